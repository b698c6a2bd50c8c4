"""`trl-vpo evaluate`: every number against the slow way, tasks and adapters side by side."""

import json
from dataclasses import replace

import numpy as np
import pytest
from held_out_kit import (
    EVERYWHERE,
    adapted,
    assert_same_record,
    evaluate,
    plain,
    processor,
    records,
    said,
    slow_scores,
    slow_sum,
    write_adapter,
    write_held_out,
)
from PIL import Image

from studies.testbed import pretraining
from trl_vpo.evaluate.probes import damaged, row_seed
from trl_vpo.evaluate.table import results_tables
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.media.masking import masked_image_list
from trl_vpo.runs.console import make_console
from trl_vpo.testbed import language


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def held_out(folder):
    return write_held_out(folder)


@pytest.fixture(scope="module")
def adapters(folder):
    """One of the language model, one of the vision tower too, and one that changes nothing."""
    return {
        "words": write_adapter(folder / "words", seed=1),
        "eyes": write_adapter(folder / "eyes", seed=2, r=2, target_modules=EVERYWHERE, scale=0.5),
        "idle": write_adapter(folder / "idle", scale=0),
    }


@pytest.fixture(scope="module")
def run(folder, held_out, adapters):
    """(results, records) of the base and all three adapters."""
    results = evaluate(held_out, folder / "run", *adapters.values(), batch_size=4, answer_preferences=True)
    return results, records(folder / "run")


@pytest.fixture(scope="module")
def models(adapters):
    return {"base": plain()} | {name: adapted(path) for name, path in adapters.items()}


def row_of(held_out, kind, end=""):
    return next(row for name, row in held_out.rows.items() if name.startswith(f"{kind}-") and name.endswith(f"0{end}"))


def nearly(value):
    return pytest.approx(value, abs=1e-4)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contestant", ["base", "words", "eyes"])
def test_a_pair_about_a_clip_agrees_with_the_long_way(held_out, run, models, contestant):
    row = row_of(held_out, "clip")
    record, sample = run[1][row["id"], contestant], held_out.samples[row["id"]]
    asked = (processor(), sample, language.PROMPTS["clip"])
    logps, tokens = slow_scores(models[contestant], *asked, said(row, "chosen"))
    before, _ = slow_scores(models["base"], *asked, said(row, "chosen"))
    assert record["chosen_logp"] == nearly(logps.gather(1, tokens[:, None]).sum().item())
    assert record["rejected_logp"] == nearly(slow_sum(models[contestant], *asked, said(row, "rejected")))
    assert record["chosen_tokens"] == len(tokens)
    kl = (before.exp() * (before - logps)).sum().item()
    assert record["chosen_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert (kl > 0.01) == (contestant != "base")
    media = Media(videos=(load_video(sample.frames, VideoOptions(num_frames=8)),))
    changed = {kind: damaged(media, kind, row_seed(0, row["id"])).videos[0].frames for kind in record["damaged_logps"]}
    assert list(changed) == ["shuffled", "masked", "blank"]
    assert not changed["blank"].any()
    for kind, frames in changed.items():
        assert not (frames == sample.frames).all()
        seen = (processor(), replace(sample, frames=frames), language.PROMPTS["clip"], said(row, "chosen"))
        assert record["damaged_logps"][kind] == nearly(slow_sum(models[contestant], *seen)), kind


def test_shuffling_leaves_no_frame_in_its_place():
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    clip = load_video(frames, VideoOptions(num_frames=5))
    shuffled = damaged(Media(videos=(clip,)), "shuffled", 3).videos[0]
    order = shuffled.frames[:, 0, 0, 0]
    assert sorted(order) == [0, 1, 2, 3, 4] and (order != np.arange(5)).all()
    assert (shuffled.timestamps == clip.timestamps).all() and (clip.frames == frames).all()
    still = Media(videos=(replace(clip, frames=frames * 0),), images=(Image.new("RGB", (4, 4), "red"),))
    assert damaged(still, "shuffled", 3) is None
    assert damaged(still, "blank", 3).images[0].getextrema() == ((0, 0),) * 3
    assert damaged(Media(), "blank", 3) is None


def test_the_image_list_agrees_with_the_long_way(held_out, run, models):
    row = row_of(held_out, "scene")
    sample, image = held_out.samples[row["id"]], Image.open(row["images"][0])
    images = masked_image_list(image, row["critical_box"], 3)
    for contestant in ("base", "words"):
        record = run[1][row["id"], contestant]
        asked = [
            (processor(), replace(sample, frames=np.asarray(x)[None]), language.PROMPTS["scene"], said(row, "chosen"))
            for x in images
        ]
        assert record["image_logps"] == nearly([slow_sum(models[contestant], *one) for one in asked])
        assert record["image_logps"][0] == pytest.approx(record["chosen_logp"], abs=1e-5)
        assert list(record["damaged_logps"]) == ["masked", "blank"]  # an image has no order


def test_a_row_with_nothing_but_an_image_list(held_out, run, tmp_path):
    """The images that would be drawn, given as files below `media_root`."""
    row = dict(row_of(held_out, "scene"))
    names = ["0.png", "1.png", "2.png"]
    for name, image in zip(names, masked_image_list(Image.open(row.pop("images")[0]), row.pop("critical_box"), 3)):
        image.save(tmp_path / name)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row | {"image_list": names}) + "\n")
    evaluate(held_out, tmp_path / "run", data=data, media_root=tmp_path)
    record, expected = records(tmp_path / "run")[row["id"], "base"], run[1][row["id"], "base"]
    assert record["cluster"] == "0.png"
    for key in ("chosen_logp", "rejected_logp", "image_logps", "damaged_logps"):
        assert record[key] == nearly(expected[key])


