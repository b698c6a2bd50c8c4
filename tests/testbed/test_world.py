"""The small world: its facts, habits and pixels, the grammar's truth, and the pairs that are made of it."""

import json
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from held_out_kit import read_mp4
from PIL import Image

from studies.testbed import lessons, pairs, truth
from trl_vpo.testbed import language, rows, world
from trl_vpo.testbed.world import STILL, Thing
from trl_vpo.text.phrases import phrase_spans

KINDS = ("clip", "scene")
CLIP = (
    Thing("large", "plain", "red", "square", 0, "rises", 2),
    Thing("small", "striped", "blue", "circle", 2, "falls", 1),
)
TRIO = (*CLIP[:1], Thing("small", "plain", "white", "cross", 1, STILL, 0), *CLIP[1:])
SCENE = tuple(Thing("large", None, "green", noun, lane) for lane, noun in enumerate(("table", "car", "lamp")))


def draws(kind, count=400, **options):
    rng = np.random.default_rng(0)
    return [world.draw_things(kind, rng, **options) for _ in range(count)]


# --- facts and pixels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fifth_of_the_combinations_is_held_out(kind):
    everything = {
        "clip": set(product(world.SIZES, world.TEXTURES, world.COLOURS, world.SHAPES)),
        "scene": set(product(world.SIZES, [None], world.SCENE_COLOURS, world.OBJECTS)),
    }[kind]
    own = world.HELD_OUT & everything
    assert len(own) / len(everything) == pytest.approx(0.2, abs=0.01)
    for number in range(4):  # none of the values is missing from either side
        assert {c[number] for c in own} == {c[number] for c in everything - own} == {c[number] for c in everything}
    assert not own & {thing.combination for habits in (True, False) for t in draws(kind, habits=habits) for thing in t}
    assert own & {thing.combination for things in draws(kind, habits=False, unseen=True) for thing in things}


def test_things_are_as_the_grammar_needs_them():
    for things in draws("clip", habits=False):
        assert len({t.shape for t in things}) == len(things) in (2, 3)
        assert sorted(t.turn for t in things) == [1, 2][: len(things)] if len(things) == 2 else [0, 1, 2]
        assert all((t.motion == STILL) == (t.turn == 0) for t in things)
    for kind in KINDS:
        assert all([t.place for t in ts] == sorted({t.place for t in ts}) for ts in draws(kind, habits=True))
    assert all(len({t.shape for t in ts}) == len(ts) in (3, 4) for ts in draws("scene", habits=True))
    assert not any(t.colour == "red" for ts in draws("scene", habits=False) for t in ts)  # LPOI's ellipse is


def test_habits_rule_the_training_world_only():
    def unusual(habits):
        return np.mean([any(world.as_usual(t) != t for t in things) for things in draws("clip", habits=habits)])

    def missing(habits):
        return np.mean([world.missing_companion(things) is not None for things in draws("scene", habits=habits)])

    assert unusual(True) < 0.12 and unusual(False) > 0.3
    assert missing(True) < 0.28 and missing(False) > 0.4


