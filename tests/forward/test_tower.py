"""Towers that attend within windows, frames or images: one call of the attention a layer gives what many gave."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import QWEN_TOWER, build
from step_kit import assert_same_gradients
from transformers import AutoModel, Exaone4_5_VisionConfig, Glm4vVisionConfig
from transformers.models.exaone4_5.modeling_exaone4_5 import Exaone4_5_VisionModel
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni, modeling_qwen2_5_omni

from trl_vpo.forward import attention
from trl_vpo.forward.tower import parts_of, use_whole_towers

WINDOWS = {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
OTHERS = {  # families that are not among the tiny models, by their towers alone
    "GLM-4V": lambda: AutoModel.from_config(Glm4vVisionConfig(**QWEN_TOWER, image_size=56)),
    "Exaone 4.5": lambda: Exaone4_5_VisionModel(
        Exaone4_5_VisionConfig(**QWEN_TOWER, **WINDOWS, num_key_value_heads=1)
    ),
    "Qwen2.5-Omni": lambda: modeling_qwen2_5_omni.Qwen2_5OmniVisionEncoder(
        configuration_qwen2_5_omni.Qwen2_5OmniVisionEncoderConfig(**QWEN_TOWER, **WINDOWS)
    ),
}
# Calls of SDPA for two layers: one for each length of frames, or of windows (16, 8 and 4 patches).
CALLS = {"Qwen2-VL": 4, "Qwen2.5-VL": 5, "Qwen3-VL": 4, "GLM-4V": 4, "Exaone 4.5": 5, "Qwen2.5-Omni": 5}
GRID = torch.tensor([[3, 10, 6], [1, 6, 4], [2, 10, 6]])  # two videos around an image
FRAMES = torch.tensor([[1, 10, 6]] * 3 + [[1, 6, 4]] + [[1, 10, 6]] * 2)  # as GLM-4V's are given


def tower_of(name):
    torch.manual_seed(0)
    return OTHERS[name]() if name in OTHERS else build(name)[0].model.visual


def run(tower, monkeypatch, autocast=False):
    """Features, gradients, and the number of calls of SDPA in the forward pass."""
    calls, plain, patches = [], F.scaled_dot_product_attention, 3 * 2 * tower.config.patch_size**2
    grid = FRAMES if "Glm4v" in type(tower).__name__ else GRID
    pixels = torch.rand(int(grid.prod(-1).sum()), patches, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or plain(*args, **kw))
        features = tower(pixels, grid_thw=grid).pooler_output
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}, len(calls)


def assert_same(tower, monkeypatch, calls, **more):
    whole = copy.deepcopy(tower)
    use_whole_towers(whole)
    want, got = run(tower, monkeypatch, **more), run(whole, monkeypatch, **more)
    assert got[2] == calls <= want[2]
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(got[1], want[1])
    return want[2]


@pytest.mark.parametrize("recomputed", [None, True, False])
@pytest.mark.parametrize("name", CALLS)
def test_one_call_gives_what_many_gave(name, recomputed, monkeypatch):
    tower = tower_of(name).train()
    if recomputed is not None:
        tower.gradient_checkpointing_enable({"use_reentrant": recomputed})
    assert assert_same(tower, monkeypatch, CALLS[name]) > CALLS[name]


def test_one_call_under_autocast(monkeypatch):
    assert_same(tower_of("Qwen2.5-VL"), monkeypatch, CALLS["Qwen2.5-VL"], autocast=True)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Exaone 4.5"])
def test_the_variable_length_kernel_gets_the_windows(name, monkeypatch):
    """No GPU is here: a loop in the place of torch's kernel says whether it is asked for the right thing."""
    asked = []

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale):
        assert cu_q is not cu_k and torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
        lengths = cu_q.diff().tolist()
        assert max_q == max_k == max(lengths) and query.shape == key.shape == value.shape
        asked.append(1)
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)))
        return torch.cat([F.scaled_dot_product_attention(*x, scale=scale) for x in parts], dim=1).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_grouped_heads", attention._grouped_heads.__wrapped__)
    monkeypatch.setattr(attention, "varlen_takes", lambda *_: True)
    tower = tower_of(name)
    windows = run(copy.deepcopy(tower), monkeypatch)[2]
    assert assert_same(tower, monkeypatch, windows) == windows and len(asked) == 2


def test_eager_attention_is_left_alone(monkeypatch):
    tower = tower_of("Qwen2.5-VL")
    tower.set_attn_implementation("eager")
    assert_same(tower, monkeypatch, 0)


def test_parts_are_sorted_only_where_it_helps():
    parts = parts_of(torch.tensor([0, 3, 6, 7, 8]))
    assert (parts.runs, parts.longest, parts.order) == ([(2, 3), (2, 1)], 3, None)
    parts = parts_of(torch.tensor([0, 2, 3, 5]))
    assert parts.runs == [(1, 1), (2, 2)] and parts.order.tolist() == [2, 0, 1, 3, 4]
