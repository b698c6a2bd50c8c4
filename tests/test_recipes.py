"""Every recipe in the tree: it parses for its method, its header says what a reader needs, its LoRA fits its model.

Recipes named `generate...` or `...-generate` make data (`trl-vpo generate`); all others train.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from families import FAMILIES
from trl import get_peft_config

from trl_vpo.doctor.loaded_recipe import method_of
from trl_vpo.generate.methods import METHODS as PIPELINES
from trl_vpo.generate.run import make_parser
from trl_vpo.models.adapters import VISION
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.model_size import adapt, empty_model, model_sizes
from trl_vpo.training.run import parse, quantization_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
RECIPES = [path for path in RECIPES if path.parent.name != "accelerate"]  # those are accelerate's
GENERATION = [path for path in RECIPES if path.stem.startswith("generate") or path.stem.endswith("-generate")]
RECIPES = [path for path in RECIPES if path not in GENERATION]
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


def name(path):
    return str(path.relative_to(ROOT / "recipes"))


def parsed(path):
    return parse(method_of(path), ["--config", str(path)], any_device=True)


@cache
def config_of(family):
    model, _ = FAMILIES[family][0]()
    model.config.architectures = [type(model).__name__]
    return model.config


def accelerate_of(header):
    """The accelerate config that a recipe is written for."""
    found = re.search(r"^#.* --accelerate_config (\w+)( --num_processes (\d+))?", header, re.MULTILINE)
    assert found, "no accelerate config is named"
    gpus = int(re.search(r"written for (\d+) GPU", header)[1]) if "written for" in header else 1
    assert (ROOT / f"recipes/accelerate/{found[1]}.yaml").is_file()
    assert int(found[3] or 1) == gpus
    return found[1]


def test_the_small_recipes_name_the_config_to_try_several_processes_with():
    for path in (path for path in RECIPES if path not in BIG):
        assert re.search(r"--accelerate_config cpu2\b", path.read_text()), path


def test_there_is_a_recipe_for_everything_that_is_promised():
    names = {name(path) for path in BIG}
    for method in ("dpo", "leanpo", "rrpo", "lpoi"):
        assert f"{method}/qwen2_5_vl_3b_qlora_24gb.yaml" in names
        assert f"quickstart/{method}.yaml" in {name(path) for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_parses_and_its_lora_fits_its_model(path):
    _, training_args, model_args, _ = parsed(path)
    assert path.parent.name in (method_of(path), "quickstart")
    model = empty_model(config_of(MODELS[model_args.model_name_or_path]))
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        assert "full" in path.stem
        return
    linear = {n for n, m in model.named_modules() if n.endswith("_proj") and not VISION.search(n + ".")}
    _, adapted = adapt(model, peft_config)
    assert not adapted.vision
    assert set(adapted.modules) == linear  # q, k, v, o, gate, up, down of every layer of the language model
    assert training_args.max_length is None


@pytest.mark.parametrize("path", BIG, ids=name)
def test_header_says_how_on_what_and_from_where(path):
    text = path.read_text()
    header = text.split("model_name_or_path")[0]
    method = method_of(path)
    assert f"trl-vpo train {method} --config recipes/{name(path)}" in header
    assert f"trl-vpo doctor recipes/{name(path)}" in header
    assert accelerate_of(header) == "zero3" if "full" in path.stem else accelerate_of(header) in ("single_gpu", "ddp")
    for part in ("# Hardware: written for", "# Source: ", "# Not run by us", "dataset_name is a placeholder"):
        assert part in header
    for key in ("beta", "learning_rate", "num_train_epochs", "lr_scheduler_type", "lora_r", "num_frames"):
        for line in re.findall(rf"^{key}: .*", text, re.MULTILINE):
            assert re.search(r"# (paper|ours)", line), line


@pytest.mark.parametrize("path", BIG, ids=name)
def test_the_effective_batch_is_what_the_header_says(path):
    header, recipe = path.read_text(), yaml.safe_load(path.read_text())
    told = int(re.search(r"Effective batch (\d+)", header)[1])
    gpus = int(re.search(r"written for (\d+) GPU", header)[1])
    assert told == gpus * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]


@pytest.mark.parametrize("path", [path for path in BIG if "qlora" in path.stem], ids=name)
def test_qlora_keeps_the_vision_tower_in_full_precision(path):
    _, training_args, model_args, _ = parsed(path)
    config = quantization_config(model_args)
    assert config.load_in_4bit
    assert str(config.bnb_4bit_compute_dtype) == "torch.bfloat16"
    model, _ = adapt(empty_model(config_of("Qwen2.5-VL")), get_peft_config(model_args))
    sizes = model_sizes(model, quantized=True, skip=NOT_QUANTIZED)
    language = [
        p.numel() for n, p in model.named_parameters() if "language_model" in n and n.endswith("_layer.weight")
    ]
    assert sizes.quantized == sum(language)
    assert training_args.gradient_checkpointing


# --- generation ---------------------------------------------------------------------------------------------------


def pipeline_of(path):
    return path.stem.removesuffix("-generate") if path.parent.name == "quickstart" else path.parent.name


def test_there_are_generation_recipes_for_every_pipeline():
    names = {name(path) for path in GENERATION}
    for method in PIPELINES:
        assert {f"{method}/generate.yaml", f"quickstart/{method}-generate.yaml"} <= names


@pytest.mark.parametrize("path", GENERATION, ids=name)
def test_generation_recipe_parses(path):
    method, given = pipeline_of(path), yaml.safe_load(path.read_text())
    config = make_parser(method).parse(["--config", str(path)])[0]
    for key, value in given.items():
        assert getattr(config, key) == value
    assert f"trl-vpo generate {method} --config recipes/{name(path)}" in path.read_text()
    assert config.seed == 0 and config.output_dir.startswith("outputs/")


@pytest.mark.parametrize("path", [path for path in GENERATION if path.parent.name != "quickstart"], ids=name)
def test_generation_header_says_how_on_what_and_from_where(path):
    text, method = path.read_text(), pipeline_of(path)
    header = "".join(line + "\n" for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
    assert f"trl-vpo generate {method} --config recipes/{name(path)} --dry_run" in header
    if "server" not in path.stem:
        assert f"scripts/generate.py {method} --config recipes/{name(path)}" in header
        train, config = re.search(rf"trl-vpo train {method} --config (\S+) --dataset_name (\S+)", header).groups()
        assert (ROOT / train).exists() and config == yaml.safe_load(text)["output_dir"] + "/rows.jsonl"
    for part in (
        "# Inputs: ",
        "# Hardware: written for",
        "# Source: ",
        "# Not run by us",
        "dataset_name is a placeholder",
    ):
        assert part in header
    places = ("model_name_or_path", "dataset_name", "output_dir", "server_", "judge_model", "judge_url", "dtype")
    for line in text.replace(header, "").splitlines():
        key = line.lstrip("# ").split(":")[0]
        if line.startswith("#") or not line or key.startswith(places) or key in ("batch_size", "seed", "timeout"):
            continue
        assert re.search(r"# (paper|ours)", line), line
