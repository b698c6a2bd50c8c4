"""The losses of the baselines against the authors' arithmetic: values, rewards, terms and gradients."""

import pytest
import torch
from loss_kit import assert_golden, golden, grads, length_mask, policy_and_reference

from trl_vpo.losses import (
    ddpo_loss,
    dpa_loss,
    dpo_loss,
    dpop_loss,
    mdpo_loss,
    mmdpo_loss,
    mpo_loss,
    simpo_loss,
    symmpo_loss,
    tdpo_loss,
)

SIDES = ("chosen", "rejected")


def cases(name):
    return pytest.mark.parametrize("case", golden(name), ids=lambda case: f"beta {case.get('beta')}")


def leaves(case, *names):
    return [torch.tensor(case[name], requires_grad=True) for name in names]


def tokens(case):
    """(policy's log-probs, masks) of both sides."""
    logps = leaves(case, *(f"{side}_logps" for side in SIDES))
    return logps, [length_mask(case[f"{side}_lengths"], x.size(1)) for side, x in zip(SIDES, logps)]


def rewards(out):
    return {"chosen_rewards": out.chosen_rewards, "rejected_rewards": out.rejected_rewards}


def gradients(out, *inputs, names=SIDES):
    return {f"grad_{name}": grad for name, grad in zip(names, grads(out.losses, *inputs))}


@cases("tdpo")
def test_tdpo_golden(case):
    logits, ratios, _, kl, masks = policy_and_reference(case)
    out = tdpo_loss(*ratios, *kl, *masks, beta=case["beta"], alpha=case["alpha"], variant=case["variant"])
    assert_golden(
        case,
        losses=out.losses,
        loss=out.losses.mean(),
        chosen_kl=out.terms["kl_chosen"],
        rejected_kl=out.terms["kl_rejected"],
        **{f"{side}_logratios": (x * mask).sum(-1) for side, x, mask in zip(SIDES, ratios, masks)},
        **rewards(out),
        **gradients(out, logits, names=["policy_logits"]),
    )


@cases("dpa")
def test_dpa_golden(case):
    logits, _, logps, kl, masks = policy_and_reference(case)
    phrases = torch.tensor(case["phrase_ids"])[:, 1:].chunk(2)
    out = dpa_loss(*logps, *phrases, kl[0], masks[0], alpha=case["alpha"])
    informative = {"phrase_losses", "official_batch_loss"}  # of phrases; of another average
    case["expected"] = {k: v for k, v in case["expected"].items() if k not in informative}
    assert_golden(
        case,
        losses=out.losses,
        loss=out.losses.mean(),
        alignment=out.terms["alignment"],
        kl=out.terms["kl"],
        **rewards(out),
        **gradients(out, logits, names=["policy_logits"]),
    )


@cases("ddpo")
def test_ddpo_golden(case):
    logps, masks = tokens(case)
    ratios = [x - torch.tensor(case[f"ref_{side}_logps"]) for side, x in zip(SIDES, logps)]
    phrases = [torch.tensor(case[f"{side}_phrase_mask"]) for side in SIDES]
    options = {k: case[k] for k in ("beta", "phrase_weight", "normalize")}
    out = ddpo_loss(*ratios, *masks, *phrases, **options)
    assert_golden(case, losses=out.losses, loss=out.losses.mean(), **rewards(out), **gradients(out, *logps))


@cases("mdpo")
def test_mdpo_golden(case):
    names = (*SIDES, "corrupted")
    logps = leaves(case, *(f"policy_{name}_logps" for name in names))
    ratios = [x - torch.tensor(case[f"ref_{name}_logps"]) for name, x in zip(names, logps)]
    weights = ("beta", "dpo_weight", "conditional_weight", "anchor_weight", "anchor_margin")
    out = mdpo_loss(*ratios, **{k: case[k] for k in weights})
    assert_golden(
        case,
        losses=out.losses,
        loss=out.losses.mean(),
        corrupted_rewards=case["beta"] * ratios[2].detach(),
        **out.terms,
        **rewards(out),
        **gradients(out, *logps, names=names),
    )


@cases("simpo")
def test_simpo_golden(case):
    logps, masks = tokens(case)
    options = {k: case[k] for k in ("beta", "target_margin", "label_smoothing", "nll_weight")}
    out = simpo_loss(*logps, *masks, **options)
    assert_golden(
        case,
        preference_losses=out.terms["preference"],
        nll=out.terms["nll"].mean(),
        loss=out.losses.mean(),
        **rewards(out),
        **gradients(out, *logps),
    )


