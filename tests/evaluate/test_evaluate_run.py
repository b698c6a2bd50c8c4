"""`trl-vpo evaluate`: every number against the slow way, tasks and adapters side by side, and runs that go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from held_out_kit import (
    EVERYWHERE,
    adapted,
    of_image,
    plain,
    processor,
    said,
    slow_scores,
    slow_sum,
    write_adapter,
    write_held_out,
)
from PIL import Image

from trl_vpo.data.inputs import InputRow, near_misses
from trl_vpo.errors import EvaluateError, GenerateError, RecipeError
from trl_vpo.evaluate.candidates import candidate_names
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.probes import damaged, row_seed
from trl_vpo.evaluate.recipe import parse
from trl_vpo.evaluate.rows import TASKS
from trl_vpo.evaluate.run import read_evaluation_inputs, run_evaluation, run_settings
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.media.masking import masked_image_list
from trl_vpo.testbed import language, tiny_vlm
from trl_vpo.testbed.rows import write_jsonl


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


def evaluate(held_out, out, *adapters, data=None, **options):
    values = {"num_frames": 8, "max_new_tokens": 16, "device": "cpu", "resamples": 200, "num_images": 3, **options}
    values |= {"synonyms": held_out.path.parent / "synonyms.txt", "output_dir": out}
    argv = ["--model", str(tiny_vlm.BASE), "--data", str(data or held_out.path)]
    argv += ["--adapters", *map(str, adapters)] if adapters else []
    return run_evaluation(argv + [str(part) for key, value in values.items() for part in (f"--{key}", value)])


def records(out) -> dict[tuple[str, str], dict]:
    """(row, contestant) -> what `rows.jsonl` says."""
    lines = [json.loads(line) for line in (Path(out) / "rows.jsonl").read_text().splitlines()]
    return {(line["id"], line["contestant"]): line for line in lines}


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


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contestant", ["base", "words", "eyes"])
def test_a_pair_about_a_clip_agrees_with_the_long_way(held_out, run, models, contestant):
    row = row_of(held_out, "clip")
    found, sample = run[1][row["id"], contestant], held_out.samples[row["id"]]
    asked = (processor(), sample, language.PROMPTS["clip"])
    logps, tokens = slow_scores(models[contestant], *asked, said(row, "chosen"))
    before, _ = slow_scores(models["base"], *asked, said(row, "chosen"))
    assert found["chosen_logp"] == pytest.approx(logps.gather(1, tokens[:, None]).sum().item(), abs=1e-4)
    assert found["rejected_logp"] == pytest.approx(
        slow_sum(models[contestant], *asked, said(row, "rejected")), abs=1e-4
    )
    assert found["chosen_tokens"] == len(tokens)
    kl = (before.exp() * (before - logps)).sum().item()
    assert found["chosen_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert (kl > 0.01) == (contestant != "base")
    media = Media(videos=(load_video(sample.frames, VideoOptions(num_frames=8)),))
    changed = {kind: damaged(media, kind, row_seed(0, row["id"])).videos[0].frames for kind in found["damaged_logps"]}
    assert list(changed) == ["shuffled", "masked", "blank"]
    assert not changed["blank"].any()
    for kind, frames in changed.items():
        assert not (frames == sample.frames).all()
        seen = (processor(), replace(sample, frames=frames), language.PROMPTS["clip"], said(row, "chosen"))
        assert found["damaged_logps"][kind] == pytest.approx(slow_sum(models[contestant], *seen), abs=1e-4), kind


def test_shuffling_keeps_every_frame_and_leaves_none_in_its_place():
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
    with pytest.raises(ValueError, match="cannot be 'upside down'"):
        damaged(still, "upside down", 3)


def test_the_image_list_agrees_with_the_long_way(held_out, run, models):
    row = row_of(held_out, "scene")
    sample, image = held_out.samples[row["id"]], Image.open(row["images"][0])
    images = masked_image_list(image, row["critical_box"], 3)
    for contestant in ("base", "words"):
        found = run[1][row["id"], contestant]
        asked = [(processor(), of_image(sample, x), language.PROMPTS["scene"], said(row, "chosen")) for x in images]
        assert found["image_logps"] == pytest.approx([slow_sum(models[contestant], *one) for one in asked], abs=1e-4)
        assert found["image_logps"][0] == pytest.approx(found["chosen_logp"], abs=1e-5)
        assert list(found["damaged_logps"]) == ["masked", "blank"]  # an image has no order


def test_a_row_with_nothing_but_an_image_list(held_out, run, tmp_path):
    """The images that would be drawn, given as files below `media_root`."""
    row = dict(row_of(held_out, "scene"))
    images = masked_image_list(Image.open(row.pop("images")[0]), row.pop("critical_box"), 3)
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row | {"image_list": ["0.png", "1.png", "2.png"]}) + "\n")
    evaluate(held_out, tmp_path / "run", data=data, media_root=tmp_path)
    found, want = records(tmp_path / "run")[row["id"], "base"], run[1][row["id"], "base"]
    assert found["cluster"] == "0.png"
    for key in ("chosen_logp", "rejected_logp", "image_logps"):
        assert found[key] == pytest.approx(want[key], abs=1e-4)
    assert found["damaged_logps"] == pytest.approx(want["damaged_logps"], abs=1e-4)


def test_options_agree_with_the_long_way(held_out, run, models):
    row = row_of(held_out, "clip", "-choice")
    found = run[1][row["id"], "words"]
    asked = [(processor(), held_out.samples[row["id"]], "Which is true?", option) for option in row["options"]]
    assert found["option_logps"] == pytest.approx([slow_sum(models["words"], *one) for one in asked], abs=1e-4)
    assert found["option_tokens"] == [len(slow_scores(models["base"], *one)[1]) for one in asked]


def test_answers_are_the_models_own_greedy_ones(held_out, run, models):
    for contestant in ("base", "words", "eyes"):
        for name, row in held_out.rows.items():
            if name.endswith(("basic", "hallucinated", "chair")):
                question = row["question"]
            elif name.endswith("choice"):
                question = "Which is true?\nA. {}\nB. {}".format(*row["options"])
            else:
                question = row["prompt"][0]["content"][1]["text"]
            want = tiny_vlm.answer(models[contestant], processor(), [held_out.samples[name]], [question])
            assert run[1][name, contestant]["response"] == want[0]
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


# --- results ------------------------------------------------------------------------------------------------------


def test_results_follow_from_the_rows(folder, run):
    results, rows = run
    assert json.loads((folder / "run" / "results.json").read_text()) == results
    assert results["data"] == {
        "rows": 17, "skipped": 0, "tasks": {"preference": 5, "yes_no": 6, "choice": 3, "chair": 3}, "clusters": 5,
        "incomplete_pairs": 0,
    }  # fmt: skip
    assert list(results["contestants"]) == ["base", "words", "eyes", "idle"]
    base, words = (results["contestants"][name] for name in ("base", "words"))
    assert base["differences"] == {} and words["differences"].keys() == words["measures"].keys()
    own = {name: record for (name, contestant), record in rows.items() if contestant == "words"}
    before = {name: record for (name, contestant), record in rows.items() if contestant == "base"}
    pairs = [name for name, record in own.items() if record["task"] == "preference"]
    wins = np.mean([own[name]["chosen_logp"] > own[name]["rejected_logp"] for name in pairs])
    moved = np.mean([own[name]["chosen_logp"] - before[name]["chosen_logp"] for name in pairs])
    kl = [sum(own[name][key] for name in pairs) for key in ("chosen_kl", "chosen_tokens")]
    right = np.mean([record["said"] == record["expected"] for record in own.values() if record["task"] == "yes_no"])
    basic, hallucinated = (words["measures"][f"yes_no/{side}"]["value"] for side in ("basic", "hallucinated"))
    false = [bool(record["hallucinated"]) for record in own.values() if record["task"] == "chair"]
    assert words["measures"]["preference/accuracy"]["value"] == pytest.approx(wins)
    assert words["measures"]["displacement/chosen"]["value"] == pytest.approx(moved)
    assert words["measures"]["kl/chosen_per_token"]["value"] == pytest.approx(kl[0] / kl[1])
    assert (basic + hallucinated) / 2 == pytest.approx(right)
    assert words["measures"]["chair/s"]["value"] == pytest.approx(np.mean(false))
    assert words["measures"]["length/words"]["n"] == 3 + 5  # captions, and the answered preference prompts
    assert [words["measures"][f"{name}"]["n"] for name in ("sensitivity/shuffled", "sensitivity/blank")] == [3, 5]
    assert [words["measures"][name]["n"] for name in ("visibility/tau", "choice/letter", "yes_no/overall")] == [
        2,
        3,
        3,
    ]
    for contestant in results["contestants"].values():
        for measure in (*contestant["measures"].values(), *contestant["differences"].values()):
            assert measure.keys() == {"value", "low", "high", "n"}
    difference = words["measures"]["logps/chosen"]["value"] - base["measures"]["logps/chosen"]["value"]
    assert words["differences"]["logps/chosen"]["value"] == pytest.approx(difference)


def test_one_adapter_alone_in_other_batches_gives_the_same(folder, held_out, adapters, run):
    evaluate(held_out, folder / "alone", adapters["eyes"], batch_size=7, answer_preferences=True)
    alone = records(folder / "alone")
    assert len(alone) == 2 * 17
    for key, record in alone.items():
        assert_same_record(record, run[1][key])


def assert_same_record(found, want):
    """Texts and counts alike, log-probs but for the rounding of another batch."""
    assert found.keys() == want.keys()
    for key, value in want.items():
        if key.endswith("logps") and value is not None:
            pick = (lambda v: list(v.values())) if isinstance(value, dict) else list
            assert pick(found[key]) == pytest.approx(pick(value), abs=1e-4)
        elif isinstance(value, float):
            assert found[key] == pytest.approx(value, abs=1e-4), key
        else:
            assert found[key] == value, key


def test_the_table_marks_what_differs():
    from rich.console import Console

    from trl_vpo.evaluate.table import results_table

    def measure(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 40}

    base = {
        "chair/i": measure(0.5, 0.4, 0.6),
        "kl/chosen": measure(0.0, None, None),
        "length/words": measure(123.4, 9.5, 200.0),
    }
    tuned = {
        "chair/i": measure(0.25, 0.2, 0.3),
        "kl/chosen": measure(1.5, 1.0, 2.0),
        "length/words": measure(20.0, 9.0, 30.0),
    }
    moved = {
        "chair/i": measure(-0.25, -0.3, -0.1),
        "kl/chosen": measure(1.5, 1.0, 2.0),
        "length/words": measure(1.0, -2.0, 4.0),
    }
    results = {
        "settings": {"level": 0.95},
        "data": {"rows": 40, "clusters": 12},
        "contestants": {
            "base": {"measures": base, "differences": {}},
            "[a]": {"measures": tuned, "differences": moved},
        },
    }
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table(results))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "chair/i 40 0.500 [0.400, 0.600] 0.250 [0.200, 0.300] ▼" in lines
    assert "kl/chosen 40 0.000 1.500 [1.000, 2.000] ▲" in lines
    assert "length/words 40 123.4 [9.500, 200.0] 20.00 [9.000, 30.00]" in lines
    assert "measure n base [a]" in lines


# --- runs that go on ----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_other_settings_are_refused(folder, held_out, adapters, run, monkeypatch, tmp_path):
    from trl_vpo.evaluate import run as module
    from trl_vpo.runs.store import Run

    write, evaluate_batch, written, worked = Run.write, module.evaluate_batch, [], []

    def until_killed(self, outcome):
        if len(written) == 6:
            raise RuntimeError("killed")
        written.append(outcome.id)
        write(self, outcome)

    def counted(candidates, batch, config):
        worked.extend(row.id for row, *_ in batch)
        return evaluate_batch(candidates, batch, config)

    copied = write_adapter(tmp_path / "words", seed=1)
    options = {"batch_size": 4, "answer_preferences": True}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", until_killed)
        with pytest.raises(RuntimeError, match="killed"):
            evaluate(held_out, tmp_path / "run", copied, **options)
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(module, "evaluate_batch", counted)
    first = evaluate(held_out, tmp_path / "run", copied, **options)
    assert worked == list(held_out.rows)[6:]
    for key, record in records(tmp_path / "run").items():
        assert_same_record(record, run[1][key])
    # the answers stay, the way to read them may change
    strict = evaluate(held_out, tmp_path / "run", copied, yes_no_rule="strict", level=0.5, **options)
    assert len(worked) == 11 and strict["settings"]["yes_no_rule"] == "strict"
    wide, narrow = (r["contestants"]["base"]["measures"]["logps/chosen"] for r in (first, strict))
    assert wide["value"] == narrow["value"] and wide["low"] < narrow["low"]
    with pytest.raises(GenerateError, match="max_new_tokens: was 16, is 9"):
        evaluate(held_out, tmp_path / "run", copied, **options, max_new_tokens=9)
    write_adapter(tmp_path / "words", seed=7)  # another adapter in the same place
    with pytest.raises(GenerateError, match=r"adapters\.words: was"):
        evaluate(held_out, tmp_path / "run", copied, **options)


def test_bad_media_stop_the_run_unless_told_otherwise(held_out, tmp_path):
    rows = [json.loads(line) for line in held_out.path.read_text().splitlines()[:5]]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    rows[1]["videos"] = [str(broken)]
    data = write_jsonl(rows, tmp_path / "rows.jsonl")
    with pytest.raises(EvaluateError, match=rf"row 1 \(id '{rows[1]['id']}'\).*broken\.mp4.*(?s:.)*on_bad=skip"):
        evaluate(held_out, tmp_path / "run", data=data, sensitivity="none")
    results = evaluate(held_out, tmp_path / "run", data=data, sensitivity="none", on_bad="skip")
    assert results["data"]["rows"] == 4 and results["data"]["skipped"] == 1
    assert results["data"]["incomplete_pairs"] == 1
    measures = results["contestants"]["base"]["measures"]
    assert not any(name.startswith(("yes_no", "sensitivity")) for name in measures)
    assert measures["preference/accuracy"]["low"] is None  # one cluster says nothing about others
    (rejected,) = map(json.loads, (tmp_path / "run" / "rejected.jsonl").read_text().splitlines())
    assert rejected["id"] == rows[1]["id"] and "broken.mp4" in rejected["reason"]
    with pytest.raises(EvaluateError, match="1 rows were left out with on_bad=skip"):
        evaluate(held_out, tmp_path / "run", data=data, sensitivity="none")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, why",
    [
        ({"bias": "all"}, "trains the base's own biases"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"target_modules": ["lm_head"]}, "adapts the LM head by low-rank layers"),
    ],
)
def test_adapters_whose_base_cannot_be_told_apart(held_out, tmp_path, lora, why):
    adapter = write_adapter(tmp_path / "odd", **{"target_modules": ["q_proj"], **lora})
    with pytest.raises(EvaluateError, match=why):
        evaluate(held_out, tmp_path / "run", adapter)


def test_a_run_knows_the_bases_weights(held_out, tmp_path):
    """A model that was trained anew into the same folder would leave stale rows in a continued run."""
    base = tmp_path / "base"
    shutil.copytree(tiny_vlm.BASE, base)
    config = EvaluateConfig(model_name_or_path=str(base), dataset_name=str(held_out.path))
    inputs = read_evaluation_inputs(config)
    first = run_settings(config, {}, inputs)
    assert run_settings(config, {}, inputs) == first
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    changed = run_settings(config, {}, inputs)
    assert {key for key in first if first[key] != changed[key]} == {"weights"}
    template = base / "chat_template.jinja"  # it decides what the model is asked
    template.write_text(template.read_text().replace("assistant", "Assistant"))
    assert run_settings(config, {}, inputs)["weights"] not in (first["weights"], changed["weights"])


def test_adapters_that_are_none(held_out, tmp_path):
    with pytest.raises(EvaluateError, match=rf"^adapter {tmp_path} has no adapter_config\.json"):
        evaluate(held_out, tmp_path / "run", tmp_path)


def test_contestants_are_named_by_as_much_of_their_path_as_it_takes():
    assert candidate_names(["out/rrpo", "out/lpoi/"]) == ["rrpo", "lpoi"]
    assert candidate_names(["a/rrpo/last", "b/dpo/last"]) == ["rrpo/last", "dpo/last"]
    assert candidate_names(["out/base"]) == ["out/base"]
    assert candidate_names([]) == []
    with pytest.raises(EvaluateError, match="cannot be told apart"):
        candidate_names(["out/rrpo", "out/rrpo"])


def test_options_that_would_lose_something(tmp_path):
    with pytest.raises(RecipeError, match="--adapters is given twice"):
        run_evaluation(["--model", "m", "--adapters", "a", "--adapters", "b"])
    with pytest.raises(RecipeError, match=r"unknown option --adapter\. Did you mean --adapters"):
        run_evaluation(["--model", "m", "--adapter", "a"])
    with pytest.raises(RecipeError, match="`output_dir` is not set"):
        run_evaluation(["--model", "m", "--data", "d"])
    with pytest.raises(ValueError, match="'sharpened' is not one of shuffled, masked, blank"):
        run_evaluation(["--sensitivity", "masked", "sharpened"])


QUESTION = {"task": "yes_no", "question": "Is it red?", "answer": "Yes.", "pair": "p"}
CHOICE = {"task": "choice", "question": "Which?", "options": ["red", "blue"], "answer": "B"}
CAPTION = {"task": "chair", "question": "Describe.", "objects": ["square"]}


@pytest.mark.parametrize(
    "rows, why",
    [
        ([{"task": "yesno"}], r"row 0 \(id 'r0'\): `task` is 'yesno': one of preference, yes_no, choice, chair"),
        ([{"question": "Is it red?"}], r"row 0 \(id 'r0'\): has no `chosen`"),
        ([{**QUESTION, "answer": "maybe"}], "`answer` is 'maybe': a yes/no question needs yes or no"),
        ([{**QUESTION, "role": "hallucinated"}], "`role` is 'hallucinated' and `answer` 'yes'"),
        ([{**QUESTION, "pair": None}], "has no `pair`"),
        ([QUESTION, QUESTION], r"pair 'p' needs one .* it has row 0 \(id 'r0'\): yes, row 1 \(id 'r1'\): yes"),
        ([{**QUESTION, "question": "<video> Is it red?"}], "holds the marker <video>"),
        ([{**CHOICE, "answer": "C"}], r"`answer` is 'C': give the letter of the right option \(A, B\)"),
        ([{**CHOICE, "options": None}], "there are no options"),
        ([{**CHOICE, "options": ["red", "Red."]}], "say the same"),
        ([{**CAPTION, "objects": None}], "`objects` is None"),
        ([{**CAPTION, "objects": ["unicorn"]}], "'unicorn' is not in the table"),
        ([{**CAPTION, "question": " "}], "`question` is ' '"),
    ],
)
def test_rows_that_break_the_contract(rows, why):
    from trl_vpo.data.inputs import InputRow
    from trl_vpo.data.rows import drop_none
    from trl_vpo.evaluate.rows import read_rows
    from trl_vpo.text.chair import ObjectTable

    inputs = [InputRow(f"r{i}", drop_none(row)) for i, row in enumerate(rows)]
    with pytest.raises(EvaluateError, match=why):
        read_rows(inputs, ObjectTable({"square": []}))


def test_clusters_are_media_unless_the_row_says_otherwise():
    from trl_vpo.data.inputs import InputRow
    from trl_vpo.evaluate.rows import read_rows

    part = {"path": "v/1.mp4", "video_start": 2.0}
    no = {**QUESTION, "answer": "no"}
    rows = [
        {**QUESTION, "videos": ["v/1.mp4"]},
        {**no, "video": part},
        {**CHOICE, "cluster": 7, "images": ["i/1.png"]},
        {**CHOICE, "image": "./i/1.png"},
        {**CHOICE, "videos": [["f/1.png", "f/2.png"]], "images": ["i/1.png"]},
        CHOICE,
        {**CHOICE, "image": {"path": "1.png", "bytes": b"a picture"}},
        {**CHOICE, "images": [b"a picture"]},
        {**CHOICE, "images": [b"another picture"]},
    ]
    found = read_rows([InputRow(f"r{i}", row) for i, row in enumerate(rows)])
    clusters = [row.cluster for row in found]
    assert clusters[:6] == ["v/1.mp4", "v/1.mp4", "7", "i/1.png", "f/1.png", "r5"]
    assert clusters[6] == clusters[7] != clusters[8]
    assert found[1].facts == {"question": "Is it red?", "expected": "no", "pair": "p"}
    assert found[2].facts == {"question": "Which?", "expected": "B", "options": ["red", "blue"]}


def test_clusters_stay_where_media_move(held_out, tmp_path):
    """A run may go on where the media lie elsewhere: the rows before and behind that are of the same clusters."""
    from trl_vpo.evaluate.rows import read_rows

    clip = Path(row_of(held_out, "clip")["videos"][0])
    data = write_jsonl([{**CHOICE, "id": "a", "videos": [clip.name]}], tmp_path / "rows.jsonl")
    clusters = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shutil.copy(clip, tmp_path / place / clip.name)
        config = EvaluateConfig(dataset_name=str(data), media_root=str(tmp_path / place))
        inputs = read_evaluation_inputs(config)
        assert inputs[0].videos == (str(tmp_path / place / clip.name),)
        clusters += [row.cluster for row in read_rows(inputs)]
    assert clusters == [clip.name] * 2


def test_pairs_that_share_a_cluster_are_one_cluster():
    """Of questions about v1 to v5: what pairs have in common may come through a third pair."""
    from trl_vpo.evaluate.results import evidence

    pairs = [("v1", "v1"), ("v2", "v3"), ("v4", "v4"), ("v3", "v5"), ("v5", "v4"), ("v1", "v1")]
    records = [
        {"task": "yes_no", "pair": str(i), "expected": side, "cluster": cluster}
        | {"response": side, "response_tokens": 1, "response_ended": True}
        for i, both in enumerate(pairs)
        for side, cluster in zip(("yes", "no"), both)
    ]
    _, clusters = evidence(records, records)["yes_no"]
    assert [clusters.index(cluster) for cluster in clusters] == [0, 1, 1, 1, 1, 0]


# --- what an adapter was trained on -------------------------------------------------------------------------------


def trained(folder, **recipe):
    """A folder with the `run.json` of a training with this recipe."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"recipe": {"learning_rate": 1e-5, **recipe}}))
    return str(folder)


