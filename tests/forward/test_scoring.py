"""Per-token scores without full logits against the same numbers from full logits."""

import copy

import families
import numpy as np
import pytest
import torch
import transformers as T
from helpers import row
from PIL import Image
from trainer_kit import (
    PAIRS,
    assert_same_gradients,
    collated,
    fresh,
    gradients,
    image_rows,
    shake,
    slow_logits,
    text_rows,
    trainer_of,
)

from trl_vpo.forward.head import Head, lm_head
from trl_vpo.forward.kl import token_kl
from trl_vpo.forward.scoring import ScoreRequest, attach_scoring, token_scores

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
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
HEADS = {  # scale, softcap, bias
    "plain": (1.0, None, False),
    "bias": (1.0, None, True),
    "scale": (0.25, None, False),
    "softcap": (1.0, 3.0, False),
    "all": (1.5, 5.0, True),
}
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def heads(kind, dtype=torch.float32, n=50, width=16, vocab=301):
    """Hidden states (n, width) of a policy and a reference, and their heads."""
    torch.manual_seed(0)
    scale, softcap, bias = HEADS[kind]

    def one(shift):
        weight = (torch.randn(vocab, width) + shift * torch.randn(vocab, width)).to(dtype).requires_grad_()
        b = torch.randn(vocab).to(dtype).requires_grad_() if bias else None
        return Head(weight, b, scale, softcap)

    hidden = torch.randn(n, width)
    near = (hidden + 0.1 * torch.randn(n, width)).to(dtype)
    return hidden.to(dtype).requires_grad_(), one(0.0), near, one(0.1)


def plain_scores(hidden, head, labels):
    """Log-probs, entropy, mean logit and "is the most likely", through the full logits."""
    logits = head.logits(hidden)  # (N, V)
    logps = logits.log_softmax(-1)
    token_logps = logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return token_logps, -(logps.exp() * logps).sum(-1), logits.mean(-1), logits.argmax(-1) == labels


def plain_kl(hidden, head, ref_hidden, ref_head):
    p, q = (h.logits(x).log_softmax(-1) for h, x in ((ref_head, ref_hidden), (head, hidden)))
    return (p.detach().exp() * (p.detach() - q)).sum(-1)


def grads_of(loss, hidden, head):
    wanted = {"hidden": hidden, "weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    return dict(zip(wanted, (g.float() for g in torch.autograd.grad(loss, wanted.values()))))


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_fused_scores_are_the_plain_ones(kind, dtype, rtol):
    hidden, head, _, _ = heads(kind, dtype)
    labels = torch.randint(0, 301, (50,))
    labels[:10] = head.logits(hidden)[:10].argmax(-1)  # some tokens are the most likely ones
    got, want = token_scores(hidden, head, labels), plain_scores(hidden, head, labels)
    for name, a, b in zip(("logps", "entropy", "mean_logits"), got, want):
        assert a.dtype == torch.float32, name
        torch.testing.assert_close(a, b, rtol=rtol, atol=20 * rtol if dtype is torch.bfloat16 else rtol)
    assert torch.equal(got[3], want[3]) and got[3][:10].all() and not got[3].all()
    weights = torch.rand(50)
    assert_same_gradients(
        grads_of((weights * got[0]).sum(), hidden, head), grads_of((weights * want[0]).sum(), hidden, head), rtol
    )


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_fused_kl_is_the_plain_one(kind, dtype, rtol):
    hidden, head, ref_hidden, ref_head = heads(kind, dtype)
    got, want = token_kl(hidden, head, ref_hidden, ref_head), plain_kl(hidden, head, ref_hidden, ref_head)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=10 * rtol, atol=10 * rtol)
    # By the definition, in float64 and with nothing shared: sum of p_ref * (log p_ref - log p).
    p = torch.log_softmax(ref_head.logits(ref_hidden).double(), -1)
    q = torch.log_softmax(head.logits(hidden).double(), -1)
    torch.testing.assert_close(want.double(), (p.exp() * (p - q)).sum(-1), rtol=10 * rtol, atol=10 * rtol)
    assert want.min() > 0.01
    weights = torch.rand(50)
    assert_same_gradients(
        grads_of((weights * got).sum(), hidden, head), grads_of((weights * want).sum(), hidden, head), rtol
    )


def test_kl_sends_no_gradient_into_the_reference():
    hidden, head, ref_hidden, ref_head = heads("bias")
    ref_hidden.requires_grad_()
    for kl in (token_kl, plain_kl):
        loss = kl(hidden, head, ref_hidden, ref_head).sum()
        assert torch.autograd.grad(loss, [ref_hidden, ref_head.weight], allow_unused=True) == (None, None)


