"""The LM head as the model itself applies it, and what scoring leaves as it was."""

import copy

import families
import pytest
import torch
import transformers as T
from families_llama import needs_llama4
from trainer_kit import trainer_of

from trl_vpo.errors import ModelError
from trl_vpo.forward.head import lm_head
from trl_vpo.forward.scorer import Scorer
from trl_vpo.forward.scoring import ScoreRequest, attach_scoring
from trl_vpo.models.adapters import preset_targets

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
ALL_HEADS = {**TINY, "num_key_value_heads": 4}
TEXT_OF = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
SIGLIP = families.tower("siglip_vision_model", vision_use_head=False)


def visual(name, text_type, **text):
    """A vision-language model over a text model with special fields in its config."""
    config = getattr(T, f"{name}Config")(
        text_config={"model_type": text_type, **TINY, **TEXT_OF, **text}, vision_config=SIGLIP
    )
    return getattr(T, f"{name}ForConditionalGeneration")(config)


SPECIAL_HEADS = {  # models that do more than one matrix product between hidden states and logits, or only seem to
    "softcap": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=0.2)),
    "logit_scale": lambda: T.CohereForCausalLM(T.CohereConfig(**TINY, logit_scale=0.25)),
    "logits_scaling": lambda: T.GraniteForCausalLM(T.GraniteConfig(**TINY, logits_scaling=4.0)),
    "multiplied": lambda: T.HyperCLOVAXForCausalLM(T.HyperCLOVAXConfig(**TINY, logits_scaling=0.25)),
    "head multiplier": lambda: T.FalconH1ForCausalLM(T.FalconH1Config(**TINY, lm_head_multiplier=0.25)),
    "fewer dimensions": lambda: T.MiniCPM3ForCausalLM(T.MiniCPM3Config(**ALL_HEADS, dim_model_base=8)),
    "ignored scale": lambda: visual("AyaVision", "cohere2", logit_scale=0.25),
    "ignored scale, too": lambda: visual("Cohere2Vision", "cohere2", logit_scale=0.25),
    "ignored softcap": lambda: visual("Gemma3", "gemma3_text", final_logit_softcapping=0.2),
    "bias": lambda: T.PhiForCausalLM(T.PhiConfig(**TINY)),
    "plain": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TINY)),
    "tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TINY, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("kind", SPECIAL_HEADS)
def test_the_head_gives_the_models_own_logits(kind):
    """Scaling, soft cap and bias as the model itself applies them, whatever the fields of its config."""
    torch.manual_seed(0)
    model = SPECIAL_HEADS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        ids = torch.randint(0, 97, (2, 9))
        out = model(ids, output_hidden_states=True)
        hidden = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(lm_head(model).logits(hidden), out.logits, rtol=1e-5, atol=1e-5)
        head = lm_head(model)
        assert {"softcap": head.softcap, "bias": head.bias}.get(kind, 1) is not None
        quartered = ("logit_scale", "logits_scaling", "multiplied", "head multiplier", "fewer dimensions")
        assert (head.scale, head.softcap) == (0.25 if kind in quartered else 1.0, 0.2 if kind == "softcap" else None)
        attach_scoring(model)
        positions = torch.arange(8).expand(2, -1)
        scores = model(ids, score=ScoreRequest(torch.arange(2), positions, torch.ones(2, 8).bool(), ids[:, 1:]))
        want = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(scores.logps, want, rtol=1e-5, atol=1e-5)


