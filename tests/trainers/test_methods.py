"""Each method's loss and gradients by hand: one full call per response and image, and the paper's formula on top."""

import itertools

import pytest
import torch
from helpers import message, row
from slow_kit import of_tokens, slow_kl, slow_scores
from step_kit import assert_same_gradients, gradients
from torch.nn.functional import logsigmoid
from trainer_kit import METHODS, PAIRS, collated, image_rows, shake, text_rows, trainer_of

from trl_vpo.errors import UserError


def by_hand(trainer):
    """Rows of (chosen, rejected, chosen on images 2..N): log-probs, the reference's, KL, phrase numbers of each."""
    policy = slow_scores(trainer)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = slow_scores(trainer)
    parts = zip(of_tokens(policy), of_tokens(reference), slow_kl(policy, reference))
    rows = []
    for tree in (trainer.data_collator.encode(example) for example in trainer.train_dataset):
        numbers = [torch.tensor(branch.phrases or [0] * len(branch.ids)) for branch in tree.branches]
        rows.append([(*next(parts), number) for number in numbers])
    return rows


def assert_same_loss(trainer, batch, formula):
    """Value and gradients are those of a formula over the rows by hand, which are returned."""
    got, rows = trainer.compute_loss(trainer.model, batch), by_hand(trainer)
    want = formula(rows, trainer.args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(trainer, got), gradients(trainer, want))
    return rows


def dpo(rows, args):
    losses = [
        -logsigmoid(args.beta * ((w.sum() - rw.sum()) - (y.sum() - ry.sum()))) for (w, rw, *_), (y, ry, *_) in rows
    ]
    return sum(losses) / len(losses)


def mpo(rows, args):
    preference, quality, tokens = args.loss_weights
    total = -tokens * torch.cat([row[0][0] for row in rows]).mean()
    for (w, rw, *_), (y, ry, *_) in rows:
        a, b = args.beta * (w - rw).sum(), args.beta * (y - ry).sum()
        total += (-preference * logsigmoid(a - b) - quality * (logsigmoid(a) + logsigmoid(-b))) / len(rows)
    return total


def dpop(rows, args):
    """Length-desensitized, too: what a response has more than the other counts `ld_alpha`."""
    losses = []
    for (w, rw, *_), (y, ry, *_) in rows:
        n = min(len(w), len(y))
        a, b = ((p - r)[:n].sum() + args.ld_alpha * (p - r)[n:].sum() for p, r in ((w, rw), (y, ry)))
        losses.append(-logsigmoid(args.beta * (a - b - args.penalty_weight * torch.relu(-a))))
    return sum(losses) / len(losses)


def leanpo(rows, args):
    losses, tokens = [], torch.cat([row[0][0] for row in rows])
    for (w, *_), (y, *_) in rows:
        d = w.mean() - y.mean()
        smooth = args.label_smoothing if d.item() < args.smoothing_threshold else 0.0
        right = logsigmoid(args.beta * d - args.target_margin)
        losses.append(-(1 - smooth) * right - smooth * logsigmoid(-args.beta * d - args.target_margin))
    return sum(losses) / len(losses) - args.nll_weight * tokens.mean()


def rrpo(rows, args):
    losses = []
    for (w, rw, kl, pw), (y, ry, _, py) in rows:
        u = args.beta * ((w - rw)[pw > 0].sum() - (y - ry)[py > 0].sum())
        losses.append(-logsigmoid(u) + args.alpha * kl.sum())
    return sum(losses) / len(losses)


def simpo(rows, args):
    losses, tokens = [], torch.cat([row[0][0] for row in rows])
    for (w, *_), (y, *_) in rows:
        u = args.beta * (w.mean() - y.mean()) - args.target_margin
        losses.append(-(1 - args.label_smoothing) * logsigmoid(u) - args.label_smoothing * logsigmoid(-u))
    return sum(losses) / len(losses) - args.nll_weight * tokens.mean()


