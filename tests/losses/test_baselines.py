"""The baselines' losses by hand, against a float64 loop, their identities, extremes and refusals."""

import math

import pytest
import torch
from loss_kit import grads, length_mask, logsigmoid, ragged

from trl_vpo.losses import (
    ddpo_loss,
    dpa_loss,
    dpo_loss,
    dpop_loss,
    leanpo_loss,
    lpoi_loss,
    mdpo_loss,
    mmdpo_loss,
    mpo_loss,
    simpo_loss,
    symmpo_loss,
    tdpo_loss,
)

LENGTHS, WIDTH = ((5, 1, 3), (2, 6, 4)), 6  # tokens of chosen and rejected responses


def row(*values):
    return torch.tensor([values])


# --- by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "gap"), [("tdpo1", 0.8 - 0.3), ("tdpo2", 0.25 * (0.8 - 0.3))])
def test_tdpo_by_hand(variant, gap):
    on = row(True, True)
    ratios, kls = (row(0.5, -0.1), row(-0.4, 0.1)), (row(0.1, 0.2), row(0.5, 0.3))
    out = tdpo_loss(*ratios, *kls, on, on, beta=0.5, alpha=0.25, variant=variant)
    assert out.losses.item() == pytest.approx(-logsigmoid(0.5 * (0.4 + 0.3 - gap)))
    assert out.chosen_rewards.item() == pytest.approx(0.5 * 0.7)
    assert out.rejected_rewards.item() == pytest.approx(0.5 * 0.5)


def test_dpa_by_hand():
    # Phrase 1: -1 - 2 against -2; phrase 2: -0.5 against -0.5 - 1. The last token of a row is in none.
    logps, ids = (row(-1.0, -2.0, -0.5, -9.0), row(-2.0, -0.5, -1.0, -7.0)), (row(1, 1, 2, 0), row(1, 2, 2, 0))
    out = dpa_loss(*logps, *ids, row(0.1, 0.2, 0.3, 9.0), row(1, 1, 1, 0), alpha=0.4)
    alignment = -(logsigmoid(-1.0) + logsigmoid(1.0)) / 2
    assert out.losses.item() == pytest.approx(alignment + 0.4 * 0.6)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-3.5, -3.5)


@pytest.mark.parametrize(("normalize", "scores"), [(False, (2.3, -0.8)), (True, (2.3 / 6, -0.8 / 2))])
def test_ddpo_by_hand(normalize, scores):
    # Weight 5 on the chosen response's second token; the rejected one has no changed token.
    ratios, phrases, on = (row(0.3, 0.4), row(-0.5, -0.3)), (row(0, 1), row(0, 0)), row(1, 1)
    out = ddpo_loss(*ratios, on, on, *phrases, beta=0.5, phrase_weight=5.0, normalize=normalize)
    assert out.losses.item() == pytest.approx(-logsigmoid(0.5 * (scores[0] - scores[1])))
    assert out.chosen_rewards.item() == pytest.approx(0.5 * scores[0])


def test_mdpo_by_hand():
    out = mdpo_loss(row(2.0)[0], row(-1.0)[0], row(3.0)[0], beta=0.1, conditional_weight=0.5, anchor_margin=0.3)
    parts = [-logsigmoid(0.3), -logsigmoid(-0.1), -logsigmoid(-0.1)]
    assert [out.terms[k].item() for k in ("dpo", "conditional", "anchor")] == pytest.approx(parts)
    assert out.losses.item() == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2])


def test_simpo_by_hand():
    # Averages -2 and -1: u = 2 * -1 - 0.5
    out = simpo_loss(
        *(row(-1.0, -3.0), row(-1.0, -7.0), row(1, 1), row(1, 0)),
        **{"beta": 2.0, "target_margin": 0.5, "label_smoothing": 0.1, "nll_weight": 0.5},
    )
    assert out.losses.item() == pytest.approx(-0.9 * logsigmoid(-2.5) - 0.1 * logsigmoid(2.5) + 0.5 * 2.0)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-4.0, -2.0)


