"""Packed rows against branches alone and padded rows, their attention against a dense mask, and when they are refused.

The slow twin of all layouts is the model's own forward pass over one branch at a time, with full logits.
"""

import functools
import logging

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

from trl_vpo.forward import attention
from trl_vpo.forward.attention import Segments, segment_attention, use_segments


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


def alone(model, batch):
    """(S, T) log-probs: every branch in a call of its own behind its prompt, nothing padded, full logits."""
    out = torch.zeros(batch["branch_mask"].shape)
    for s, t in enumerate(batch["branch_trunk"].tolist()):
        prompt, response = batch["trunk_mask"][t], batch["branch_mask"][s]
        n = int(response.sum())
        ids = torch.cat([batch["trunk_ids"][t][prompt], batch["branch_ids"][s][response]]).unsqueeze(0)
        types = {k: F.pad(v[t][prompt], (0, n)).unsqueeze(0) for k, v in batch["trunk_types"].items()}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **batch["media"][t]).logits
        logps = logits[0, -n - 1 : -1].float().log_softmax(-1).gather(1, ids[0, -n:].unsqueeze(1)).squeeze(1)
        out = out.index_put((torch.tensor(s), torch.arange(n)), logps)
    return out


def gradient(trainer, logps):
    """Of a loss that weighs every token differently."""
    trainer.model.zero_grad()
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    (logps * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def assert_branches_alone(trainer, shared=True):
    """Shared and separate, packed and padded, give the log-probs and gradients of branches alone."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    want = alone(trainer.model, batch)
    grads = gradient(trainer, want)
    for layout, packs in [*([("shared", True)] if shared else []), ("separate", True), ("separate", False)]:
        trainer.scorer.layout, trainer.scorer.packs = layout, packs
        use_segments(trainer.model.get_base_model())
        got = trainer.concatenated_forward(trainer.model, batch).logps
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=f"{layout}, packed: {packs}")
        assert (gradient(trainer, got) - grads).norm() <= 1e-5 * grads.norm(), (layout, packs)


TOWER = ("Qwen2.5-VL", "image", "all-linear")


@pytest.mark.parametrize(("name", "kind", "target"), [(*k, LANGUAGE_MODEL) for k in KINDS] + [TOWER])
def test_layouts_are_branches_alone(name, kind, target, media, tmp_path):
    """Images or clips of unlike sizes and lengths, beside a row of text."""
    assert_branches_alone(trainer_of("dpo", "auto", tmp_path, ragged_rows(kind, media), name, target))


WINDOWS = {
    "Idefics2": {},
    "OLMo-3": {},
    "Cohere2": {},
    "Qwen2-MoE": {"use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_sliding_windows_shorter_than_the_prompt(name, tmp_path):
    """Qwen2-MoE has its window in the masks only, and in one of its two layers."""
    built = build(name) if name in FAMILIES else text_standin(name, sliding_window=5, **WINDOWS[name])
    built[0].config.get_text_config().sliding_window = 5
    data = [row(None, (), "a square.", "two circles are in the picture."), row(None, (), "left.", "right.")]
    more = {"target": "all-linear", "built": built}
    assert_branches_alone(trainer_of("dpo", "auto", tmp_path, data, **more))


@pytest.mark.parametrize(("name", "kind", "target"), [(*k, LANGUAGE_MODEL) for k in KINDS] + [TOWER])
def test_both_layouts_give_the_same_step(name, kind, target, media, tmp_path):
    """With adapters in the tower, its features differ between policy and reference: they must not be reused."""
    data = ragged_rows(kind, media)
    want = step(trainer_of("rrpo", "separate", tmp_path, data, name, target))
    assert_same_step(step(trainer_of("rrpo", "shared", tmp_path, data, name, target)), want)


SPANS = [(0, 7, 0, 0), (7, 11, 0, 4), (11, 17, 11, 11), (17, 20, 11, 13), (20, 23, 20, 20), (23, 25, 20, 20)]


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("queries", [256, 3, 1])
def test_segments_are_attention_under_a_dense_mask(queries, window, monkeypatch):
    """Trunks of 5, 3 and 1 tokens (the last of each is in the branches); grouped heads; values of another size."""
    monkeypatch.setattr("trl_vpo.forward.attention.QUERIES", queries)
    segments, length = Segments.of(SPANS), 25
    dense = torch.zeros(length, length, dtype=torch.bool)
    for begin, end, prefix_begin, prefix_end in SPANS:
        keys = [*range(prefix_begin, prefix_end), *range(begin, end)]
        for q in range(begin, end):
            seen = keys[: keys.index(q) + 1]
            dense[q, seen[-window:] if window else seen] = True
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, length, 8, requires_grad=True), torch.randn(1, 2, length, 8, requires_grad=True)
    value = torch.randn(1, 2, length, 6, requires_grad=True)
    repeated = [states.repeat_interleave(2, 1) for states in (key, value)]
    want = F.scaled_dot_product_attention(query, *repeated, dense).transpose(1, 2)
    got = segment_attention(torch.nn.Module(), query, key, value, segments, sliding_window=window)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def varlen_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """(L, H, D), (K, H, D) twice -> (L, H, D); windows are aligned at the bottom right, as in FlashAttention."""
    assert cu_seq_q is not cu_seq_k and window_size[1] == 0 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    parts = []
    for q, k, v in zip(
        *(x.tensor_split(c[1:-1].tolist()) for x, c in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k)))
    ):
        place = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
        seen = torch.arange(len(k)) <= place
        if window_size[0] >= 0:
            seen &= torch.arange(len(k)) >= place - window_size[0]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def varlen_of_torch_2_12(query, key, value, *args, enable_gqa=False, **kwargs):
    assert enable_gqa and key.size(1) < query.size(1)
    repeated = (x.repeat_interleave(query.size(1) // key.size(1), 1) for x in (key, value))
    return varlen_of_torch_2_11(query, *repeated, *args, **kwargs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernel", [varlen_of_torch_2_11, varlen_of_torch_2_12])
def test_the_variable_length_call(kernel, window, monkeypatch):
    """What CUDA would be given; here plain functions with the kernel's signatures stand in for it."""
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_grouped_heads", attention._grouped_heads.__wrapped__)
    segments = Segments.of(SPANS)
    torch.manual_seed(0)
    sizes = {"dtype": torch.float64, "requires_grad": True}
    query, key, value = (torch.randn(1, heads, 25, 8, **sizes) for heads in (4, 2, 2))
    got = attention._varlen(torch.nn.Module(), query, key, value, segments, 0.5, window)
    want = attention._sdpa(query, key, value, segments, 0.5, 0.0, window)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (got, want)]
    torch.testing.assert_close(*grads)


