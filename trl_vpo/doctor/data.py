"""The rows of a recipe: each is checked, a sample is tokenized as in training."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from datasets import Dataset, IterableDataset
from rich.progress import track
from transformers import GenerationConfig

from trl_vpo.data.chat import end_of_turn
from trl_vpo.data.check import Problem, check_row, check_rows
from trl_vpo.data.raw_rows import raw_rows, undecoded
from trl_vpo.data.rows import ROW_INDEX
from trl_vpo.data.sources import load_splits
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.doctor.report import OK, STOP, WARN, Report
from trl_vpo.errors import DatasetError, RowError
from trl_vpo.forward.tree import Tree
from trl_vpo.training.start import describe_media

STREAMED = 64  # rows of a stream that are looked at
ENDS = 8  # tokens that are shown of an end
LONGEST, ALL_SEQUENCES = "longest sequence", "all sequences of the pair"


class LongestRows(NamedTuple):
    """The longest rows, as many as a micro-batch has (repeated if there are too few), and their trees."""

    rows: Dataset
    trees: list[Tree]


def check_data(recipe: LoadedRecipe, count: int | None, report: Report) -> LongestRows | None:
    """Check all rows, tokenize `count` of them (None: all); None if nothing could be, as without a processor."""
    datasets = _load_data(recipe, report)
    trainer_class, args = recipe.trainer_class, recipe.args
    check = partial(check_row, args=args, processing_class=recipe.processor, phrases=trainer_class.needs_phrases)
    for name, dataset in datasets.items():  # every row against the contract, every medium as `check_media` says
        problems = check_rows(dataset, check, desc=f"Checking {name} rows")
        report.add_problems(name, problems)
        skipped = [p for p in problems if p.media] if args.on_bad_media == "skip" else []
        status = OK if not problems else WARN if len(skipped) == len(problems) < len(dataset) else STOP
        text = f"{len(dataset)} rows, {len(problems)} with problems (media: {args.check_media})"
        report.add(f"{name} rows", status, text + (f", {len(skipped)} would be skipped" if skipped else ""))
    if recipe.processor is not None and "train" in datasets:
        return _tokenize(recipe, datasets["train"], count, report)
    return None


def _load_data(recipe: LoadedRecipe, report: Report) -> dict[str, Dataset]:
    """Load the splits and number their rows; of a stream, take the first rows."""
    evaluate = recipe.args.eval_strategy != "no"
    try:
        splits = load_splits(recipe.script_args, recipe.mixture, evaluate=evaluate, seed=recipe.args.seed)
    except (DatasetError, OSError, ValueError) as error:
        report.add("data", STOP, str(error))
        return {}
    loaded = {}
    for name, dataset in zip(("train", "eval"), splits):
        if isinstance(dataset, IterableDataset):
            rows = list(undecoded(dataset, recipe.args).take(STREAMED))
            names = dict.fromkeys(name for row in rows for name in row)  # no row need have all columns
            table = [{name: row.get(name) for name in names} for row in rows]
            dataset = Dataset.from_list(table, on_mixed_types="use_json")
            report.add(f"{name} data", WARN, f"streamed: only the first {len(dataset)} rows are checked")
        if dataset is not None and len(dataset) == 0:
            report.add(f"{name} data", STOP, "no rows")
        elif dataset is not None:
            loaded[name] = dataset.add_column(ROW_INDEX, list(range(len(dataset))))
    return loaded


def _tokenize(recipe: LoadedRecipe, dataset: Dataset, count: int | None, report: Report) -> LongestRows | None:
    """Tokenize good rows as training will; report their lengths, and what cannot be tokenized."""
    bad = {problem["row"] for problem in report.problems if problem["dataset"] == "train"}
    good = [i for i in range(len(dataset)) if i not in bad]
    count = len(good) if count is None else min(count, len(good))
    pairs, limit = recipe.args.per_device_train_batch_size, recipe.args.max_length
    failed: list[Problem] = []
    longest: list[tuple[int, int, Tree]] = []  # (tokens, -row, tree)
    for index, tree in _trees(recipe, dataset, [good[i * len(good) // count] for i in range(count)]):
        if isinstance(tree, RowError):
            failed.append(Problem(index, str(tree), media=False))
            continue
        lengths = row_lengths(tree, recipe.media_tokens)
        for name, value in lengths.items():
            report.tokens.setdefault(name, []).append(value)
        longest = heapq.nlargest(pairs, [*longest, (lengths[ALL_SEQUENCES], -index, tree)])
        if limit is not None and lengths[LONGEST] > limit:
            reason = f"{tree.name}: {lengths[LONGEST]} tokens are more than max_length={limit}"
            failed.append(Problem(index, reason, media=False))
    report.add_problems("train", failed)
    if longest:
        _show_tokens(recipe, longest[0][2], report)
    media = describe_media(recipe.args, recipe.processor, dataset.column_names)
    text = f"{count} of {len(dataset)} rows tokenized, {len(failed)} of them cannot be trained on; media: {media}"
    text = text if count else f"none of the {len(dataset)} rows can be tokenized: each has a problem"
    report.add("tokens", STOP if failed or not count else OK, text)
    if not longest:
        return None
    longest = (longest * pairs)[:pairs]
    rows = dataset.remove_columns(ROW_INDEX).select([-minus for _, minus, _ in longest])
    return LongestRows(rows, [tree for _, _, tree in longest])


def _show_tokens(recipe: LoadedRecipe, tree: Tree, report: Report) -> None:
    """Show the seam of one row: the prompt's last tokens, the chosen response's tokens, and what ends it."""
    tokenizer = recipe.tokenizer
    prompt, response = ([tokenizer.decode([t]) for t in part.ids] for part in (tree.trunks[0], tree.branches[0]))
    middle = [repr(piece) for piece in response]
    if len(middle) > 2 * ENDS:
        middle[ENDS:-ENDS] = ["..."]
    end = end_of_turn("".join(response), tokenizer)
    ending, status = f"It ends with {end!r}.", OK
    if end is None:
        ending, status = "Nothing ends it: the model would not learn to stop.", WARN
    elif tokenizer.convert_tokens_to_ids(end) not in (stops := _stop_tokens(recipe)):
        names, status = " or ".join(repr(tokenizer.decode([token])) for token in sorted(stops)), WARN
        ending = (
            f"It ends with {end!r}, but generation stops at {names}: add it to `eos_token_id` in the model's "
            "generation_config.json."
        )
    prompt_end = " ".join(map(repr, prompt[-ENDS:]))
    text = f"{tree.name}: the prompt ends {prompt_end}; the chosen response is {' '.join(middle)}. {ending}"
    report.add("prompt and response", status, text)


def _stop_tokens(recipe: LoadedRecipe) -> set[int]:
    """Return the ids at which the model's own generation stops."""
    name, revision = recipe.model_args.model_name_or_path, recipe.model_args.model_revision
    try:
        stop_ids = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except (OSError, ValueError):  # without that file, generation goes by the model's config
        stop_ids = getattr(recipe.config and recipe.config.get_text_config(), "eos_token_id", None)
    return {*(stop_ids if isinstance(stop_ids, (list, tuple)) else [stop_ids]), recipe.tokenizer.eos_token_id} - {None}


def _trees(recipe: LoadedRecipe, dataset: Dataset, indices: list[int]) -> Iterator[tuple[int, Tree | RowError]]:
    collator = recipe.collator()
    rows = zip(indices, raw_rows(dataset.select(indices)))
    for index, row in track(rows, "Tokenizing", total=len(indices), transient=True, disable=not indices):
        try:
            yield index, collator.encode(row)
        except RowError as error:
            yield index, error


def row_lengths(tree: Tree, media: set[int]) -> dict[str, int]:
    """Count the tokens of a row: of its first prompt, of each response, and of all sequences that a step computes."""
    ids = tree.trunks[0].ids
    visual = sum(token in media for token in ids)
    sequences = [len(tree.trunks[branch.trunk].ids) + len(branch.ids) for branch in tree.branches]
    return {
        "prompt text": len(ids) - visual,
        "media": visual,
        "chosen response": len(tree.branches[0].ids),
        "rejected response": len(tree.branches[1].ids),
        LONGEST: max(sequences),
        ALL_SEQUENCES: sum(sequences),
    }
