"""The rows of a recipe, as `trl-vpo doctor` looks at them: each is checked, a sample is tokenized as in training."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset
from rich.progress import track
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_vpo.data.chat import end_of_turn
from trl_vpo.data.check import Problem, check_row, check_rows
from trl_vpo.data.raw_rows import raw_rows, undecoded
from trl_vpo.data.rows import ROW_INDEX
from trl_vpo.data.sources import load_splits
from trl_vpo.doctor.findings import OK, STOP, WARN, Report
from trl_vpo.errors import DatasetError, RowError
from trl_vpo.forward.tree import Tree

if TYPE_CHECKING:
    from trl_vpo.doctor.checks import Patient

ENDS = 8  # tokens that are shown of an end
LONGEST, ALL_SEQUENCES = "longest sequence", "all sequences of the pair"


def check_data(patient: Patient, rows: int | None, report: Report) -> list[Tree]:
    """Check all rows and tokenize some.

    Args:
        patient: the recipe; without its processor nothing is tokenized.
        rows: how many to tokenize, spread over the dataset; None: all.
        report: takes what was found.

    Returns:
        the longest rows, as many as a micro-batch has; none if nothing could be tokenized.
    """
    datasets = _load_data(patient, report)
    for name, dataset in datasets.items():
        _check_rows(patient, dataset, name, report)
    if patient.processor is None or "train" not in datasets:
        return []
    return _tokenize(patient, datasets["train"], rows, report)


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
            dataset = Dataset.from_list(list(undecoded(dataset, patient.args).take(64)))
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
        processing_class=patient.processor,
        phrases=trainer.needs_phrases,
        image_list=trainer.needs_image_list,
    )
    problems = check_rows(dataset, check, desc=f"Checking {name} rows")
    report.add_problems(name, problems)
    skipped = [p for p in problems if p.media] if patient.args.on_bad_media == "skip" else []
    status = OK if not problems else WARN if len(skipped) == len(problems) < len(dataset) else STOP
    what = f"{len(dataset)} rows, {len(problems)} with problems (media: {patient.args.check_media})"
    report.add(f"{name} rows", status, what + (f", {len(skipped)} would be skipped" if skipped else ""))


def _tokenize(patient: Patient, dataset: Dataset, rows: int | None, report: Report) -> list[Tree]:
    """Tokenize rows as training will; note their lengths, and what cannot be tokenized.

    Gives the longest rows, as many as a micro-batch has; none if nothing could be tokenized.
    """
    bad = {problem["row"] for problem in report.problems if problem["dataset"] == "train"}
    good = [i for i in range(len(dataset)) if i not in bad]
    count = len(good) if rows is None else min(rows, len(good))
    failed: list[Problem] = []
    heaviest: list[tuple[int, int, Tree]] = []
    for index, tree in _trees(patient, dataset, [good[i * len(good) // count] for i in range(count)]):
        if isinstance(tree, RowError):
            failed.append(Problem(index, str(tree), media=False))
            continue
        lengths = row_lengths(tree, patient.media_tokens)
        for name, value in lengths.items():
            report.tokens.setdefault(name, []).append(value)
        heaviest = heapq.nlargest(
            patient.args.per_device_train_batch_size, [*heaviest, (lengths[ALL_SEQUENCES], -index, tree)]
        )
        if patient.args.max_length is not None and lengths[LONGEST] > patient.args.max_length:
            reason = f"{tree.name}: {lengths[LONGEST]} tokens are more than max_length={patient.args.max_length}"
            failed.append(Problem(index, reason, media=False))
    report.add_problems("train", failed)
    if heaviest:
        _show_tokens(patient, heaviest[0][2], report)
    what = f"{count} of {len(dataset)} rows tokenized, {len(failed)} of them cannot be trained on"
    report.add("tokens", STOP if failed or not count else OK, what)
    return [tree for _, _, tree in heaviest]


def _show_tokens(patient: Patient, tree: Tree, report: Report) -> None:
    """The seam of one row: the prompt's last tokens, the chosen response's tokens, and what ends it."""
    tokenizer = getattr(patient.processor, "tokenizer", patient.processor)
    prompt, response = (
        [tokenizer.decode([token]) for token in part.ids] for part in (tree.trunks[0], tree.branches[0])
    )
    end = end_of_turn("".join(response), tokenizer)
    middle = response if len(response) <= 2 * ENDS else [*response[:ENDS], ..., *response[-ENDS:]]
    shown = [" ".join("..." if piece is ... else repr(piece) for piece in part) for part in (prompt[-ENDS:], middle)]
    ends, status = f"It ends with {end!r}.", OK
    if end is None:
        ends, status = "Nothing ends it: the model would not learn to stop.", WARN
    elif tokenizer.convert_tokens_to_ids(end) not in (stops := _stop_tokens(patient, tokenizer)):
        stops = " or ".join(repr(tokenizer.decode([token])) for token in sorted(stops))
        ends, status = f"It ends with {end!r}, but generation stops at {stops}: add it to `eos_token_id`", WARN
        ends += " in the model's generation_config.json."
    what = f"{tree.name}: the prompt ends {shown[0]}; the chosen response is {shown[1]}. {ends}"
    report.add("prompt and response", status, what)


def _stop_tokens(patient: Patient, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids at which the model's own generation stops."""
    name, revision = patient.model_args.model_name_or_path, patient.model_args.model_revision
    try:
        own = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except (OSError, ValueError):  # without that file, generation goes by the model's config
        own = getattr(patient.config and patient.config.get_text_config(), "eos_token_id", None)
    return {*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id} - {None}


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


def row_lengths(tree: Tree, media: set[int]) -> dict[str, int]:
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
        ALL_SEQUENCES: sum(whole),
    }
