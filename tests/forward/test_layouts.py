"""The shared layout against the separate one, its attention against a dense mask, and when "auto" refuses it."""

import functools
import logging
import re

import pytest
import torch
import torch.nn.functional as F
import trainer_kit
from families import FAMILIES, KINDS, LANGUAGE_MODEL, build
from helpers import row
from peft import LoraConfig, prepare_model_for_kbit_training
from trainer_kit import draw_lora
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from trl_standins import text_standin
from vlm_standins import VISION_MODELS

import trl_vpo
from trl_vpo.forward import layouts
from trl_vpo.forward.attention import tree_attention, use_tree_attention
from trl_vpo.forward.layouts import PADDING, TRUNK, shared


def ragged_rows(kind, media, box=False):
    more = {"critical_box": [4, 8, 30, 40]} if box else {}
    second = row(kind, [media[kind][1]], "a square.", "two circles are in the picture.", **more)
    return [row(kind, [media[kind][0]], **more), second, *([] if box else [row(None)])]


def trainer_of(method, layout, folder, data, name="Qwen2.5-VL", target=LANGUAGE_MODEL, built=None, **more):
    """A trainer whose adapter is not the identity; the same seed gives the same weights."""
    model, processor = built or build(name)
    more = {"num_frames": 6, "peft": None, "peft_config": LoraConfig(r=4, target_modules=target), **more}
    trainer = trainer_kit.trainer_of(method, folder, data, model=model, processor=processor, layout=layout, **more)
    draw_lora(trainer.model, std=0.05)
    trainer.model.train()
    return trainer


