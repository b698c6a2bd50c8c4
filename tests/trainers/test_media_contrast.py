"""Visual contrast: rejected responses behind media of their own, given or drawn. DPO's, and mDPO's on any media."""

from dataclasses import replace
from zlib import crc32

import pytest
import torch
from helpers import message, row, write_clip
from precompute_kit import ahead, lines, on_the_fly
from slow_kit import slow_logits
from step_kit import assert_same_gradients, gradients
from torch.nn.functional import logsigmoid
from trainer_kit import PAIRS, collated, image_rows, shake, trainer_of

from trl_vpo.data.rows import read_row
from trl_vpo.errors import RowError
from trl_vpo.media.corruptions import corrupted
from trl_vpo.media.load import Media, load_image, load_video

FILLED = {"images": None, "videos": None, "rejected_images": None, "rejected_videos": None}


def contrasts(media, images):
    """One answer on two images, two answers on two images, on two clips, on two of each, and an ordinary pair."""
    one, two, three, four, five = PAIRS[:5]
    texts = message("user", "<image>", "<video>", "What moves?")
    rows = [
        row("image", images[:1], one[0], rejected_images=images[1:2]) | {"rejected": None},
        row("image", images[2:], *two, rejected_images=images[:1]),
        row("video", media["video"][:1], three[0], rejected_videos=media["video"][1:]) | {"rejected": None},
        row("image", images[1:2], *four, videos=media["video"][:1], rejected_videos=media["video"][1:]),
        row("image", images[:1], *five),
    ]  # fmt: skip
    rows[3]["prompt"] = texts
    return [FILLED | {"id": str(i)} | r for i, r in enumerate(rows)]


def plain_sums(trainer, examples):
    """Summed log-probs of the chosen and rejected responses of plain rows, each in a call of its own."""
    collator, sums = replace(trainer.data_collator, media_form=None, media_contrast=None), []
    for example in examples:
        tree = collator.encode({k: v for k, v in example.items() if not k.startswith("rejected_")})
        (trunk,) = tree.trunks
        logits = [slow_logits(trainer.model, trunk, branch).log_softmax(-1) for branch in tree.branches]
        parts = zip(logits, tree.branches)
        sums.append([x.gather(-1, torch.tensor(b.ids)[:, None]).sum() for x, b in parts])
    return sums


def by_plain_pairs(trainer, rows):
    """The loss from two plain DPO rows for each: about the chosen media, and about the rejected ones."""
    other = {"rejected": message("assistant", "something else.")}
    chosen, rejected = [], []
    for r in rows:
        chosen.append({**r, "rejected": r["rejected"] or other["rejected"]})
        swapped = {kind: r[f"rejected_{kind}"] or r[kind] for kind in ("images", "videos")}
        answer = {"chosen": other["rejected"], "rejected": r["rejected"] or r["chosen"]}
        rejected.append({**r, **swapped, **answer})
    policy = [(a[0], b[1]) for a, b in zip(plain_sums(trainer, chosen), plain_sums(trainer, rejected))]
    with torch.no_grad(), trainer.model.disable_adapter():
        ref = [(a[0], b[1]) for a, b in zip(plain_sums(trainer, chosen), plain_sums(trainer, rejected))]
    ratios = [(w - rw, y - ry) for (w, y), (rw, ry) in zip(policy, ref)]
    losses = [-logsigmoid(trainer.beta * (w - y)) - trainer.args.anchor_weight * logsigmoid(trainer.beta * w)
              for w, y in ratios]  # fmt: skip
    return sum(losses) / len(losses)


@pytest.mark.parametrize("layout", ["separate", "shared", "padded"])
@pytest.mark.parametrize("name", ["Qwen2-VL", "LLaVA-OneVision"])
def test_given_media_are_those_of_two_plain_pairs(name, layout, images, media, tmp_path):
    """Images, clips and both in one batch with an ordinary row: value and gradients."""
    rows = contrasts(media, images)
    more = {"num_frames": 4, "anchor_weight": 0.3, "beta": 0.7}
    trainer = trainer_of("dpo", tmp_path, rows, name=name, layout="separate" if layout == "padded" else layout, **more)
    trainer.scorer.packs = layout != "padded"
    shake(trainer.model)
    batch = collated(trainer)
    assert batch["branch_trunk"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8] and "image_branches" not in batch
    got, want = trainer.compute_loss(trainer.model, batch), by_plain_pairs(trainer, rows)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(trainer, got), gradients(trainer, want))
    logs = trainer._averages("train")
    assert got.item() == pytest.approx(logs["loss/sigmoid"] + 0.3 * logs["loss/anchor"], rel=1e-5)


def drawn_rows(media, images):
    rows = [
        row("video", media["video"][:1], *PAIRS[0]),
        row("video", media["video"], PAIRS[1][0]) | {"rejected": None},
        row("video", media["video"][1:], *PAIRS[2], rejected_videos=media["video"][:1]),  # what is given is taken
        row(None, (), *PAIRS[3]),
    ]
    return [FILLED | r for r in rows]


