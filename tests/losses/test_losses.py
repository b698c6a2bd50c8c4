"""Losses against the authors' arithmetic, hand-worked values, a float64 loop, identities and extremes."""

import math

import pytest
import torch
from loss_kit import assert_golden, golden, grads, length_mask, logsigmoid, ragged

from trl_vpo.losses import dpo_loss, leanpo_loss, lpoi_loss, rrpo_loss

LEANPO = {"beta": 2.0, "target_margin": 0.5, "label_smoothing": 0.1}


# --- the authors' arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("leanpo"), ids=str)
def test_leanpo_golden(case):
    sides = [torch.tensor(case[f"{side}_logps"], requires_grad=True) for side in ("chosen", "rejected")]
    masks = [length_mask(case[f"{side}_lengths"], x.size(1)) for side, x in zip(("chosen", "rejected"), sides)]
    options = {k: case[k] for k in ("beta", "target_margin", "label_smoothing", "nll_weight")}
    out = leanpo_loss(*sides, *masks, **options)
    grad_chosen, grad_rejected = grads(out.losses, *sides)
    assert_golden(
        case,
        preference_losses=out.terms["preference"],
        smoothing=out.terms["smoothing"],
        chosen_rewards=out.chosen_rewards,
        rejected_rewards=out.rejected_rewards,
        nll=out.terms["nll"].mean(),
        loss=out.losses.mean(),
        grad_chosen=grad_chosen,
        grad_rejected=grad_rejected,
    )


@pytest.mark.parametrize("case", golden("rrpo"), ids=str)
def test_rrpo_golden(case):
    """Per-token log-ratios and KL(ref || policy) from full logits, shifted: the slow, obvious way."""
    logits, labels = torch.tensor(case["policy_logits"], requires_grad=True), torch.tensor(case["labels"])[:, 1:]
    policy, ref = (x[:, :-1].log_softmax(-1) for x in (logits, torch.tensor(case["ref_logits"])))
    mask, phrases, pairs = labels != -100, torch.tensor(case["phrase_ids"])[:, 1:] > 0, len(labels) // 2
    logps, ref_logps = (x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) for x in (policy, ref))
    kl, ratios = (ref.exp() * (ref - policy)).sum(-1), logps - ref_logps
    halves = [half for x in (ratios, phrases) for half in (x[:pairs], x[pairs:])]
    out = rrpo_loss(*halves, kl[:pairs], mask[:pairs], beta=case["beta"], alpha=case["alpha"])
    (grad,) = grads(out.losses, logits)
    assert_golden(
        case,
        losses=out.losses,
        chosen_rewards=out.chosen_rewards,
        rejected_rewards=out.rejected_rewards,
        chosen_kl=out.terms["kl"],
        rejected_kl=(kl * mask).sum(-1)[pairs:],
        chosen_logps=(logps * mask).sum(-1)[:pairs],
        rejected_logps=(logps * mask).sum(-1)[pairs:],
        grad_norm=grad.norm(),
        grad_l1_per_row=grad.abs().sum((1, 2)),
    )


@pytest.mark.parametrize("case", golden("lpoi"), ids=str)
def test_lpoi_golden(case):
    images = torch.tensor(case["policy_chosen_logps_per_image"], requires_grad=True)
    rejected = torch.tensor(case["policy_rejected_logps"], requires_grad=True)
    ref_images, ref_rejected = (torch.tensor(case[f"ref_{k}"]) for k in ("chosen_logps_per_image", "rejected_logps"))
    out = lpoi_loss(images - ref_images, rejected - ref_rejected, beta=case["beta"])
    grad_images, grad_rejected = grads(out.losses, images, rejected)
    assert_golden(
        case,
        listwise=out.terms["list"],
        text_dpo=out.terms["dpo"],
        anchor=out.terms["anchor"],
        total=out.losses,
        grad_policy_images=grad_images,
        grad_policy_rejected=grad_rejected,
    )


# --- by hand ----------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    out = dpo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5)
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (1.0, -0.5)


def test_leanpo_by_hand_ranked_wrongly():
    # avg chosen (-1 - 3) / 2 = -2, avg rejected -1: d = -1 < 0, so the pair is smoothed.
    logps, masks = torch.tensor([[[-1.0, -3.0]], [[-1.0, -7.0]]]), torch.tensor([[[1, 1]], [[1, 0]]])
    out = leanpo_loss(*logps, *masks, nll_weight=0.5, **LEANPO)
    preference = -0.9 * logsigmoid(-2.5) - 0.1 * logsigmoid(1.5)
    assert out.terms["preference"].item() == pytest.approx(preference)
    assert out.terms["smoothing"].item() == pytest.approx(0.1)
    assert out.losses.item() == pytest.approx(preference + 0.5 * 2.0)