def media_settings(*adapters, **given):
    argv = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    config = parse(["--model", "m", "--data", "d", "--output_dir", "o", "--adapters", *adapters, *argv])
    return [config.num_frames, config.fps, config.max_frames, config.max_pixels]


def test_an_adapter_is_evaluated_with_the_frames_of_its_training(tmp_path, caplog):
    short = trained(tmp_path / "short", num_frames=8, max_pixels=1024)
    fast = trained(tmp_path / "fast", fps=2.0, max_frames=32)
    usual = trained(tmp_path / "usual")
    (tmp_path / "fast/checkpoint-5").mkdir()
    assert media_settings(short) == [8, None, 64, 1024]
    assert media_settings(fast) == media_settings(fast + "/checkpoint-5") == [None, 2.0, 32, None]
    assert media_settings(usual) == [16, None, 64, None]
    window = trained(tmp_path / "window", video_start=1.0, video_end=3.0)
    config = parse(["--model", "m", "--data", "d", "--output_dir", "o", "--adapters", window])
    assert (config.video_start, config.video_end) == (1.0, 3.0) and config.video_options().video_end == 3.0
    assert media_settings(short, str(tmp_path / "unknown")) == [8, None, 64, 1024]
    assert not caplog.messages
    assert media_settings(short, num_frames=8) == [8, None, 64, 1024] and not caplog.messages
    assert media_settings(short, fps=1.0, max_frames=9, max_pixels=512) == [None, 1.0, 9, 512]
    assert f"{short} was trained with num_frames 8, and is evaluated with fps 1.0." in caplog.messages
    assert f"{short} was trained with max_pixels 1024, and is evaluated with max_pixels 512." in caplog.messages


