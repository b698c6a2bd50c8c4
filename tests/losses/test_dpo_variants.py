"""The losses of the DPO family in a float64 loop, their identities, extremes and gradients."""

import math

import pytest
import torch
from loss_kit import grads, length_mask, logsigmoid, ragged

from trl_vpo.losses import dpo_loss, dpo_sum_loss, dpop_loss, mpo_loss
from trl_vpo.losses.dpo_sum import LOSS_TYPES
from trl_vpo.losses.dpo_variants import DIVERGENCES, divergence_scores, ld_sums, wpo_weights

BETA, SMOOTHING, TAU, PENALTY = 0.6, 0.15, 0.4, 7.0
OPTIONS = {"beta": BETA, "label_smoothing": SMOOTHING, "discopop_tau": TAU, "penalty_weight": PENALTY}
TOKENS = [(5, 1, 3, 2), (2, 6, 4, 2)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kl(q, p):
    return sum(x * math.log(x / y) for x, y in zip(q, p))


def smoothed(x):
    return -(1 - SMOOTHING) * logsigmoid(x) - SMOOTHING * logsigmoid(-x)


def blend(x):
    share = sigmoid(x / TAU)
    return (1 - share) * -logsigmoid(x) + share * math.exp(-x)


LOOPS = {  # of r(y_w), r(y_l), their lengths
    "sigmoid": lambda w, y, *_: -logsigmoid(BETA * (w - y)),
    "hinge": lambda w, y, *_: max(0.0, 1 - BETA * (w - y)),
    "ipo": lambda w, y, n, m: (w / n - y / m - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda w, y, *_: kl((sigmoid(BETA * (w - y)), sigmoid(BETA * (y - w))), (1 - SMOOTHING, SMOOTHING)),
    "nca_pair": lambda w, y, *_: -logsigmoid(BETA * w) - (logsigmoid(-BETA * w) + logsigmoid(-BETA * y)) / 2,
    "robust": lambda w, y, *_: (
        ((1 - SMOOTHING) * -logsigmoid(BETA * (w - y)) - SMOOTHING * -logsigmoid(BETA * (y - w))) / (1 - 2 * SMOOTHING)
    ),
    "bco_pair": lambda w, y, *_: -logsigmoid(BETA * w) - logsigmoid(-BETA * y),
    "sppo_hard": lambda w, y, *_: (w - 1 / (2 * BETA)) ** 2 + (y + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda w, y, *_: 1 - sigmoid(BETA * w) + sigmoid(BETA * y),
    "apo_down": lambda w, y, *_: sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - y)),
    "discopop": lambda w, y, *_: blend(BETA * (w - y)),
    "sigmoid_norm": lambda w, y, n, m: -logsigmoid(BETA * (w / n - y / m)),
    "dpop": lambda w, y, *_: -logsigmoid(BETA * (w - y - PENALTY * max(0.0, -w))),
}


def pairs(n=4):
    """Log-probs of chosen and rejected responses: the policy's, the reference's."""
    policy = [[-9.0, -4.5, -12.5, -7.0], [-8.0, -11.0, -6.0, -9.75]]
    reference = [[-8.25, -6.0, -11.5, -7.5], [-9.5, -9.0, -7.75, -8.0]]
    policy, reference = (torch.tensor(x, dtype=torch.float64)[:, :n] for x in (policy, reference))
    return policy.requires_grad_(), reference


def tokens():
    return [torch.tensor(side) for side in TOKENS]


def of_type(*names, policy=None, reference=None, **more):
    if policy is None:
        policy, reference = pairs()
    return dpo_sum_loss(policy, reference, tokens(), policy[0], loss_type=names, **OPTIONS | more)


@pytest.mark.parametrize("name", LOOPS)
def test_against_loop(name):
    policy, reference = pairs()
    out = of_type(name)
    ratios = (policy - reference).tolist()
    want = [LOOPS[name](*row) for row in zip(*ratios, *TOKENS)]
    assert out.losses.tolist() == pytest.approx(want, rel=1e-12)
    assert min(ratios[0]) < 0 < max(ratios[0])
    assert out.chosen_rewards.tolist() == pytest.approx([BETA * r for r in ratios[0]], rel=1e-12)
    assert out.rejected_rewards.tolist() == pytest.approx([BETA * r for r in ratios[1]], rel=1e-12)
    assert torch.equal(out.terms[name], out.losses) and not out.terms[name].requires_grad


def test_aot_against_loop():
    """Sorted margins: the loss at i is that of the i-th smallest, not of row i."""
    (policy, reference) = ([side.tolist() for side in model] for model in pairs())
    margins = [sorted(w - y for w, y in zip(*model)) for model in (policy, reference)]
    want = [smoothed(BETA * (x - r)) for x, r in zip(*margins)]
    assert of_type("aot").losses.tolist() == pytest.approx(want, rel=1e-12)
    ratios = [sorted(p - r for p, r in zip(*side)) for side in zip(policy, reference)]
    want = [smoothed(BETA * (w - y)) for w, y in zip(*ratios)]
    assert of_type("aot_unpaired").losses.tolist() == pytest.approx(want, rel=1e-12)


def test_aot_of_a_pair_alone_is_dpo():
    policy, reference = pairs(n=1)
    out = dpo_sum_loss(policy, reference, [torch.ones(1)] * 2, policy[0], loss_type=["aot"], beta=1, label_smoothing=0)
    torch.testing.assert_close(out.losses, dpo_loss(*(policy - reference), beta=1).losses)


def test_sft_is_a_mean_over_tokens():
    policy, _ = pairs()
    assert of_type("sft").losses.mean().item() == pytest.approx(-policy[0].sum().item() / sum(TOKENS[0]))
    want = (-policy[0] / 4.0).tolist()
    assert of_type("sft", tokens_per_pair=4.0).losses.tolist() == pytest.approx(want)


def test_every_type_has_a_loop():
    assert set(LOSS_TYPES) == set(LOOPS) | {"aot", "aot_unpaired", "sft"}


def test_sums_are_dpo_dpop_and_mpo():
    policy, reference = pairs()
    chosen, rejected = ratios = policy - reference
    logps = policy[0][:, None]
    more = {"loss_weights": [0.8, 0.2, 1.0], "tokens_per_pair": 3.0}
    for out, want in (
        (of_type("sigmoid", policy=policy, reference=reference), dpo_loss(*ratios, beta=BETA)),
        (of_type("dpop", policy=policy, reference=reference), dpop_loss(*ratios, beta=BETA, penalty_weight=PENALTY)),
        (
            of_type("sigmoid", "bco_pair", "sft", policy=policy, reference=reference, **more),
            mpo_loss(chosen, rejected, logps, torch.ones(4, 1), beta=BETA, tokens_per_pair=3.0),
        ),
    ):
        torch.testing.assert_close(out.losses, want.losses)
        torch.testing.assert_close(out.chosen_rewards, want.chosen_rewards)
        torch.testing.assert_close(*(grads(side.losses, policy)[0] for side in (out, want)))


def test_pair_weights_multiply_the_sum():
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    plain, out = (of_type("hinge", "ipo", loss_weights=[2.0, 1.0], pair_weights=w) for w in (None, weights))
    torch.testing.assert_close(plain.losses, 2 * plain.terms["hinge"] + plain.terms["ipo"])
    torch.testing.assert_close(out.losses, weights * plain.losses)
    assert torch.equal(out.terms["ipo"], plain.terms["ipo"])


# --- divergences, lengths, weights ----------------------------------------------------------------------------------


def test_divergences_by_hand():
    """f'(t) of the ratio t = pi / pi_ref."""
    t = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    want = {
        "reverse_kl": t.log(),
        "forward_kl": 1 - 1 / t,
        "js_divergence": (2 * t / (1 + t)).log(),
        "alpha_divergence": (t**-0.3 - 1) / -0.3,
    }
    assert set(want) == set(DIVERGENCES)
    for name, values in want.items():
        torch.testing.assert_close(divergence_scores(t.log(), name, 0.7), values)
    for alpha, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        torch.testing.assert_close(divergence_scores(t.log(), "alpha_divergence", alpha), want[name])


def test_a_divergence_changes_the_loss_and_not_the_reward():
    policy, reference = pairs()
    out = of_type("sigmoid", f_divergence_type="forward_kl")
    w, y = (1 - (reference - policy).exp()).tolist()
    assert out.losses.tolist() == pytest.approx([-logsigmoid(BETA * (a - b)) for a, b in zip(w, y)])
    assert torch.equal(out.chosen_rewards, of_type("sigmoid").chosen_rewards)


def test_length_desensitized_sums_against_loop():
    rows = [[-1.0, -2.0, -4.0], [-1.5], [-0.5, -3.0]]
    logps, mask, shared = ragged(rows, 4), length_mask([3, 1, 2], 4), torch.tensor([1, 1, 5])
    want = [-1 - 0.3 * 6, -1.5, -3.5]
    assert ld_sums(logps, mask, shared, 0.3).tolist() == pytest.approx(want)
    assert ld_sums(logps, mask, shared, 1.0).tolist() == pytest.approx([sum(r) for r in rows])
    assert ld_sums(logps, mask, shared, 0.0).tolist() == pytest.approx([-1, -1.5, -3.5])


def test_wpo_weights_against_loop():
    g = torch.Generator().manual_seed(0)
    logits, ids, lengths = torch.randn(3, 4, 9, generator=g), torch.arange(12).view(3, 4) % 9, [3, 1, 4]
    probs = logits.double().softmax(-1)
    logps = probs.gather(-1, ids[..., None])[..., 0].log()
    squares = (probs**2).sum(-1).log()
    want = []
    for row, n in enumerate(lengths):
        factors = [probs[row, t, ids[row, t]].item() / sum(p**2 for p in probs[row, t].tolist()) for t in range(n)]
        want.append(math.prod(factors) ** (1 / n))
    mask = length_mask(lengths, 4)
    padded = [x.masked_fill(~mask, math.nan).requires_grad_() for x in (logps, squares)]
    out = wpo_weights(*padded, mask)
    assert out.tolist() == pytest.approx(want) and not out.requires_grad


# --- extremes and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [900.0, -900.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(sign, dtype):
    policy = (torch.tensor([[sign], [-sign]], dtype=dtype)).requires_grad_()
    count = [torch.tensor([300]), torch.tensor([200])]
    cases = [(name, "reverse_kl") for name in LOSS_TYPES]
    cases += [(name, divergence) for name in ("sigmoid", "sigmoid_norm") for divergence in DIVERGENCES]
    for name, divergence in cases:
        more = {"f_divergence_type": divergence, "f_alpha_divergence_coef": 0.5, "loss_type": [name]}
        out = dpo_sum_loss(policy, torch.zeros(2, 1), count, policy[0], **OPTIONS | {"beta": 1.0}, **more)
        assert out.losses.dtype == torch.float32 and torch.isfinite(out.losses).all(), (name, divergence)
        (grad,) = torch.autograd.grad(out.losses.sum(), policy)
        assert torch.isfinite(grad).all(), (name, divergence)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradients(name):
    policy, reference = pairs()
    loss = lambda values: of_type(name, policy=values, reference=reference).losses  # noqa: E731
    assert torch.autograd.gradcheck(loss, policy)
