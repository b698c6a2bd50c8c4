"""Runs of `trl-vpo generate` with the real base of the testbed: their rows, whatever batch, worker or adapter."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from helpers import write_clip
from peft import LoraConfig, get_peft_model
from run_kit import KINDS, generate, lines, options, write_inputs, written
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.rows import read_row
from trl_vpo.errors import RunError
from trl_vpo.generate.run import run_generation
from trl_vpo.runs.digests import weights_digest
from trl_vpo.runs.store import read_settings
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.testbed.tiny_vlm import BASE

COUNT = 12
WHO = {"model": str(BASE), "adapter": None, "revision": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve questions about four clips, and twelve pairs about scenes: kind -> file."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """method -> the folder of a run over all twelve inputs, and its summary."""
    done = {}

    def run(method):
        if method not in done:
            folder = tmp_path_factory.mktemp(method) / "run"
            done[method] = folder, generate(method, inputs[KINDS[method]], folder)
        return done[method]

    return run


def write_adapter(folder, *targets):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))
    model.save_pretrained(folder)
    return model


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["leanpo", "rrpo", "lpoi"])
def test_rows_of_every_method(method, runs, inputs):
    folder, summary = runs(method)
    rows, rejected = lines(folder / "rows.jsonl"), lines(folder / "rejected.jsonl")
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["inputs"], summary["kept"], summary["rejected"]) == (COUNT, len(rows), len(rejected))
    assert rows and len(rows) + len(rejected) == COUNT
    asked = {row["id"]: row for row in lines(inputs[KINDS[method]])}
    assert sorted(row["id"] for row in rows + rejected) == sorted(asked)
    settings = read_settings(folder)
    assert settings["answered_by"] == WHO
    assert settings["inputs"]["count"] == COUNT and settings["pipeline"] == method
    (who,) = {json.dumps(row["generated_by"], sort_keys=True) for row in rows}
    who = json.loads(who)
    assert re.fullmatch("[0-9a-f]{16}", who.pop("settings")) and who == WHO | {"pipeline": method, "judge": None}
    for row in rows:
        read = read_row(row, phrases=method == "rrpo", media_form="ranking" if method == "lpoi" else None)
        assert row["id"] in read.name
        assert [Path(p).is_absolute() and Path(p).exists() for p in (*read.images, *read.videos)] == [True]
        if method != "lpoi":  # the training prompt is the plain question about the untouched media
            question = {"type": "text", "text": asked[row["id"]]["question"]}
            assert row["prompt"] == [{"role": "user", "content": [{"type": "video"}, question]}]
            assert row["videos"] == [asked[row["id"]]["video"]]


@pytest.mark.parametrize(
    "method, options", [("leanpo", {}), ("rrpo", {"phrases": True}), ("lpoi", {"media_form": "ranking"})]
)
def test_rows_are_collated_as_in_training(method, options, runs):
    processor = AutoProcessor.from_pretrained(BASE)
    rows = load_dataset("json", data_files=str(runs(method)[0] / "rows.jsonl"), split="train")
    batch = PreferenceCollator(processor, **options)(list(rows))
    assert len(batch["names"]) == len(rows) and len(batch["chosen"]) == len(batch["rejected"]) == len(rows)
    if method == "rrpo":
        assert batch["phrase_mask"].any(1).all() and batch["phrase_mask"].sum() < batch["branch_mask"].sum()
    if method == "lpoi":
        assert batch["image_branches"].shape == (len(rows), 5)


def test_inputs_that_cannot_be_used(inputs, tmp_path):
    """They end in rejected.jsonl with what is wrong; the others are made as if they were alone."""
    good = lines(inputs["clip"])
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "empty.mp4").touch()
    cases = [
        ({"video": str(tmp_path / "broken.mp4")}, "unreadable media", "broken.mp4 cannot be opened as a video"),
        ({"video": str(tmp_path / "empty.mp4")}, "unreadable media", "empty.mp4 is empty"),
        ({"video": "gone.mp4"}, "unreadable media", "gone.mp4 does not exist"),
        ({"answer": None}, "unusable input", "`answer` is None: RRPO needs it"),
        ({"video": None}, "unusable input", "neither a video nor an image"),
    ]
    bad = [{**good[0], "id": f"bad-{i}", **change} for i, (change, *_) in enumerate(cases)]
    mixed = write_jsonl([*bad[:3], *good[:4], *bad[3:]], tmp_path / "mixed.jsonl")
    summary = generate("rrpo", mixed, tmp_path / "run")
    rejected = {row["id"]: row for row in lines(tmp_path / "run/rejected.jsonl")}
    for i, (_, kind, reason) in enumerate(cases):
        assert rejected[f"bad-{i}"]["kind"] == kind and reason in rejected[f"bad-{i}"]["reason"]
    counts = summary["rejected_by_kind"]
    assert (counts["unreadable media"], counts["unusable input"]) == (3, 2)
    generate("rrpo", write_jsonl(good[:4], tmp_path / "good.jsonl"), tmp_path / "alone")
    rows, alone = (lines(tmp_path / name / "rows.jsonl") for name in ("run", "alone"))
    assert [row | {"generated_by": None} for row in rows] == [row | {"generated_by": None} for row in alone]


# --- the same rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, COUNT])
def test_the_batch_size_changes_no_row(batch_size, runs, inputs, tmp_path):
    generate("rrpo", inputs["clip"], tmp_path / "run", "--batch_size", batch_size)
    assert written(tmp_path / "run") == written(runs("rrpo")[0])


def test_two_workers_one_after_the_other(runs, inputs, tmp_path, monkeypatch, capsys):
    folder, summary = runs("rrpo")  # in an environment of one worker
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    capsys.readouterr()
    assert generate("rrpo", inputs["clip"], tmp_path / "run") is None
    output = capsys.readouterr()
    assert "This worker is done; the last one writes the results" in output.out
    assert "0/6 inputs [" in output.err and "6/6 inputs [" in output.err
    assert not (tmp_path / "run/rows.jsonl").exists()
    monkeypatch.setenv("RANK", "1")
    assert generate("rrpo", inputs["clip"], tmp_path / "run") == summary
    output = capsys.readouterr()
    assert output.err == "" and "rows to train on" in output.out  # who comes last has the summary
    assert len(list((tmp_path / "run/shards").glob("0000?-of-00002.jsonl"))) == 2
    assert written(tmp_path / "run") == written(folder)


def test_a_limit_and_then_all(runs, inputs, tmp_path, capsys):
    folder, summary = runs("rrpo")
    assert generate("rrpo", inputs["clip"], tmp_path / "run", "--limit", 5)["inputs"] == 5
    assert generate("rrpo", inputs["clip"], tmp_path / "run") == summary
    assert written(tmp_path / "run") == written(folder)
    printed = capsys.readouterr().err
    for progress in ("0/5 inputs [", "5/5 inputs [", "5/12 inputs [", "12/12 inputs ["):
        assert progress in printed
    assert generate("rrpo", inputs["clip"], tmp_path / "run", "--limit", 5)["inputs"] == 5  # and back


def test_a_medium_that_is_replaced_is_noticed(inputs, tmp_path):
    """Under the same name; the rows made of the old one would stay."""
    rows = lines(inputs["clip"])
    for place, row in enumerate(rows[:2]):
        row["video"] = str(shutil.copy(row["video"], tmp_path / f"{place}.mp4"))
    data = write_jsonl(rows[:2], tmp_path / "rows.jsonl")
    assert generate("rrpo", data, tmp_path / "run", "--limit", 1)["inputs"] == 1
    write_clip(tmp_path / "1.mp4", seed=9)  # that of a row that is not finished may change
    assert generate("rrpo", data, tmp_path / "run")["inputs"] == 2
    write_clip(tmp_path / "0.mp4", seed=9)
    with pytest.raises(RunError, match=f"1 rows, or their media, have changed .*, the first is '{rows[0]['id']}'"):
        generate("rrpo", data, tmp_path / "run")


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_answers(runs, inputs, tmp_path):
    """The rows of the next round: other answers, and who gave them."""
    write_adapter(tmp_path / "adapter", "q_proj", "v_proj", "down_proj")
    for folder, option in (("one", "--from-adapter"), ("two", "--from_adapter")):
        generate("rrpo", inputs["clip"], tmp_path / folder, option, tmp_path / "adapter", "--limit", 6)
    assert written(tmp_path / "one") == written(tmp_path / "two")
    rows = {row["id"]: row for row in lines(tmp_path / "one/rows.jsonl")}
    before = {row["id"]: row for row in lines(runs("rrpo")[0] / "rows.jsonl")}
    assert any(name not in before or before[name]["model_answer"] != rows[name]["model_answer"] for name in rows)
    who = WHO | {"adapter": str(tmp_path / "adapter")}
    assert read_settings(tmp_path / "one")["answered_by"] == who
    assert all(row["generated_by"].items() >= who.items() for row in rows.values())


def test_an_adapter_sees_the_frames_of_its_training(inputs, tmp_path, capsys):
    """The window of its training is of other videos; an option or a key of the recipe wins."""
    write_adapter(tmp_path / "adapter", "q_proj")
    recipe = {"fps": 4.0, "max_pixels": 3000, "video_end": 0.5}
    (tmp_path / "adapter/run.json").write_text(json.dumps({"recipe": recipe}))
    words = ["--from_adapter", tmp_path / "adapter", "--limit", 1]
    named, config, *rest = options("rrpo", inputs["clip"], tmp_path / "run", *words)
    (tmp_path / "own.yaml").write_text(Path(config).read_text().replace("num_frames: 8", ""))
    run_generation("rrpo", [named, str(tmp_path / "own.yaml"), *rest])
    settings = read_settings(tmp_path / "run")
    names = ("num_frames", "fps", "max_pixels", "video_end")
    assert [settings[name] for name in names] == [None, 4.0, 3000, None]
    assert (
        "Videos as in the training, by run.json: fps 4.0, max_frames 64, max_pixels 3000.\n" in capsys.readouterr().err
    )
    generate("rrpo", inputs["clip"], tmp_path / "other", *words)
    assert read_settings(tmp_path / "other")["fps"] is None


def test_weights_that_changed_under_their_name(runs, inputs, tmp_path):
    """An adapter that was trained on, in the same folder: its rows do not go into the run of the old one."""
    model = write_adapter(tmp_path / "adapter", "q_proj")
    one, other = ["--from_adapter", tmp_path / "adapter", "--limit", 2], tmp_path / "other"
    for _ in range(2):
        generate("rrpo", inputs["clip"], tmp_path / "run", *one)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.01)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunError, match=r"weights\.from_adapter: was .*, is "):
        generate("rrpo", inputs["clip"], tmp_path / "run", *one)
    generate("rrpo", inputs["clip"], other, *one)
    first, second, base = (read_settings(folder)["weights"] for folder in (tmp_path / "run", other, runs("rrpo")[0]))
    assert first["model_name_or_path"] == base["model_name_or_path"]
    assert first["from_adapter"] != second["from_adapter"]


def test_the_digest_of_weights_is_of_all_that_is_read(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    before = weights_digest(tmp_path)
    for name in (
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt", "vocab.txt",
        "tokenizer.model", "tokenizer.json", "config.json", "model.safetensors",
    ):  # fmt: skip
        for content in ("before", "behind"):
            (tmp_path / name).write_text(content)
            before, now = weights_digest(tmp_path), before
            assert now != before, name
    (tmp_path / "README.md").write_text("not read")
    assert weights_digest(tmp_path) == before
