"""Whatever attention a user names, the default layout trains, and all other calls run on it under its own name."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from step_kit import assert_same_gradients, gradients
from trainer_kit import collated, fresh, image_rows, shake, text_rows, trainer_of
from transformers import TrainerCallback
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

from trl_vpo.forward.attention import ALL_ATTENTION_FUNCTIONS

NAMES = ["sdpa", "eager", "flash_attention_2", "flash_attention_3", "kernels-community/some-attention"]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    """(B, L, H, D), aligned at the bottom right as FlashAttention does."""
    flash_attn_func.calls += 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2)) if causal else None
    out = F.scaled_dot_product_attention(q, k, v, seen, dropout_p, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0,
    softmax_scale=None, causal=False, **kwargs,
):  # fmt: skip
    cuts = ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    parts = zip(*(states[None].tensor_split(at[1:-1].tolist(), dim=1) for states, at in cuts))
    return torch.cat([flash_attn_func(*part, dropout_p, softmax_scale, causal)[0] for part in parts])


@pytest.fixture
def attention(request, monkeypatch):
    """A name of an attention; where that is FlashAttention, with a package that computes it on the CPU."""
    name, flash_attn_func.calls = request.param, 0
    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = _pad_input, _unpad_input
    utils = "transformers.modeling_flash_attention_utils"
    monkeypatch.setattr(f"{utils}._loaded_implementation", None)
    for version, module in ((2, "flash_attn"), (3, "flash_attn_interface")):
        monkeypatch.setitem(sys.modules, module, package)
        monkeypatch.setattr(f"{utils}.is_flash_attn_{version}_available", lambda *_, **__: True)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    if "/" in name:
        kernel = lambda *_: package  # noqa: E731
        monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", kernel)
        flash = ALL_ATTENTION_FUNCTIONS._global_mapping["flash_attention_2"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash)
        masks = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
        monkeypatch.setitem(masks, name, masks["flash_attention_2"])
    yield name
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop(name, None)


class Answer(TrainerCallback):
    """Generates in the midst of training."""

    def on_step_end(self, args, state, control, model, processing_class, **_):
        inputs = processing_class(text=["a red", "a"], padding=True, return_tensors="pt")
        model.eval()
        self.answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("attention", NAMES, indirect=True)
def test_it_trains_evaluates_and_generates(attention, images, tmp_path):
    """The numbers and the answers are those of SDPA in the separate layout."""
    runs = []
    for name, layout in (("sdpa", "separate"), (attention, "auto")):
        model, processor = fresh("Qwen2-VL")
        model.config._attn_implementation = name
        generating = Answer()
        more = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Dataset.from_list(image_rows(images, 2))}
        trainer = trainer_of("dpo", tmp_path / name, image_rows(images), name="Qwen2-VL", model=model, layout=layout,
                             processor=processor, callbacks=[generating], **more)  # fmt: skip
        shake(trainer.model)
        trainer.train()
        runs.append(([{**e} for e in trainer.state.log_history], generating.answer))
    assert trainer.scorer.layout == "shared"
    assert {c._attn_implementation for c in (model.config, model.config.get_text_config())} == {attention}
    assert (flash_attn_func.calls > 0) == (attention not in ("sdpa", "eager"))
    (want, first), (got, second) = runs
    assert torch.equal(first, second)
    for a, b in zip(got, want):
        for key in ("loss", "grad_norm", "eval_loss", "rewards/margins", "eval_logps/chosen"):
            assert a.get(key) == (pytest.approx(b[key], rel=2e-4) if key in b else None), key


def test_flex_attention_keeps_its_name(tmp_path):
    """A shared call does not need it, so it trains where flex attention itself has no backward pass."""
    model, tokenizer = fresh()
    trainer = trainer_of("leanpo", tmp_path, text_rows(4), model=model, processor=tokenizer, layout="shared")
    batch = collated(trainer)
    want = trainer.compute_loss(trainer.model, batch).item()
    model, tokenizer = fresh()
    model.config._attn_implementation = "flex_attention"
    trainer = trainer_of("leanpo", tmp_path, text_rows(4), model=model, processor=tokenizer, layout="shared")
    try:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert loss.item() == pytest.approx(want, rel=1e-5) and model.config._attn_implementation == "flex_attention"
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("flex_attention", None)


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("attention", NAMES[:3], indirect=True)
def test_a_prompt_of_one_token(attention, longer, tmp_path):
    """Then the mask of the shared layout is as square as any other, alone and beside a longer prompt."""
    rows = [{"prompt": "a", "chosen": " red square.", "rejected": " blue."}]
    rows += [{"prompt": "a red circle moves", "chosen": " left.", "rejected": " right."}] if longer else []
    steps = []
    for layout in ("separate", "shared"):
        model, tokenizer = fresh()
        tokenizer.chat_template = None
        model.config._attn_implementation = attention
        trainer = trainer_of("dpo", tmp_path, rows, model=model, processor=tokenizer, layout=layout)
        shake(trainer.model)
        batch = collated(trainer)
        assert batch["trunk_mask"].sum(-1).min() == 1
        scores = trainer.concatenated_forward(trainer.model, batch)
        steps.append((scores.logps.detach(), gradients(trainer, scores.sums.sum())))
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=1e-5, atol=1e-5)
    assert_same_gradients(steps[1][1], steps[0][1])


def test_a_prompt_without_a_token_is_refused(tmp_path):
    """The prompt's only letter is in the first token of both responses; nothing would be left to predict that."""
    model, tokenizer = fresh()
    tokenizer.chat_template = None
    rows = [{"prompt": "b", "chosen": "lue circle.", "rejected": "lue."}]
    with pytest.raises(ValueError, match=r"row 0: the prompt has no token of its own"):
        collated(trainer_of("dpo", tmp_path, rows, model=model, processor=tokenizer))