def test_dpop_by_hand():
    ratios = torch.tensor([-0.2, 0.2, 0.0], requires_grad=True)
    out = dpop_loss(ratios, torch.zeros(3), beta=0.3, penalty_weight=50.0)
    assert out.losses.tolist() == pytest.approx([-logsigmoid(0.3 * x) for x in (-0.2 - 10, 0.2, 0.0)])
    assert out.terms["penalty"].tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert grads(out.losses, ratios)[0][2].item() == pytest.approx(-0.3 * 0.5 / 3)  # at the reference it is DPO's


def test_mpo_by_hand():
    out = mpo_loss(row(2.0)[0], row(-1.0)[0], row(-1.0, -3.0), row(1, 1), beta=0.5, reward_shift=0.25)
    quality = -logsigmoid(0.75) - logsigmoid(0.75)
    assert out.losses.item() == pytest.approx(0.8 * -logsigmoid(1.5) + 0.2 * quality + 2.0)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (1.0, -0.5)


def test_mmdpo_by_hand():
    ratios, scores = (torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])), torch.tensor([2.0, -3.0])
    logps, on = torch.full((2, 1), -3.0), torch.ones(2, 1)
    out = mmdpo_loss(*ratios, scores, logps, on, beta=0.1, nll_weight=0.25)
    betas = [0.1 * (1 + 0.5 * (1 - math.exp(-1.0))), 0.1]
    assert out.terms["beta"].tolist() == pytest.approx(betas)
    assert out.losses.tolist() == pytest.approx([-logsigmoid(2 * b) + 0.75 for b in betas])
    assert out.chosen_rewards.tolist() == pytest.approx([0.1, 0.1])


def test_symmpo_by_hand():
    ratios = [torch.tensor([x]) for x in (2.0, -1.0, 0.5, -2.0, 1.0)]
    out = symmpo_loss(*ratios, beta=0.5, margin_weight=0.1)
    parts = (-logsigmoid(1.5), -logsigmoid(0.75) - logsigmoid(1.5), -logsigmoid(1.0) - logsigmoid(0.5), 2.25)
    assert [out.terms[k].item() for k in ("dpo", "pair", "anchor", "margin")] == pytest.approx(parts)
    assert out.losses.item() == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2] + 0.1 * parts[3])


# --- ragged rows against a float64 loop -----------------------------------------------------------------------------


def rows_of(seed, sign=1.0):
    """Numbers of the tokens of three pairs, by side: lists, and padded with nan."""
    g = torch.Generator().manual_seed(seed)
    rows = [[(sign * torch.randn(n, generator=g, dtype=torch.float64)).tolist() for n in side] for side in LENGTHS]
    return rows, [ragged(side, WIDTH) for side in rows]


MASKS = [length_mask(side, WIDTH) for side in LENGTHS]
PHRASES = ([[1, 0, 2, 2, 0], [1], [2, 1, 0]], [[1, 2], [0, 0, 1, 1, 1, 0], [2, 2, 1, 0]])  # ids of phrase pairs
PHRASE_IDS = [torch.tensor([ids + [0] * (WIDTH - len(ids)) for ids in side]) for side in PHRASES]


def loop_tdpo(ratios, kls, variant):
    u = [sum(w) - sum(y) for w, y in zip(*ratios)]
    gaps = [sum(ky) - sum(kw) for kw, ky in zip(*kls)]
    weight = 1.0 if variant == "tdpo1" else 0.5
    return [-logsigmoid(0.3 * (x - weight * gap)) for x, gap in zip(u, gaps)]


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_tdpo_against_loop(variant):
    (ratios, padded), (kls, padded_kls) = rows_of(1), rows_of(2)
    leaves = [x.requires_grad_() for x in (*padded, *padded_kls)]
    out = tdpo_loss(*leaves, *MASKS, beta=0.3, variant=variant)
    assert out.losses.tolist() == pytest.approx(loop_tdpo(ratios, kls, variant), rel=1e-12)
    *moved, chosen, rejected = torch.autograd.grad(out.losses.sum(), leaves, materialize_grads=True)
    assert all((g[~m] == 0).all() for g, m in zip((*moved, rejected), (*MASKS, MASKS[1])))
    weight = 1.0 if variant == "tdpo1" else 0.5
    torch.testing.assert_close(rejected, weight * moved[1])
    stopped = variant == "tdpo2"
    assert (chosen == 0).all() if stopped else torch.equal(chosen, moved[0])  # the chosen KL's gradient


