"""Every recipe in the tree: it parses for its method, its header says what a reader needs, its LoRA fits its model.

Recipes named `generate...` or `...-generate` make data (`trl-vpo generate`), those in `compare/` or named `compare...`
list trainings (`trl-vpo compare`); all others train.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from families import FAMILIES
from recipe_memory import GIB, card_of, recipe_memory
from trl import get_peft_config

from trl_vpo.compare.plan import read_plan
from trl_vpo.evaluate.run import parse as parse_evaluation
from trl_vpo.forward.parts import part_of
from trl_vpo.generate.pipelines import PIPELINES
from trl_vpo.generate.run import make_parser
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.model_size import adapt, empty_model, model_sizes
from trl_vpo.runs.recipe_list import MEMORY
from trl_vpo.training.launch import launch_options
from trl_vpo.training.methods import METHODS, method_of
from trl_vpo.training.run import parse, quantization_config

ROOT = Path(__file__).parent.parent
FILES = [path for path in sorted((ROOT / "recipes").glob("*/*.yaml")) if path.parent.name != "accelerate"]
GENERATION = [path for path in FILES if path.stem.startswith("generate") or path.stem.endswith("-generate")]
COMPARISONS = [path for path in FILES if path.parent.name == "compare" or path.stem.startswith("compare")]
RECIPES = [path for path in FILES if path not in (*GENERATION, *COMPARISONS)]
BIG = [path for path in RECIPES if path.parent.name != "quickstart"]
MODELS = {
    "trl_vpo/testbed/base": "Qwen2-VL",
    "Qwen/Qwen2-VL-7B-Instruct": "Qwen2-VL",
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen2.5-VL",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL",
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5",
    "llava-hf/llava-1.5-13b-hf": "LLaVA-1.5",
    "llava-hf/LLaVA-NeXT-Video-7B-hf": "LLaVA-NeXT-Video",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "LLaVA-OneVision",
    "HuggingFaceM4/idefics2-8b": "Idefics2",
}
QUICK = ("lpoi/llava_1_5_7b",)
COMMON = ("# Hardware: written for", "# Source: ", "# Run: ", "dataset_name is a placeholder")


def name(path):
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


def parsed(path):
    return parse(method_of(path), ["--config", str(path)], any_device=True)


@cache
def config_of(family):
    model, _ = FAMILIES[family][0]()
    model.config.architectures = [type(model).__name__]
    return model.config


def test_there_is_a_recipe_for_everything_that_is_promised():
    names = set(map(name, FILES))
    for method in ("dpo", "leanpo", "rrpo", "lpoi"):
        small = ("qwen2_5_vl_3b_lora_24gb", "qwen2_5_vl_7b_qlora_24gb")
        assert {f"quickstart/{method}", *(f"{method}/{name}" for name in small)} <= names
    assert {f"quickstart/{method}" for method in METHODS} <= names
    for method in PIPELINES:
        assert {f"{method}/generate", f"quickstart/{method}-generate"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_parses_and_its_lora_fits_its_model(path):
    _, training_args, model_args, _ = parsed(path)
    assert path.parent.name in (method_of(path), "quickstart")
    if path not in BIG:
        assert re.search(r"--accelerate_config cpu2\b", path.read_text())  # to try several processes with
    model = empty_model(config_of(MODELS[model_args.model_name_or_path]))
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        assert "full" in path.stem
        return
    linear = {n for n, m in model.named_modules() if n.endswith("_proj") and part_of(n) == "language"}
    _, adapted = adapt(model, peft_config)
    assert set(adapted) == linear  # q, k, v, o, gate, up, down of every layer of the language model
    assert training_args.max_length is None


@pytest.mark.parametrize("path", BIG, ids=name)
def test_header_says_how_on_what_and_from_where(path):
    text, method = path.read_text(), method_of(path)
    header = text.split("model_name_or_path")[0]
    commands = (f"trl-vpo train {method} --config {name(path)}\n", f"trl-vpo doctor {name(path)} ")
    for part in (*commands, *COMMON):
        assert part in header
    gpus = int(re.search(r"written for (\d+) GPU", header)[1])
    recipe = yaml.safe_load(text)
    assert recipe["num_processes"] == gpus
    assert recipe["accelerate_config"] == ("zero3" if "full" in path.stem else "ddp" if gpus > 1 else "single_gpu")
    batch = gpus * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert int(re.search(r"Effective batch (\d+)", header)[1]) == batch
    for key in ("beta", "learning_rate", "num_train_epochs", "lr_scheduler_type", "lora_r", "num_frames"):
        for line in re.findall(rf"^{key}: .*", text, re.MULTILINE):
            assert re.search(r"# (paper|ours)", line), line


@pytest.mark.parametrize("path", [path for path in BIG if "qlora" in path.stem], ids=name)
def test_qlora_keeps_the_vision_tower_in_full_precision(path):
    _, training_args, model_args, _ = parsed(path)
    config = quantization_config(model_args)
    assert config.load_in_4bit and str(config.bnb_4bit_compute_dtype) == "torch.bfloat16"
    model, _ = adapt(empty_model(config_of("Qwen2.5-VL")), get_peft_config(model_args))
    language = [p for n, p in model.named_parameters() if "language_model" in n and n.endswith("_layer.weight")]
    quantized = model_sizes(model, quantized=True, skip=NOT_QUANTIZED).quantized
    assert quantized == sum(p.numel() for p in language)
    assert training_args.gradient_checkpointing


@pytest.mark.parametrize("path", BIG, ids=name)
def test_recipe_leaves_room_on_its_gpu(path):
    stated = re.search(MEMORY, path.read_text(), re.MULTILINE)
    assert stated, f"python tests/kits/recipe_memory.py {path}"
    assert float(stated[1].split()[0]) * GIB <= 0.9 * card_of(path)


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if name(path) in QUICK else pytest.mark.slow, id=name(path)) for path in BIG]
)
def test_header_states_what_the_doctor_computes(path):
    memory, stated = recipe_memory(path), re.search(MEMORY, path.read_text(), re.MULTILINE)
    assert memory.total / GIB == pytest.approx(float(stated[1].split()[0]), rel=0.02), memory.line
    rest = memory.line.partition(" GiB")[2]
    assert stated[0].endswith(rest)


@pytest.mark.parametrize("path", COMPARISONS, ids=name)
def test_comparison(path):
    """Every training parses, on one base; the papers' tables have the methods that they are named after."""
    plan = read_plan([str(path)], None, None, [])
    assert f"#   trl-vpo compare --config {name(path)}\n" in path.read_text()
    for training in plan.trainings:
        options, _ = launch_options(training.options(plan.folder(training)))
        _, args, model_args, _ = parse(training.method, options, any_device=True)
        assert model_args.use_peft and args.output_dir == str(plan.folder(training))
    assert len({training.values()["model_name_or_path"] for training in plan.trainings}) == 1
    if path.parent.name == "compare":
        assert {"dpo", path.stem} <= {training.method for training in plan.trainings}
    assert parse_evaluation(launch_options(plan.evaluation_options())[0]).dataset_name == plan.held_out


