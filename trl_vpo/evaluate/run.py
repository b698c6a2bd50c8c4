"""A run of `trl-vpo evaluate`: held-out rows -> candidates -> store -> results; started again, it continues.

    settings.json    what decides the numbers; a run with other settings is refused
    rows.jsonl       a line for each row and contestant: log-probs, answers, what was read from them
    rejected.jsonl   rows that were left out (`on_bad=skip`), with the reason
    results.json     settings, and for each contestant measures with intervals and paired differences to the base

A row is worked on once, for all candidates: its media are decoded once, and the KL needs the base beside the adapter.
How yes and no are read, synonyms and the bootstrap may change when a run is continued: the stored answers stay, the
results are made anew. Under `accelerate launch` every process works on its own share of the rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_vpo.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from trl_vpo.data.inputs import InputRow, Inputs
    from trl_vpo.evaluate.candidates import ModelSet
    from trl_vpo.evaluate.rows import EvalRow
    from trl_vpo.media.load import Media
    from trl_vpo.runs.outcome import Outcome
    from trl_vpo.runs.store import Run

# What a run may change when it is continued: none of it changes a log-prob or an answer.
FREE = {
    "output_dir", "limit", "batch_size", "device", "dataset_name", "dataset_config", "dataset_split", "media_root",
    "adapters", "yes_no_rule", "synonyms", "level", "resamples", "on_bad",
}  # fmt: skip
DECODERS = 2  # threads that decode the next batch while the model works on this one


def make_parser():
    """The parser of recipes and options."""
    from trl_vpo.runs.recipe import RecipeParser

    return RecipeParser([EvaluateConfig], any_device=True, prog="trl-vpo evaluate")


def run_evaluation(argv: list[str]) -> dict[str, Any] | None:
    """Evaluate a base and its adapters on held-out rows; continue where an earlier run with these settings stopped.

    Args:
        argv: the options of `trl-vpo evaluate`, such as `["--model", "BASE", "--adapters", "A", "B", ...]`.

    Returns:
        what `results.json` holds, or None while other workers are still at work.

    Raises:
        RecipeError, ValueError: the options cannot be used.
        EvaluateError: rows or adapters cannot be.
        GenerateError: the inputs, the model or the run's folder cannot be.
        SystemExit: Ctrl-C, with 130; what was finished stays.
    """
    config = _parse(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        return _evaluate(config, rank, world_size)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"Stopped. The same command goes on with what is finished in {config.output_dir}.", file=sys.stderr)
        raise SystemExit(130) from None


def _parse(argv: list[str]) -> EvaluateConfig:
    from trl_vpo.errors import RecipeError

    if sum(arg.split("=")[0] == "--adapters" for arg in argv) > 1:
        raise RecipeError("--adapters is given twice, and the first would be lost: name all of them behind one.")
    parser = make_parser()
    config = parser.parse(argv)[0]
    for name, what in (
        ("model_name_or_path", "the base model, a folder or a Hub model"),
        ("dataset_name", "the held-out rows"),
        ("output_dir", "a folder for the run"),
    ):
        if not getattr(config, name):
            raise RecipeError(f"`{name}` is not set: give {what}.")
    from trl_vpo.evaluate.trained import trained_media

    return replace(config, **trained_media(config.adapters, parser.given))


def _evaluate(config: EvaluateConfig, rank: int, world_size: int) -> dict[str, Any] | None:
    """Everything that can be checked without weights comes before they are loaded."""
    from trl_vpo.data.inputs import read_inputs
    from trl_vpo.evaluate.rows import read_rows
    from trl_vpo.runs.shards import check_settings
    from trl_vpo.runs.store import Run
    from trl_vpo.text.chair import ObjectTable, read_synonyms

    _quiet(rank)
    table = ObjectTable(read_synonyms(config.synonyms)) if config.synonyms else None
    inputs = read_inputs(config.generate_config())
    wanted = inputs[: config.limit] if config.limit else inputs
    rows = read_rows(wanted, table)
    from trl_vpo.evaluate.candidates import candidate_names, load_candidates
    from trl_vpo.evaluate.results import BASE, Report

    names = candidate_names(config.adapters)
    settings = run_settings(config, dict(zip(names, config.adapters)), inputs)
    check_settings(config.output_dir, settings, partly=True)
    candidates = load_candidates(config.adapters, **config.model_options())
    settings["evaluated"] = candidates.model.record()
    about = {BASE: candidates.model.record()} | {name: {"adapter": path} for name, path in zip(names, config.adapters)}
    report = Report(config, about, table)
    ids = [row.id for row in rows]
    with Run(config.output_dir, settings, rank=rank, world_size=world_size) as run:
        _refuse_skipped(run, config)
        work(run, candidates, wanted, rows, run.remaining(ids), config)
        summary = run.finish(ids, report)
    if summary is None:
        if rank == 0:
            print("This worker is done. The last one writes the results; if one died, start the same command again.")
        return None
    from trl_vpo.evaluate.table import show_results, write_results

    write_results(report.results, config.output_dir)
    show_results(report.results, config.output_dir)
    return report.results


def _quiet(rank: int) -> None:
    """No bars but ours, except that weights are loaded behind one on a terminal."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    if rank or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def run_settings(config: EvaluateConfig, adapters: dict[str, str], inputs: Inputs) -> dict[str, Any]:
    """All that log-probs and answers depend on, but for the base's revision. A run goes on only with the same."""
    from trl_vpo.data.inputs import digest
    from trl_vpo.evaluate.candidates import fingerprint
    from trl_vpo.runs.digests import weights_digest

    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    base = Path(config.model_name_or_path)
    return settings | {
        "weights": weights_digest(base) if base.is_dir() else None,  # it may be trained anew under its old name
        "adapters": {name: fingerprint(path) for name, path in adapters.items()},
        "inputs": {"count": len(inputs), "fingerprint": digest(inputs)},
    }