def test_kl_of_a_model_to_itself_is_zero():
    hidden, head, _, _ = heads("all")
    for kl in (token_kl, plain_kl):
        assert kl(hidden, head, hidden.detach(), head).abs().max() < 1e-5


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


def test_attach_scoring_leaves_other_calls_alone():
    torch.manual_seed(0)
    model = SPECIAL_HEADS["plain"]().eval()
    ids = torch.randint(0, 97, (1, 5))
    want, said = model(ids, labels=ids), model.generate(ids, max_new_tokens=4, do_sample=False)
    attach_scoring(model)
    attach_scoring(model)  # a second trainer on the same model
    got = model(ids, labels=ids)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), said)


def test_a_copy_of_a_scoring_model_scores_with_its_own_weights():
    """A reference is a deep copy of a model that may have been trained, and patched, before."""
    torch.manual_seed(0)
    model = SPECIAL_HEADS["plain"]().eval()
    attach_scoring(model)
    twin = copy.deepcopy(model)
    ids = torch.randint(0, 97, (1, 5))
    request = ScoreRequest(torch.arange(1), torch.arange(4)[None], torch.ones(1, 4).bool(), ids[:, 1:])
    scores = twin(ids, score=request).logps
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0)
    assert torch.equal(twin(ids, score=request).logps, scores)


def test_a_copy_of_a_scoring_model_computes_plain_calls_with_its_own_weights():
    """As one keeps a model from before its training: its logits, and what it generates, are its own."""
    torch.manual_seed(0)
    model = SPECIAL_HEADS["plain"]().eval()
    attach_scoring(model)
    twin = copy.deepcopy(model)
    third = copy.deepcopy(twin)
    ids = torch.randint(0, 97, (1, 5))
    want, said = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert not torch.allclose(model(ids).logits, want)
    for copied in (twin, third):
        assert torch.equal(copied(ids).logits, want)
        assert torch.equal(copied.generate(ids, max_new_tokens=4, do_sample=False), said)
    twin(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in twin.parameters()) and all(p.grad is None for p in model.parameters())


def test_rows_without_tokens_score_zero_and_stay_connected():
    model = SPECIAL_HEADS["plain"]()
    attach_scoring(model)
    ids, mask = torch.randint(0, 97, (2, 5)), torch.zeros(2, 3).bool()
    nothing = torch.zeros(2, 3).long()
    reference = torch.zeros(0, 32), lm_head(model), torch.tensor([True, False])
    request = ScoreRequest(torch.arange(2), nothing, mask, nothing, *reference)
    out = model(ids, score=request)
    assert out.logps.abs().sum() == 0 and out.kl.shape == (2, 3)
    (out.logps.sum() + out.kl.sum()).backward()


# --- concatenated_forward -----------------------------------------------------------------------------------------


def moved(method, name, tmp_path, images, **more):
    rows = text_rows(4) if name == "text" else [*image_rows(images, 3), *text_rows(1)]
    trainer = trainer_of(method, tmp_path, rows, name=name, **more)
    shake(trainer.model)
    return trainer


def both_ways(trainer):
    """(R, T) lists of log-probs: ours, and slow."""
    trees = [trainer.data_collator.encode(example) for example in trainer.train_dataset]
    pairs = [(tree.trunks[b.trunk], b) for tree in trees for b in tree.branches]
    slow = [slow_logits(trainer.model, trunk, branch) for trunk, branch in pairs]
    logps = [x.log_softmax(-1).gather(-1, torch.tensor(b.ids)[:, None])[:, 0] for x, (_, b) in zip(slow, pairs)]
    return slow, logps


LAYOUTS = pytest.mark.parametrize("layout", ["separate", "shared"])