def test_rrpo_by_hand():
    # u = 0.5 * (0.4 - (-0.2 - 0.3)) = 0.45; KL over both chosen tokens 0.1 + 0.3 = 0.4
    ratios, phrases = torch.tensor([[[9.0, 0.4]], [[-0.2, -0.3]]]), torch.tensor([[[0, 1]], [[1, 1]]])
    out = rrpo_loss(*ratios, *phrases, torch.tensor([[0.1, 0.3]]), phrases[1], beta=0.5, alpha=0.05)
    assert out.losses.item() == pytest.approx(-logsigmoid(0.45) + 0.05 * 0.4)
    assert out.terms["kl"].item() == pytest.approx(0.4)


def test_lpoi_by_hand_two_images():
    # S = (0.2, -0.1), rejected score 0.3: every part is a logsigmoid.
    out = lpoi_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([3.0]), beta=0.1)
    parts = (-logsigmoid(0.3), -logsigmoid(-0.1), -logsigmoid(0.2))
    assert [out.terms[k].item() for k in ("list", "dpo", "anchor")] == pytest.approx(parts)
    assert out.losses.item() == pytest.approx(sum(parts))


# --- an independent float64 loop ----------------------------------------------------------------------------------


def slow_leanpo(chosen, rejected, beta, margin, smoothing, threshold, nll_weight, symmetric):
    total, nll, tokens = 0.0, 0.0, 0
    for w, r in zip(chosen, rejected):
        d = sum(w) / len(w) - sum(r) / len(r)
        weight = smoothing if d < threshold else 0.0
        total -= (1 - weight) * logsigmoid(beta * d - margin)
        total -= weight * logsigmoid(-beta * d + (margin if symmetric else -margin))
        nll, tokens = nll - sum(w), tokens + len(w)
    return total / len(chosen) + nll_weight * nll / tokens


def slow_lpoi(images, rejected, beta):
    total = 0.0
    for ratios, loser in zip(images, rejected):
        s = [beta * r for r in ratios]
        total += sum(math.log(sum(math.exp(x) for x in s[k:])) - s[k] for k in range(len(s) - 1))
        total += -logsigmoid(s[0] - beta * loser) - logsigmoid(s[0])
    return total / len(images)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_leanpo_against_loop(symmetric, threshold):
    g = torch.Generator().manual_seed(1)
    rows = [
        [(-torch.rand(n, generator=g, dtype=torch.float64) * 3).tolist() for n in lengths]
        for lengths in ((1, 4, 2, 5, 3), (3, 1, 5, 2, 2))
    ]
    tensors = [ragged(side, 5) for side in rows] + [length_mask([len(r) for r in side], 5) for side in rows]
    weights = {"beta": 1.7, "target_margin": 0.3, "label_smoothing": 0.2, "nll_weight": 0.4}
    out = leanpo_loss(*tensors, smoothing_threshold=threshold, symmetric_margin=symmetric, **weights)
    want = slow_leanpo(*rows, 1.7, 0.3, 0.2, threshold, 0.4, symmetric)
    assert out.losses.mean().item() == pytest.approx(want, rel=1e-12)
    assert 0 < (out.terms["smoothing"] > 0).sum() < 5  # both kinds of pairs are in the batch


def test_lpoi_ragged_against_loop_and_alone():
    g = torch.Generator().manual_seed(2)
    rows = [(torch.randn(n, generator=g, dtype=torch.float64) * 4).tolist() for n in (2, 5, 3, 9)]
    rejected = torch.randn(4, generator=g, dtype=torch.float64)
    images = ragged(rows, 9).requires_grad_()
    mask = length_mask([len(r) for r in rows], 9)
    out = lpoi_loss(images, rejected, beta=0.3, image_mask=mask)
    assert out.losses.mean().item() == pytest.approx(slow_lpoi(rows, rejected.tolist(), 0.3), rel=1e-12)
    (grad,) = grads(out.losses, images)
    assert torch.isfinite(grad).all() and (grad[~mask] == 0).all()
    for i, row in enumerate(rows):  # padding changes neither a row's loss nor its gradient
        alone = torch.tensor([row], dtype=torch.float64, requires_grad=True)
        one = lpoi_loss(alone, rejected[i : i + 1], beta=0.3)
        torch.testing.assert_close(one.losses, out.losses[i : i + 1])
        torch.testing.assert_close(grads(one.losses, alone)[0][0] / 4, grad[i, : len(row)])


