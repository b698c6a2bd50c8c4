"""LeanPO's pairs of the small world, made by the testbed's base."""

import json

import pytest
from leanpo_kit import pipeline

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.testbed import language, world


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    """(items, pipeline, outcomes) of 16 clips of the small world, answered by the shipped base."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trl_vpo.models.local import LocalModel
    from trl_vpo.testbed.tiny_vlm import BASE

    folder = tmp_path_factory.mktemp("clips")
    samples = world.draw_samples("clip", 16, seed=11, habits=False)
    items = []
    for number, sample in enumerate(samples):
        path = str(world.write_sample(sample, folder / f"{number}.mp4"))
        example = {"question": language.PROMPTS["clip"], "answer": language.caption(sample.things)}
        media = Media(videos=(load_video(path, VideoOptions(num_frames=8)),))
        items.append((InputRow(f"r{number}", example, videos=(path,)), media))
    model = LocalModel(
        AutoModelForImageTextToText.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE), batch_size=16
    )
    job = pipeline(model, max_new_tokens=16)
    return items, job, job.make(items)


def test_the_base_makes_rows_to_train_on(base_run):
    items, job, outcomes = base_run
    figures = job.summarize(outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    assert len(rows) >= 10
    # the damage costs answers: motion cannot be told from two frames of a small part
    assert figures["rejected_right"] < figures["plain_right"]
    assert figures["rejected_trust"] < figures["chosen_trust"]
    assert figures["reward_accuracy"] > 0.5
    assert figures["answer_reward"] < 0
    for row in rows:
        read = read_row(row)
        assert read.prompt[0]["content"] == [{"type": "video"}, {"type": "text", "text": language.PROMPTS["clip"]}]
        assert row["videos"] == [items[int(row["id"][1:])][0].videos[0]]
    json.dumps([figures, [outcome.notes for outcome in outcomes]], allow_nan=False)
    check_rewards(items, job, rows)


def check_rewards(items, job, rows):
    """Rewards are those of the plain question and the whole clip."""
    row = rows[0]
    (request,) = [request for title, request in job.preview(*items[int(row["id"][1:])]) if title.startswith("plain")]
    responses = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
    rewards = job.model.average_logps([request] * 2, responses)
    assert rewards == pytest.approx([row["chosen_reward"], row["rejected_reward"]], abs=1e-4)


def test_smaller_batches_give_the_same_rows(base_run):
    items, job, outcomes = base_run
    for start in (0, 5):
        for outcome, again in zip(outcomes[start:], job.make(items[start : start + 3])):
            assert again.notes["answers"] == outcome.notes["answers"]
            assert (again.kind, again.notes.keys()) == (outcome.kind, outcome.notes.keys())
            for name in again.notes.keys() - {"answers"}:
                assert again.notes[name] == pytest.approx(outcome.notes[name], abs=1e-4)
