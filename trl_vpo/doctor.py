"""`trl-vpo doctor RECIPE`: what would stop or spoil a training run, found before it starts.

Parses the recipe, loads processor and config (no weights), checks every row, tokenizes a sample of them as training
will, looks at what LoRA would adapt, and estimates memory.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, AutoProcessor
from trl import get_peft_config

import trl_vpo
from trl_vpo import footprint
from trl_vpo.data.check import Problem, check_row, check_rows, raw_rows
from trl_vpo.data.rows import ROW_INDEX, RowError
from trl_vpo.data.sources import DatasetError, load_splits
from trl_vpo.forward.tree import Tree
from trl_vpo.recipe import RecipeError
from trl_vpo.report.findings import OK, STOP, WARN, Report, show
from trl_vpo.train import METHODS, NOT_QUANTIZED, parse
from trl_vpo.trainers.setup import set_pad_token

LONGEST = "longest sequence"
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
    model: Any = None  # on the meta device

    @property
    def trainer_class(self) -> Any:
        return getattr(trl_vpo, METHODS[self.method][1])

    @property
    def media_tokens(self) -> set[int]:
        """The ids that stand for image and video features in a prompt."""
        return {getattr(self.config, name, None) for name in MEDIA_TOKENS} - {None}


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
        overrides: options that win over it.
        method: a key of `METHODS`; None: what the recipe's header or path says.
        rows: how many rows to tokenize, spread over the dataset; None: all.
        out: file for every problem, one JSON object per line.
        console: where to print.

    Raises:
        RecipeError, ValueError: the recipe cannot be parsed.
    """
    console = console or Console()
    report = examine(recipe, overrides, method=method, rows=rows)
    show(report, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(problem, ensure_ascii=False) + "\n" for problem in report.problems)
        out.write_text("".join(lines), encoding="utf-8")
        console.print(f"{len(report.problems)} problems written to {out}", highlight=False)
    return int(report.stops)


def examine(recipe: Path, overrides: list[str], *, method: str | None = None, rows: int | None = 64) -> Report:
    """All checks of `run_doctor`; a check that fails does not keep the others from running."""
    method = method or method_of(recipe)
    patient = Patient(method, *parse(method, ["--config", str(recipe), *overrides], any_device=True))
    report = Report()
    report.add("recipe", OK, f"{recipe} parses for {method}")
    _load_pretrained(patient, report)
    if patient.config is not None:
        _check_model(patient, report)
    datasets = _load_data(patient, report)
    for name, dataset in datasets.items():
        _check_rows(patient, dataset, name, report)
    if patient.processor is not None and "train" in datasets:
        load = _tokenize(patient, datasets["train"], rows, report)
        if load is not None and patient.model is not None:
            _estimate(patient, load, report)
    return report