def _refuse_skipped(run: Run, config: EvaluateConfig) -> None:
    """Rows that an earlier call left out are finished, and would stay left out without a word."""
    from trl_vpo.errors import EvaluateError

    skipped = [outcome for outcome in run.outcomes() if outcome.reason] if config.on_bad == "error" else []
    if skipped:
        raise EvaluateError(
            f"{run.folder}: {len(skipped)} rows were left out with on_bad=skip, the first is {skipped[0].id!r}. Give "
            "on_bad=skip again, or name another output_dir."
        )


# --- the rows -----------------------------------------------------------------------------------------------------


def work(
    run: Run,
    candidates: ModelSet,
    inputs: Inputs,
    rows: Sequence[EvalRow],
    todo: Sequence[int],
    config: EvaluateConfig,
) -> None:
    """Work through the rows at positions `todo`, batch by batch, and write what came of each as it comes.

    Raises:
        EvaluateError: a row's media or prompt cannot be used, and `on_bad` is "error". What is written stays.
    """
    from trl_vpo.errors import EvaluateError
    from trl_vpo.runs.progress import Bar

    share, size = len(range(run.rank, len(rows), run.world_size)), config.batch_size
    batches = [[rows[i] for i in todo[start : start + size]] for start in range(0, len(todo), size)]
    loaded = _loaded(inputs, batches, config)
    with (
        Bar(len(todo), finished=share - len(todo), workers=run.world_size, show=run.rank == 0) as bar,
        closing(loaded),
    ):
        for batch in loaded:
            for outcome in evaluate_batch(candidates, batch, config):
                if outcome.reason and config.on_bad == "error":
                    raise EvaluateError(
                        f"{outcome.reason}\nMend the row or its media and start the same command again: it goes on "
                        "from here. With on_bad=skip such rows are left out and listed."
                    )
                run.write(outcome)
                bar.advance(kept=bool(outcome.rows))


def _loaded(
    inputs: Inputs, batches: Sequence[Sequence[EvalRow]], config: EvaluateConfig
) -> Iterator[list[tuple[EvalRow, InputRow, Media | str]]]:
    """Each batch with its media, decoded while the model works on the one before."""
    pool = ThreadPoolExecutor(DECODERS)
    submit = lambda batch: [pool.submit(_load, inputs, row, config) for row in batch]  # noqa: E731
    try:
        following = submit(batches[0]) if batches else []
        for after in [*batches[1:], []]:
            loading, following = following, submit(after)
            yield [future.result() for future in loading]
    finally:  # an error does not wait for a batch that nobody will use
        pool.shutdown(wait=False, cancel_futures=True)


def _load(inputs: Inputs, row: EvalRow, config: EvaluateConfig) -> tuple[EvalRow, InputRow, Media | str]:
    """A row with its media, or why they cannot be used."""
    from trl_vpo.data.inputs import load_media
    from trl_vpo.errors import MediaError

    source = inputs[row.place]
    try:
        return row, source, load_media(source, config.video_options(), config.max_pixels)
    except MediaError as error:
        return row, source, f"{row.name}: {error}"


def evaluate_batch(
    candidates: ModelSet, batch: Sequence[tuple[EvalRow, InputRow, Media | str]], config: EvaluateConfig
) -> list[Outcome]:
    """What every contestant does on each row of a batch: a record for each, or the reason why there is none."""
    from trl_vpo.errors import RowError
    from trl_vpo.evaluate.probes import run_probes
    from trl_vpo.runs.outcome import Outcome

    reasons: dict[str, tuple[str, str]] = {}
    usable, probes = [], []
    for row, source, media in batch:
        try:
            if isinstance(media, str):
                reasons[row.id] = (media, "unreadable media")
                continue
            probes.append(_probes(row, source, media, config))
            usable.append(row)
        except RowError as error:
            reasons[row.id] = (str(error), "unusable row")
    found = run_probes(
        probes, candidates.model.encode, candidates.score, lambda trees: candidates.ask(trees, config.max_new_tokens)
    )
    records: dict[str, tuple[dict, ...]] = {}
    for row, result in zip(usable, found, strict=True):
        if isinstance(result, RowError):
            reasons[row.id] = (str(result), "unusable row")
        else:
            records[row.id] = tuple(_record(row, name, result[name]) for name in candidates.names)
    outcomes = []
    for row, *_ in batch:
        reason, kind = reasons.get(row.id, (None, None))
        outcomes.append(Outcome(row.id, records.get(row.id, ()), reason=reason, kind=kind))
    return outcomes


def _probes(row: EvalRow, source: InputRow, media: Media, config: EvaluateConfig) -> list:
    from trl_vpo.evaluate.probes import image_list, preference_probes, question_probes, row_seed, with_first_image
    from trl_vpo.evaluate.rows import preference_row

    if row.task != "preference":
        return question_probes(row, source, media)
    pair = preference_row(source)
    media = with_first_image(pair, media, config.media_root)
    lists = {"num_images": config.num_images, "visual_prompt": config.visual_prompt, "media_root": config.media_root}
    return preference_probes(
        pair,
        media,
        seed=row_seed(config.seed, row.id),
        damages=config.damages(),
        images=image_list(pair, source, **lists),
        answered=config.answer_preferences,
    )


def _record(row: EvalRow, contestant: str, results: dict[str, Any]) -> dict[str, Any]:
    """A line of `rows.jsonl`."""
    from trl_vpo.evaluate.probes import numbers

    about = {"id": row.id, "task": row.task, "cluster": row.cluster, "contestant": contestant}
    return about | row.facts | numbers(results)
