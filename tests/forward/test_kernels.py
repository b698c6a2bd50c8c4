"""TRL's chunked kernels against the same numbers through the full logits."""

import pytest
import torch
from step_kit import assert_same_gradients

from trl_vpo.forward.head import Head
from trl_vpo.forward.kl import token_kl
from trl_vpo.forward.scoring import token_scores

HEADS = {  # scale, softcap, bias
    "plain": (1.0, None, False),
    "bias": (1.0, None, True),
    "scale": (0.25, None, False),
    "softcap": (1.0, 3.0, False),
    "all": (1.5, 5.0, True),
}
EVERY_HEAD = pytest.mark.parametrize("kind", HEADS)
DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


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
    """The scores through the full logits."""
    logits = head.logits(hidden)  # (N, V)
    logps = logits.log_softmax(-1)
    return {
        "logps": logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": (logits.softmax(-1) ** 2).sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
    }


def plain_kl(hidden, head, ref_hidden, ref_head, dtype=torch.float32):
    p, q = (h.logits(x).to(dtype).log_softmax(-1) for h, x in ((ref_head, ref_hidden), (head, hidden)))
    return (p.detach().exp() * (p.detach() - q)).sum(-1)


def assert_same_backward(got, want, hidden, head, rtol):
    weights = torch.rand(len(got))
    inputs = {"hidden": hidden, "weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    grads = [torch.autograd.grad((weights * values).sum(), inputs.values()) for values in (got, want)]
    assert_same_gradients(*(dict(zip(inputs, (g.float() for g in side))) for side in grads), rtol)


@DTYPES
@EVERY_HEAD
def test_chunked_scores_are_the_plain_ones(kind, dtype, rtol):
    hidden, head, _, _ = heads(kind, dtype)
    labels = torch.randint(0, 301, (50,))
    labels[:10] = head.logits(hidden)[:10].argmax(-1)  # some tokens are the most likely ones
    got, want = token_scores(hidden, head, labels, squares=True), plain_scores(hidden, head, labels)
    assert set(got) == set(want) and set(token_scores(hidden, head, labels)) == set(want) - {"log_sum_sq_probs"}
    top = got.pop("is_top1")
    for name, a in got.items():
        assert a.dtype == torch.float32, name
        torch.testing.assert_close(a, want[name], rtol=rtol, atol=20 * rtol if dtype is torch.bfloat16 else rtol)
    assert torch.equal(top, want["is_top1"]) and top[:10].all() and not top.all()
    assert_same_backward(got["logps"], want["logps"], hidden, head, rtol)


@DTYPES
@EVERY_HEAD
def test_chunked_kl_is_the_plain_one(kind, dtype, rtol):
    """And that of its definition in float64."""
    sides = heads(kind, dtype)
    got, want = token_kl(*sides), plain_kl(*sides)
    assert got.dtype == torch.float32 and want.min() > 0.01
    torch.testing.assert_close(got, want, rtol=10 * rtol, atol=10 * rtol)
    torch.testing.assert_close(got.double(), plain_kl(*sides, torch.float64), rtol=10 * rtol, atol=10 * rtol)
    assert_same_backward(got, want, *sides[:2], rtol)


def test_kl_sends_no_gradient_into_the_reference():
    hidden, head, ref_hidden, ref_head = heads("bias")
    ref_hidden.requires_grad_()
    loss = token_kl(hidden, head, ref_hidden, ref_head).sum()
    assert torch.autograd.grad(loss, [ref_hidden, ref_head.weight], allow_unused=True) == (None, None)