def tdpo(rows, args):
    losses = []
    for (w, rw, kw, _), (y, ry, ky, _) in rows:
        gap = ky.sum() - kw.sum() if args.variant == "tdpo1" else args.alpha * (ky.sum() - kw.sum().detach())
        losses.append(-logsigmoid(args.beta * ((w - rw).sum() - (y - ry).sum() - gap)))
    return sum(losses) / len(losses)


def ddpo(rows, args):
    losses = []
    for pair in rows:
        weights = [torch.where(number > 0, args.phrase_weight, 1.0) for *_, number in pair]
        s = [((p - r) * w).sum() / (w.sum() if args.normalize else 1) for (p, r, *_), w in zip(pair, weights)]
        losses.append(-logsigmoid(args.beta * (s[0] - s[1])))
    return sum(losses) / len(losses)


def dpa(rows, args):
    losses = []
    for (w, _, kl, pw), (y, _, _, py) in rows:
        pairs = [(w[pw == i].sum(), y[py == i].sum()) for i in range(1, int(pw.max()) + 1)]
        losses.append(sum(-logsigmoid(a - b) for a, b in pairs) / len(pairs) + args.alpha * kl.sum())
    return sum(losses) / len(losses)


def lpoi(rows, args):
    losses = []
    for first, (y, ry, *_), *others in rows:
        s = [args.beta * (w.sum() - rw.sum()) for w, rw, *_ in (first, *others)]
        listed = sum(-(s[k].exp() / sum(x.exp() for x in s[k:])).log() for k in range(len(s) - 1))
        pair = -logsigmoid(s[0] - args.beta * (y.sum() - ry.sum()))
        anchor = -logsigmoid(s[0])
        losses.append(args.list_weight * listed + args.dpo_weight * pair + args.anchor_weight * anchor)
    return sum(losses) / len(losses)


def clips(media):
    """Clips with a box, a span, and a list of two, and an image with a box."""
    one, two, three, four = PAIRS[:4]
    rows = [
        row("video", media["video"][:1], *one, critical_box=[4, 8, 40, 44]),
        row("video", media["video"][:1], *two, critical_span=[0.2, 0.9]),
        row("video", [], *three, video_list=media["video"], prompt=message("user", "<video>", "What moves?")),
        row("image", media["image"][:1], *four, critical_box=[5, 5, 40, 50]),
    ]
    names = ("images", "videos", "critical_box", "critical_span", "video_list")
    return [dict.fromkeys(names) | {k: v for k, v in r.items() if v != []} for r in rows]


def lists(images):
    """Image lists of different lengths: two and three images given, and four drawn from a box."""
    rows = image_rows(images, 3)
    rows[0] |= {"image_list": [images[0], images[1]], "critical_box": None}
    rows[1] |= {"image_list": images[::-1], "critical_box": None, "images": [images[2]]}
    rows[2] |= {"image_list": None, "critical_box": [5, 5, 40, 60]}
    return rows


