"""The driver of `trl-vpo generate` with the real base of the testbed: its rows, whatever batch, worker or adapter."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from run_kit import KINDS, generate, lines, write_inputs, written
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.importers import import_rows
from trl_vpo.data.rows import read_row
from trl_vpo.errors import GenerateError
from trl_vpo.runs.digests import weights_digest
from trl_vpo.runs.shards import read_outcomes, read_settings
from trl_vpo.testbed import rows as testbed_rows
from trl_vpo.testbed.tiny_vlm import BASE

COUNT = 12
WHO = {"model": str(BASE), "adapter": None, "revision": None, "judge": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve questions about four clips, and twelve pairs about scenes: kind -> file."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """method -> the folder of a run over all twelve inputs, and its summary."""
    runs = {}

    def run(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp(method) / "run"
            runs[method] = folder, generate(method, inputs[KINDS[method]], folder)
        return runs[method]

    return run


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


def shards(folder):
    return sorted(path.name for path in (folder / "shards").glob("*.jsonl"))


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["leanpo", "rrpo", "lpoi"])
def test_rows_of_every_method(method, made, inputs):
    folder, summary = made(method)
    rows, rejected = lines(folder / "rows.jsonl"), lines(folder / "rejected.jsonl")
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["inputs"], summary["kept"], summary["rejected"]) == (COUNT, len(rows), len(rejected))
    assert rows and len(rows) + len(rejected) == COUNT
    ids = [row["id"] for row in lines(inputs[KINDS[method]])]
    assert sorted([r["id"] for r in rows] + [r["id"] for r in rejected]) == sorted(ids)
    settings = read_settings(folder)
    assert settings["answered_by"] == {key: WHO[key] for key in ("model", "adapter", "revision")}
    assert settings["inputs"]["count"] == COUNT and settings["pipeline"] == method
    (who,) = {json.dumps(row["generated_by"], sort_keys=True) for row in rows}
    who = json.loads(who)
    assert re.fullmatch("[0-9a-f]{16}", who.pop("settings")) and who == WHO | {"pipeline": method}
    for row in rows:
        read = read_row(row, phrases=method == "rrpo", image_list=method == "lpoi")
        assert row["id"] in read.name
        assert [Path(p).is_absolute() and Path(p).exists() for p in (*read.images, *read.videos)] == [True]


def test_the_training_prompt_is_the_plain_question(made, inputs):
    asked = {row["id"]: row for row in lines(inputs["clip"])}
    for method in ("leanpo", "rrpo"):
        for row in lines(made(method)[0] / "rows.jsonl"):
            (message,) = row["prompt"]
            assert message["content"] == [{"type": "video"}, {"type": "text", "text": asked[row["id"]]["question"]}]
            assert row["videos"] == [asked[row["id"]]["video"]]


def test_rewards_are_what_training_computes(made, processor):
    """A row's chosen_reward is the mean log-prob of its response behind its prompt, by a plain forward pass."""
    row = lines(made("leanpo")[0] / "rows.jsonl")[0]
    batch = PreferenceCollator(processor)([{key: row[key] for key in ("prompt", "chosen", "rejected", "videos")}])
    model = AutoModelForImageTextToText.from_pretrained(BASE).eval()
    length = batch["trunk_mask"].sum()
    for side in ("chosen", "rejected"):
        ids = batch["branch_ids"][batch[side][0]][batch["branch_mask"][batch[side][0]].bool()]
        none = torch.zeros(1, len(ids), dtype=torch.long)  # a response has no media tokens
        types = {key: torch.cat([value, none], 1) for key, value in batch["trunk_types"].items()}
        with torch.no_grad():
            logits = model(torch.cat([batch["trunk_ids"], ids[None]], 1), **batch["media"][0], **types).logits[0]
        logps = logits[length - 1 : -1].log_softmax(-1)[torch.arange(len(ids)), ids]
        assert logps.mean().item() == pytest.approx(row[f"{side}_reward"], abs=1e-3)