def test_options_agree_with_the_long_way(held_out, run, models):
    row = row_of(held_out, "clip", "-choice")
    record = run[1][row["id"], "words"]
    asked = [(processor(), held_out.samples[row["id"]], "Which is true?", option) for option in row["options"]]
    assert record["option_logps"] == nearly([slow_sum(models["words"], *one) for one in asked])
    assert record["option_tokens"] == [len(slow_scores(models["base"], *one)[1]) for one in asked]


def test_answers_are_the_models_own_greedy_ones(held_out, run, models):
    for contestant in ("base", "words", "eyes"):
        for name, row in held_out.rows.items():
            if name.endswith(("basic", "hallucinated", "chair")):
                question = row["question"]
            elif name.endswith("choice"):
                question = "Which is true?\nA. {}\nB. {}".format(*row["options"])
            else:
                question = row["prompt"][0]["content"][1]["text"]
            asked = (processor(), [held_out.samples[name]], [question])
            (answer,) = pretraining.answer(models[contestant], *asked, max_new_tokens=16)
            assert run[1][name, contestant]["response"] == answer
    assert len({run[1][name, "base"]["response"] for name in held_out.rows}) > 5


def test_an_adapter_that_changes_nothing_is_the_base(run):
    results, rows = run
    for (name, contestant), record in rows.items():
        if contestant == "idle":
            base = rows[name, "base"] | {"contestant": "idle", "chosen_kl": record["chosen_kl"]}
            assert record == base
            assert not record["chosen_kl"] or abs(record["chosen_kl"]) < 1e-6
    idle = results["contestants"]["idle"]
    for name in ("reward/margin", "displacement/chosen", "displacement/rejected", "displacement/both_fall"):
        assert idle["measures"][name]["value"] == 0
    assert idle["measures"]["reward/accuracy"]["value"] == 0.5
    assert idle["measures"]["kl/chosen"]["value"] == pytest.approx(0, abs=1e-6)
    assert all(abs(difference["value"]) < 1e-6 for difference in idle["differences"].values())


def test_one_adapter_in_other_batches_gives_the_same(folder, held_out, adapters, run):
    evaluate(held_out, folder / "alone", adapters["eyes"], batch_size=7, answer_preferences=True)
    alone = records(folder / "alone")
    assert len(alone) == 2 * 17
    for key, record in alone.items():
        assert_same_record(record, run[1][key])


# --- results ------------------------------------------------------------------------------------------------------