CASES = {
    "DPO": ("dpo", dpo, {"beta": 0.7}),
    "MPO": ("dpo", mpo, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "DPOP, LD": ("dpo", dpop, {"loss_type": ["dpop"], "penalty_weight": 5.0, "ld_alpha": 0.4}),
    "LeanPO": ("leanpo", leanpo, {}),
    "LeanPO, all smoothed": (
        "leanpo",
        leanpo,
        {"smoothing_threshold": 9.0, "label_smoothing": 0.3, "nll_weight": 0.1},
    ),
    "RRPO": ("rrpo", rrpo, {"alpha": 0.5, "beta": 0.9}),
    "RRPO, published": ("rrpo", rrpo, {}),
    "SimPO": ("simpo", simpo, {}),
    "SimPO, smoothed": ("simpo", simpo, {"label_smoothing": 0.2, "nll_weight": 0.3, "target_margin": 1.5}),
    "TDPO1": ("tdpo", tdpo, {"variant": "tdpo1", "beta": 0.9}),
    "TDPO2": ("tdpo", tdpo, {"alpha": 0.8, "beta": 0.9}),
    "DPA": ("dpa", dpa, {"alpha": 0.3}),
    "DDPO": ("ddpo", ddpo, {"phrase_weight": 3.0, "beta": 0.9}),
    "DDPO, the paper's": ("ddpo", ddpo, {"phrase_weight": 5.0, "beta": 0.5, "normalize": True}),
}


def test_every_method_has_a_case():
    own = {"lpoi", "mdpo", "symmpo"}  # have tests of their own
    missing = set(METHODS) - {method for method, *_ in CASES.values()} - own
    assert not missing, f"write the loss of {sorted(missing)} as a slow loop here, and enter it in CASES"


def mdpo(rows, args):
    losses = []
    for chosen, rejected, crop in rows:
        a, b, c = (args.beta * (p.sum() - r.sum()) for p, r, *_ in (chosen, rejected, crop))
        conditional, anchor = -logsigmoid(a - c), -logsigmoid(a - args.anchor_margin)
        losses.append(
            -args.dpo_weight * logsigmoid(a - b) + args.conditional_weight * conditional + args.anchor_weight * anchor
        )
    return sum(losses) / len(losses)


LAYOUTS = pytest.mark.parametrize("layout", ["separate", "shared"])


@LAYOUTS
@pytest.mark.parametrize("name", ["text", "Qwen2-VL", "LLaVA-1.5"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_by_hand(case, name, layout, images, tmp_path):
    method, formula, more = CASES[case]
    rows = text_rows(4) if name == "text" else [*image_rows(images, 3), *text_rows(1, start=3)]
    trainer = trainer_of(method, tmp_path, rows, name=name, layout=layout, **more)
    shake(trainer.model)
    batch = collated(trainer)
    if method in ("rrpo", "ddpo", "dpa"):  # phrases are a part of the response, on some side
        assert (batch["phrase_mask"] != batch["branch_mask"]).any() and batch["phrase_mask"].any()
    assert_same_loss(trainer, batch, formula)


@LAYOUTS
@pytest.mark.parametrize("name", ["Qwen2-VL", "LLaVA-1.5"])
def test_lpoi_by_hand_with_lists_of_different_lengths(name, layout, images, tmp_path):
    more = {"num_images": 4, "list_weight": 0.7, "anchor_weight": 0.4, "layout": layout}
    trainer = trainer_of("lpoi", tmp_path, lists(images), name=name, **more)
    shake(trainer.model)
    batch = collated(trainer)
    assert (batch["image_branches"] >= 0).sum(-1).tolist() == [2, 3, 4]
    rows = assert_same_loss(trainer, batch, lpoi)
    # Its rewards per image, averaged over the rows that have that many images.
    logs = trainer._averages("train")
    for k in range(4):
        of_rows = [r[k + 1 if k else 0] for r in rows if len(r) > k + 1]
        reward = sum(trainer.beta * (w.sum() - rw.sum()).item() for w, rw, *_ in of_rows) / len(of_rows)
        assert logs[f"rewards/image/{k + 1}"] == pytest.approx(reward, rel=1e-4, abs=1e-5), k


@LAYOUTS
@pytest.mark.parametrize("name", ["Qwen2-VL", "LLaVA-OneVision"])
def test_lpoi_by_hand_on_clips(name, layout, media, tmp_path):
    trainer = trainer_of("lpoi", tmp_path, clips(media), name=name, layout=layout, num_images=3, num_frames=6)
    shake(trainer.model)
    batch = collated(trainer)
    assert (batch["image_branches"] >= 0).sum(-1).tolist() == [3, 3, 2, 3]
    assert_same_loss(trainer, batch, lpoi)
    first = [trainer.data_collator.encode(example).trunks for example in trainer.train_dataset]
    for trunks in first:
        (name,) = (name for name in trunks[0].media if name.startswith("pixel_values"))
        pixels = [trunk.media[name] for trunk in trunks]
        assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in itertools.pairwise(pixels))


@LAYOUTS
@pytest.mark.parametrize("name", ["Qwen2-VL", "LLaVA-1.5"])
def test_mdpo_by_hand(name, layout, images, tmp_path):
    """A crop of its own for each row, the same for policy and reference; one row brings its second image."""
    rows = image_rows(images[:1], 3, critical_box=None, image_list=None)
    rows[2] |= {"images": None, "image_list": images[:2]}
    more = {"conditional_weight": 0.7, "anchor_weight": 0.4, "anchor_margin": 0.2, "beta": 0.9, "layout": layout}
    trainer = trainer_of("mdpo", tmp_path, rows, name=name, **more)
    shake(trainer.model)
    hand = assert_same_loss(trainer, collated(trainer), mdpo)
    logs = trainer._averages("train")
    for k, branch in ((1, 0), (2, 2)):
        reward = sum(trainer.beta * (row[branch][0] - row[branch][1]).sum().item() for row in hand) / 3
        assert logs[f"rewards/image/{k}"] == pytest.approx(reward, rel=1e-4, abs=1e-5)
    trees = [trainer.data_collator.encode(example) for example in trainer.train_dataset]
    pixels = [[next(iter(trunk.media.values())) for trunk in tree.trunks] for tree in trees]
    assert torch.equal(pixels[0][0], pixels[1][0]) and not torch.equal(pixels[0][1], pixels[1][1])
    assert all(not torch.equal(whole, crop) for whole, crop in pixels)


def symmpo(rows, args):
    losses = []
    for branches in rows:
        chosen, rejected, other, chosen_there, other_there = (p.sum() - r.sum() for p, r, *_ in branches)
        a, b = chosen - other, other_there - chosen_there
        pair = -logsigmoid(args.beta * a) - logsigmoid(args.beta * b)
        anchor = -logsigmoid(args.beta * chosen) - logsigmoid(args.beta * other_there)
        dpo = -logsigmoid(args.beta * (chosen - rejected))
        losses.append(dpo + args.pair_weight * pair + args.anchor_weight * anchor + args.margin_weight * (a - b) ** 2)
    return sum(losses) / len(losses)


@LAYOUTS
@pytest.mark.parametrize("name", ["Qwen2-VL", "LLaVA-OneVision"])
def test_symmpo_by_hand(name, layout, media, tmp_path):
    """An image row and a video row: y_w, y_l and y' on m, y_w and y' on m'."""
    kinds = ("images", "videos", "other_images", "other_videos")
    rows = [
        row(kind, media[kind][:1], *PAIRS[i], **{f"other_{kind}s": media[kind][1:2]})
        | {"other_chosen": message("assistant", PAIRS[i + 2][0])}
        for i, kind in enumerate(("image", "video"))
    ]
    more = {"pair_weight": 0.7, "anchor_weight": 0.4, "margin_weight": 0.01, "beta": 0.9, "num_frames": 4}
    trainer = trainer_of(
        "symmpo", tmp_path, [dict.fromkeys(kinds) | r for r in rows], name=name, layout=layout, **more
    )
    shake(trainer.model)
    batch = collated(trainer)
    assert batch["branch_trunk"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert (batch["image_branches"].tolist(), batch["other_branches"].tolist()) == ([[0, 3], [5, 8]], [[2, 4], [7, 9]])
    hand = assert_same_loss(trainer, batch, symmpo)
    logs = trainer._averages("train")
    for key, branch in (("image/1", 0), ("image/2", 3), ("other/1", 2), ("other/2", 4)):
        reward = sum(trainer.beta * (r[branch][0] - r[branch][1]).sum().item() for r in hand) / 2
        assert logs[f"rewards/{key}"] == pytest.approx(reward, rel=1e-4, abs=1e-5), key


@LAYOUTS
def test_mdpo_on_clips_and_several_images(layout, media, images, tmp_path):
    """Crops of all images of a row, one crop for all frames of a clip, and a row with second media of its own."""
    rows = [
        row("image", images[:2], *PAIRS[0]),
        row("video", media["video"][:1], *PAIRS[1]),
        row("video", media["video"][1:], *PAIRS[2], rejected_videos=media["video"][:1]),
    ]
    filled = {"images": None, "videos": None, "rejected_videos": None}
    more = {"layout": layout, "num_frames": 4, "conditional_weight": 0.7, "anchor_margin": 0.2}
    trainer = trainer_of("mdpo", tmp_path, [filled | r for r in rows], name="Qwen2-VL", **more)
    shake(trainer.model)
    batch = collated(trainer)
    assert batch["image_branches"].tolist() == [[0, 2], [3, 5], [6, 8]]
    assert_same_loss(trainer, batch, mdpo)
    for example in trainer.train_dataset:
        own, other = trainer.data_collator.encode(example).trunks
        (name,) = (name for name in own.media if name.startswith("pixel_values"))
        assert own.media[name].shape != other.media[name].shape or not torch.equal(own.media[name], other.media[name])


def test_dpa_with_several_pairs_in_a_row(tmp_path):
    """Phrases that are given out of order, and rows with different numbers of them."""
    rows = text_rows(3)
    numbers = ([[[0, 1], [2, 5]], [[7, 11], [0, 1]]], [[[2, 8]], [[0, 3]]], [[[0, 3], [4, 7]], [[0, 4], [4, 7]]])
    for r, (chosen, rejected) in zip(rows, numbers):
        r |= {"chosen_phrases": chosen, "rejected_phrases": rejected}
    trainer = trainer_of("dpa", tmp_path, rows, alpha=0.2)
    shake(trainer.model)
    hand = assert_same_loss(trainer, collated(trainer), dpa)
    assert [int(side[3].max()) for pair in hand for side in pair] == [2, 2, 1, 1, 2, 2]
    first = hand[0][1][3]
    assert (first == 1).nonzero().min() > (first == 2).nonzero().max()
    rows[1]["rejected_phrases"] = [[0, 1], [1, 3]]
    with pytest.raises(UserError, match="1 phrases in the chosen and 2 in the rejected"):
        trainer_of("dpa", tmp_path, rows)
    trainer.data_collator.encode(trainer.train_dataset[1] | {"chosen_phrases": [[2, 8]]})
    halves = {"chosen_phrases": [[2, 5], [5, 8]], "rejected_phrases": [[0, 3], [4, 7]]}  # of "square"
    with pytest.raises(UserError, match=r"t1.*two phrases of the chosen response share a token"):
        trainer.data_collator.encode(trainer.train_dataset[1] | halves)


def test_rrpo_rewards_nothing_outside_the_phrases(images, tmp_path):
    """Phrases that are given count, and only they: the rest of a response reaches the loss through the KL alone."""
    rows = text_rows(2)
    for r, phrases in zip(rows, ([[2, 5]], [[0, 1]])):
        r |= {"chosen_phrases": phrases, "rejected_phrases": []}
    trainer = trainer_of("rrpo", tmp_path, rows, alpha=0.0, beta=1.0)
    shake(trainer.model)
    hand = by_hand(trainer)
    masks = [chosen[3] > 0 for chosen, _ in hand]
    assert all(0 < m.sum() < len(m) for m in masks) and not any(rejected[3].any() for _, rejected in hand)
    want = sum(-logsigmoid((w - rw)[p > 0].sum()) for (w, rw, _, p), _ in hand) / 2
    torch.testing.assert_close(trainer.compute_loss(trainer.model, collated(trainer)), want, rtol=1e-5, atol=0)
