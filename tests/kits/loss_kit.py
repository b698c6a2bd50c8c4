"""Golden numbers of the losses, masks, and gradients."""

import json
import math
from pathlib import Path

import torch

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def golden(name):
    cases = json.loads((GOLDEN / f"{name}.json").read_text())
    return cases if isinstance(cases, list) else cases["cases"]


def length_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def logsigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


def grads(losses, *inputs):
    return torch.autograd.grad(losses.mean(), inputs, retain_graph=True)


def ragged(rows, width, fill=float("nan")):
    """Pad rows with nan: padding must have no influence at all."""
    return torch.tensor([r + [fill] * (width - len(r)) for r in rows], dtype=torch.float64)


def assert_golden(case, **values):
    """Values by their names in the case's `expected`, all of which are compared."""
    assert set(values) == set(case["expected"])
    for name, value in values.items():
        torch.testing.assert_close(value, torch.tensor(case["expected"][name]), **CLOSE, msg=lambda m, n=name: n + m)


def policy_and_reference(case):
    """From full logits, shifted, the slow and obvious way: the policy's logits, then chosen and rejected log-ratios,
    log-probs, exact KL(ref || policy), and masks of the response's tokens."""
    logits, labels = torch.tensor(case["policy_logits"], requires_grad=True), torch.tensor(case["labels"])[:, 1:]
    policy, ref = (x[:, :-1].log_softmax(-1) for x in (logits, torch.tensor(case["ref_logits"])))
    logps, ref_logps = (x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) for x in (policy, ref))
    kl = (ref.exp() * (ref - policy)).sum(-1)
    halves = (x.chunk(2) for x in (logps - ref_logps, logps, kl, labels != -100))
    return logits, *halves
