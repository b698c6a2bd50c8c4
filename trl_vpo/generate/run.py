"""A run of `trl-vpo generate`: inputs -> pipeline -> store, with progress; started again, it continues.

Relative paths in a recipe start from the working directory. Under `accelerate launch`, or wherever RANK and WORLD_SIZE
are set, every process works on its own share of the inputs; the one that comes last writes `rows.jsonl`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_vpo.data.inputs import InputRow, Inputs, digest, load_media, read_inputs
from trl_vpo.errors import GenerateError, InputError, MediaError
from trl_vpo.generate import METHODS
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.generate.pipeline import Pipeline
from trl_vpo.media.load import Media
from trl_vpo.runs.digests import weights_digest
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.quiet import quiet_libraries
from trl_vpo.runs.secrets import scrub
from trl_vpo.runs.shards import check_settings
from trl_vpo.runs.store import Run

# What a run may change when it is continued: none of it changes an answer.
FREE = {
    "output_dir", "limit", "dry_run", "batch_size", "device", "timeout", "max_retries", "max_requests", "api_key_env",
    "judge_api_key_env", "server_url", "judge_url", "dataset_name", "dataset_config", "dataset_split",
}  # fmt: skip
# Settings that may name a folder of weights.
WEIGHTS = ("model_name_or_path", "from_adapter", "detector", "mask_model")
DECODERS = 2  # threads that decode the next batch while the model answers this one


def make_parser(method: str):
    """The parser of a method's generation recipes and options.

    Raises:
        RecipeError: there is no such method.
    """
    from trl_vpo.errors import RecipeError, did_you_mean
    from trl_vpo.runs.recipe import RecipeParser

    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}; one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    module, config, _ = METHODS[method]
    types = [getattr(importlib.import_module(module), config)]
    return RecipeParser(types, any_device=True, prog=f"trl-vpo generate {method}")


def run_generation(method: str, argv: list[str]) -> dict[str, Any] | None:
    """Generate a method's preference data; continue where an earlier run with these settings stopped.

    Args:
        method: leanpo, rrpo or lpoi.
        argv: the options of `trl-vpo generate METHOD`, such as `["--config", "recipe.yaml"]`.

    Returns:
        The run's summary, or None after a dry run or while other workers are still at work.

    Raises:
        RecipeError, ValueError: the recipe cannot be used.
        GenerateError: the inputs, the models or the run's folder cannot be; or no input gave a row.
        SystemExit: Ctrl-C, with 130; what was finished stays.
    """
    config = make_parser(method).parse(argv)[0]
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        return _generate(method, config, rank, world_size)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"Stopped. The same command goes on with what is finished in {config.output_dir}.", file=sys.stderr)
        raise SystemExit(130) from None


def _generate(method: str, config: GenerateConfig, rank: int, world_size: int) -> dict[str, Any] | None:
    pipeline_class = getattr(importlib.import_module(METHODS[method][0]), METHODS[method][2])
    _check_config(config, pipeline_class)
    quiet_libraries()
    inputs = read_inputs(config)
    if config.dry_run:
        from trl_vpo.generate.dry_run import show

        if rank == 0:
            show(pipeline_class(config, None), inputs[: min(3, config.limit or 3)], config)
        return None
    settings = run_settings(method, config, inputs)
    check_settings(config.output_dir, settings, partly=True)  # before weights are loaded, which can take minutes
    pipeline = _pipeline(pipeline_class, config, settings, say=rank == 0)
    wanted = inputs[: config.limit] if config.limit else inputs
    with Run(config.output_dir, settings, rank=rank, world_size=world_size) as run:
        work(run, pipeline, wanted, run.remaining(wanted.ids), config)
        summary = run.finish(wanted.ids, pipeline)
    if summary is not None:
        from trl_vpo.generate.summary import show_summary

        show_summary(summary, config.output_dir)
        if not summary["rows"]:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in summary["rejected_by_kind"].items())
            why = Path(config.output_dir) / "rejected.jsonl"
            raise GenerateError(f"no row was made of {summary['inputs']} inputs ({kinds}). {why} says why.")
    elif rank == 0:
        print("This worker is done. The last one writes rows.jsonl; if one died, start the same command again.")
    return summary


def _check_config(config: GenerateConfig, pipeline_class: type[Pipeline]) -> None:
    from trl_vpo.errors import RecipeError

    for name, what in (("dataset_name", "the inputs"), ("output_dir", "a folder for the run")):
        if not getattr(config, name):
            raise RecipeError(f"`{name}` is not set: give {what}.")
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir: {folder} is a file. Name a folder; it is made if it is not there.")
    if pipeline_class.needs_model(config) and not config.model_name_or_path:
        raise RecipeError("there is no model: set `model_name_or_path` to a Hub model, a folder, or a server's model.")


def _pipeline(pipeline_class: type[Pipeline], config: GenerateConfig, settings: dict, *, say: bool) -> Pipeline:
    """The pipeline with its model and judge, which are entered into the settings."""
    from trl_vpo.models.load import answering_model, judge_model
    from trl_vpo.models.server import RequestBudget

    budget, model = RequestBudget(config.max_requests), None
    if pipeline_class.needs_model(config):
        if say and not config.server_url:
            print(f"Loading {config.model_name_or_path} ...", file=sys.stderr, flush=True)
        model = answering_model(config, budget)
    judge = judge_model(config, budget)
    for key, who in (("answered_by", model), ("judged_by", judge)):
        settings[key] = {k: v for k, v in who.record().items() if k != "server"} if who else None
    return pipeline_class(config, model, judge, generated_by(settings))


def run_settings(method: str, config: GenerateConfig, inputs: Inputs) -> dict[str, Any]:
    """All that the rows depend on, but for who answers. A run continues only where nothing of it has changed."""
    settings = scrub({key: value for key, value in asdict(config).items() if key not in FREE})
    folders = {name: getattr(config, name, None) for name in WEIGHTS}
    if config.server_url:  # a server's name for its model, and perhaps a folder by chance
        del folders["model_name_or_path"]
    settings["weights"] = {
        name: weights_digest(path) for name, path in folders.items() if path and Path(path).is_dir()
    }
    return settings | {"pipeline": method, "inputs": {"count": len(inputs), "fingerprint": digest(inputs)}}


def generated_by(settings: dict) -> dict[str, str | None]:
    """The `generated_by` column: who made a row, and a fingerprint of the settings (`settings.json` has them)."""
    fingerprint = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
    answered = settings["answered_by"] or {}
    judged = settings["judged_by"] or {}
    return {
        "pipeline": settings["pipeline"],
        **{key: answered.get(key) for key in ("model", "adapter", "revision")},
        "judge": judged.get("model"),
        "settings": fingerprint,
    }


def work(run: Run, pipeline: Pipeline, inputs: Inputs, todo: Sequence[int], config: GenerateConfig) -> None:
    """Work through the inputs at positions `todo`, batch by batch, and write what came of each as it comes."""
    from trl_vpo.runs.progress import Bar

    share = len(range(run.rank, len(inputs), run.world_size))
    batches = [todo[start : start + config.batch_size] for start in range(0, len(todo), config.batch_size)]
    loaded = _loaded(pipeline, inputs, batches, config)
    with (
        Bar(len(todo), finished=share - len(todo), workers=run.world_size, show=run.rank == 0) as bar,
        closing(loaded),
    ):
        for batch in loaded:
            usable = [(row, media) for row, media in batch if isinstance(media, Media)]
            outcomes = [media for _, media in batch if isinstance(media, Outcome)]
            outcomes += pipeline.make(usable) if usable else []
            for outcome in outcomes:
                run.write(outcome)
                bar.advance(kept=bool(outcome.rows))


def _loaded(
    pipeline: Pipeline, inputs: Inputs, batches: Sequence[Sequence[int]], config: GenerateConfig
) -> Iterator[list[tuple[InputRow, Media | Outcome]]]:
    """Each batch with its media, decoded while the one before is being answered."""
    pool = ThreadPoolExecutor(DECODERS)
    submit = lambda batch: [pool.submit(_load, pipeline, inputs, place, config) for place in batch]  # noqa: E731
    try:
        following = submit(batches[0]) if batches else []
        for after in [*batches[1:], []]:
            loading, following = following, submit(after)
            yield [future.result() for future in loading]
    finally:  # Ctrl-C does not wait for a batch that nobody will answer
        pool.shutdown(wait=False, cancel_futures=True)


def _load(pipeline: Pipeline, inputs: Inputs, place: int, config: GenerateConfig) -> tuple[InputRow, Media | Outcome]:
    """An input with its media, or with the reason why it is rejected."""
    row = inputs[place]
    try:
        pipeline.check(row)
        return row, load_media(row, config.video_options(), config.max_pixels)
    except InputError as error:
        return row, Outcome(row.id, reason=str(error), kind="unusable input")
    except MediaError as error:
        return row, Outcome(row.id, reason=str(error), kind="unreadable media")
