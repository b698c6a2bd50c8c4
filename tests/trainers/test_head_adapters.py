"""Adapters at the LM head: what is trained there takes part as in a plain call of the model, or it is refused.

Log-probs are made of hidden states and the head's weight; the module itself is never called. The twin of every
comparison calls the model, one sequence at a time, for all of its logits.
"""

import dataclasses

import pytest
import torch
import transformers as T
from families import text_model
from peft import get_peft_model, inject_adapter_in_model
from slow_kit import of_tokens, slow_kl, slow_scores
from step_kit import assert_same_gradients, gradients
from trainer_kit import METHODS, TEXT_METHODS, collated, fresh, image_rows, lora, shake, text_rows, trainer_of
from transformers import BitsAndBytesConfig
from trl.trainer.utils import use_adapter

from trl_vpo.trainers.compat import keep_frozen

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HEAD = {"modules_to_save": ["lm_head"]}


def tied():
    """A text model whose head shares the weights of its embeddings, and its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = text_model()
    config = T.Qwen2Config(**{**model.config.to_dict(), "tie_word_embeddings": True})
    return T.Qwen2ForCausalLM(config), tokenizer


def with_bias():
    """A model whose head has a bias."""
    torch.manual_seed(0)
    tokenizer = text_model()[1]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = T.PhiForCausalLM(T.PhiConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    torch.nn.init.normal_(model.lm_head.bias)
    return model, tokenizer


MODELS = {"untied": fresh, "tied": tied, "bias": with_bias}


def slow(trainer, like, reference=None):
    """`like` with log-probs (and the KL to `reference`) from full logits; and those full log-probs."""
    branches = slow_scores(trainer)

    def spread(values):
        return torch.zeros(like.mask.shape).masked_scatter(like.mask, torch.cat(values))

    kl = None if reference is None else spread(slow_kl(branches, reference))
    return dataclasses.replace(like, logps=spread(of_tokens(branches)), kl=kl), branches


def compare(trainer, given=False):
    """Scores of policy and reference, loss and gradients, with what full logits give."""
    batch = collated(trainer)
    reference = trainer.reference_scores(batch) if trainer.needs_reference else None
    scores = trainer.concatenated_forward(trainer.model, batch, reference if trainer.needs_kl else None)
    slow_reference = branches = None
    if reference is not None:
        # The adapter off, or the frozen copy of a given one.
        with torch.no_grad(), keep_frozen(trainer.model), use_adapter(trainer.model, "ref" if given else None):
            slow_reference, branches = slow(trainer, reference)
        torch.testing.assert_close(reference.logps, slow_reference.logps, **CLOSE)
        assert (scores.logps - reference.logps).abs().max() > 0.05  # else comparing them would say little
    slow_policy, _ = slow(trainer, scores, branches if trainer.needs_kl else None)
    torch.testing.assert_close(scores.logps, slow_policy.logps, **CLOSE)
    if trainer.needs_kl:
        torch.testing.assert_close(scores.kl, slow_policy.kl, **CLOSE)
    pairs = (scores, reference), (slow_policy, slow_reference)
    got, want = (trainer.preference_loss(*pair, batch).losses.sum() for pair in pairs)
    torch.testing.assert_close(got, want, **CLOSE)
    got, want = gradients(trainer, got), gradients(trainer, want)
    assert_same_gradients(got, want)
    return want


def adapted_trainer(method, folder, peft_config, kind="untied", given=False, layout="auto", rows=None, name="text"):
    model, processor = MODELS[kind]() if name == "text" else fresh(name)
    options = {"processor": processor, "peft": None, "layout": layout}
    if method == "rrpo":
        options["alpha"] = 0.5  # by default the KL hardly shows in the gradients
    if given:
        model = get_peft_model(model, peft_config)
        shake(model, seed=7)
        peft_config = None
    trainer = trainer_of(method, folder, rows or text_rows(3), model=model, peft_config=peft_config, **options)
    shake(trainer.model)
    return trainer


@pytest.mark.parametrize("layout", ["separate", "shared"])
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_copy_of_the_head(method, layout, images, tmp_path):
    """`modules_to_save`: under every method, in both layouts; the reference has the base's head."""
    rows, name = image_rows(images, 3), "Qwen2-VL"
    if method not in TEXT_METHODS:
        longer = method == "lpoi"  # mDPO's lists have two images
        rows = [{**row, "image_list": images[: 2 + i % 2 * longer], "images": None} for i, row in enumerate(rows)]
    trainer = adapted_trainer(method, tmp_path, lora(**HEAD), layout=layout, rows=rows, name=name)
    grads = compare(trainer)
    (head,) = (grad for name, grad in grads.items() if "lm_head" in name)
    assert head.norm() > 0


