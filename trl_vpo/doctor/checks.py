"""`trl-vpo doctor RECIPE`: find what would stop or spoil a training run before it starts.

Parses the recipe, loads processor and config (no weights), checks every row, tokenizes a sample of them as training
will, lists the modules that LoRA would adapt, and estimates memory.
"""

import json
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict
from rich.console import Console
from transformers import AutoConfig, AutoProcessor
from trl import get_peft_config

from trl_vpo.data.paths import check_output_file
from trl_vpo.doctor.data import LongestRows, check_data
from trl_vpo.doctor.loaded_recipe import LoadedRecipe, parse_recipe
from trl_vpo.doctor.measure import check_can_measure, measure
from trl_vpo.doctor.memory import GIB, plan_of
from trl_vpo.doctor.memory_report import check_fit
from trl_vpo.doctor.report import OK, PROBLEM, STOP, WARN, Report, show
from trl_vpo.errors import ModelError, RecipeError, SourceError, UserError
from trl_vpo.forward.head import check_head
from trl_vpo.forward.parts import part_of
from trl_vpo.models.adapters import LORA_RANKS, vllm_refuses
from trl_vpo.models.model_size import adapt
from trl_vpo.models.source import check_model
from trl_vpo.runs.console import make_console
from trl_vpo.runs.packages import missing_packages
from trl_vpo.runs.values import check_bounds
from trl_vpo.trainers.rates import check_trained_parts
from trl_vpo.trainers.setup import check_checkpointing, low_rate, set_pad_token
from trl_vpo.training.launch import check_gpus, launch_options
from trl_vpo.training.run import freeze_vision
from trl_vpo.training.sharding import check_groups


def run_doctor(
    recipe: Path, overrides: list[str], *, out: Path | None = None, console: Console | None = None, **options: object
) -> int:
    """Examine a recipe (see `examine`) and print the report. The exit code is 1 if something would stop the training.

    Every problem is written into the file `out`, one JSON object per line.
    """
    console = console or make_console()
    if out is not None:
        check_output_file(out)
        _check_replaceable(out)
    report = examine(recipe, overrides, **options)
    show(report, console)
    if out is not None:
        lines = (json.dumps(problem, ensure_ascii=False) + "\n" for problem in report.problems)
        out.write_text("".join(lines), encoding="utf-8")
        console.print(f"{len(report.problems)} problems written to {out}", soft_wrap=True)
    return int(report.stops)


def _check_replaceable(out: Path) -> None:
    """Refuse to write over a file that holds anything but the problems of an earlier call."""
    if out.is_file() and out.stat().st_size:
        try:
            first = json.loads(out.read_bytes().partition(b"\n")[0])
        except ValueError:
            first = None
        if not isinstance(first, dict) or first.keys() != {*PROBLEM}:
            raise RecipeError(f"--out {out} holds something else than problems of rows. Name another file.")


def examine(
    recipe: Path,
    overrides: list[str],
    *,
    method: str | None = None,
    rows: int | None = 64,
    gpu_memory: float | None = None,
    measures: bool = False,
) -> Report:
    """Check a recipe; a check that fails does not keep the others from running.

    `rows` are tokenized, spread over the dataset; None: all. `measures`: also train two steps on the longest rows, and
    measure their memory. The rest is as `parse_recipe` takes it. Raises as it does, and where nothing can be measured.
    """
    check_bounds("rows", rows, "--")
    check_bounds("gpu_memory", gpu_memory, "--")
    loaded = parse_recipe(recipe, overrides, method=method, gpu_memory=gpu_memory)
    if measures:
        check_can_measure(loaded)
    report = Report()
    report.add("recipe", OK, f"{recipe} parses for {loaded.method}")
    _check_launch(loaded, ["train", loaded.method, "--config", str(recipe), *overrides], report)
    _load_pretrained(loaded, report)
    if loaded.config is not None:
        _check_model(loaded, report)
    longest = check_data(loaded, rows, report)
    if loaded.config is None or loaded.processor is None:
        text = "LoRA, tokens and memory: they need the model's config and processor, which could not be loaded"
        report.add("not checked", WARN, text)
    if longest is not None and loaded.model is not None:
        _estimate(loaded, longest, report)
        if measures and not report.stops:
            try:
                measured = measure(loaded, longest.rows)
            except torch.OutOfMemoryError as error:
                report.add("measured memory", STOP, str(error).splitlines()[0])
                return report
            if report.memory is not None:
                report.memory.measured = measured
            tensors, reserved = measured.allocated / GIB, measured.reserved / GIB
            text = f"two steps took {tensors:.2f} GiB in tensors, {reserved:.2f} GiB in all"
            report.add("measured memory", OK, text)
    return report


