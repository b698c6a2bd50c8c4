"""The small world: repeatable, really encoded, biased where it says so, and checked by hand-made cases."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from studies.testbed.base import read_mp4
from studies.testbed.pretraining import CARELESS, as_described
from trl_vpo.testbed import language, rows, world
from trl_vpo.testbed.world import Thing

RED_SQUARE = Thing("red", "square", "left")
BLUE_SQUARE = Thing("blue", "square", "left")
SCENE = (Thing("green", "cross"), Thing("white", "square"))


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_a_seed_fixes_facts_pixels_text_and_files(kind, tmp_path):
    runs = [rows.write_preferences(kind, 6, seed=3, folder=tmp_path / name / "x") for name in ("one", "two")]
    (samples, written), (again, rewritten) = runs
    for first, second, row, other in zip(samples, again, written, rewritten):
        assert first.things == second.things
        assert np.array_equal(first.frames, second.frames)
        path, repeated = (r.pop("videos" if kind == "clip" else "images")[0] for r in (row, other))
        assert Path(path).read_bytes() == Path(repeated).read_bytes()
        name, repeated = (Path(r.pop("other_images", [""])[0]).name for r in (row, other))
        assert name == repeated and bool(name) == (kind == "scene")
        assert row == other
    different = world.draw_samples(kind, 6, seed=4, habits=False)
    assert any(a.things != b.things for a, b in zip(samples, different))


def test_clips_decode_to_what_was_drawn(tmp_path):
    samples = world.draw_samples("clip", 30, seed=0, habits=False)
    assert {s.things[0].colour for s in samples} == set(world.COLOURS)
    for number, sample in enumerate(samples):
        path = world.write_sample(sample, tmp_path / f"{number}.mp4")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert float(stream.average_rate) == world.FRAME_RATE
        frames = read_mp4(path)
        assert frames.shape == (world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
        x0, y0, x1, y1 = sample.things[0].box
        seen = frames[0, (y0 + y1) // 2 - 2 : (y0 + y1) // 2 + 2, (x0 + x1) // 2 - 2 : (x0 + x1) // 2 + 2]
        distances = {name: np.abs(seen.mean((0, 1)) - rgb).sum() for name, rgb in world.COLOURS.items()}
        assert min(distances, key=distances.get) == sample.things[0].colour


def test_things_move_where_the_facts_say():
    for sample in world.draw_samples("clip", 40, seed=1, habits=False):
        brightness = sample.frames.astype(int).max(-1)  # ink is brighter than any background
        first, last = (np.argwhere(brightness[t] > world.BACKGROUND_MAX).mean(0)[::-1] for t in (0, -1))  # (x, y)
        moved, step = last - first, np.array(world.MOTIONS[sample.things[0].motion])
        assert moved @ step > 0.25 * world.SIZE
        assert abs(moved @ step[::-1]) < 2


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_boxes_hold_all_of_a_shape_and_nothing_more(kind):
    for sample in world.draw_samples(kind, 30, seed=2, habits=False):
        inked = sample.frames[0].astype(int).max(-1) > world.BACKGROUND_MAX
        inside = np.zeros_like(inked)
        for x0, y0, x1, y1 in (thing.box for thing in sample.things):
            inside[y0:y1, x0:x1] = True
            box = inked[y0:y1, x0:x1]
            assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()
        assert inked.any() and not (inked & ~inside).any()


def test_habits_rule_the_training_split_only():
    def share(samples, shape, attribute, value):
        return np.mean([getattr(s.things[0], attribute) == value for s in samples if s.things[0].shape == shape])

    biased, balanced = (world.draw_samples("clip", 1500, seed=0, habits=habits) for habits in (True, False))
    exceptions = 1 - world.HABIT
    assert share(biased, "square", "colour", "red") == pytest.approx(world.HABIT + exceptions / 6, abs=0.06)
    assert share(biased, "circle", "motion", "left") == pytest.approx(world.HABIT + exceptions / 4, abs=0.06)
    assert share(biased, "cross", "colour", "red") == pytest.approx(1 / 6, abs=0.06)
    for attribute, values in (("colour", world.COLOURS), ("motion", world.MOTIONS)):
        shares = [share(balanced, shape, attribute, value) for shape in world.SHAPES for value in values]
        assert shares == pytest.approx([1 / len(values)] * len(shares), abs=0.07)


def test_training_text_follows_the_habit():
    rng = np.random.default_rng(0)
    colours = [as_described((BLUE_SQUARE,), rng)[0].colour for _ in range(1000)]
    assert colours.count("red") / 1000 == pytest.approx(CARELESS, abs=0.05)
    assert set(colours) == {"red", "blue"}
    assert as_described((Thing("blue", "cross", "up"),), rng) == (Thing("blue", "cross", "up"),)


@pytest.mark.parametrize(
    ("things", "text", "parsed", "exact", "false_words"),
    [
        ((RED_SQUARE,), "a red square moves left.", True, True, ()),
        ((BLUE_SQUARE,), "a red square moves left.", True, False, ("red square",)),
        ((RED_SQUARE,), "a red square moves up.", True, False, ("moves up",)),
        ((RED_SQUARE,), "a red square.", True, False, ()),  # says less, but nothing false
        ((RED_SQUARE,), "a red square moves", False, False, ()),
        ((RED_SQUARE,), "", False, False, ()),
        ((RED_SQUARE,), "a red square moves left. a blue cross", False, False, ("blue cross",)),
        (SCENE, "a green cross and a white square.", True, True, ()),
        (SCENE, "a white square and a green cross.", True, False, ()),  # wrong order, but nothing false
        (SCENE, "a green cross and a green cross.", True, False, ("green cross",)),  # there is only one
        (SCENE, "a white cross and a green square.", True, False, ("white cross", "green square")),
        (SCENE, "a green cross moves left.", True, False, ("moves left",)),
    ],
)
def test_captions_are_checked_against_the_facts(things, text, parsed, exact, false_words):
    check = language.check_caption(text, things)
    assert check == language.CaptionCheck(parsed, exact, false_words)
    assert check.hallucinated == bool(false_words)


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_questions_and_false_captions_agree_with_the_facts(kind):
    rng = np.random.default_rng(0)
    for sample in world.draw_samples(kind, 100, seed=5, habits=False):
        truth = language.caption(sample.things)
        assert language.check_caption(truth, sample.things).exact
        wrong = language.check_caption(language.wrong_caption(sample.things, rng), sample.things)
        assert wrong.parsed and wrong.hallucinated
        yes, no = language.yes_no_pair(sample.things, rng)
        assert (yes.answer, no.answer) == ("yes.", "no.")
        assert sum(a != b for a, b in zip(yes.question.split(), no.question.split())) == 1
    assert {language.wrong_caption((BLUE_SQUARE,), rng) for _ in range(10)} == {"a red square moves left."}


def test_rows_follow_the_contract(tmp_path):
    samples, written = rows.write_preferences("scene", 20, seed=6, folder=tmp_path / "scenes")
    path = rows.write_jsonl(written, tmp_path / "rows.jsonl")
    loaded = [json.loads(line) for line in path.read_text().splitlines()]
    assert loaded == written
    for sample, row in zip(samples, loaded):
        assert np.array_equal(np.asarray(Image.open(row["images"][0])), sample.frames[0])
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
        wronged = next(t for t in sample.things if t.name not in row["rejected"][0]["content"][0]["text"])
        assert list(wronged.box) == row["critical_box"]
    _, clips = rows.write_preferences("clip", 2, seed=6, folder=tmp_path / "clips")
    assert clips[0]["videos"][0].endswith("clips/0000.mp4") and "critical_box" not in clips[0]