def test_dpa_against_loop():
    logps, padded = rows_of(3)
    kls, padded_kls = rows_of(4)
    want = []
    for w, y, a, b, kl in zip(*logps, *PHRASES, kls[0]):
        phrases = range(1, max(a) + 1)
        sums = [[sum(x for x, j in zip(side, ids) if j == i) for side, ids in ((w, a), (y, b))] for i in phrases]
        want.append(sum(-logsigmoid(c - r) for c, r in sums) / len(phrases) + 0.4 * sum(kl))
    padded[0].requires_grad_()
    out = dpa_loss(*padded, *PHRASE_IDS, padded_kls[0], MASKS[0], alpha=0.4)
    assert out.losses.tolist() == pytest.approx(want, rel=1e-12)
    (grad,) = grads(out.losses, padded[0])
    assert (grad[PHRASE_IDS[0] == 0] == 0).all() and (grad[PHRASE_IDS[0] > 0] != 0).all()
    alone = dpa_loss(*(x[1:2] for x in (*padded, *PHRASE_IDS, padded_kls[0], MASKS[0])), alpha=0.4)
    torch.testing.assert_close(alone.losses, out.losses[1:2])  # a row's loss does not depend on its batch


@pytest.mark.parametrize("normalize", [False, True])
def test_ddpo_against_loop(normalize):
    ratios, padded = rows_of(5)
    scores = []
    for side, ids in zip(ratios, PHRASES):
        weights = [[3.0 if i else 1.0 for i in row] for row in ids]
        sums = [sum(x * w for x, w in zip(*pair)) for pair in zip(side, weights)]
        scores.append([s / sum(w) for s, w in zip(sums, weights)] if normalize else sums)
    masks = [ids > 0 for ids in PHRASE_IDS]
    padded[1].requires_grad_()
    out = ddpo_loss(*padded, *MASKS, *masks, beta=0.3, phrase_weight=3.0, normalize=normalize)
    assert out.losses.tolist() == pytest.approx([-logsigmoid(0.3 * (w - y)) for w, y in zip(*scores)], rel=1e-12)
    (grad,) = grads(out.losses, padded[1])
    assert (grad[~MASKS[1]] == 0).all() and (grad[MASKS[1]] > 0).all()


def test_nll_of_padded_rows_against_loop():
    """SimPO, MPO and MM-DPO: the mean over all chosen tokens, or a share of a larger batch's."""
    logps, padded = rows_of(6)
    sums, tokens, zeros = [sum(w) for w in logps[0]], sum(LENGTHS[0]), torch.zeros(3, dtype=torch.float64)
    one = {"beta": 0.3, "nll_weight": 1.0}
    losses = {
        "simpo": lambda **more: simpo_loss(*padded, *MASKS, target_margin=0.5, **one, **more),
        "mpo": lambda **more: mpo_loss(zeros, zeros, padded[0], MASKS[0], **one, **more),
        "mmdpo": lambda **more: mmdpo_loss(zeros, zeros, zeros, padded[0], MASKS[0], **one, **more),
    }
    for name, loss in losses.items():
        assert loss().terms["nll"].mean().item() == pytest.approx(-sum(sums) / tokens, rel=1e-12), name
        of_batch = loss(tokens_per_pair=4.0).terms["nll"]
        assert of_batch.tolist() == pytest.approx([-s / 4.0 for s in sums], rel=1e-12), name


