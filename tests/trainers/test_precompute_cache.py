"""The cache of precomputed reference log-probs: what is computed again when something changed, and what is not."""

import json
from dataclasses import dataclass

import pytest
import torch
from helpers import row, write_image
from peft import get_peft_model
from precompute_kit import ahead, lines
from trainer_kit import PAIRS, collated, fresh, image_rows, lora, shake, text_rows

from trl_vpo.data.collator import PreferenceCollator


@pytest.fixture
def own_images(tmp_path):
    """Four pictures that a test may overwrite."""
    return [write_image(tmp_path / f"{i}.png", (56, 56), i) for i in range(4)]


def assert_sums_are_the_references(trainer):
    batch = collated(trainer)
    torch.testing.assert_close(batch["ref_sums"], trainer.reference_scores(batch).sums, rtol=1e-5, atol=1e-5)


class Killed(Exception):
    pass


def test_an_interrupted_run_continues_where_it_stopped(tmp_path):
    model, tokenizer = fresh()

    def kill(*_):
        if (tmp_path / "cache").exists() and len(lines(tmp_path / "cache")) == 4:
            raise Killed

    model.get_input_embeddings().register_forward_hook(kill)
    with pytest.raises(Killed):
        ahead("dpo", tmp_path, model=model, processor=tokenizer, layout="shared")
    assert len(lines(tmp_path / "cache")) == 4  # two batches of two
    trainer = ahead("dpo", tmp_path)
    assert len(lines(tmp_path / "cache")) == 8 and len({e["row"] for e in lines(tmp_path / "cache")}) == 8
    whole = ahead("dpo", tmp_path, cache="other")
    torch.testing.assert_close(collated(trainer)["ref_sums"], collated(whole)["ref_sums"])


def test_a_chat_template_with_a_date(tmp_path, monkeypatch):
    """The prompts of another day have other log-probs."""
    import transformers.utils.chat_template_utils as templates

    model, tokenizer = fresh()
    tokenizer.chat_template = "<|im_start|>system\n{{ strftime_now('%d') }}<|im_end|>\n" + tokenizer.chat_template
    for day, count in ((1, 8), (1, 8), (2, 16)):
        now = type("Fixed", (templates.datetime,), {"now": classmethod(lambda cls, day=day: cls(2026, 12, day))})
        monkeypatch.setattr(templates, "datetime", now)
        trainer = ahead("dpo", tmp_path, model=model, processor=tokenizer)
        assert len(lines(tmp_path / "cache")) == count
    assert_sums_are_the_references(trainer)