KINDS = {  # what is adapted, in which model
    "head": ("untied", HEAD),
    "head of a tied model": ("tied", HEAD),
    "head with a bias": ("bias", {**HEAD, "target_modules": ["q_proj"]}),
    "embeddings of a tied model": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "embeddings and head, tied": (
        "tied",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "low-rank embeddings": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "all linear layers but the head": ("untied", {"target_modules": "all-linear"}),
    "single tokens": ("untied", {"trainable_token_indices": [40, 60, 300]}),
    "single tokens of a tied model": ("tied", {"trainable_token_indices": [40, 60, 300]}),
}


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_else_is_trained_near_the_head(kind, given, tmp_path):
    """Under RRPO, which also needs the heads for its KL. A given adapter is compared with its frozen copy."""
    model, options = KINDS[kind]
    layout = "separate" if model == "bias" else "shared"
    trainer = adapted_trainer("rrpo", tmp_path, lora(text=True, **options), model, given, layout)
    compare(trainer, given)


REFUSED = {
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "dropout": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.1},
    "parameter": {"target_parameters": ["lm_head.weight"]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_low_rank_layers_on_the_head(kind, tmp_path):
    """New, given, as an adapter of transformers' own, and on the reference: said before a step."""
    config = lora(text=True, **REFUSED[kind])
    with pytest.raises(ValueError, match="lm_head"):
        adapted_trainer("dpo", tmp_path, config)
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]"):
        adapted_trainer("dpo", tmp_path, config, given=True)
    model, tokenizer = fresh()
    inject_adapter_in_model(config, model)  # as `model.add_adapter` of transformers does
    with pytest.raises(ValueError, match="trl-vpo merge"):
        trainer_of("leanpo", tmp_path, model=model, processor=tokenizer, peft=None)
    with pytest.raises(ValueError, match="an adapter on the LM head"):
        trainer_of("rrpo", tmp_path, ref_model=get_peft_model(fresh()[0], config))


def test_low_rank_embeddings_tied_to_the_head(tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    for given in (False, True):
        with pytest.raises(ValueError, match="lm_head"):
            adapted_trainer("dpo", tmp_path, lora(text=True, **options), "tied", given)


def test_a_quantized_head(tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {**fresh()[0].config.to_dict(), "hidden_size": 64, "intermediate_size": 128}
    T.Qwen2ForCausalLM(T.Qwen2Config(**sizes)).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    with pytest.raises(ValueError, match="llm_int8_skip_modules"):
        trainer_of("dpo", tmp_path, model=model, processor=fresh()[1], peft=None, peft_config=lora(text=True))


CHANGING = {"bias": {"bias": "all"}, "biases": {"bias": "lora_only"}, "pissa": {"init_lora_weights": "pissa"}}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_reference_that_would_not_be_the_base(kind, tmp_path):
    """With the adapter off, trained biases stay trained, and PiSSA leaves the base without its largest parts."""
    config = lora(text=True, **CHANGING[kind])
    for method in ("dpo", "rrpo"):
        with pytest.raises(ValueError, match=r"does not give the reference.*`ref_model`"):
            adapted_trainer(method, tmp_path, config)
    trainer_of("dpo", tmp_path, peft=None, peft_config=config, ref_model=fresh()[0])
    trainer_of("leanpo", tmp_path, peft=None, peft_config=config)
    for method in ("dpo", "leanpo"):  # DPOTrainer's copy of a given adapter would change the base again
        with pytest.raises(ValueError, match="trl-vpo merge"):
            adapted_trainer(method, tmp_path, config, given=True)