# --- identities ---------------------------------------------------------------------------------------------------


def ratios(count=2, seed=7):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * 3


def assert_same(out, want, *inputs):
    """Losses, rewards and gradients."""
    torch.testing.assert_close(out.losses, want.losses)
    torch.testing.assert_close(out.chosen_rewards, want.chosen_rewards)
    torch.testing.assert_close(out.rejected_rewards, want.rejected_rewards)
    for mine, theirs in zip(grads(out.losses, *inputs), grads(want.losses, *inputs)):
        torch.testing.assert_close(mine, theirs)


def test_losses_that_are_dpo():
    chosen, rejected = (x.requires_grad_() for x in ratios())
    logps, on, scores = torch.full((5, 1), -2.0), torch.ones(5, 1), torch.arange(5.0) - 2
    want = dpo_loss(chosen, rejected, beta=0.3)
    for out in (
        ddpo_loss(chosen[:, None], rejected[:, None], on, on, on, 0 * on, beta=0.3, phrase_weight=1.0),
        dpop_loss(chosen, rejected, beta=0.3, penalty_weight=0.0),
        mdpo_loss(chosen, rejected, scores, beta=0.3, conditional_weight=0.0, anchor_weight=0.0),
        mpo_loss(chosen, rejected, logps, on, beta=0.3, preference_weight=1, quality_weight=0, nll_weight=0),
        symmpo_loss(
            *(chosen, rejected, scores, scores, scores),
            **{"beta": 0.3, "pair_weight": 0, "anchor_weight": 0, "margin_weight": 0},
        ),
        mmdpo_loss(chosen, rejected, scores, logps, on, beta=0.3, scale_weight=0.0),
    ):
        assert_same(out, want, chosen, rejected)


def test_tdpo2_without_alpha_is_dpo_but_in_its_rewards():
    chosen, rejected = (x.requires_grad_() for x in ratios())
    on, kl = torch.ones(5, 1), torch.rand(5, 1)
    out = tdpo_loss(chosen[:, None], rejected[:, None], kl, kl, on, on, beta=0.3, alpha=0.0)
    want = dpo_loss(chosen, rejected, beta=0.3)
    torch.testing.assert_close(out.chosen_rewards, want.chosen_rewards + 0.3 * kl[:, 0])
    want.chosen_rewards, want.rejected_rewards = out.chosen_rewards, out.rejected_rewards
    assert_same(out, want, chosen, rejected)


def test_mdpo_is_lpoi_with_two_images():
    chosen, rejected, corrupted = (x.requires_grad_() for x in ratios(3))
    weights = {"beta": 0.3, "dpo_weight": 0.7, "anchor_weight": 2.0}
    out = mdpo_loss(chosen, rejected, corrupted, conditional_weight=0.4, **weights)
    want = lpoi_loss(torch.stack([chosen, corrupted], 1), rejected, list_weight=0.4, **weights)
    assert_same(out, want, chosen, rejected, corrupted)
    torch.testing.assert_close(out.terms["conditional"], want.terms["list"])


def test_mdpo_without_its_contrast_is_dpo_with_an_anchor():
    chosen, rejected, corrupted = ratios(3)
    out = mdpo_loss(chosen, rejected, corrupted, beta=0.3, conditional_weight=0.0)
    anchor = -torch.nn.functional.logsigmoid(0.3 * chosen)
    torch.testing.assert_close(out.losses, dpo_loss(chosen, rejected, beta=0.3).losses + anchor)


def test_simpo_is_leanpo_with_all_pairs_smoothed():
    chosen, rejected = (-x.abs()[:, None].expand(-1, 4).clone().requires_grad_() for x in ratios())
    masks = length_mask([4, 1, 2, 3, 4], 4), length_mask([1, 4, 3, 2, 2], 4)
    options = {"beta": 2.0, "target_margin": 0.5, "label_smoothing": 0.2, "nll_weight": 0.3}
    out = simpo_loss(chosen, rejected, *masks, **options)
    smoothed = {"symmetric_margin": True, "smoothing_threshold": math.inf}
    assert_same(out, leanpo_loss(chosen, rejected, *masks, **smoothed, **options), chosen, rejected)