def step(trainer):
    """Per-token log-probs, loss and gradients of one step."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss, scores = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return scores.logps.detach(), loss.detach(), grads


def assert_same_step(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert got[2].shape == want[2].shape and (got[2] - want[2]).norm() <= 1e-5 * want[2].norm()


TOWER = ("Qwen2.5-VL", "image", "all-linear")


SHARING = [kind for kind in KINDS if kind[0] != "Idefics2"]  # Mistral: a sliding window


@pytest.mark.parametrize(("name", "kind", "target"), [(*k, LANGUAGE_MODEL) for k in SHARING] + [TOWER])
def test_both_layouts_give_the_same_step(name, kind, target, media, tmp_path):
    """With adapters in the tower, its features differ between policy and reference: they must not be reused."""
    data = ragged_rows(kind, media)
    want = step(trainer_of("rrpo", "separate", tmp_path, data, name, target))
    assert_same_step(step(trainer_of("rrpo", "shared", tmp_path, data, name, target)), want)


@pytest.mark.parametrize("queries", [256, 7, 3, 1])
def test_tree_attention_is_attention_under_a_dense_mask(queries, monkeypatch):
    """Two rows, trunks of 5 and 3 tokens, branches of 2 and 3 and of 4 tokens; grouped heads; so many queries a call,
    which leave some over or do not."""
    monkeypatch.setattr("trl_vpo.forward.attention.QUERIES", queries)
    owner = torch.tensor([[TRUNK] * 5 + [0] * 2 + [1] * 3, [TRUNK] * 3 + [2] * 4 + [PADDING] * 3])
    length = owner.size(1)
    dense = torch.zeros(2, length, length, dtype=torch.bool)
    for r in range(2):
        for q in range(length):
            for k in range(q + 1):
                dense[r, q, k] = owner[r, k] == TRUNK or owner[r, k] == owner[r, q]
    torch.manual_seed(0)
    query = torch.randn(2, 4, length, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 2, length, 8).unbind(0)
    key.requires_grad_(), value.requires_grad_()
    mask = layouts._tree_mask(owner, 3)
    assert mask.shape == (2, 1, length - 3, length) and torch.equal(mask[:, 0], dense[:, 3:])
    want = F.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), dense[:, None]
    )
    got = tree_attention(query, key, value, mask)
    torch.testing.assert_close(got, want.transpose(1, 2))
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (got, want.transpose(1, 2))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_rows_of_unlike_length_get_calls_of_their_own(media, monkeypatch):
    model, processor = build("Qwen2-VL")
    batch = trl_vpo.PreferenceCollator(processor)([row(None), row("image", [media["image"][1]]), row(None)])
    assert len(shared(batch, model.base_model, pad_token_id=0)) == 1
    monkeypatch.setattr(layouts, "CALL_TOKENS", 1)
    calls = shared(batch, model.base_model, pad_token_id=0)
    assert [call.branches.tolist() for call in calls] == [[2, 3], [0, 1, 4, 5]]


@pytest.mark.parametrize("lengths", [[472, 375, 375, 375, 375], [6000, 30, 5990, 40], [500, 490, 480], [10]])
def test_the_split_into_calls_computes_least(lengths):
    """Against all ways to cut the rows, sorted by length, into runs."""

    def cost(groups):
        return sum(max(lengths[t] for t in group) * len(group) + layouts.CALL_TOKENS for group in groups)

    order = sorted(range(len(lengths)), key=lambda t: -lengths[t])
    cuts = [[c for c in range(1, len(order)) if bits >> (c - 1) & 1] for bits in range(2 ** (len(order) - 1))]
    runs = [[order[a:b] for a, b in zip([0, *cut], [*cut, len(order)])] for cut in cuts]
    groups = layouts._calls(list(range(len(lengths))), lengths)
    assert sorted(t for group in groups for t in group) == list(range(len(lengths)))
    assert cost(groups) == min(map(cost, runs))


def test_other_calls_of_the_model_run_as_before(media):
    model, processor = build("LLaVA-1.5")
    inputs = processor(text=["a red square"], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        use_tree_attention(model)
        use_tree_attention(model)  # twice is once
        after = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "Idefics2"])
def test_auto_shares_where_it_can(name, media, tmp_path):
    trainer = trainer_of("dpo", "auto", tmp_path, ragged_rows("image", media), name)
    assert trainer.scorer.layout == "auto"
    step(trainer)
    assert trainer.scorer.layout == "shared"


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
@pytest.mark.parametrize("name", ["Qwen2.5-VL", "LLaVA-1.5"])
def test_auto_shares_in_bfloat16_autocast(name, method, media, tmp_path):
    """The layouts are compared in the precision of training, and by what that allows."""
    trainer = trainer_of(method, "auto", tmp_path, ragged_rows("image", media), name, bf16=True, max_steps=1)
    trainer.train()
    assert trainer.scorer.layout == "shared"


def test_auto_proves_itself_and_falls_back_with_the_difference(media, tmp_path, monkeypatch, caplog):
    """An attention that lets branches see their siblings: the first batch shows it."""
    whole = layouts._tree_mask
    monkeypatch.setattr(layouts, "_tree_mask", lambda owner, trunk: whole(torch.full_like(owner, TRUNK), trunk))
    trainer = trainer_of("dpo", "auto", tmp_path, ragged_rows("image", media))
    with caplog.at_level(logging.WARNING):
        got = step(trainer)
    assert trainer.scorer.layout == "separate"
    assert "Qwen2_5_VLModel is trained with the separate layout, because its log-probs differ" in caplog.text
    assert_same_step(got, step(trainer_of("dpo", "separate", tmp_path, ragged_rows("image", media))))


SEPARATE = {  # models that cannot have the shared layout
    "Idefics2": r"sliding window \(4096 tokens\)",
    "OLMo-3": "sliding window",
    "Cohere2": "sliding window",
    "LFM2": "pass a state along",
    "Gemma 3": "both directions",
}


@pytest.mark.parametrize("name", SEPARATE)
def test_kinds_that_fall_back_without_trying(name, tmp_path, caplog):
    maker = build if name == "Idefics2" else text_standin
    build_model = VISION_MODELS.get(name) or functools.partial(maker, name)
    data = [row(None), row(None, "a square.", "two circles.")]
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of("dpo", "auto", tmp_path, data, target="all-linear", built=build_model())
    assert trainer.scorer.layout == "separate" and re.search(SEPARATE[name], caplog.text)
    with pytest.raises(ValueError, match=SEPARATE[name]):
        trainer_of("dpo", "shared", tmp_path, data, target="all-linear", built=build_model())
    assert torch.isfinite(step(trainer)[1])


def towers(trainer):
    """Count the runs of the vision tower in one step."""
    calls = []
    backbone = trainer.model.get_base_model().base_model
    tower = next(m for n, m in backbone.named_children() if n in ("visual", "vision_tower", "vision_model"))
    tower.register_forward_hook(lambda *_: calls.append(1))
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch)
    return len(calls)


@pytest.mark.parametrize(("name", "kind", "target"), [(*k, LANGUAGE_MODEL) for k in SHARING] + [TOWER])
def test_frozen_features_are_computed_once_per_step(name, kind, target, media, tmp_path):
    """An adapted tower runs in both passes."""
    trainer = trainer_of("dpo", "shared", tmp_path, [row(kind, [media[kind][0]])], name, target)
    assert towers(trainer) == (2 if target == "all-linear" else 1)


def test_lpoi_encodes_each_image_once(media, tmp_path):
    """One call of the tower with the five images of the list, for eleven responses of policy and reference."""
    data = [row("image", [media["image"][0]], critical_box=[4, 8, 30, 40])]
    trainer = trainer_of("lpoi", "shared", tmp_path, data)
    seen = []
    tower = trainer.model.get_base_model().base_model.visual
    tower.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert [len(kwargs["grid_thw"]) for kwargs in seen] == [5]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(bits, media, tmp_path):
    model, processor = build("Qwen2-VL")
    model.save_pretrained(tmp_path / "base")
    skip = ["model.visual", "lm_head"]
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skip)
    steps, data = [], ragged_rows("image", media)
    for layout in ("separate", "shared"):
        quantized = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=quantization)
        kinds = {type(m).__name__ for m in quantized.model.language_model.modules()}
        assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
        prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
        more = {"built": (quantized, processor), "gradient_checkpointing": True}
        steps.append(step(trainer_of("rrpo", layout, tmp_path / "out", data, **more)))
    # Eight-bit layers round their inputs, outliers apart, by the largest of the whole call: not exactly alike.
    tolerance = 1e-3 if bits == 4 else 5e-2
    (_, loss, grads), (_, other_loss, other_grads) = steps
    torch.testing.assert_close(loss, other_loss, rtol=tolerance, atol=tolerance)
    assert (grads - other_grads).norm() <= 2e-2 * grads.norm() * (1 if bits == 4 else 10)


def test_compiled_decoder_layers(media, tmp_path):
    data, more = ragged_rows("image", media), {"name": "Qwen2-VL", "gradient_checkpointing": True}
    want = step(trainer_of("rrpo", "separate", tmp_path, data, **more))
    trainer = trainer_of("rrpo", "shared", tmp_path, data, **more)
    for layer in trainer.model.get_base_model().model.language_model.layers:
        layer.compile(backend="aot_eager")
    got = step(trainer)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert (got[2] - want[2]).norm() <= 1e-4 * want[2].norm()