def test_results_follow_from_the_rows(folder, run):
    results, rows = run
    assert json.loads((folder / "run" / "results.json").read_text()) == results
    assert results["data"] == {
        "rows": 17, "skipped": 0, "tasks": {"preference": 5, "yes_no": 6, "choice": 3, "chair": 3}, "clusters": 5,
        "incomplete_pairs": 0, "incomplete_sets": 0,
    }  # fmt: skip
    assert list(results["contestants"]) == ["base", "words", "eyes", "idle"]
    for contestant in results["contestants"].values():
        for measure in (*contestant["measures"].values(), *contestant["differences"].values()):
            assert measure.keys() == {"value", "low", "high", "n"}
    base, words = (results["contestants"][name] for name in ("base", "words"))
    assert base["differences"] == {} and words["differences"].keys() == words["measures"].keys()
    own = {name: record for (name, contestant), record in rows.items() if contestant == "words"}
    pairs = [(own[name], rows[name, "base"]) for name, record in own.items() if record["task"] == "preference"]
    false = [bool(record["hallucinated"]) for record in own.values() if record["task"] == "chair"]
    value = {name: measure["value"] for name, measure in words["measures"].items()}
    expected = {
        "preference/accuracy": np.mean([one["chosen_logp"] > one["rejected_logp"] for one, _ in pairs]),
        "displacement/chosen": np.mean([one["chosen_logp"] - before["chosen_logp"] for one, before in pairs]),
        "chair/s": np.mean(false),
    }
    assert {name: value[name] for name in expected} == pytest.approx(expected)
    right = np.mean([record["said"] == record["expected"] for record in own.values() if record["task"] == "yes_no"])
    assert (value["yes_no/basic"] + value["yes_no/hallucinated"]) / 2 == pytest.approx(right)
    counts = {"length/words": 3 + 5, "sensitivity/shuffled": 3, "sensitivity/blank": 5, "yes_no/overall": 3}
    assert {name: words["measures"][name]["n"] for name in counts} == counts  # words: captions, answered prompts
    difference = value["logps/chosen"] - base["measures"]["logps/chosen"]["value"]
    assert words["differences"]["logps/chosen"]["value"] == pytest.approx(difference)


def printed(results, width):
    """The lines of each table on a terminal of this width, in single blanks."""
    console, texts = make_console(width=width), []
    for part in results_tables(results, width):
        with console.capture() as capture:
            console.print(part)
        texts.append([" ".join(line.split()) for line in capture.get().splitlines()])
    return texts


def test_the_table_shows_names_as_they_are():
    """Groups, sets and adapters have the names that users give."""
    one = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    groups = ("binary", "binary[popular]", "binary[/red]", "binary[a]b[/]", "binary[:car:]")
    own = {name: one for group in groups for name in (f"{group}/accuracy", f"{group}/f1")} | {"sets/a/[b": one}
    about = {"rows": 40, "clusters": 12}
    contestants = {name: {"measures": own, "differences": {}} for name in ("base", "[bold]c")}
    (lines,) = printed({"settings": {"level": 0.95}, "data": about, "contestants": contestants}, 80)
    row = "40 0.500 [0.400, 0.600] 0.500 [0.400, 0.600]"
    expected = [line for group in groups for line in (group, f"accuracy {row}", f"f1 {row}")]
    assert "measure n base [bold]c" in lines and lines[3:] == [*expected, "sets", f"a/[b {row}"]


def test_the_table_marks_what_differs():
    def side(*values):
        measures = [dict(zip(("value", "low", "high", "n"), (*value, 40))) for value in values]
        return dict(zip(("chair/i", "kl/chosen", "length/words"), measures))

    base = side((0.5, 0.4, 0.6), (0.0, None, None), (123.4, 9.5, 200.0))
    tuned = side((0.25, 0.2, 0.3), (1.5, 1.0, 2.0), (20.0, 9.0, 30.0))
    moved = side((-0.25, -0.3, -0.1), (1.5, 1.0, 2.0), (1.0, -2.0, 4.0))
    contestants = {"base": {"measures": base, "differences": {}}, "[a]": {"measures": tuned, "differences": moved}}
    data = {"rows": 40, "clusters": 12}
    results = {"settings": {"level": 0.95}, "data": data, "contestants": contestants}
    (lines,) = printed(results, 120)
    assert "i 40 0.500 [0.400, 0.600] 0.250 [0.200, 0.300] ▼" in lines
    assert "chosen 40 0.000 1.500 [1.000, 2.000] ▲" in lines
    assert "words 40 123.4 [9.500, 200.0] 20.00 [9.000, 30.00]" in lines
    assert "measure n base [a]" in lines
    for differences in moved.values():
        differences["n"] = 29
    assert not [line for line in printed(results, 120)[0] if "0." in line and ("▼" in line or "▲" in line)]


def test_a_narrow_terminal_gets_several_tables():
    measure = {"value": -12.3456, "low": -13.4567, "high": -11.1234, "n": 4000}
    own = {"preference/accuracy_average": measure, "sensitivity/shuffled": measure}
    models = {f"{'a_long_name/' * 4}{k}": {"measures": own, "differences": own} for k in range(3)}
    data = {"rows": 40, "clusters": 12}
    results = {"settings": {"level": 0.95}, "data": data, "contestants": models}
    tables = printed(results, 80)
    assert len(tables) == 2
    for lines, count in zip(tables, (2, 1)):
        assert f"accuracy_average 4000{' -12.35 [-13.46, -11.12] ▼' * count}" in lines
    assert len(printed(results, 70)) == 3 and len(printed(results, 120)) == 1
    assert [line for line in tables[-1] if "(no marks below n = 30)" in line] and "below n" not in str(tables[0])