def test_rows_are_collated_together_with_published_ones(made, inputs, processor, tmp_path):
    """Read as training reads them; nothing about a generated row needs a case of its own."""
    clip = lines(inputs["clip"])[0]["video"]
    record = {
        "question": "Which colour is the shape?",
        "answer": "the shape is red.",
        "pred": "the shape is blue.",
        "answer_masked": "the shape is <MASK>red</MASK>.",
        "pred_masked": "the shape is <MASK>blue</MASK>.",
        "video": clip,
        "sample_id": "published",
    }
    (tmp_path / "published.json").write_text(json.dumps([record]))
    published = list(import_rows("rrpo", tmp_path / "published.json"))
    for method, options in (("leanpo", {}), ("rrpo", {"phrases": True}), ("lpoi", {})):
        rows = load_dataset("json", data_files=str(made(method)[0] / "rows.jsonl"), split="train")
        batch = PreferenceCollator(processor, **options)([*rows, *published])
        assert len(batch["names"]) == len(rows) + 1 and "published" in batch["names"][-1]
        assert batch["branch_ids"].size(0) == 2 * len(rows) + 2
        if method == "rrpo":
            assert batch["phrase_mask"].any(1).tolist()[-2:] == [True, True]
            assert (batch["phrase_mask"].sum() < batch["branch_mask"].sum()).item()
        if method == "lpoi":
            listed = PreferenceCollator(processor, num_images=5)(list(rows))
            assert listed["image_branches"].shape == (len(rows), 5)


def test_inputs_that_cannot_be_used(inputs, tmp_path):
    """They end in rejected.jsonl with what is wrong; the others are made as if they were alone."""
    good = lines(inputs["clip"])
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "empty.mp4").touch()
    bad = [
        {**good[0], "id": "broken", "video": str(tmp_path / "broken.mp4")},
        {**good[0], "id": "empty", "video": str(tmp_path / "empty.mp4")},
        {**good[0], "id": "gone", "video": "gone.mp4"},
        {**good[0], "id": "silent", "answer": None},
        {**good[0], "id": "blind", "video": None},
    ]
    mixed = testbed_rows.write_jsonl([*bad[:3], *good[:4], *bad[3:]], tmp_path / "mixed.jsonl")
    summary = generate("rrpo", mixed, tmp_path / "run")
    rejected = {row["id"]: (row["kind"], row["reason"]) for row in lines(tmp_path / "run/rejected.jsonl")}
    expected = {
        "broken": ("unreadable media", "broken.mp4 cannot be opened as a video"),
        "empty": ("unreadable media", "empty.mp4 is empty"),
        "gone": ("unreadable media", "gone.mp4 does not exist"),
        "silent": ("unusable input", "`answer` is None: RRPO needs it"),
        "blind": ("unusable input", "neither a video nor an image"),
    }
    assert {name: rejected[name][0] for name in expected} == {name: kind for name, (kind, _) in expected.items()}
    for name, (_, reason) in expected.items():
        assert reason in rejected[name][1], rejected[name][1]
    counts = summary["rejected_by_kind"]
    assert (counts["unreadable media"], counts["unusable input"]) == (3, 2)
    testbed_rows.write_jsonl(good[:4], tmp_path / "good.jsonl")
    generate("rrpo", tmp_path / "good.jsonl", tmp_path / "alone")

    def plain(folder):
        return [{**row, "generated_by": None} for row in lines(folder / "rows.jsonl")]

    assert plain(tmp_path / "run") == plain(tmp_path / "alone")  # but for the fingerprint, which has the inputs


# --- the same rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, COUNT])
def test_the_batch_size_changes_no_row(batch_size, made, inputs, tmp_path):
    generate("rrpo", inputs["clip"], tmp_path / "run", "--batch_size", batch_size)
    assert written(tmp_path / "run") == written(made("rrpo")[0])


def test_rewards_hardly_depend_on_the_batch(made, inputs, tmp_path):
    generate("leanpo", inputs["clip"], tmp_path / "run", "--batch_size", COUNT)
    pairs = zip(lines(tmp_path / "run/rows.jsonl"), lines(made("leanpo")[0] / "rows.jsonl"), strict=True)
    for row, other in pairs:
        assert row["generated_by"] == other["generated_by"]
        for key in ("id", "chosen", "rejected"):
            assert row[key] == other[key]
        assert row["chosen_reward"] == pytest.approx(other["chosen_reward"], abs=1e-3)