def test_careless_writers_say_what_is_usual():
    rng = np.random.default_rng(0)
    odd = (Thing("large", "plain", "blue", "square", 0, "falls", 1), *CLIP[1:])
    told = [lessons.as_described(odd, rng) for _ in range(500)]
    assert {t[0].colour for t in told} == {"red", "blue"}
    assert np.mean([t[0].colour == "red" for t in told]) == pytest.approx(lessons.CARELESS, abs=0.07)
    invented = [lessons.as_described(SCENE, rng) for _ in range(200)]
    assert {tuple(t.shape for t in things) for things in invented} == {
        ("table", "car", "lamp"),
        ("table", "cup", "car", "lamp"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_show_the_facts(kind):
    for sample in world.draw_samples(kind, 30, 3, habits=False):
        inked = sample.frames.astype(int).max(-1) > world.BACKGROUND_MAX  # (T, H, W)
        for thing in sample.things:
            x0, y0, x1, y1 = thing.box
            box = inked[0, y0:y1, x0:x1]
            assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()
            assert max(x1 - x0, y1 - y0) > 16 if thing.size == "large" else max(x1 - x0, y1 - y0) < 16
            if kind == "clip":
                lane = inked[:, :, thing.place * world.LANE : (thing.place + 1) * world.LANE]
                heights = [np.argwhere(frame).mean(0)[0] if frame.any() else None for frame in lane]
                assert _motion(heights, thing.turn) == thing.motion
        lanes = {thing.place for thing in sample.things}
        empty = [n for n in range(inked.shape[2] // world.LANE) if n not in lanes]
        assert not any(inked[:, :, n * world.LANE : (n + 1) * world.LANE].any() for n in empty)


def _motion(heights, turn):
    own = heights[4 * turn - 4 : 4 * turn] if turn else heights
    assert all(height is not None for number, height in enumerate(heights) if not turn or number // 4 != turn - 1)
    if None in own:
        return "flashes"
    return "rises" if own[-1] < own[0] - 10 else "falls" if own[-1] > own[0] + 10 else STILL


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
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


def test_a_file_that_is_there_is_whole(tmp_path, monkeypatch):
    """Runs that continue keep it."""

    def half(path, *words, **options):
        path.write_bytes(b"{")
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "_write_clip", lambda frames, path: half(path))
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        world.write_sample(world.draw_samples("clip", 1, 5, habits=False)[0], tmp_path / "0000.mp4")
    with pytest.raises(KeyboardInterrupt):
        rows.write_jsonl([{"id": "a"}], tmp_path / "rows.jsonl")
    assert not [path.name for path in tmp_path.iterdir() if path.name[0] != "."]


def test_clips_decode_to_what_was_drawn(tmp_path):
    colours = set()
    for number, sample in enumerate(world.draw_samples("clip", 40, seed=0, habits=False)):
        path = world.write_sample(sample, tmp_path / f"{number}.mp4")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert float(stream.average_rate) == world.FRAME_RATE
        frames = read_mp4(path)
        assert frames.shape == (world.NUM_FRAMES, world.HEIGHT, 3 * world.LANE, 3)
        for thing in sample.things:
            if (thing.size, thing.texture) == ("large", "plain"):
                x0, y0, x1, y1 = thing.box
                x, y = (x0 + x1) // 2, (y0 + y1) // 2
                seen = frames[0, y - 2 : y + 2, x - 2 : x + 2].mean((0, 1))
                distances = {name: np.abs(seen - rgb).sum() for name, rgb in world.COLOURS.items()}
                assert min(distances, key=distances.get) == thing.colour
                colours.add(thing.colour)
    assert colours == set(world.COLOURS)


def test_rows_follow_the_contract(tmp_path):
    samples, written = rows.write_preferences("scene", 12, seed=6, folder=tmp_path / "scenes")
    loaded = [json.loads(line) for line in rows.write_jsonl(written, tmp_path / "rows.jsonl").read_text().splitlines()]
    assert loaded == written
    for sample, row in zip(samples, loaded):
        assert np.array_equal(np.asarray(Image.open(row["images"][0])), sample.frames[0])
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
        chosen, rejected = (row[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
        assert truth.check_caption(chosen, sample.things).true
        assert truth.check_caption(rejected, sample.things).false
        assert tuple(row["critical_box"]) in {thing.box for thing in sample.things}
    _, clips = rows.write_preferences("clip", 2, seed=6, folder=tmp_path / "clips")
    assert clips[0]["videos"][0].endswith("clips/0000.mp4") and "critical_box" not in clips[0]


def paired_phrases(kind, folder):
    """Yield the responses and the given phrases of 60 rows, in each of which DPA finds pairs of phrases."""
    for row in rows.write_preferences(kind, 60, 11, folder)[1]:
        texts = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
        marked = [row.get(f"{side}_phrases") for side in ("chosen", "rejected")]
        assert len(set(map(len, phrase_spans(*texts, *marked, paired=True)[2:]))) == 1
        yield texts, marked


def test_dpa_finds_pairs_of_phrases_in_every_clip(tmp_path):
    given = 0
    for texts, marked in paired_phrases("clip", tmp_path):
        assert phrase_spans(*texts, *marked) == phrase_spans(*texts)  # those of RRPO, in any case
        given += marked[0] is not None
    assert 0 < given < 10  # events in a wrong order, where words have only moved


def test_dpa_finds_pairs_of_phrases_in_every_scene(tmp_path):
    """Beside an invented sentence stands the true one in its place."""
    given = 0
    for texts, marked in paired_phrases("scene", tmp_path):
        if marked[0] is not None:
            ((start, end),), ((_, stop),) = marked
            true, invented = texts[0][start:end], texts[1][start:stop]
            assert texts[1].count(". ") == texts[0].count(". ") + 1
            assert true in texts[0].split(". ") and invented in texts[1].split(". ") and true != invented
            given += 1
    assert 0 < given < 20


# --- the grammar --------------------------------------------------------------------------------------------------


def test_captions_read_as_written():
    assert language.caption(CLIP, (0, 1, 0)) == (
        "the left one is a large plain red square. the right place holds a small striped blue circle. "
        "first the circle falls, then the square rises."
    )
    assert language.caption(TRIO, (0, 0, 0, 1, 0)).endswith("the circle falls before the square rises. "
                                                            "the cross stays still.")  # fmt: skip
    assert language.caption(SCENE, (1, 0, 0, 1)) == (
        "one sees a large green table. there is a large green car. there is a large green lamp. nothing else is there."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_paraphrases_are_true_and_a_wrong_fact_is_not(kind):
    rng = np.random.default_rng(1)
    for things in draws(kind, 60, habits=False, unseen=True):
        found = truth.captions(things)
        assert len(set(found)) == len(found) in (16, 32) and all(3 <= text.count(".") <= 5 for text in found)
        assert all(truth.check_caption(text, things).true for text in found)
        wrong, about = language.one_fact_wrong(things, rng)
        wording = language.draw_wording(rng)
        check = truth.check_caption(language.caption(wrong, wording), things)
        assert check.parsed and check.false and about in things
        if len(wrong) == len(things):  # near-duplicates differ in a word, or in the order of two events
            pair = (language.caption(one, wording).split() for one in (things, wrong))
            assert 1 <= sum(a != b for a, b in zip(*pair)) <= 4


@pytest.mark.parametrize(
    ("text", "parsed", "false"),
    [
        ("the left one is a large plain red square.", False, 0),  # it breaks off
        ("the left one is a large plain blue square. the right one is a small striped blue circle. "
         "first the square rises, then the circle falls.", True, 2),
        ("the left one is a large plain red square. red red red.", False, 0),
        ("the left one is a small plain red square. red red red.", False, 1),
        ("the left one is a large plain red square. the middle one is a small striped blue circle. "
         "first the circle falls, then the square rises.", True, 2),  # and the right one is left out
        ("the left one is a large plain red square. the right one is a small striped blue circle. "
         "first the circle falls, then the square rises. the cross stays still.", True, 1),
        ("", False, 0),
    ],
)  # fmt: skip
def test_captions_are_checked_sentence_by_sentence(text, parsed, false):
    check = truth.check_caption(text, CLIP)
    assert (check.parsed, len(check.false)) == (parsed, false) and not check.true


@pytest.mark.parametrize("kind", KINDS)
def test_yes_and_no_questions_differ_in_a_word(kind):
    rng = np.random.default_rng(2)
    for things in draws(kind, 60, habits=False):
        yes, no = language.yes_no_pair(things, rng)
        assert (yes.answer, no.answer) == ("yes.", "no.")
        assert sum(a != b for a, b in zip(yes.question.split(), no.question.split())) == 1
    assert language.yes_no_pair(SCENE, rng)[1].question == "Is there a cup?"


# --- pairs --------------------------------------------------------------------------------------------------------


def texts(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [tuple(row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")) for row in rows]


def test_the_kinds_of_pairs(tmp_path):
    near, wording, *flips = (
        texts(pairs.training_rows(kind, "clip", 10, 5, tmp_path)) for kind in ("near", "wording", "flip20", "flip40")
    )
    samples = world.draw_samples("clip", 10, 5, habits=False)
    for sample, one, other in zip(samples, near, wording):
        assert one[0] == other[0] and truth.check_caption(one[0], sample.things).true
        assert truth.check_caption(one[1], sample.things).false
        assert truth.check_caption(other[1], sample.things).false
    assert any(one[1] != other[1] for one, other in zip(near, wording))
    flipped = [{number for number, pair in enumerate(found) if pair == near[number][::-1]} for found in flips]
    assert list(map(len, flipped)) == [2, 4] and flipped[0] < flipped[1]


def test_only_wrong_samples_of_the_base_are_rejected(tmp_path):
    samples, asked = world.draw_samples("scene", 12, 5, habits=False), []

    def sampler(rows):  # right in every second case
        asked.extend(rows)
        first = len(asked) - len(rows)
        said = [language.caption(samples[first + n].things, (0,) * 5) for n in range(len(rows))]
        return [text if n % 2 else "salad." for n, text in enumerate(said)]

    found = texts(pairs.training_rows("policy", "scene", 4, 5, tmp_path, sampler))
    assert len(asked) == 8 and [rejected for _, rejected in found] == ["salad."] * 4
    assert [truth.check_caption(c, s.things).true for (c, _), s in zip(found, samples[::2])] == [True] * 4
    with pytest.raises(ValueError, match="of 9 samples the base describes only 0 wrongly, and 3 are needed"):
        right = {row["id"]: row["chosen"] for row in rows.write_rows(samples, 5, tmp_path / "scenes-5")}
        say = lambda rows: [right[row["id"]][0]["content"][0]["text"] for row in rows]  # noqa: E731
        pairs.training_rows("policy", "scene", 3, 5, tmp_path, say)