def _check_launch(recipe: LoadedRecipe, words: list[str], report: Report) -> None:
    """Check what is refused before anything is loaded; `words` are the command that trains."""
    launch = launch_options(words)[1]
    if torch.accelerator.device_count():  # without any, training is meant for another machine
        try:
            check_gpus(words, launch)
        except RecipeError as error:
            report.add("GPUs", WARN, str(error))
    try:
        check_groups(launch)
    except RecipeError as error:
        report.add("processes", STOP, str(error))
    try:
        check_checkpointing(recipe.args, forced=recipe.model_args.use_peft and recipe.sharding.kind == "zero3")
    except RecipeError as error:
        report.add("gradient checkpointing", STOP, str(error))


# --- model --------------------------------------------------------------------------------------------------------


def _load_pretrained(recipe: LoadedRecipe, report: Report) -> None:
    name, revision = recipe.model_args.model_name_or_path, recipe.model_args.model_revision
    if not name:
        report.add("model", STOP, "there is no model: set `model_name_or_path`")
        return
    for line in missing_packages(vars(recipe.args) | vars(recipe.model_args)):
        report.add("package", STOP, line)
    try:
        check_model(name, revision=revision)
    except SourceError as error:
        report.add("model", STOP, str(error))
        if not Path(name).exists():
            return
    for part, auto in (("config", AutoConfig), ("processor", AutoProcessor)):
        try:
            value = auto.from_pretrained(name, revision=revision, trust_remote_code=recipe.args.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            report.add(part, STOP, f"{name}: {str(error).splitlines()[0]}")
        else:
            setattr(recipe, part, value)
            report.add(part, OK, type(value).__name__)
    if recipe.processor is not None:
        try:
            set_pad_token(recipe.processor, recipe.args)
        except ValueError as error:
            report.add("pad token", STOP, str(error))


def _check_model(recipe: LoadedRecipe, report: Report) -> None:
    """Build the empty model and the empty adapter."""
    try:
        recipe.build()
    except ModelError as error:
        report.add("model", STOP, str(error))
        return
    except Exception as error:  # model code of any origin; the other checks go on
        report.add("model", WARN, f"cannot be built without weights, so LoRA and memory are unchecked: {error}")
        return
    _check_trained(recipe, report)
    if recipe.model is not None:
        try:
            check_trained_parts(recipe.args, recipe.model)
        except RecipeError as error:
            report.add("learning rate", STOP, str(error))


def _check_trained(recipe: LoadedRecipe, report: Report) -> None:
    if (peft_config := get_peft_config(recipe.model_args)) is not None:
        _check_lora(recipe, peft_config, report)
    elif not recipe.script_args.freeze_vision:
        text = "every parameter is trained, those of the vision tower as well (freeze_vision: true freezes them)"
        report.add("full fine-tuning", WARN, text)
    else:
        try:
            freeze_vision(recipe.model)
        except UserError as error:
            report.add("full fine-tuning", STOP, str(error))
        else:
            report.add("full fine-tuning", OK, "vision tower and projector are frozen")


def _check_lora(recipe: LoadedRecipe, peft_config: PeftConfig, report: Report) -> None:
    try:
        recipe.model, names = adapt(recipe.model, peft_config)
        check_head(recipe.model)
    except ValueError as error:
        report.add("LoRA", STOP, str(error).split(". Please check")[0])
        recipe.model = None
        return
    if wrong := low_rate(recipe.args):
        report.add("learning rate", WARN, wrong)
    vision = [name for name in names if part_of(name) != "language"]
    text = f"{len(names)} modules adapted, {len(vision)} of them in vision tower or projector"
    if vision:
        text += f" (such as {vision[0]}): the recipes train the language model only"
    report.add("LoRA", WARN if vision else OK, text)
    served = recipe.model.peft_config["default"].to_dict()
    tensors = get_peft_model_state_dict(recipe.model, save_embedding_layers=False)
    refused = vllm_refuses(served, tensors, max_lora_rank=LORA_RANKS[-1])  # such a rank it takes when it is told so
    text = " ".join(vllm_refuses(served, tensors)) or "the adapter has nothing that it is known to refuse (not tried)"
    report.add("vLLM", WARN if refused else OK, text)


# --- memory -------------------------------------------------------------------------------------------------------


def _estimate(recipe: LoadedRecipe, longest: LongestRows, report: Report) -> None:
    """Estimate the memory of the micro-batch that the longest rows make."""
    try:
        plan = plan_of(recipe, longest.trees, device="cpu" if recipe.on_cpu else "cuda")
        sizes = plan.sizes
        text = f"{sizes.total / 1e9:.2f} B ({sizes.vision / 1e9:.2f} B vision), {sizes.trained / 1e6:.2f} M trained"
        report.add("parameters", OK, text)
        report.memory = check_fit(plan, recipe.model, recipe.args, recipe.gpu_memory)
    except Exception as error:  # model code of any origin, which may look into tensors that hold nothing here
        report.add("memory", WARN, f"not estimated: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    report.add("memory", WARN if report.memory.fits is False else OK, str(report.memory))