@pytest.mark.parametrize("path", GENERATION, ids=name)
def test_generation_recipe(path):
    text = path.read_text()
    recipe = yaml.safe_load(text)
    small = path.parent.name == "quickstart"
    method = path.stem.removesuffix("-generate") if small else path.parent.name
    config = make_parser(method).parse(["--config", str(path)])[0]
    assert {key: getattr(config, key) for key in recipe} == recipe
    assert f"trl-vpo generate {method} --config {name(path)}\n" in text
    assert config.seed == 0 and config.output_dir.startswith("outputs/")
    if small:
        return
    header = "".join(line + "\n" for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
    for part in (f"--config {name(path)} --dry_run", "# Inputs: ", *COMMON):
        assert part in header
    if "server" not in path.stem:
        assert f"trl-vpo generate {method} --config {name(path)} --num_processes 4\n" in header
        train, rows = re.search(rf"trl-vpo train {method} --config (\S+) --dataset_name (\S+)", header).groups()
        assert train in map(name, RECIPES) and rows == recipe["output_dir"] + "/rows.jsonl"
    places = ("model_name_or_path", "dataset_name", "output_dir", "server_", "judge_model", "judge_url", "dtype")
    for line in text.replace(header, "").splitlines():
        key = line.lstrip("# ").split(":")[0]
        if line and not line.startswith("#") and not key.startswith((*places, "batch_size", "seed", "timeout")):
            assert re.search(r"# (paper|ours)", line), line