# --- identities ---------------------------------------------------------------------------------------------------


def test_rrpo_without_kl_and_one_phrase_over_everything_is_dpo():
    g = torch.Generator().manual_seed(3)
    chosen, rejected = torch.randn(2, 4, 6, generator=g)
    mask = length_mask([6, 3, 1, 4], 6)
    out = rrpo_loss(chosen, rejected, mask, mask, torch.full_like(chosen, 7.0), mask, beta=0.3, alpha=0.0)
    want = dpo_loss((chosen * mask).sum(-1), (rejected * mask).sum(-1), beta=0.3)
    torch.testing.assert_close(out.losses, want.losses)
    torch.testing.assert_close(out.chosen_rewards, want.chosen_rewards)


def test_lpoi_list_of_two_is_dpo_between_the_images():
    ratios = torch.randn(5, 2, generator=torch.Generator().manual_seed(4))
    out = lpoi_loss(ratios, torch.zeros(5), beta=0.7, dpo_weight=0.0, anchor_weight=0.0)
    torch.testing.assert_close(out.losses, dpo_loss(ratios[:, 0], ratios[:, 1], beta=0.7).losses)


def test_leanpo_without_smoothing_is_simpo():
    g = torch.Generator().manual_seed(5)
    chosen, rejected = -torch.rand(2, 4, 6, generator=g)
    mask = length_mask([6, 3, 1, 4], 6)
    out = leanpo_loss(chosen, rejected, mask, mask, beta=2.0, target_margin=0.5, label_smoothing=0.0)
    avg = [(x * mask).sum(-1) / mask.sum(-1) for x in (chosen, rejected)]
    torch.testing.assert_close(out.losses, -torch.nn.functional.logsigmoid(2.0 * (avg[0] - avg[1]) - 0.5))


def test_the_smoothing_weight_carries_no_gradient():
    chosen = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True]])
    args = dict(LEANPO, smoothing_threshold=1.0)
    out = leanpo_loss(chosen, torch.tensor([[-1.5]], dtype=torch.float64), mask, mask, **args)
    x = 2.0 * 0.5  # beta * d
    by_hand = 2.0 * (-0.9 * (1 - 1 / (1 + math.exp(-(x - 0.5)))) + 0.1 * (1 - 1 / (1 + math.exp(x + 0.5))))
    assert grads(out.losses, chosen)[0].item() == pytest.approx(by_hand)


# --- extremes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_scores_stay_finite(sign):
    big = torch.tensor([sign * 1e4], requires_grad=True)
    mask = torch.tensor([[True]])
    outs = [
        dpo_loss(big, -big, beta=1.0),
        leanpo_loss(big[:, None], -big[:, None], mask, mask, nll_weight=0.5, **LEANPO),
        rrpo_loss(big[:, None], -big[:, None], mask, mask, big[:, None].abs(), mask, beta=1.0, alpha=0.01),
        lpoi_loss(torch.stack([big, -big, big], -1), -big, beta=1.0),
    ]
    for out in outs:
        assert torch.isfinite(out.losses).all()
        assert torch.isfinite(grads(out.losses, big)[0]).all()
    assert outs[0].losses.item() == (0.0 if sign > 0 else 2e4)


def test_bfloat16_inputs_are_computed_in_float32():
    chosen = torch.full((1, 300), -1.0078125, dtype=torch.bfloat16)  # exact in bfloat16; the sum is not
    mask = torch.ones(1, 300)
    out = rrpo_loss(chosen, chosen * 0, mask, mask, chosen * 0, mask, beta=1.0, alpha=0.0)
    assert out.losses.dtype == torch.float32
    assert out.chosen_rewards.item() == -302.34375


def test_what_makes_no_sense_is_refused():
    x, on, off = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"chosen responses \[1\] of the batch have no tokens"):
        leanpo_loss(x, x, off, on, **LEANPO)
    with pytest.raises(ValueError, match=r"pairs \[1\] of the batch have no phrase tokens"):
        rrpo_loss(x, x, off, off, x, on, beta=0.1, alpha=0.01)
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch have fewer than two images"):
        lpoi_loss(x, x[:, 0], beta=0.1, image_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    with pytest.raises(ValueError, match="gaps"):
        lpoi_loss(x, x[:, 0], beta=0.1, image_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]))
