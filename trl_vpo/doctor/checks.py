"""`trl-vpo doctor RECIPE`: what would stop or spoil a training run, found before it starts.

Parses the recipe, loads processor and config (no weights), checks every row, tokenizes a sample of them as training
will, looks at what LoRA would adapt, and estimates memory.
"""

import argparse
import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from rich.console import Console
from transformers import AutoConfig, AutoProcessor
from trl import get_peft_config

import trl_vpo
from trl_vpo.doctor.data import check_data
from trl_vpo.doctor.findings import OK, STOP, WARN, Report, show
from trl_vpo.doctor.memory import GIB, plan_of
from trl_vpo.doctor.memory_report import Verdict, judge, show_memory
from trl_vpo.doctor.workload import load_of
from trl_vpo.errors import RecipeError, SourceError
from trl_vpo.forward.head import check_head
from trl_vpo.forward.tree import Tree
from trl_vpo.models import model_size as footprint
from trl_vpo.models.adapters import LORA_RANKS, vllm_refuses
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.source import check_model
from trl_vpo.runs.packages import missing_packages
from trl_vpo.runs.recipe_file import recipe_text
from trl_vpo.trainers.setup import low_rate, set_pad_token
from trl_vpo.training.launch import launch_options
from trl_vpo.training.methods import METHODS
from trl_vpo.training.run import parse
from trl_vpo.training.sharding import Sharding, launched

MEDIA_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass
class Patient:
    """A parsed recipe and what it names."""

    method: str
    script_args: Any
    args: Any
    model_args: Any
    mixture: Any
    config: Any = None
    processor: Any = None
    base: Any = None  # the model on the meta device ...
    model: Any = None  # ... and with its adapter
    sharding: Sharding = field(default_factory=Sharding)
    gpu_memory: int | None = None  # bytes

    @property
    def trainer_class(self) -> Any:
        return getattr(trl_vpo, METHODS[self.method][1])

    @property
    def media_tokens(self) -> set[int]:
        """The ids that stand for image and video features in a prompt."""
        return {getattr(self.config, name, None) for name in MEDIA_TOKENS} - {None}


@dataclass
class Diagnosis(Report):
    """A report, and what the recipe takes on a GPU. None: it could not be estimated."""

    verdict: Verdict | None = None


def run_doctor(
    recipe: Path,
    overrides: list[str],
    *,
    method: str | None = None,
    rows: int | None = 64,
    out: Path | None = None,
    console: Console | None = None,
) -> int:
    """Check a recipe and print what was found. Gives the exit code: 1 if something would stop the training.

    Args:
        recipe: the YAML file.
        overrides: options that win over it; `--accelerate_config` and `--num_processes` as `trl-vpo train` takes
            them, and `--gpu_memory`, GiB, for a GPU that is not here.
        method: a key of `METHODS`; None: what the recipe's header or path says.
        rows: how many rows to tokenize, spread over the dataset; None: all.
        out: file for every problem, one JSON object per line.
        console: where to print.

    Raises:
        RecipeError, ValueError: the recipe or an option cannot be parsed.
    """
    console = console or Console()
    report = examine(recipe, overrides, method=method, rows=rows)
    show(report, console)
    if report.verdict is not None:
        show_memory(report.verdict, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(problem, ensure_ascii=False) + "\n" for problem in report.problems)
        out.write_text("".join(lines), encoding="utf-8")
        console.print(f"{len(report.problems)} problems written to {out}", highlight=False)
    return int(report.stops)


def examine(recipe: Path, overrides: list[str], *, method: str | None = None, rows: int | None = 64) -> Diagnosis:
    """All checks of `run_doctor`; a check that fails does not keep the others from running."""
    method = method or method_of(recipe)
    options, gpu_memory = _gpu_memory(["--config", str(recipe), *overrides])
    options, launch = launch_options(options)
    patient = Patient(method, *parse(method, options, any_device=True), gpu_memory=gpu_memory)
    patient.sharding = launched(launch)
    report = Diagnosis()
    report.add("recipe", OK, f"{recipe} parses for {method}")
    _load_pretrained(patient, report)
    if patient.config is not None:
        _check_model(patient, report)
    heaviest = check_data(patient, rows, report)
    if heaviest and patient.model is not None:
        _estimate(patient, heaviest, report)
    return report