def test_a_packed_row_has_no_padding_and_no_mask(media, tmp_path):
    data = ragged_rows("video", media)
    trainer = trainer_of("dpo", "shared", tmp_path, data, "LLaVA-OneVision")
    batch, calls = trainer.data_collator(data), []
    trainer.model.register_forward_pre_hook(lambda model, args, kwargs: calls.append(kwargs), with_kwargs=True)
    trainer.concatenated_forward(trainer.model, batch)
    (call,) = calls
    prompts, responses = (int(batch[f"{part}_mask"].sum()) for part in ("trunk", "branch"))
    assert call["input_ids"].shape == (1, prompts - 3 + responses + 6) and not call["attention_mask"].numel()
    assert len(call["score"].segments.spans) == 6 and call["score"].segments.cu_q[-1] == call["input_ids"].numel()


def test_other_calls_of_the_model_run_as_before(media):
    model, processor = build("LLaVA-1.5")
    inputs = processor(text=["a red square"], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        use_segments(model)
        use_segments(model)  # twice is once
        after = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
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


@pytest.mark.parametrize("layout", ["auto", "separate"])
def test_packing_proves_itself_or_pads(layout, media, tmp_path, monkeypatch, caplog):
    """An attention that lets tokens see what comes after them: the first batch shows it."""
    attend = F.scaled_dot_product_attention
    broken = lambda *args, is_causal=False, **more: attend(*args, **more)  # noqa: E731
    trainer = trainer_of("dpo", layout, tmp_path, ragged_rows("image", media), proves=True)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr("trl_vpo.forward.attention.F", type("F", (), {"scaled_dot_product_attention": broken}))
        got = step(trainer)
    assert (trainer.scorer.layout, trainer.scorer.packs) == ("separate", False)
    assert (
        "Qwen2_5_VLForConditionalGeneration is trained with padded rows and the separate layout, because its log-probs"
        in caplog.text
    )
    assert_same_step(got, step(trainer_of("dpo", "separate", tmp_path, ragged_rows("image", media))))


PADDED = {"LFM2": "pass a state along", "Gemma 3": "both directions", "GPT-OSS": "attention sinks"}


@pytest.mark.parametrize("name", PADDED)
def test_kinds_that_are_padded(name, tmp_path, caplog):
    """GPT-OSS is tried: its attention sinks need FlashAttention."""
    build_model = VISION_MODELS.get(name) or functools.partial(text_standin, name)
    data = [row(None), row(None, "a square.", "two circles.")]
    more = {"target": r".*(q|k|v)_proj"}
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of("dpo", "auto", tmp_path, data, **more, built=build_model())
        assert torch.isfinite(step(trainer)[1])
    assert (trainer.scorer.layout, trainer.scorer.packs) == ("separate", False) and PADDED[name] in caplog.text
    with pytest.raises(ValueError, match=PADDED[name]):
        step(trainer_of("dpo", "shared", tmp_path, data, **more, built=build_model()))


def towers(trainer):
    """Count the runs of the vision tower in one step."""
    calls = []
    backbone = trainer.model.get_base_model().base_model
    tower = next(m for n, m in backbone.named_children() if n in ("visual", "vision_tower", "vision_model"))
    tower.register_forward_hook(lambda *_: calls.append(1))
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch)
    return len(calls)


@pytest.mark.parametrize(("name", "kind", "target"), [(*k, LANGUAGE_MODEL) for k in KINDS] + [TOWER])
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
    assert_same_step(step(trainer), want)