@pytest.mark.parametrize("contrast", ["crop", "mask", "blank", "shuffle", "reverse", "drop"])
def test_drawn_media_follow_from_the_rows_texts(contrast, media, images, tmp_path):
    rows = drawn_rows(media, images)
    trainer = trainer_of("dpo", tmp_path, rows, name="Qwen2-VL", num_frames=4, media_contrast=contrast)
    collator = trainer.data_collator
    trees = [collator.encode(example) for example in trainer.train_dataset]
    assert [len(tree.trunks) for tree in trees] == [2, 2, 2, 1]
    again = [collator.encode(example) for example in trainer.train_dataset]
    for tree, same, example in zip(trees, again, rows):
        pixels = [trunk.media.get("pixel_values_videos") for trunk in tree.trunks]
        if example["videos"] is None:
            continue
        assert torch.equal(pixels[1], same.trunks[1].media["pixel_values_videos"])
        load = lambda sources: tuple(load_video(source, collator.video) for source in sources)  # noqa: E731
        clips = load(example["rejected_videos"] or example["videos"])
        read = collator.read(example)
        if example["rejected_videos"] is None:
            seed = crc32(repr([read.prompt, read.chosen, read.rejected]).encode())
            clips = corrupted(Media((), clips), contrast, seed).videos
        want = replace(collator, media_form=None, media_contrast=None).encode_row(
            replace(read, videos=list(clips), media_list=None), ("chosen",)
        )
        assert torch.equal(pixels[1], want.trunks[0].media["pixel_values_videos"])
        assert not torch.equal(pixels[0], pixels[1]) if pixels[0].shape == pixels[1].shape else contrast == "drop"
    assert trees[1].branches[0].ids == trees[1].branches[1].ids and trees[1].branches[1].trunk == 1


def test_images_are_drawn_too_and_refuse_time(images, tmp_path):
    rows = [r | {"rejected": None} for r in image_rows(images, 3)]
    trainer = trainer_of("dpo", tmp_path, rows, name="Qwen2-VL", media_contrast="mask")
    shake(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(RowError, match=r"3 of 3 train rows (.*\n)*.*row 0 .*'reverse' .* an image, which has no time"):
        trainer_of("dpo", tmp_path, rows, name="Qwen2-VL", media_contrast="reverse")
    with pytest.raises(ValueError, match="media_contrast='flip' is not one of crop, mask"):
        trainer_of("dpo", tmp_path, rows, name="Qwen2-VL", media_contrast="flip")


def test_the_same_media_give_log_2_and_no_gradient(media, tmp_path):
    """A clip whose frames are all alike, shuffled."""
    still = [load_image(media["image"][0])] * 4
    rows = [row("video", [still]) | {"rejected": None}]
    trainer = trainer_of("dpo", tmp_path, rows, name="Qwen2-VL", num_frames=4, media_contrast="shuffle")
    shake(trainer.model)
    loss = trainer.compute_loss(trainer.model, collated(trainer))
    assert loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert max(g.abs().max() for g in gradients(trainer, loss).values()) < 1e-6


@pytest.mark.parametrize("method", ["dpo", "mdpo"])
def test_a_precomputed_reference_sees_the_same_media(method, media, images, tmp_path):
    rows = contrasts(media, images) if method == "dpo" else [
        FILLED | r for r in (*image_rows(images, 2), row("video", media["video"], *PAIRS[2]))
    ]  # fmt: skip
    more = {"name": "Qwen2-VL", "num_frames": 4, "media_contrast": "crop"}
    got, want = (make(method, tmp_path, rows, **more) for make in (ahead, on_the_fly))
    sums = want.reference_scores(collated(want)).sums
    torch.testing.assert_close(collated(got)["ref_sums"], sums, rtol=1e-5, atol=1e-5)
    ahead(method, tmp_path, rows, **more)
    assert len(lines(tmp_path / "cache")) == len(rows)
    rows[0] = rows[0] | {"rejected_images": images[2:]}  # other media of one row
    ahead(method, tmp_path, rows, **more)
    assert len(lines(tmp_path / "cache")) == len(rows) + 1
    ahead(method, tmp_path, rows, **more | {"media_contrast": "mask"})  # and of all
    assert len(lines(tmp_path / "cache")) == 2 * len(rows) + 1


def test_the_check_names_rows_whose_media_do_not_fit(images, tmp_path):
    gone, short = str(tmp_path / "gone.png"), write_clip(tmp_path / "short.mp4", frames=2)
    rows = [FILLED | r | {"rejected": None} for r in image_rows(images, 3)]
    rows[0] |= {"rejected_images": [gone]}
    rows[1] |= {"rejected_images": images[:2]}
    rows[2] |= {"rejected_images": images[1:2]}
    with pytest.raises(RowError, match=r"(?s)2 of 3 train .*row 0 .*gone.png does not exist.*row 1 .*has 2 item"):
        trainer_of("dpo", tmp_path, rows, name="Qwen2-VL")
    clips = [row("video", [short]) | {"rejected": None}]
    with pytest.raises(RowError, match=r"row 0.*'drop' needs at least 3 frames, and .*short.mp4 is sampled at 2"):
        trainer_of("dpo", tmp_path, clips, name="Qwen2-VL", media_contrast="drop")


def test_other_methods_refuse_rejected_media(images, tmp_path):
    rows = image_rows(images, 1, rejected_images=images[1:2])
    with pytest.raises(RowError, match=r"row 0 .*only DPO and mDPO read"):
        trainer_of("leanpo", tmp_path, rows, name="Qwen2-VL")
    assert read_row(rows[0], media_form="pair").media_list is not None