@LAYOUTS
@pytest.mark.parametrize("name", ["text", "Qwen2-VL", "LLaVA-1.5"])
def test_concatenated_forward_scores_as_full_calls(name, layout, tmp_path, images):
    """Ragged prompts, responses and images, and a row without an image: values and LoRA gradients."""
    trainer = moved("dpo", name, tmp_path, images, layout=layout)
    batch = collated(trainer)
    scores = trainer.concatenated_forward(trainer.model, batch)
    logits, logps = both_ways(trainer)
    assert len({len(x) for x in logps}) > 3
    for s, (x, want) in enumerate(zip(logits, logps)):
        mask = scores.mask[s]
        torch.testing.assert_close(scores.logps[s][mask], want, rtol=1e-5, atol=1e-5)
        p = x.log_softmax(-1)
        torch.testing.assert_close(scores.entropy[s][mask], -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores.mean_logits[s][mask], x.mean(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(scores.is_top1[s][mask], x.argmax(-1) == batch["branch_ids"][s][mask])
        assert scores.logps[s][~mask].abs().sum() == 0
    torch.testing.assert_close(scores.sums, torch.stack([x.sum() for x in logps]))
    weights = torch.rand(len(logps))
    want = gradients(trainer, sum(w * x.sum() for w, x in zip(weights, logps)))
    assert_same_gradients(gradients(trainer, (weights * scores.sums).sum()), want)


@LAYOUTS
@pytest.mark.parametrize("name", ["text", "Qwen2-VL", "LLaVA-1.5"])
def test_kl_is_that_of_the_full_logits(name, layout, tmp_path, images):
    trainer = moved("rrpo", name, tmp_path, images, layout=layout)
    batch = collated(trainer)
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    logits, _ = both_ways(trainer)
    with torch.no_grad(), trainer.model.disable_adapter():
        ref_logits, ref_logps = both_ways(trainer)
    kl = [
        (r.log_softmax(-1).exp() * (r.log_softmax(-1) - x.log_softmax(-1))).sum(-1) for x, r in zip(logits, ref_logits)
    ]
    for s, want in enumerate(kl):
        torch.testing.assert_close(scores.kl[s][scores.mask[s]], want, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(reference.logps[s][scores.mask[s]], ref_logps[s], rtol=1e-5, atol=1e-5)
        assert want.mean() > 1e-4  # there is something to compare
    chosen = batch["chosen"].tolist()
    want = gradients(trainer, sum(kl[s].sum() for s in chosen))
    assert_same_gradients(gradients(trainer, scores.kl[batch["chosen"]].sum()), want)
    # The rejected side's is a metric: through the sum of everything flows the chosen side's gradient only.
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    assert_same_gradients(gradients(trainer, scores.kl.sum()), want)
    assert not reference.logps.requires_grad and reference.kl is None


@LAYOUTS
def test_videos_of_different_lengths_keep_their_order(layout, tmp_path):
    """LLaVA-OneVision cannot stack clips of 2, 4 and 3 frames: several calls, whose scores go back to their rows."""
    rng = np.random.default_rng(0)
    clips = [[Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8)) for _ in range(n)] for n in (2, 4, 3, 4)]
    rows = [{**row("video", [clip], *PAIRS[i]), "id": f"v{i}"} for i, clip in enumerate(clips)]
    trainer = trainer_of(
        "rrpo", tmp_path, [*rows, {**text_rows(1)[0], "videos": []}], name="LLaVA-OneVision", layout=layout
    )
    shake(trainer.model)
    batch, calls = collated(trainer), []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    assert len(calls) == 2 * 3  # policy and reference
    logits, logps = both_ways(trainer)
    with torch.no_grad(), trainer.model.disable_adapter():
        ref_logits, _ = both_ways(trainer)
    for s, (x, r, want) in enumerate(zip(logits, ref_logits, logps)):
        p, q = r.log_softmax(-1), x.log_softmax(-1)
        torch.testing.assert_close(scores.logps[s][scores.mask[s]], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.kl[s][scores.mask[s]], (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_pad_to_multiple_of_changes_nothing_but_the_width(layout, tmp_path, images):
    widths, logps = [], []
    for multiple in (32, None):
        trainer = moved("dpo", "Qwen2-VL", tmp_path, images, layout=layout, pad_to_multiple_of=multiple)
        seen = lambda model, args, kwargs: widths.append(kwargs["input_ids"].size(1))  # noqa: E731
        trainer.model.register_forward_pre_hook(seen, with_kwargs=True)
        logps.append(trainer.concatenated_forward(trainer.model, collated(trainer)).logps)
    torch.testing.assert_close(*logps, rtol=1e-5, atol=1e-5)
    assert widths[0] % 32 == 0 and widths[1] % 32 and widths[1] < widths[0]


def test_bf16_weights_give_float32_log_probs(tmp_path):
    model, tokenizer = fresh()
    trainer = trainer_of("rrpo", tmp_path, model=model.bfloat16(), processor=tokenizer, peft=None)
    batch = collated(trainer)
    shake(trainer.model)
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    assert {scores.logps.dtype, scores.kl.dtype, scores.entropy.dtype} == {torch.float32}
    _, want = both_ways(trainer)
    for s, x in enumerate(want):
        torch.testing.assert_close(scores.logps[s][scores.mask[s]], x, rtol=2e-2, atol=2e-2)