# --- extremes and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [900.0, -900.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(sign, dtype):
    big = torch.tensor([sign], dtype=dtype, requires_grad=True)
    on, one, kl = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.long), big[:, None].abs()
    pair = (big[:, None], -big[:, None])
    outs = [
        tdpo_loss(*pair, kl, kl * 2, on, on, beta=1.0),
        tdpo_loss(*pair, kl, kl * 2, on, on, beta=1.0, variant="tdpo1"),
        dpa_loss(*pair, one, one, kl, on, alpha=0.4),
        ddpo_loss(*pair, on, on, on, on, beta=1.0, phrase_weight=5.0),
        mdpo_loss(big, -big, -big, beta=1.0),
        simpo_loss(*pair, on, on, beta=2.0, target_margin=0.5, label_smoothing=0.1, nll_weight=1.0),
        dpop_loss(big, -big, beta=0.3, penalty_weight=50.0),
        mpo_loss(big, -big, big[:, None], on, beta=1.0),
        mmdpo_loss(big, -big, big.detach(), big[:, None], on, beta=1.0, nll_weight=1.0),
        symmpo_loss(big, -big, -big, big, -big, beta=1.0),
    ]
    for out in outs:
        assert out.losses.dtype == torch.float32 and torch.isfinite(out.losses).all()
        assert torch.isfinite(grads(out.losses, big)[0]).all()
        assert not any(x.requires_grad for x in (out.chosen_rewards, out.rejected_rewards, *out.terms.values()))


def test_responses_without_tokens_are_refused():
    x, ratios, on, off = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"chosen responses \[1\] of the batch have no tokens"):
        tdpo_loss(x, x, x, x, off, on, beta=0.1)
    with pytest.raises(ValueError, match=r"rejected responses \[1\] of the batch have no tokens"):
        ddpo_loss(x, x, on, off, on, on, beta=0.1, phrase_weight=1.1)
    with pytest.raises(ValueError, match=r"rejected responses \[1\] of the batch have no tokens"):
        simpo_loss(x, x, on, off, beta=2.0, target_margin=0.5)
    with pytest.raises(ValueError, match=r"anchor responses \[1\] of the batch have no tokens"):
        dpa_loss(x, x, on.long(), on.long(), x, off, alpha=0.4)
    for loss in (mpo_loss, lambda *args, **more: mmdpo_loss(*args[:2], ratios, *args[2:], **more)):
        with pytest.raises(ValueError, match=r"chosen responses \[1\] of the batch have no tokens"):
            loss(ratios, ratios, x, off, beta=0.1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 0], "row 1 of the batch has 2 phrases in the chosen and 1 in the rejected"),
        ([0, 0, 0], "row 1 of the batch has 0 phrases in the chosen and 1 in the rejected"),
        ([2, 2, 0], "row 1 of the batch has a phrase without tokens, of 2 on each side"),
    ],
)
def test_phrases_that_are_not_paired_are_refused(ids, message):
    x, on = torch.zeros(2, 3), torch.ones(2, 3)
    chosen, rejected = torch.tensor([[1, 0, 2], ids]), torch.tensor([[2, 1, 0], [1, 2 * (ids[0] == 2), 0]])
    with pytest.raises(ValueError, match=message):
        dpa_loss(x, x, chosen, rejected, x, on, alpha=0.4)


def test_what_makes_no_sense_is_refused():
    x, on = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="variant='tdpo3' is not one of tdpo1, tdpo2"):
        tdpo_loss(x, x, x, x, on, on, beta=0.1, variant="tdpo3")
    scores = torch.tensor([0.0, math.nan])
    with pytest.raises(ValueError, match=r"the scores of pairs \[1\] of the batch are not finite"):
        mmdpo_loss(x[:, 0], x[:, 0], scores, x, on, beta=0.1)