def test_a_head_of_a_language_model_inside():
    """Llama 4 has no backbone: it holds a whole language model, and hands on its logits."""
    needs_llama4()
    torch.manual_seed(0)
    text = {**TINY, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [1]}
    text |= {"layer_types": ["full_attention"] * 2, "pad_token_id": 0}
    tower = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 56, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24}
    model = T.Llama4ForConditionalGeneration(T.Llama4Config(text_config=text, vision_config=tower)).eval()
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn_like(p))
        want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        attach_scoring(model)
        positions = torch.arange(8).expand(2, -1)
        scores = model(ids, score=ScoreRequest(torch.arange(2), positions, torch.ones(2, 8).bool(), ids[:, 1:]))
        torch.testing.assert_close(scores.logps, want, rtol=1e-5, atol=1e-5)
        assert model(ids).logits.shape == (2, 9, 97)  # other calls compute the head

    class Doubled(T.Llama4ForConditionalGeneration):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    with pytest.raises(ModelError, match="Doubled changes the logits of its language model"):
        attach_scoring(Doubled(model.config))


def test_a_head_that_is_not_known_is_refused():
    """Chameleon gives no text tokens of its pictures: that is no factor and no cap."""

    class Odd(T.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[..., 3] = -1e9
            return out

    class Squared(T.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * out.logits.abs()
            return out

    with pytest.raises(ValueError, match=r"Odd computes its logits .* some tokens"):
        attach_scoring(Odd(T.LlamaConfig(**TINY)))
    with pytest.raises(ValueError, match=r"Squared computes its logits .* became"):
        attach_scoring(Squared(T.LlamaConfig(**TINY)))


def test_a_copy_of_a_scoring_model_uses_its_own_weights():
    """In every kind of call: a reference is a deep copy of a model that may have been trained, and patched, before."""
    torch.manual_seed(0)
    model, ids = SPECIAL_HEADS["plain"]().eval(), torch.randint(0, 97, (1, 5))
    want, answer = model(ids, labels=ids), model.generate(ids, max_new_tokens=4, do_sample=False)
    attach_scoring(model)
    attach_scoring(model)  # a second trainer on the same model
    request = ScoreRequest(torch.arange(1), torch.arange(4)[None], torch.ones(1, 4).bool(), ids[:, 1:])
    logps = model(ids, score=request).logps
    twin = copy.deepcopy(model)
    third = copy.deepcopy(twin)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert not torch.allclose(model(ids).logits, want.logits)
    for copied in (twin, third):
        assert torch.equal(copied(ids, score=request).logps, logps)
        plain = copied(ids, labels=ids)
        assert torch.equal(plain.logits, want.logits) and torch.equal(plain.loss, want.loss)
        assert torch.equal(copied.generate(ids, max_new_tokens=4, do_sample=False), answer)
    twin(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in twin.parameters()) and all(p.grad is None for p in model.parameters())


def test_rows_without_tokens_score_zero_and_stay_connected():
    model = SPECIAL_HEADS["plain"]()
    attach_scoring(model)
    ids, mask = torch.randint(0, 97, (2, 5)), torch.zeros(2, 3).bool()
    nothing = torch.zeros(2, 3).long()
    reference = {"ref_hidden": torch.zeros(0, 32), "ref_head": lm_head(model), "kl_rows": torch.tensor([True, False])}
    request = ScoreRequest(torch.arange(2), nothing, mask, nothing, **reference)
    out = model(ids, score=request)
    assert out.logps.abs().sum() == 0 and out.kl.shape == (2, 3)
    (out.logps.sum() + out.kl.sum()).backward()


def test_a_head_that_is_called_decoder_is_refused(tmp_path):
    """With the layers of the model in its place, LoRA would adapt the head and rows be packed for it."""
    sizes = {"vocab_size": 360, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = T.ModernBertDecoderConfig(**sizes, num_attention_heads=1, pad_token_id=0, cls_token_id=1)
    model = T.ModernBertDecoderForCausalLM(config)
    refused = "ModernBertDecoderForCausalLM is not supported: its `get_decoder` gives its LM head"
    with pytest.raises(ModelError, match=refused):
        Scorer(model, layout="auto", pad_token_id=0)
    with pytest.raises(ModelError, match=refused):
        trainer_of("dpo", tmp_path, model=model, processor=families.tokenizer())
    with pytest.raises(ModelError, match=refused):
        preset_targets(model, "language")
