"""A run of `trl-vpo generate`: inputs -> pipeline -> rows to train on. The same command continues it.

Relative paths in a recipe start from the working directory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from trl_vpo.data.inputs import InputRow, Inputs, digest, load_media, read_inputs
from trl_vpo.errors import GenerateError, InputError, MediaError, RecipeError, as_user_errors, did_you_mean
from trl_vpo.files import json_digest
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.generate.dry_run import show
from trl_vpo.generate.pipeline import Pipeline
from trl_vpo.generate.pipelines import PIPELINES
from trl_vpo.generate.summary import show_summary
from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.load import Media
from trl_vpo.models.load import load_model
from trl_vpo.models.requests import AnsweringModel
from trl_vpo.models.server import RequestBudget, ServerModel
from trl_vpo.models.trained import SIZES, trained_media
from trl_vpo.runs.digests import row_digest, weights_digest
from trl_vpo.runs.driver import check_unchanged, ctrl_c_says_how_to_continue, rank, work_through
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.quiet import quiet_libraries
from trl_vpo.runs.recipe import RecipeParser
from trl_vpo.runs.resume_rules import fixed_settings
from trl_vpo.runs.secrets import scrub
from trl_vpo.runs.store import check_settings

WEIGHTS = ("model_name_or_path", "from_adapter", "detector", "mask_model")  # may name a folder of weights


def make_parser(method: str) -> RecipeParser:
    """Return the parser of a method's generation recipes and options."""
    if method not in PIPELINES:
        hint = did_you_mean(method, PIPELINES)
        raise RecipeError(f"unknown method {method!r}; one of {', '.join(PIPELINES)}.{hint}")
    module, config, _ = PIPELINES[method]
    types = [getattr(importlib.import_module(module), config)]
    return RecipeParser(types, any_device=True, prog=f"trl-vpo generate {method}")


def run_generation(method: str, argv: list[str]) -> dict[str, Any] | None:
    """Generate a method's preference data, or continue an earlier run with these settings.

    `argv` are the options of `trl-vpo generate METHOD`, such as `["--config", "recipe.yaml"]`. Return the run's
    summary, or None after a dry run or while other workers are still at work. After Ctrl-C what was finished stays.
    """
    parser = make_parser(method)
    config = parser.parse(argv)[0]
    if config.model_name_or_path and not config.server_url:
        adapters = [config.from_adapter] if config.from_adapter else []
        model = (config.model_name_or_path, config.model_revision)
        config = replace(config, **trained_media(adapters, parser.named, *model, SIZES))
    with ctrl_c_says_how_to_continue(config.output_dir):
        return _generate(method, config)


def _generate(method: str, config: GenerateConfig) -> dict[str, Any] | None:
    module, _, name = PIPELINES[method]
    pipeline_class: type[Pipeline] = getattr(importlib.import_module(module), name)
    config.check_can_start(dataset_name="the inputs", output_dir="a folder for the run")
    if pipeline_class.needs_model(config) and not config.model_name_or_path:
        raise RecipeError("there is no model: set `model_name_or_path` to a Hub model, a folder, or a server's model.")
    quiet_libraries()
    if config.dry_run:
        if rank() == 0:
            show(pipeline_class(config, None), config)
        return None
    inputs = read_inputs(**config.input_options())
    settings = run_settings(method, config, inputs)
    identity = lambda place: row_digest(inputs[place], config.media_root)  # noqa: E731
    check_settings(config.output_dir, settings)  # before weights are loaded, which can take minutes
    check_unchanged(config.output_dir, inputs.ids, identity)
    with as_user_errors():  # also of processes that do not find each other
        model, judge = make_models(config, pipeline_class.needs_model(config))
    for key, party in (("answered_by", model), ("judged_by", judge)):
        settings[key] = {k: v for k, v in party.record().items() if k != "server"} if party else None
    if budget := model and model.video_budget:
        settings["video_budget"] = str(budget)
    pipeline = pipeline_class(config, model, judge, generated_by(settings))
    summary = work_through(
        config.output_dir,
        settings,
        inputs.ids[: config.limit],
        load=lambda place: _load(pipeline, inputs[place], budget),
        make=pipeline.make,
        identity=identity,
        report=pipeline,
        batch_size=config.batch_size,
    )
    if summary is not None:
        show_summary(summary, config.output_dir)
        if not summary["rows"]:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in summary["rejected_by_kind"].items())
            reasons = f"The reasons are in {Path(config.output_dir) / 'rejected.jsonl'}."
            raise GenerateError(f"none of the {summary['inputs']} inputs gave a row ({kinds}). {reasons}")
    return summary


def make_models(config: GenerateConfig, with_model: bool = True) -> tuple[AnsweringModel | None, ...]:
    """Return the answering model, on a server or loaded here, and the judge."""
    model = judge = None
    server = partial(
        ServerModel,
        concurrency=config.batch_size,
        media=config.server_media,
        timeout=config.timeout,
        max_retries=config.max_retries,
        max_pixels=config.max_pixels,
        budget=RequestBudget(config.max_requests),
    )
    if with_model and config.server_url:
        model = server(config.server_url, config.model_name_or_path, api_key_env=config.api_key_env)
    elif with_model:
        if rank() == 0:
            print(f"Loading {config.model_name_or_path} ...", file=sys.stderr, flush=True)
        model = load_model(adapter=config.from_adapter, **config.model_options())
    if config.judge_url:
        judge = server(config.judge_url, config.judge_model, api_key_env=config.judge_api_key_env)
    return model, judge


def run_settings(method: str, config: GenerateConfig, inputs: Inputs) -> dict[str, Any]:
    """Return all that the rows depend on, except the answering model. A run is continued only if it is the same."""
    folders = {name: getattr(config, name, None) for name in WEIGHTS}
    if config.server_url:  # a server's name for its model, and perhaps a folder by chance
        del folders["model_name_or_path"]
    return scrub(fixed_settings("generate", asdict(config))) | {
        "weights": {name: weights_digest(path) for name, path in folders.items() if path and Path(path).is_dir()},
        "pipeline": method,
        "inputs": {"count": len(inputs), "fingerprint": digest(inputs)},
    }


def generated_by(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the `generated_by` column: the models of a row, and a fingerprint of `settings.json`."""
    answered, judged = settings["answered_by"] or {}, settings["judged_by"] or {}
    return {
        "pipeline": settings["pipeline"],
        **{key: answered.get(key) for key in ("model", "adapter", "revision")},
        "judge": judged.get("model"),
        "settings": json_digest(settings, size=8),
    }


def _load(pipeline: Pipeline, row: InputRow, budget: PixelBudget | None) -> tuple[InputRow, Media] | Outcome:
    """Return an input with its media, or the reason why it is rejected."""
    try:
        media = load_media(row, pipeline.config.video_options(), budget)
        pipeline.check(row)
        return row, media
    except (InputError, MediaError) as error:
        kind = "unreadable media" if isinstance(error, MediaError) else "unusable input"
        return Outcome(row.id, reason=str(error), kind=kind)
