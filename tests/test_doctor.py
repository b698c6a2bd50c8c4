"""`trl-vpo doctor`: what it finds in a good recipe, and in bad ones."""

import json

import pytest
import transformers as T
import yaml
from families import FAMILIES, build
from helpers import row, write_image
from peft import LoraConfig
from rich.console import Console

from trl_vpo import footprint
from trl_vpo.doctor import examine, method_of, run_doctor
from trl_vpo.recipe import RecipeError
from trl_vpo.report.findings import OK, STOP, WARN
from trl_vpo.train import NOT_QUANTIZED, parse

LORA = r".*language_model.*\.(q_proj|v_proj)"


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model on disk, rows with images, and a recipe for them."""
    folder = tmp_path_factory.mktemp("doctor")
    model, processor = build("Qwen2-VL")
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    image = write_image(folder / "image.png")
    rows = [row("image", [image], critical_box=[8, 8, 40, 40], id=f"r{i}") for i in range(6)]
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": write(folder / "rows.jsonl", rows),
        "output_dir": str(folder / "out"),
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": LORA,
        "per_device_train_batch_size": 3,
        "num_images": 4,
    }
    (folder / "recipe.yaml").write_text("# trl-vpo train lpoi --config recipe.yaml\n" + yaml.safe_dump(recipe))
    return folder


def status(report):
    return {check: found for check, found, _ in report.findings}


def test_a_good_recipe(work):
    report = examine(work / "recipe.yaml", [], rows=4)
    assert not report.stops
    assert not report.problems
    assert status(report)["LoRA"] == OK
    said = {check: what for check, _, what in report.findings}
    assert said["LoRA"].startswith("4 modules adapted, 0 of them")  # q and v in 2 layers
    assert said["tokens"].startswith("4 of 6 rows tokenized")
    tokens = {name: values[0] for name, values in report.tokens.items()}
    assert tokens["media"] == 4  # 56 x 56 pixels, patches of 14, merged 2 x 2
    sides = tokens["chosen response"], tokens["rejected response"]
    prompt = tokens["prompt text"] + tokens["media"]
    assert tokens["longest sequence"] == prompt + max(sides)
    assert tokens["all sequences of the pair"] == 5 * prompt + 4 * sides[0] + sides[1]  # 4 images and the rejected
    assert set(report.memory) == {"weights", "gradients", "optimizer", "activations", "head"}


def test_every_problem_is_listed_and_written(work, tmp_path):
    image = write_image(tmp_path / "image.png")
    (tmp_path / "no.png").write_bytes(b"no image")
    rows = [row("image", [image], critical_box=[8, 8, 40, 40], id="good")]
    rows += [row("image", [str(tmp_path / "no.png")], critical_box=[8, 8, 40, 40], id=f"bad-{i}") for i in range(12)]
    rows += [row("image", [image], critical_box=[40, 8, 8, 40], id="inverted"), row(None, id="text")]
    argv = ["--dataset_name", write(tmp_path / "rows.jsonl", rows)]
    console = Console(record=True, width=100)
    code = run_doctor(work / "recipe.yaml", argv, out=tmp_path / "problems.jsonl", console=console)
    assert code == 1
    found = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [problem["row"] for problem in found] == list(range(1, 15))
    assert [problem["media"] for problem in found] == [True] * 12 + [False] * 2
    assert "bad-0" in found[0]["reason"]
    text = console.export_text()
    assert "and 4 more" in text
    assert "1 of 15 rows tokenized" in text  # the one that is good
    skipping = examine(work / "recipe.yaml", [*argv, "--on_bad_media", "skip"])
    assert "12 would be skipped" in {check: what for check, _, what in skipping.findings}["train rows"]
    assert skipping.stops  # the other two rows still stop it


def test_rows_over_max_length(work):
    report = examine(work / "recipe.yaml", ["--max_length", "10"])
    assert status(report)["tokens"] == STOP
    assert len(report.problems) == 6
    assert "max_length=10" in report.problems[0]["reason"]


def test_lora_targets(work):
    everywhere = examine(work / "recipe.yaml", ["--lora_target_modules", "all-linear"])
    assert status(everywhere)["LoRA"] == WARN
    nowhere = examine(work / "recipe.yaml", ["--lora_target_modules", "query"])
    assert status(nowhere)["LoRA"] == STOP
    assert "tokens" in status(nowhere)  # the other checks went on


def test_full_fine_tuning(work):
    argv = ["--use_peft", "false"]
    report = examine(work / "recipe.yaml", argv)
    assert status(report)["full fine-tuning"] == WARN
    frozen = examine(work / "recipe.yaml", [*argv, "--freeze_vision"])
    assert status(frozen)["full fine-tuning"] == OK
    assert frozen.memory["gradients"] < report.memory["gradients"]
    lora = examine(work / "recipe.yaml", [])
    assert report.memory["weights"] > 1.9 * lora.memory["weights"]  # a second copy is the reference


@pytest.mark.parametrize(
    ("argv", "check"),
    [
        (["--model_name_or_path", "nowhere/nothing"], "processor"),
        (["--dataset_name", "nowhere.jsonl"], "data"),
        (["--eval_strategy", "steps"], "data"),  # there is no test split
    ],
)
def test_what_is_missing_stops(work, argv, check):
    assert status(examine(work / "recipe.yaml", argv))[check] == STOP


def test_method_of_a_recipe(work, tmp_path):
    assert method_of(work / "recipe.yaml") == "lpoi"
    (tmp_path / "rrpo").mkdir()
    for path in (tmp_path / "rrpo" / "some.yaml", tmp_path / "leanpo.yaml", tmp_path / "other.yaml"):
        path.write_text("use_cpu: true\n")
    assert method_of(tmp_path / "rrpo" / "some.yaml") == "rrpo"
    assert method_of(tmp_path / "leanpo.yaml") == "leanpo"
    with pytest.raises(RecipeError, match="--method"):
        method_of(tmp_path / "other.yaml")
    with pytest.raises(RecipeError, match="does not exist"):
        method_of(tmp_path / "nowhere.yaml")


# --- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_models_count_as_real_ones(family):
    model, _ = build(family)
    model.config.architectures = [type(model).__name__]
    empty = footprint.empty_model(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    counted = footprint.sizes(empty, quantized=False, skip=[])
    assert counted.total == model.num_parameters()
    assert 0 < counted.vision < counted.total
    _, adapted = footprint.adapt(empty, LoraConfig(target_modules="all-linear"))
    assert adapted.vision  # all-linear reaches into the tower of every family


def test_memory_by_hand():
    config = T.Qwen2Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    layer = 4 * 64 + 3 * 8 + 3 * 8 * 16 + 2 * 8  # attention with biases of q, k, v; MLP; norms
    linear = 2 * (4 * 64 + 3 * 8 * 16)
    total = 2 * layer + 2 * 32 * 8 + 8
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model, adapted = footprint.adapt(footprint.empty_model(config), lora)
    trained = 2 * 2 * (8 + 8)
    sizes = footprint.sizes(model, quantized=True, skip=NOT_QUANTIZED)
    assert (sizes.total, sizes.trained, sizes.quantized) == (total + trained, trained, linear)
    assert len(adapted.modules) == 2
    load = footprint.Load(sequences=4, length=10, responses=12)
    four_bit = [
        "--load_in_4bit",
        "--dtype",
        "bfloat16",
        "--use_peft",
        "--optim",
        "adamw_8bit",
        "--use_cpu",
        "--bf16=true",
    ]
    _, args, model_args, _ = parse("rrpo", four_bit)
    found = footprint.memory(sizes, load, config, args, model_args, copies=1)
    assert found["weights"] == int(2 * (total - linear) + linear * (0.5 + 4 / 64) + 2 * trained)
    assert found["gradients"] == 2 * trained
    assert found["optimizer"] == 2 * trained
    assert found["activations"] == 40 * (2 * 8 + 9 * 8 + 4 * 16) * 2  # checkpointing is on by default
    assert found["head"] == 3 * 12 * 32 * 4
    _, args, model_args, _ = parse("rrpo", ["--use_cpu", "--bf16=false"])
    sizes = footprint.sizes(footprint.empty_model(config), quantized=False, skip=[])
    found = footprint.memory(sizes, load, config, args, model_args, copies=2)
    assert found["weights"] == 2 * 4 * total
    assert found["optimizer"] == 8 * total