def method_of(recipe: Path) -> str:
    """The method that a recipe is for: its header's `trl-vpo train METHOD`, else its file name or folder.

    Raises:
        RecipeError: nothing says it.
    """
    if not recipe.is_file():
        raise RecipeError(f"the recipe {recipe} does not exist (seen from {Path.cwd()}).")
    header = re.findall(r"^#.*\btrain(?:\.py)?\s+(\w+)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
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
        patient.model = footprint.empty_model(patient.config)
    except Exception as error:  # model code of any origin; the other checks go on
        report.add("model", WARN, f"cannot be built without weights, so LoRA and memory are unchecked: {error}")
        return
    if (peft_config := get_peft_config(patient.model_args)) is None:
        _check_full(patient, report)
        return
    try:
        patient.model, adapted = footprint.adapt(patient.model, peft_config)
    except ValueError as error:
        report.add("LoRA", STOP, str(error).split(". Please check")[0])
        patient.model = None
        return
    what = f"{len(adapted.modules)} modules adapted, {len(adapted.vision)} of them in vision tower or projector"
    if adapted.vision:
        what += f" (such as {adapted.vision[0]}): the recipes train the language model only"
    report.add("LoRA", WARN if adapted.vision else OK, what)


def _check_full(patient: Patient, report: Report) -> None:
    if patient.script_args.freeze_vision:
        for name, parameter in patient.model.named_parameters():
            parameter.requires_grad_(not footprint.VISION.search(name))
        report.add("full fine-tuning", OK, "vision tower and projector are frozen")
        return
    report.add("full fine-tuning", WARN, "every parameter is trained, the vision tower's too (freeze_vision: true)")


# --- data ---------------------------------------------------------------------------------------------------------


def _load_data(patient: Patient, report: Report) -> dict[str, Dataset]:
    """The splits, numbered; of a streamed one the first rows."""
    evaluate = patient.args.eval_strategy != "no"
    try:
        splits = load_splits(patient.script_args, patient.mixture, evaluate=evaluate, seed=patient.args.seed)
    except (DatasetError, OSError, ValueError) as error:
        report.add("data", STOP, str(error))
        return {}
    loaded = {}
    for name, dataset in zip(("train", "eval"), splits):
        if isinstance(dataset, IterableDataset):
            dataset = Dataset.from_list(list(dataset.take(64)))
            report.add(f"{name} data", WARN, f"streamed: only the first {len(dataset)} rows are looked at")
        if dataset is not None and len(dataset) == 0:
            report.add(f"{name} data", STOP, "no rows")
        elif dataset is not None:
            loaded[name] = dataset.add_column(ROW_INDEX, list(range(len(dataset))))
    return loaded


def _check_rows(patient: Patient, dataset: Dataset, name: str, report: Report) -> None:
    """Every row against the contract, every media file as closely as the recipe's check_media says."""
    trainer = patient.trainer_class
    check = partial(
        check_row,
        args=patient.args,
        processing_class=patient.processor or SimpleNamespace(image_processor=True, video_processor=True),  # any media
        phrases=trainer.needs_phrases,
        image_list=trainer.needs_image_list,
    )
    problems = check_rows(dataset, check, desc=f"Checking {name} rows")
    report.add_problems(name, problems)
    skipped = [p for p in problems if p.media] if patient.args.on_bad_media == "skip" else []
    status = OK if not problems else WARN if len(skipped) == len(problems) < len(dataset) else STOP
    what = f"{len(dataset)} rows, {len(problems)} with problems (media: {patient.args.check_media})"
    report.add(f"{name} rows", status, what + (f", {len(skipped)} would be skipped" if skipped else ""))


def _tokenize(patient: Patient, dataset: Dataset, rows: int | None, report: Report) -> footprint.Load | None:
    """Tokenize rows as training will; note their lengths, and what cannot be tokenized. None: nothing could be."""
    bad = {problem["row"] for problem in report.problems if problem["dataset"] == "train"}
    good = [i for i in range(len(dataset)) if i not in bad]
    count = len(good) if rows is None else min(rows, len(good))
    failed, sequences = [], 0
    for index, tree in _trees(patient, dataset, [good[i * len(good) // count] for i in range(count)]):
        if isinstance(tree, RowError):
            failed.append(Problem(index, str(tree), media=False))
            continue
        sequences = max(sequences, len(tree.branches))
        lengths = row_lengths(tree, patient.media_tokens)
        for name, value in lengths.items():
            report.tokens.setdefault(name, []).append(value)
        if patient.args.max_length is not None and lengths[LONGEST] > patient.args.max_length:
            reason = f"{tree.name}: {lengths[LONGEST]} tokens are more than max_length={patient.args.max_length}"
            failed.append(Problem(index, reason, media=False))
    report.add_problems("train", failed)
    what = f"{count} of {len(dataset)} rows tokenized, {len(failed)} of them cannot be trained on"
    report.add("tokens", STOP if failed or not count else OK, what)
    return _load(report.tokens, sequences, patient.args.per_device_train_batch_size) if report.tokens else None


def _trees(patient: Patient, dataset: Dataset, indices: list[int]) -> Iterator[tuple[int, Tree | RowError]]:
    """Rows as the trainer's own collator makes them, without its limit on length; with a progress bar."""
    collator = patient.trainer_class.make_collator(patient.processor, patient.args)
    collator = replace(collator, max_length=None)
    rows = zip(indices, raw_rows(dataset.select(indices)))
    title = f"Tokenizing {len(indices)} rows"
    for index, row in track(rows, title, total=len(indices), transient=True, disable=not indices):
        try:
            yield index, collator.encode(row)
        except RowError as error:
            yield index, error


def _load(tokens: dict[str, list[int]], sequences: int, batch_size: int) -> footprint.Load:
    """The heaviest micro-batch that the tokenized rows can make; LPOI repeats the chosen response for every image."""
    chosen, rejected = max(tokens["chosen response"]), max(tokens["rejected response"])
    responses = chosen * (sequences - 1) + rejected
    return footprint.Load(sequences * batch_size, max(tokens[LONGEST]), responses * batch_size)


def row_lengths(tree: Any, media: set[int]) -> dict[str, int]:
    """Tokens of a row: of its first prompt, of each response, and of all sequences that a step computes."""
    ids = tree.trunks[0].ids
    visual = sum(token in media for token in ids)
    whole = [len(tree.trunks[branch.trunk].ids) + len(branch.ids) for branch in tree.branches]
    return {
        "prompt text": len(ids) - visual,
        "media": visual,
        "chosen response": len(tree.branches[0].ids),
        "rejected response": len(tree.branches[1].ids),
        LONGEST: max(whole),
        "all sequences of the pair": sum(whole),
    }


# --- memory -------------------------------------------------------------------------------------------------------


def _estimate(patient: Patient, load: footprint.Load, report: Report) -> None:
    quantized = patient.model_args.load_in_4bit or patient.model_args.load_in_8bit
    sizes = footprint.sizes(patient.model, quantized=quantized, skip=NOT_QUANTIZED)
    held = patient.trainer_class.needs_reference and not patient.args.precompute_ref_log_probs
    copies = 2 if held and not patient.model_args.use_peft else 1
    report.memory = footprint.memory(sizes, load, patient.config, patient.args, patient.model_args, copies)
    total = sum(report.memory.values()) / footprint.GIB
    what = f"{sizes.total / 1e9:.2f} B ({sizes.vision / 1e9:.2f} B vision), {sizes.trained / 1e6:.2f} M trained"
    report.add("parameters", OK, what)
    what = f"about {total:.1f} GiB on one GPU"
    status = OK
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory / footprint.GIB
        what += f" of {there:.0f} GiB"
        status = WARN if total > 0.9 * there else OK
    report.add("memory", status, what)