def test_two_workers_one_after_the_other(made, inputs, tmp_path, monkeypatch, capsys):
    made("rrpo")  # in an environment of one worker
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert generate("rrpo", inputs["clip"], tmp_path / "run") is None
    told = capsys.readouterr()
    assert "This worker is done. The last one writes rows.jsonl" in told.out
    assert "1 of 2 shares, which is 6 inputs: 0 finished, 6 to do." in told.err
    assert not (tmp_path / "run/rows.jsonl").exists()
    monkeypatch.setenv("RANK", "1")
    assert generate("rrpo", inputs["clip"], tmp_path / "run") == made("rrpo")[1]
    told = capsys.readouterr()
    assert told.err == "" and "rows to train on" in told.out  # who comes last has the summary
    assert shards(tmp_path / "run") == ["00000-of-00002.jsonl", "00001-of-00002.jsonl"]
    assert written(tmp_path / "run") == written(made("rrpo")[0])


def test_a_limit_and_then_all(made, inputs, tmp_path, capsys):
    assert generate("rrpo", inputs["clip"], tmp_path / "run", "--limit", 5)["inputs"] == 5
    assert generate("rrpo", inputs["clip"], tmp_path / "run") == made("rrpo")[1]
    told = capsys.readouterr().err
    assert "5 inputs: 0 finished, 5 to do." in told and "12 inputs: 5 finished, 7 to do." in told
    assert "7/7 inputs, " in told
    assert written(tmp_path / "run") == written(made("rrpo")[0])


def test_the_seed_changes_the_rows(made, inputs, tmp_path):
    generate("rrpo", inputs["clip"], tmp_path / "run", "--seed", 1)
    answers = [[row["model_answer"] for row in lines(f / "rows.jsonl")] for f in (tmp_path / "run", made("rrpo")[0])]
    assert answers[0] != answers[1]


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_answers(made, inputs, tmp_path):
    """The rows of the next round: other answers, and who gave them."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for folder, option in (("one", "--from-adapter"), ("two", "--from_adapter")):
        generate("rrpo", inputs["clip"], tmp_path / folder, option, tmp_path / "adapter", "--limit", 6)
    assert written(tmp_path / "one") == written(tmp_path / "two")
    outcomes = {o.id: o for o in read_outcomes(tmp_path / "one")}
    before = {o.id: o for o in read_outcomes(made("rrpo")[0]) if o.id in outcomes}

    def answers(found):
        return {name: o.rows[0]["model_answer"] if o.rows else o.reason for name, o in found.items()}

    assert answers(outcomes) != answers(before)
    assert read_settings(tmp_path / "one")["answered_by"]["adapter"] == str(tmp_path / "adapter")
    for row in lines(tmp_path / "one/rows.jsonl"):
        assert row["generated_by"]["adapter"] == str(tmp_path / "adapter")
        assert row["generated_by"]["model"] == str(BASE)


def test_weights_that_changed_under_their_name(made, inputs, tmp_path):
    """An adapter that was trained on, in the same folder: its rows do not go into the run of the old one."""
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    one, other = ["--from_adapter", tmp_path / "adapter", "--limit", 2], tmp_path / "other"
    generate("rrpo", inputs["clip"], tmp_path / "run", *one)
    generate("rrpo", inputs["clip"], tmp_path / "run", *one)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.01)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(GenerateError, match=r"weights\.from_adapter: was .*, is "):
        generate("rrpo", inputs["clip"], tmp_path / "run", *one)
    generate("rrpo", inputs["clip"], other, *one)
    found = [read_settings(folder) for folder in (tmp_path / "run", other, made("rrpo")[0])]
    assert found[0]["weights"]["model_name_or_path"] == found[2]["weights"]["model_name_or_path"]
    assert found[0]["weights"]["from_adapter"] != found[1]["weights"]["from_adapter"]


NAMES = [
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt", "vocab.txt", "tokenizer.model",
    "tokenizer.json", "config.json", "model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_of_weights_is_of_all_files_that_are_read(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    none = weights_digest(tmp_path)
    path.write_bytes(b"before")
    first = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("not read")
    assert weights_digest(tmp_path) == first != none
    path.write_bytes(b"behind")
    assert weights_digest(tmp_path) not in (none, first)


def test_the_digest_of_text_is_of_every_byte(tmp_path):
    """Training changes weights all over, an editor one place of a tokenizer."""
    text = bytearray(3 << 20)
    (tmp_path / "tokenizer.json").write_bytes(text)
    first = weights_digest(tmp_path)
    for place in (20_000, 1 << 20, 3_000_000):
        text[place] = 1
        (tmp_path / "tokenizer.json").write_bytes(text)
        first, before = weights_digest(tmp_path), first
        assert first != before, place