def _gpu_memory(options: list[str]) -> tuple[list[str], int | None]:
    """Options without `--gpu_memory`, and its bytes; None where it is not given and no GPU is here."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--gpu_memory", type=float)
    try:
        given, rest = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise RecipeError(f"--gpu_memory takes a number of GiB: {error.message}.") from error
    if given.gpu_memory is not None:
        return rest, int(given.gpu_memory * GIB)
    return rest, torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def method_of(recipe: Path) -> str:
    """The method that a recipe is for: its header's `trl-vpo train METHOD`, else its file name or folder.

    Raises:
        RecipeError: nothing says it.
    """
    header = re.findall(r"^#.*\btrain(?:\.py)?\s+(\w+)", recipe_text(recipe), re.MULTILINE)
    for name in [*header, recipe.stem, *reversed(recipe.parent.parts)]:
        if name in METHODS:
            return name
    raise RecipeError(f"which method is {recipe} for? Say --method {'|'.join(METHODS)}.")


# --- model --------------------------------------------------------------------------------------------------------


def _load_pretrained(patient: Patient, report: Report) -> None:
    name = patient.model_args.model_name_or_path
    if not name:
        report.add("model", STOP, "there is no model: set `model_name_or_path`")
        return
    for line in missing_packages(vars(patient.args) | vars(patient.model_args)):
        report.add("package", STOP, line)
    try:
        check_model(name, revision=patient.model_args.model_revision)
    except SourceError as error:
        report.add("model", STOP, str(error))
        if not Path(name).exists():
            return
    kwargs = {"revision": patient.model_args.model_revision, "trust_remote_code": patient.args.trust_remote_code}
    for part, auto in (("config", AutoConfig), ("processor", AutoProcessor)):
        try:
            setattr(patient, part, auto.from_pretrained(name, **kwargs))
            report.add(part, OK, type(getattr(patient, part)).__name__)
        except (OSError, ValueError, ImportError) as error:
            report.add(part, STOP, f"{name}: {str(error).splitlines()[0]}")
    if patient.processor is not None:
        try:
            set_pad_token(patient.processor, patient.args)
        except ValueError as error:
            report.add("pad token", STOP, str(error))


def _check_model(patient: Patient, report: Report) -> None:
    """Build the empty model and the empty adapter."""
    try:
        patient.base = patient.model = footprint.empty_model(patient.config)
    except Exception as error:  # model code of any origin; the other checks go on
        report.add("model", WARN, f"cannot be built without weights, so LoRA and memory are unchecked: {error}")
        return
    if (peft_config := get_peft_config(patient.model_args)) is None:
        _check_full(patient, report)
        return
    try:
        patient.model, adapted = footprint.adapt(patient.model, peft_config)
        check_head(patient.model)
    except ValueError as error:
        report.add("LoRA", STOP, str(error).split(". Please check")[0])
        patient.model = None
        return
    if wrong := low_rate(patient.args, patient.trainer_class._name):
        report.add("learning rate", WARN, wrong)
    what = f"{len(adapted.modules)} modules adapted, {len(adapted.vision)} of them in vision tower or projector"
    if adapted.vision:
        what += f" (such as {adapted.vision[0]}): the recipes train the language model only"
    report.add("LoRA", WARN if adapted.vision else OK, what)
    _check_serving(patient.model, report)


def _check_serving(model: Any, report: Report) -> None:
    """What vLLM would make of the adapter. A rank that it takes when it is told so is no cause for a warning."""
    config = model.peft_config["default"].to_dict()
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    refused = vllm_refuses(config, tensors, max_lora_rank=LORA_RANKS[-1])
    said = " ".join(vllm_refuses(config, tensors)) or "serves the adapter as it will be saved"
    report.add("vLLM", WARN if refused else OK, said)


def _check_full(patient: Patient, report: Report) -> None:
    if patient.script_args.freeze_vision:
        for name, parameter in patient.model.named_parameters():
            parameter.requires_grad_(not footprint.VISION.search(name))
        report.add("full fine-tuning", OK, "vision tower and projector are frozen")
        return
    report.add("full fine-tuning", WARN, "every parameter is trained, the vision tower's too (freeze_vision: true)")


# --- memory -------------------------------------------------------------------------------------------------------


def _estimate(patient: Patient, heaviest: list[Tree], report: Diagnosis) -> None:
    """Memory of the micro-batch that the longest rows make, repeated where there are too few."""
    args, model_args = patient.args, patient.model_args
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    sizes = footprint.sizes(patient.model, quantized=quantized, skip=NOT_QUANTIZED)
    what = f"{sizes.total / 1e9:.2f} B ({sizes.vision / 1e9:.2f} B vision), {sizes.trained / 1e6:.2f} M trained"
    report.add("parameters", OK, what)
    pairs = args.per_device_train_batch_size
    make = partial(
        load_of,
        model=patient.base,
        layout=args.layout,
        media_tokens=patient.media_tokens,
        pad_token_id=getattr(patient.processor, "tokenizer", patient.processor).pad_token_id,
        compares=patient.trainer_class.needs_kl,
        processes=patient.sharding.processes,
        pad_to_multiple_of=args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None,
        masks=not str(model_args.attn_implementation).startswith("flash"),
    )
    try:
        plan = plan_of(
            args,
            model_args,
            sizes=sizes,
            load=make((heaviest * pairs)[:pairs]),
            pair=make(heaviest[:1]),
            config=patient.config,
            needs_reference=patient.trainer_class.needs_reference,
            sharding=patient.sharding,
        )
        report.verdict = judge(plan, patient.model, args, patient.gpu_memory)
    except Exception as error:  # model code of any origin, which may look into tensors that hold nothing here
        report.add("memory", WARN, f"not estimated: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    report.add("memory", WARN if report.verdict.fits is False else OK, str(report.verdict))