@pytest.mark.parametrize("tail", [b"", b'{"row": "12', b"\x00\xff\x00", b'{"row": "1"}\n[]'])
def test_a_line_that_is_not_complete(tail, tmp_path, caplog):
    first = ahead("dpo", tmp_path)
    (shard,) = (tmp_path / "cache").glob("*.jsonl")
    kept = shard.read_bytes()
    last = kept.splitlines()[-1]
    shard.write_bytes(kept[: -len(last) // 2] + tail)
    second = ahead("dpo", tmp_path)
    new = max((tmp_path / "cache").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert new != shard
    assert [json.loads(line)["row"] for line in new.read_text().splitlines()] == [json.loads(last)["row"]]
    assert "line 8 is not complete" in caplog.text
    torch.testing.assert_close(collated(second)["ref_sums"], collated(first)["ref_sums"])


def edit(number, **more):
    return lambda rows: [row_ | more if i == number else row_ for i, row_ in enumerate(rows)]


SPEECH = [{"role": "assistant", "content": [{"type": "text", "text": "something else."}]}]
ROWS = {  # what happens to the rows -> how many are computed again
    "nothing": (lambda rows: rows, 0),
    "another order": (lambda rows: rows[::-1], 0),
    "one less": (lambda rows: rows[1:], 0),
    "an id": (edit(1, id="new", source="somewhere"), 0),
    "a column that DPO does not read": (edit(1, critical_box=[1, 2, 3, 4]), 0),
    "a response": (edit(1, rejected=SPEECH), 1),
    "one more": (lambda rows: [*rows, *text_rows(1)], 1),
    "a row twice": (lambda rows: [*rows, rows[0] | {"id": "twin"}], 0),
}


@pytest.mark.parametrize("change", ROWS)
def test_a_changed_row(change, own_images, tmp_path):
    rows = image_rows(own_images)
    ahead("dpo", tmp_path, rows, name="Qwen2-VL")
    edited, again = ROWS[change]
    trainer = ahead("dpo", tmp_path, edited(rows), name="Qwen2-VL")
    assert len(lines(tmp_path / "cache")) == 4 + again
    assert_sums_are_the_references(trainer)


@pytest.mark.parametrize("form", ["path", "frames", "bytes"])
def test_a_changed_media_file(form, own_images, tmp_path):
    def rows():
        if form == "frames":
            return [row("video", [{"video": [own_images[i], own_images[i]]}], *PAIRS[i]) for i in range(4)]
        if form == "bytes":
            return [row("image", [{"bytes": open(p, "rb").read()}], *PAIRS[i]) for i, p in enumerate(own_images)]
        return image_rows(own_images)

    before = ahead("dpo", tmp_path, rows(), name="Qwen2-VL")
    write_image(tmp_path / "2.png", (112, 56), 5)
    after = ahead("dpo", tmp_path, rows(), name="Qwen2-VL")
    assert len(lines(tmp_path / "cache")) == 5
    same = [torch.equal(*(collated(t)["ref_sums"].view(4, 2)[i] for t in (before, after))) for i in range(4)]
    assert same == [True, True, False, True]


def other_weights(more):
    more["model"].lm_head.weight.data[0, 0] += 1e-3


def other_template(more):
    more["processor"].chat_template += "\n"


def other_pixels(more):
    more["processor"].image_processor.image_mean = [0.5, 0.5, 0.5]


CONTEXT = {  # what changes, between two runs of four rows -> how many are computed again
    "weights": (other_weights, {}, 4),
    "chat template": (other_template, {}, 4),
    "image processor": (other_pixels, {}, 4),
    "max_pixels": (None, {"max_pixels": 28 * 28}, 4),
    "num_frames": (None, {"num_frames": 3}, 4),
    "precision": (None, {"bf16": True}, 4),
    "batch size": (None, {"precompute_ref_batch_size": 3, "per_device_train_batch_size": 1}, 0),
    "max_length": (None, {"max_length": 4000}, 0),
    "learning rate, beta": (None, {"learning_rate": 1e-6, "beta": 0.3}, 0),
    "adapter": (None, {"peft": None, "peft_config": lora(r=2, modules_to_save=["lm_head"])}, 0),
    "no adapter": (None, {"peft": None}, 0),
}


@pytest.mark.parametrize("change", CONTEXT)
def test_changed_settings(change, own_images, tmp_path):
    ahead("dpo", tmp_path, image_rows(own_images), name="Qwen2-VL")
    apply, more, again = CONTEXT[change]
    model, processor = fresh("Qwen2-VL")
    more = {"model": model, "processor": processor, "name": "Qwen2-VL", **more}
    if apply:
        apply(more)
    trainer = ahead("dpo", tmp_path, image_rows(own_images), **more)
    assert len(lines(tmp_path / "cache")) == 4 + again
    if "bf16" not in more:
        assert_sums_are_the_references(trainer)


@pytest.mark.parametrize(("knob", "value"), [("num_images", 3), ("visual_prompt", False)])
def test_changed_lists(knob, value, own_images, tmp_path):
    rows = image_rows(own_images, critical_box=[4, 4, 40, 30])
    for more in ({}, {}, {knob: value}):
        ahead("lpoi", tmp_path, rows, name="Qwen2-VL", **more)
    assert len(lines(tmp_path / "cache")) == 8
    ahead("lpoi", tmp_path, edit(0, critical_box=[4, 4, 41, 30])(rows), name="Qwen2-VL")
    assert len(lines(tmp_path / "cache")) == 9


@dataclass
class Hinting(PreferenceCollator):
    """Reads more into a row than its columns say."""

    hint: str = ""

    def __call__(self, examples):
        hint = {"type": "text", "text": self.hint}
        turns = [example["prompt"][0] for example in examples]
        asked = [[turn | {"content": [hint, *turn["content"]]}] for turn in turns]
        return super().__call__([example | {"prompt": prompt} for example, prompt in zip(examples, asked)])


def test_a_collator_of_ones_own_is_computed_anew(tmp_path):
    tokenizer = fresh()[1]
    for hint in ("Look. ", "Look twice. "):
        trainer = ahead("dpo", tmp_path, text_rows(4), data_collator=Hinting(tokenizer, hint=hint))
        assert_sums_are_the_references(trainer)
    assert len(lines(tmp_path / "cache")) == 8


def test_a_trained_adapter_as_reference(tmp_path):
    """Its weights and its scale are the reference's."""
    for seed, alpha in [(3, 8), (3, 8), (4, 8), (3, 16)]:
        model, tokenizer = fresh()
        torch.manual_seed(0)
        model = get_peft_model(model, lora(text=True, lora_alpha=alpha))
        shake(model, seed, scale=0.1)
        assert_sums_are_the_references(ahead("dpo", tmp_path, model=model, processor=tokenizer, peft=None))
    assert len(lines(tmp_path / "cache")) == 3 * 8
