"""Every family of docs/models.md: right log-probs, and steps of every method that move LoRA and nothing else."""

import math

import model_table
import pytest
import torch
from families import FAMILIES, KINDS, LANGUAGE_MODEL, build
from helpers import message, row
from peft import LoraConfig
from slow_kit import of_tokens, slow_scores
from step_kit import losses_of, snapshot
from trainer_kit import BY_SPEED, collated, trainable, trainer_of

from trl_vpo.data.rows import response_text


def dataset(kind, media, **more):
    second = row(kind, [media[kind][1]], "a square.", "two circles are in the picture.", **more)
    return [row(kind, [media[kind][0]], **more), second] * 2


def trainer_on(method, name, rows, folder, lora=LANGUAGE_MODEL):
    model, processor = build(name)
    peft = LoraConfig(r=4, target_modules=lora) if lora else None
    more = {"num_frames": 6, "peft": None, "peft_config": peft}
    return trainer_of(method, folder, rows, model=model, processor=processor, **more)


def assert_logps_are_those_of_full_calls(trainer):
    with torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, collated(trainer))
        for got, mask, want in zip(scores.logps, scores.mask, of_tokens(slow_scores(trainer)), strict=True):
            torch.testing.assert_close(got[mask], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_logps_of_a_ragged_batch_are_those_of_full_calls(name, kind, media, tmp_path):
    """Media of different shapes, responses of different lengths and a text-only row in one batch."""
    trainer = trainer_on("dpo", name, [*dataset(kind, media)[:2], row(None)], tmp_path, lora=None)
    assert_logps_are_those_of_full_calls(trainer)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_media_matter(name, kind, media, tmp_path):
    """The same texts about another picture score differently: the media do reach the model."""
    trainer = trainer_on("dpo", name, [row(kind, [path]) for path in media[kind]], tmp_path, lora=None)
    with torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, collated(trainer))
    first, second = scores.sums[scores.chosen]
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("method", BY_SPEED)
def test_two_steps_move_the_adapter_and_nothing_else(method, name, kind, media, tmp_path):
    more = {"critical_box": [4, 8, 30, 40]} if method == "lpoi" else {}
    if method == "symmpo":
        more = {f"other_{kind}s": media[kind][:1], "other_chosen": message("assistant", "nothing moves.")}
    trainer = trainer_on(method, name, dataset(kind, media, **more), tmp_path)
    before, adapter = snapshot(trainer.model), trainable(trainer.model)
    assert all("lora_" in k and "vision" not in k and "visual" not in k for k in adapter) and adapter
    trainer.train()
    assert all(map(math.isfinite, losses_of(trainer))) and len(losses_of(trainer)) == 2
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(adapter)


@pytest.mark.parametrize("name", [n for n, (_, video) in FAMILIES.items() if video])
def test_mixed_text_image_and_video_rows(name, media, tmp_path):
    """Rows of all kinds share a dataset (Arrow fills the absent columns with None) and every batch."""
    rows = [row("image", [media["image"][1]]), row(None), row("video", [media["video"][0]])]
    trainer = trainer_on("rrpo", name, [{"images": None, "videos": None, **r} for r in rows], tmp_path)
    assert_logps_are_those_of_full_calls(trainer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_table_in_the_docs_is_what_the_models_give():
    """tests/kits/model_table.py writes it."""
    lines = [model_table.line(*family) for family in model_table.built()]
    assert model_table.page_with(lines) == model_table.PAGE.read_text(encoding="utf-8")


def test_the_response_text_is_what_is_trained(media, tmp_path):
    trainer = trainer_on("dpo", "Qwen2-VL", dataset("image", media), tmp_path, lora=None)
    example = trainer.train_dataset[0]
    ids = trainer.data_collator.encode(example).branches[0].ids
    text = trainer.processing_class.tokenizer.decode(ids)
    assert text == response_text(example["chosen"]) + "<|im_end|>\n"
