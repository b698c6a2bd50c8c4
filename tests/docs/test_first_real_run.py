"""The steps of the page, on stand-ins of its datasets: their files and fields, clips of the small world."""

import json

import pytest
import stand_ins
from pages import ROOT, blocks, commands

from trl_vpo import cli
from trl_vpo.testbed.tiny_vlm import BASE

PAGE = "first-real-run"
# In the place of a 7B model on GPUs: the small world's base on a CPU, two steps. Later options win.
SMALL = ["--model_name_or_path", str(BASE), "--num_frames", "8"]
STEPS = [
    "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32",
    "--load_in_4bit", "false", "--use_bnb_nested_quant", "false", "--gradient_checkpointing", "false",
    "--dataloader_num_workers", "0",
]  # fmt: skip


def shown(mark=""):
    found = [block for block in blocks("bash", mark) if block.page.stem == PAGE]
    return [words for block in found for words in commands(block.text)]


def one(command, *with_words):
    (words,) = [words for words in shown() if words[0] == command and set(with_words) <= set(words)]
    return words


@pytest.mark.parametrize("dataset", stand_ins.WRITE)
def test_from_the_dataset_to_a_merged_model(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as under a launcher: start no processes
    stand_ins.WRITE[dataset](tmp_path, 12)
    (imported,) = shown(f"runs: {dataset}")
    assert cli.main(imported) == 0
    assert "12 rows of 12 records" in (said := capsys.readouterr().out) and " 0 missing" in said
    lines = (tmp_path / "data/pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("train", lines[:-4]), ("held_out", lines[-4:])):  # the page: `head` and `tail`
        (tmp_path / f"data/{name}.jsonl").write_text("".join(part), encoding="utf-8")

    assert cli.main(one("view")) == 0 and (tmp_path / "train.html").is_file()
    assert cli.main([*one("doctor"), *SMALL, *STEPS]) == 0
    train = one("train", "--num_processes")
    at = train.index("--num_processes")
    assert cli.main([*train[:at], *train[at + 2 :], *SMALL, *STEPS]) == 0
    assert cli.main(one("plot")) == 0
    assert cli.main([str(BASE) if word.startswith("Qwen/") else word for word in one("evaluate")]) == 0
    assert cli.main(one("merge")) == 0
    results = json.loads((tmp_path / "outputs/evaluation/results.json").read_text(encoding="utf-8"))
    assert "preference/accuracy" in json.dumps(results)
    for block in blocks("python", "runs: load"):  # of docs/models.md
        scope = {}
        text = block.text.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(BASE))
        exec(text.replace("outputs/rrpo", "outputs/leanpo-qwen2_5_vl_7b"), scope)
        assert scope["model"].peft_config["default"].r == 64
    assert (tmp_path / "curves.html").is_file() and (tmp_path / "merged/leanpo/model.safetensors").is_file()


def test_the_recipe_for_one_gpu_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stand_ins.write_hound(tmp_path, 4)
    (imported,) = shown("runs: hound")
    assert cli.main(imported) == 0
    (tmp_path / "data/pairs.jsonl").rename("data/train.jsonl")
    (train,) = [words for words in shown() if words[0] == "train" and "24gb" in words[3]]
    assert cli.main([*train, *SMALL, *STEPS]) == 0
    assert (tmp_path / "outputs/leanpo-qwen2_5_vl_3b_lora_24gb/adapter_model.safetensors").is_file()


def test_the_page_says_what_was_not_run():
    text = (ROOT / f"docs/{PAGE}.md").read_text(encoding="utf-8")
    assert "not run" in text[text.index("## What was run here") :]
