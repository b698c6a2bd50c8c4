"""The kernels over the vocabulary at real size: log-probs, and RRPO's KL, against plain float32 in chunks of tokens.

"chunked" is what a training step calls (TRL's kernels, in Triton where it is installed); "plain" makes all logits in
bfloat16 and takes their float32 log-softmax. Values and gradients of both are held against float32. The kernels may
lose what the plain way loses to bfloat16, not more.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.kl import plain_kl
from torch import Tensor

from gpu_checks.trainers import free, held_mib, peak_mib, timed
from trl_vpo.forward.head import Head
from trl_vpo.forward.kl import token_kl
from trl_vpo.forward.scoring import token_scores

VOCABULARY, WIDTH = 151_936, 3584
TOKENS = (256, 2048)
CHUNK = 128  # tokens of the float32 computation at a time
LIMITS = {"value_error": 1e-4, "gradient_error": 1e-4}  # of float32
ROUNDING = 1.5  # times the error of the plain way in bfloat16


def cells(options: Any) -> list[dict]:
    found = []
    for tokens in (16,) if options.tiny else TOKENS:
        for what in ("logps", "kl"):
            found.append({"method": what, "tokens": tokens, "vocabulary": 2000 if options.tiny else VOCABULARY})
    return found


def run(cell: dict, options: Any) -> list[dict]:
    device, tokens, vocabulary = options.device, cell["tokens"], cell["vocabulary"]
    width, dtype = (64, torch.float32) if options.tiny else (WIDTH, torch.bfloat16)
    free(device)
    generator = torch.Generator(device).manual_seed(0)
    made = {"device": device, "dtype": dtype, "generator": generator}
    head = Head(torch.randn(vocabulary, width, **made) * width**-0.5, None)
    hidden = torch.randn(tokens, width, **made)
    reference = hidden + 0.3 * torch.randn(tokens, width, **made)
    labels = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    weights = torch.randn(tokens, device=device, generator=generator)
    truth = _in_float32(cell["method"], hidden, head, reference, labels, weights)
    found, errors = [], {}
    for name in ("plain", "chunked"):
        free(device)
        states = hidden.clone().requires_grad_()
        call = {
            ("logps", "plain"): lambda s=states: _plain_logps(s, head, labels),
            ("logps", "chunked"): lambda s=states: token_scores(s, head, labels)["logps"],
            ("kl", "plain"): lambda s=states: plain_kl(s, head, reference, head),
            ("kl", "chunked"): lambda s=states: token_kl(s, head, reference, head),
        }[cell["method"], name]
        got = _values(call, states, weights)
        errors[name] = {key: _error(a, b) for key, a, b in zip(LIMITS, got, truth)}
        row = {"candidate": name, "triton": find_spec("triton") is not None, **errors[name]}
        if name == "chunked":
            row["ok"] = all(errors[name][key] <= _limit(key, errors["plain"], dtype) for key in LIMITS)
        before = held_mib(device)
        row |= timed(lambda c=call, s=states: _values(c, s, weights), device, warm_up=1, repeats=3, limit=3.0)
        # On a CPU what exists before is not counted.
        row["peak_mib"] = peak_mib(lambda c=call, s=states: _values(c, s, weights), device) - before
        found.append(row)
    return found


def _limit(key: str, plain: dict, dtype: torch.dtype) -> float:
    return LIMITS[key] if dtype == torch.float32 else ROUNDING * plain[key] + LIMITS[key]


def _values(call: Callable[[], Tensor], states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) values and (N, H) gradients of their weighted sum."""
    states.grad = None
    values = call()
    (values * weights).sum().backward()
    return values.detach(), states.grad


def _plain_logps(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    return head.logits(hidden).log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _in_float32(what: str, hidden: Tensor, head: Head, reference: Tensor, labels: Tensor, weights: Tensor) -> tuple:
    """The same in float32, a few tokens at a time."""
    single = Head(head.weight.float(), None)
    values, gradients = [], []
    for begin in range(0, len(hidden), CHUNK):
        part = slice(begin, begin + CHUNK)
        states = hidden[part].float().requires_grad_()
        if what == "logps":
            call = lambda s=states, p=part: _plain_logps(s, single, labels[p])  # noqa: E731
        else:
            call = lambda s=states, p=part: plain_kl(s, single, reference[p].float(), single)  # noqa: E731
        value, gradient = _values(call, states, weights[part])
        values.append(value)
        gradients.append(gradient)
    return torch.cat(values), torch.cat(gradients)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())