def test_adapters_of_different_frames_are_not_compared_silently(tmp_path):
    short, usual = trained(tmp_path / "short", num_frames=8), trained(tmp_path / "usual")
    with pytest.raises(EvaluateError, match=r"different settings .*short: num_frames 8; .*usual: num_frames 16"):
        media_settings(short, usual)
    assert media_settings(short, usual, num_frames=4)[0] == 4


# --- rows as people write them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, answer, expected",
    [
        ("yes_no", "Yes, it is.", "yes"),
        ("yes_no", "NO", "no"),
        ("choice", "(B)", "B"),
        ("choice", "b) blue", "B"),
        ("choice", "Answer: A", "A"),
        ("choice", "blue", "B"),
    ],
)
def test_answers_of_rows_are_read_in_every_form(task, answer, expected):
    example = {"question": "Which is it?", "options": ["red", "blue"], "answer": answer, "pair": 1}
    facts = TASKS[task](InputRow("a", example), None)
    assert facts["expected"] == expected


def test_a_near_miss_of_a_column_is_named():
    assert near_misses(["question", "anwser", "option", "image_id", "source", "vidoes"]) == [
        ("anwser", "answer"),
        ("option", "options"),
        ("vidoes", "videos"),
    ]
    assert near_misses(["question", "answer", "answers", "images", "imgs", "prompt_template"]) == []
