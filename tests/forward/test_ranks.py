"""The padding rows that a rank gets beside others. (Real processes: tests/trainers/test_distributed.py.)"""

import pytest
import torch
from families import FAMILIES
from helpers import row
from trainer_kit import collated, shake, trainer_of

from trl_vpo.forward import ranks

VIDEO_FAMILIES = [name for name, (_, video) in FAMILIES.items() if video]


def rows(*kinds, media):
    """One row for each kind: text, image or video."""
    sources = {"text": (None, ()), "image": ("image", media["image"][:1]), "video": ("video", media["video"][:1])}
    empty = {"images": None, "videos": None}
    return [empty | row(*sources[kind]) | {"id": kind} for kind in kinds]


def agreed(trainer, batch, others, monkeypatch, *, sharding=None, trains_vision=False):
    """The batch after another rank said which vision inputs its call has."""
    monkeypatch.setattr(ranks, "PartialState", lambda: type("State", (), {"num_processes": 2}))
    monkeypatch.setattr(ranks, "gather_object", lambda mine: [*mine, *others])
    ranks.sync_calls(batch, trainer._padding_rows, sharding=sharding, trains_vision=trains_vision)
    return batch


def vision_calls(trainer, batch):
    """(log-probs of the batch, how often images or videos went through the tower)"""
    depths, depth, features = [], 0, trainer.scorer._vision.features

    def counted(name, compute):
        nonlocal depth
        depths.append(depth)  # Qwen3-VL computes the features of a video as those of an image
        depth += 1
        try:
            return features(name, compute)
        finally:
            depth -= 1

    trainer.scorer._vision.features = counted
    with torch.no_grad():
        logps = trainer.concatenated_forward(trainer.model, batch).logps
    return logps, depths.count(0)


def assert_passes(count, trainer, others, sharding, monkeypatch):
    """Images or videos go through the tower so often beside those of another rank, and no score changes."""
    shake(trainer.model)
    trainer.model.eval()
    with torch.no_grad():
        want = trainer.concatenated_forward(trainer.model, collated(trainer)).logps
    batch = agreed(trainer, collated(trainer), others, monkeypatch, sharding=sharding)
    got, passes = vision_calls(trainer, batch)
    assert passes == count
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return batch


@pytest.mark.parametrize("layout", ["auto", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_passes_the_tower_of_a_rank_that_has_text_only(name, layout, media, tmp_path, monkeypatch):
    trainer = trainer_of("dpo", tmp_path, rows("text", "text", media=media), name=name, layout=layout)
    batch = assert_passes(1, trainer, [["pixel_values"]], "fsdp", monkeypatch)
    assert len(batch["padded"]["media"]) == 3


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_video_passes_the_tower_of_a_rank_that_has_images(name, media, tmp_path, monkeypatch):
    """They are different inputs of the tower, except in SmolVLM and InternVL."""
    trainer = trainer_of("dpo", tmp_path, rows("image", "text", media=media), name=name, num_frames=4)
    video = trainer._padding_rows("pixel_values_videos")["media"][0]
    others = [[n for n in ranks.VISION_INPUTS if n in video]]
    assert_passes(1 if others == [["pixel_values"]] else 2, trainer, others, "zero3", monkeypatch)


IMAGE, VIDEO = "pixel_values", "pixel_values_videos"


@pytest.mark.parametrize(
    ("present", "others", "sharding", "trains_vision", "missing"),
    [
        ([], [[], [IMAGE]], "fsdp", False, [IMAGE]),
        ([], [[], [VIDEO]], "fsdp", False, [IMAGE]),  # the smaller one: both go through the same weights
        ([], [[], [VIDEO]], "zero3", False, [VIDEO]),
        ([IMAGE], [[IMAGE], [VIDEO]], "fsdp", False, []),
        ([IMAGE], [[IMAGE], [VIDEO]], "zero3", False, [VIDEO]),
        ([IMAGE], [[IMAGE], [IMAGE, VIDEO]], "fsdp", False, [VIDEO]),
        ([IMAGE, VIDEO], [[IMAGE, VIDEO], []], "fsdp", True, []),
        ([], [[], []], "zero3", True, []),  # no rank calls it
        ([], [[], [IMAGE]], None, False, []),  # every rank holds all weights
        ([], [[], []], None, True, [IMAGE]),  # DDP waits for the gradients of the tower
        ([VIDEO], [[VIDEO], []], None, True, []),
    ],
)
def test_what_a_call_needs(present, others, sharding, trains_vision, missing):
    assert ranks._missing(present, others, sharding, trains_vision) == missing


def test_a_rank_that_needs_nothing_asks_nobody(media, tmp_path, monkeypatch):
    """Each holds all weights, and nothing of the tower is trained."""
    trainer = trainer_of("dpo", tmp_path, rows("text", "text", media=media), name="LLaVA-NeXT-Video", layout="shared")
    monkeypatch.setattr(ranks, "PartialState", lambda: type("State", (), {"num_processes": 2}))
    batch = collated(trainer)
    ranks.sync_calls(batch, trainer._padding_rows, sharding=None, trains_vision=False)
    assert batch["padded"] is batch


def test_one_process_agrees_with_itself(media, tmp_path):
    trainer = trainer_of("dpo", tmp_path, rows("text", "image", media=media), name="Qwen2-VL")
    batch = collated(trainer)
    trainer.scorer.sync_calls(batch, trainer._padding_rows, "fsdp")
    assert "padded" not in batch and not trainer._padding_rows.cache_info().currsize
