"""`run_training` from a recipe and a file of rows to an adapter that loads again."""

import json
import re

import pytest
import torch
import yaml
from families import build, write_model
from helpers import write_image
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_vpo.data.sources import load_splits
from trl_vpo.errors import DatasetError, RecipeError, RowError, UserError
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.training.methods import METHODS
from trl_vpo.training.run import parse, run_training

LORA = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def preference_rows(folder, count=6):
    """Rows of both kinds: with an image, and text only."""
    rows = []
    for i in range(count):
        row = {"prompt": [{"role": "user", "content": "What moves?"}], "id": f"row-{i}"}
        for side, text in (("chosen", "a red square moves left"), ("rejected", "a blue circle moves right")):
            row[side] = [{"role": "assistant", "content": f"{text} {i}."}]
        rows.append(row | ({} if i % 2 else {"images": [write_image(folder / f"{i}.png")]}))
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model on disk, train and test rows, and a recipe."""
    folder = tmp_path_factory.mktemp("train")
    rows = preference_rows(folder)
    write_jsonl(rows, folder / "data" / "train.jsonl")
    write_jsonl(rows[:2], folder / "data" / "test.jsonl")
    recipe = {"model_name_or_path": write_model(folder / "base", *build("Qwen2-VL")), "output_dir": f"{folder}/out"}
    recipe |= {"dataset_name": f"{folder}/data", "use_peft": True, "lora_r": 2, "lora_target_modules": LORA}
    recipe |= {"learning_rate": "1e-2", "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    recipe |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 1, "report_to": "none", "seed": 3}
    recipe |= {"gradient_checkpointing": False, "bf16": False, "use_cpu": True}
    recipe |= {"hub_token": "hf_abcdefghijklmnopqrstuvwxyz"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(work):
    return run_training("rrpo", ["--config", str(work / "recipe.yaml"), "--alpha", "0.05"])


def test_adapter_and_processor_load_again(work, trained):
    model = AutoModelForImageTextToText.from_pretrained(work / "base")
    adapted = PeftModel.from_pretrained(model, work / "out")
    assert adapted.peft_config["default"].r == 2
    assert type(AutoProcessor.from_pretrained(work / "out")).__name__ == "Qwen2VLProcessor"
    weights = load_file(work / "out" / "adapter_model.safetensors")
    assert any(bool(tensor.abs().max() > 0) for name, tensor in weights.items() if "lora_B" in name)
    assert not [name for name in weights if "visual" in name]


def test_model_card_shows_how_to_load_the_adapter(work, trained):
    card = (work / "out" / "README.md").read_text()
    for part in ("RRPO", "2504.12083", "PeftModel.from_pretrained", "AutoModelForImageTextToText", "TRL-VPO"):
        assert part in card
    assert "text-generation" not in card


def test_run_record(work, trained):
    record = json.loads((work / "out" / "run.json").read_text())
    known = {"method": "rrpo", "seed": 3, "steps": 2, "rows": {"trained": 6, "skipped": 0}}
    assert known.items() <= (record | {"recipe_path": None}).items()
    assert record["recipe_path"] == str(work / "recipe.yaml")
    assert (record["recipe"]["alpha"], record["recipe"]["learning_rate"]) == (0.05, 0.01)
    keys = yaml.safe_load((work / "recipe.yaml").read_text()).keys() - {"hub_token"}
    assert set(record["recipe"]) <= keys | {"alpha"}  # nothing that has its default value
    assert {"train_loss", "rewards/margins", "kl/chosen"} <= set(record["metrics"]["train"])
    assert "eval_loss" in record["metrics"]["eval"]
    assert {"torch", "trl", "trl_vpo"} <= set(record["versions"])
    assert record["started"] <= record["finished"] and record["device"].startswith("cpu")
    assert "hf_" not in json.dumps(record)


def test_bad_rows_are_counted_as_skipped(work, tmp_path, capsys):
    rows = preference_rows(tmp_path)
    (tmp_path / "0.png").write_bytes(b"not an image")
    argv = ["--config", str(work / "recipe.yaml"), "--dataset_name", str(write_jsonl(rows, tmp_path / "rows.jsonl"))]
    argv += ["--output_dir", str(tmp_path / "out"), "--eval_strategy", "no", "--max_steps", "1"]
    with pytest.raises(RowError, match="row-0"):
        run_training("leanpo", argv)
    run_training("leanpo", [*argv, "--on_bad_media", "skip"])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["rows"] == {"trained": 5, "skipped": 1} and "eval" not in record["metrics"]
    assert re.search(r"^rows +\d+ \(1 skipped: skipped_rows\.jsonl\)$", capsys.readouterr().out, re.M)


def test_full_fine_tuning_with_a_frozen_tower(work, tmp_path):
    argv = ["--config", str(work / "recipe.yaml"), "--output_dir", str(tmp_path), "--max_steps", "1"]
    run_training("leanpo", [*argv, "--use_peft", "false", "--freeze_vision", "--eval_strategy", "no"])
    before, after = (load_file(folder / "model.safetensors") for folder in (work / "base", tmp_path))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "visual" in name]
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["freeze_vision"] is True


# --- recipes and options ------------------------------------------------------------------------------------------


def test_unknown_method():
    with pytest.raises(RecipeError, match=r"one of dpo, .*, symmpo\. Did you mean rrpo"):
        parse("rpo", [])


@pytest.mark.parametrize("method", METHODS)
def test_options_win_over_the_recipe(method, work):
    own = "alpha" if method == "dpa" else "beta"
    argv = [f"--config={work / 'recipe.yaml'}", f"--{own}", "0.7", "--no_remove_unused_columns"]
    script_args, training_args, model_args, _ = parse(method, argv)
    assert (getattr(training_args, own), training_args.learning_rate) == (0.7, 0.01)
    assert script_args.dataset_name == str(work / "data")
    assert model_args.lora_target_modules == LORA  # a string stays a regular expression


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_name_or_path", ""], "model_name_or_path"),
        (["--gradient_checkpointing_kwargs", '{"every_n_layer": 2}'], "Did you mean every_n_layers"),
        (["--gradient_checkpointing_kwargs", "{every_n_layers: 2}"], "^--gradient_checkpointing_kwargs: .* is JSON"),
        (["--enable_jit_checkpoint", "True"], "enable_jit_checkpoint: leave it out"),
        (["--output_dir", "/sys/kernel/run"], "output_dir /sys/kernel/run cannot be written"),
    ],
)
def test_what_is_told_before_anything_is_loaded(work, options, message):
    with pytest.raises(UserError, match=message):
        run_training("rrpo", ["--config", str(work / "recipe.yaml"), "--dataset_name", str(work), *options])


# --- data ---------------------------------------------------------------------------------------------------------


def load(*argv, evaluate=False):
    script_args, _, _, mixture = parse("dpo", ["--use_cpu", *map(str, argv)])
    return load_splits(script_args, mixture, evaluate=evaluate)


def test_every_local_source_gives_the_same_rows(work, tmp_path):
    train, test = load("--dataset_name", work / "data", evaluate=True)
    assert (len(train), len(test)) == (6, 2)
    train.to_parquet(tmp_path / "rows.parquet")
    train.to_json(tmp_path / "rows.json")
    train.save_to_disk(tmp_path / "saved")
    for source in (work / "data" / "train.jsonl", *(tmp_path / n for n in ("rows.parquet", "rows.json", "saved"))):
        rows, _ = load("--dataset_name", source)
        assert rows["chosen"][:] == train["chosen"][:], source
    streamed, _ = load("--dataset_name", work / "data", "--dataset_streaming")
    assert len(list(streamed)) == 6


def test_a_test_split_can_be_cut_off(work):
    file = work / "data" / "train.jsonl"
    cut = ["--dataset_name", file, "--test_split_size", "0.34", "--eval_strategy", "epoch"]
    train, test = load(*cut, evaluate=True)
    assert (len(train), len(test)) == (3, 3)
    with pytest.raises(DatasetError, match="or set test_split_size"):
        load("--dataset_name", file, evaluate=True)
    with pytest.raises(DatasetError, match="test_split_size cannot cut a test split off a stream"):
        load(*cut, "--dataset_streaming", evaluate=True)


def test_keys_on_data_that_would_do_nothing_are_refused(work, tmp_path):
    data = str(work / "data")
    with pytest.raises(RecipeError, match=r"streaming.* `dataset_name` .* dataset_streaming"):
        parse("dpo", ["--use_cpu", "--dataset_name", data, "--streaming", "true"])
    with pytest.raises(RecipeError, match=r"test_split_size .* eval_strategy"):
        parse("dpo", ["--use_cpu", "--dataset_name", data, "--test_split_size", "0.25"])
    mixture = {"use_cpu": True, "datasets": [{"path": "json", "data_files": f"{data}/train.jsonl", "split": "train"}]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(mixture | {"dataset_streaming": True}))
    with pytest.raises(RecipeError, match=r"dataset_streaming.* `datasets` .* streaming"):
        parse("dpo", ["--config", str(recipe)])
    recipe.write_text(yaml.safe_dump(mixture | {"streaming": True}))
    assert len(list(load("--config", recipe)[0])) == 6


def test_missing_data(tmp_path):
    with pytest.raises(DatasetError, match="dataset_name"):
        load()
    with pytest.raises(DatasetError, match=r"has no \.jsonl"):
        load("--dataset_name", tmp_path)
    (tmp_path / "valid.jsonl").write_text("")
    with pytest.raises(DatasetError, match="no split 'train'; it has valid"):
        load("--dataset_name", tmp_path)