@cases("dpop")
def test_dpop_golden(case):
    logps = leaves(case, *(f"policy_{side}_logps" for side in SIDES))
    ratios = [x - torch.tensor(case[f"ref_{side}_logps"]) for side, x in zip(SIDES, logps)]
    out = dpop_loss(*ratios, beta=case["beta"], penalty_weight=case["lam"])
    assert_golden(
        case,
        losses=out.losses,
        loss=out.losses.mean(),
        penalty=out.terms["penalty"],
        **rewards(out),
        **gradients(out, *logps),
    )


def sums_and_ratios(case):
    logps, masks = tokens(case)
    sums = [x.masked_fill(~mask, 0).sum(-1) for x, mask in zip(logps, masks)]
    return logps, masks, [x - torch.tensor(case[f"ref_{side}_sums"]) for side, x in zip(SIDES, sums)]


@cases("mpo")
def test_mpo_golden(case):
    logps, masks, ratios = sums_and_ratios(case)
    mean = case["beta"] * torch.cat(ratios).mean().detach()
    shift = torch.stack([torch.tensor(x) for x in case["previous_reward_means"]] + [mean]).mean()
    shift = shift if case["running_shift"] else torch.tensor(0.0)
    weights = {k: case[k] for k in ("beta", "preference_weight", "quality_weight", "nll_weight")}
    out = mpo_loss(*ratios, logps[0], masks[0], reward_shift=shift, **weights)
    assert_golden(
        case,
        preference=out.terms["preference"],
        quality=out.terms["quality"],
        nll=out.terms["nll"].mean(),
        reward_mean=mean,
        reward_shift=shift,
        loss=out.losses.mean(),
        **rewards(out),
        **gradients(out, *logps),
    )


@cases("mmdpo")
def test_mmdpo_golden(case):
    logps, masks, ratios = sums_and_ratios(case)
    scores = torch.tensor(case["chosen_scores"]) - torch.tensor(case["rejected_scores"])
    options = {"scale_weight": case["w"], "sensitivity": case["k"], "nll_weight": case["nll_weight"]}
    out = mmdpo_loss(*ratios, scores, logps[0], masks[0], beta=case["beta"], **options)
    assert_golden(
        case,
        preference=out.terms["preference"],
        betas=out.terms["beta"],
        nll=out.terms["nll"].mean(),
        loss=out.losses.mean(),
        **rewards(out),
        **gradients(out, *logps),
    )


@cases("symmpo")
def test_symmpo_golden(case):
    names = ("1_w", "1_l", "1_2", "2_w", "2_2")
    logps = [torch.tensor(case["policy_logps"][name], requires_grad=True) for name in names]
    ratios = [x - torch.tensor(case["ref_logps"][name]) for name, x in zip(names, logps)]
    weights = ("beta", "anchor_beta", "pair_weight", "anchor_weight", "margin_weight")
    out = symmpo_loss(*ratios, **{k: case[k] for k in weights})
    by_key = case["expected"].pop("grads"), case["expected"].pop("rewards")
    for name, grad in zip(names, grads(out.losses, *logps)):
        torch.testing.assert_close(grad, torch.tensor(by_key[0][name]), rtol=1e-4, atol=1e-5)
    for name, reward in (("1_w", out.chosen_rewards), ("1_l", out.rejected_rewards)):
        torch.testing.assert_close(reward, torch.tensor(by_key[1][name]), rtol=1e-4, atol=1e-5)
    assert_golden(case, losses=out.losses, loss=out.losses.mean(), **out.terms)


@cases("visual_contrast")
def test_dpo_between_two_images_golden(case):
    """One response behind chosen and rejected media: mDPO's conditional term."""
    names = [f"{side}_media" for side in SIDES]
    logps = leaves(case, *(f"{name}_logps" for name in names))
    mask = length_mask(case["lengths"], logps[0].size(1))
    moved = [x - torch.tensor(case[f"ref_{name}_logps"]) for name, x in zip(names, logps)]
    out = dpo_loss(*(x.masked_fill(~mask, 0).sum(-1) for x in moved), beta=case["beta"])
    grad = gradients(out, *logps, names=names)
    assert_golden(case, losses=out.losses, loss=out.losses.mean(), **rewards(out), **grad)
