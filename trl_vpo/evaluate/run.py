"""A run of `trl-vpo evaluate`: held-out rows -> base and adapters -> results. The same command continues it.

    settings.json    all settings that the numbers depend on; a run with others is refused, and one whose finished rows
                     have changed
    rows.jsonl       each model's results on each row: log-probs (nats), answers and what was read from them
    rejected.jsonl   rows that were left out (`on_bad=skip`), with the reason
    results.json     measures with intervals, and paired differences to the base

A row is worked on once, for all candidates: its media are decoded once, and the KL needs base and adapter.
The reading of yes and no, synonyms and the bootstrap may change when a run is continued: the stored answers stay, the
results are computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.inputs import InputRow, Inputs, load_media, read_inputs
from trl_vpo.errors import EvaluateError, MediaError, RecipeError, RowError, as_user_errors
from trl_vpo.evaluate.candidates import ModelSet, candidate_names, load_candidates
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.judge import judgements, read_prompt
from trl_vpo.evaluate.probes import (
    Probe,
    check_media,
    listed_media,
    numbers,
    preference_probes,
    question_probes,
    row_seed,
    run_probes,
)
from trl_vpo.evaluate.results import BASE, Report
from trl_vpo.evaluate.rows import EvalRow, preference_row, read_rows
from trl_vpo.evaluate.table import show_results
from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.load import Media
from trl_vpo.models.requests import AnsweringModel
from trl_vpo.models.server import ServerModel
from trl_vpo.models.trained import trained_media
from trl_vpo.runs.digests import adapter_digest, row_digest, weights_digest
from trl_vpo.runs.driver import check_unchanged, ctrl_c_says_how_to_continue, rank, work_through, world_size
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.quiet import quiet_libraries
from trl_vpo.runs.recipe import RecipeParser
from trl_vpo.runs.results import encode, write_lines
from trl_vpo.runs.resume_rules import fixed_settings
from trl_vpo.runs.store import check_settings
from trl_vpo.text.chair import ObjectTable, read_synonyms
from trl_vpo.text.responses import Failure

Loaded = tuple[EvalRow, InputRow, Media]
CORRECT = "Correct the row or its media and start the same command again: it continues here."
SKIP = " With on_bad=skip such rows are left out and listed."
NO_JUDGEMENT = "no judgement"  # kind of an outcome


def make_parser() -> RecipeParser:
    return RecipeParser([EvaluateConfig], any_device=True, prog="trl-vpo evaluate")


def parse(argv: list[str]) -> EvaluateConfig:
    """Return the settings; unset video settings are those of the training."""
    if sum(arg.split("=")[0] == "--adapters" for arg in argv) > 1:
        raise RecipeError("--adapters is given twice, and the first would be lost: name all of them behind one.")
    parser = make_parser()
    config = parser.parse(argv)[0]
    config.check_can_start(
        model_name_or_path="the base model, a folder or a Hub model",
        dataset_name="the held-out rows",
        output_dir="a folder for the run",
    )
    model = (config.model_name_or_path, config.model_revision)
    return replace(config, **trained_media(config.adapters, parser.named, *model))


def run_evaluation(argv: list[str]) -> dict[str, Any] | None:
    """Evaluate a base and its adapters on held-out rows, or continue an earlier run with these settings.

    `argv` are the options of `trl-vpo evaluate`, such as `["--model", "BASE", "--adapters", "A", "B", ...]`. Return
    the content of `results.json`, or None while other workers are still at work. After Ctrl-C what was finished stays.
    """
    config = parse(argv)
    with ctrl_c_says_how_to_continue(config.output_dir):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Check all that can be checked without weights before they are loaded."""
    quiet_libraries()
    inputs, rows, table = held_out_rows(config)
    adapters = dict(zip(candidate_names(config.adapters), config.adapters))
    settings = run_settings(config, adapters)
    check_settings(config.output_dir, settings)
    identity = lambda place: row_digest(inputs[place], config.media_root)  # noqa: E731
    finished = check_unchanged(config.output_dir, inputs.ids, identity)
    _check_skipped(config, finished)
    check_held_out(config, inputs, rows, finished={done.id for done in finished})
    judge = None
    if config.judge_url:
        judge = ServerModel(config.judge_url, config.judge_model, api_key_env=config.judge_api_key_env)
    with as_user_errors():  # also of processes that do not find each other
        candidates = load_candidates(config.adapters, **config.model_options())
    settings["revision"] = candidates.model.record()["revision"]
    if budget := candidates.model.video_budget:
        settings["video_budget"] = str(budget)
    about = {BASE: candidates.model.record()} | {name: {"adapter": path} for name, path in adapters.items()}
    prompt = settings["judge_prompt"]
    report = Report(config, about, table, {row.id: row.facts["sets"] for row in rows if "sets" in row.facts})
    rows = rows[: config.limit]
    summary = work_through(
        config.output_dir,
        settings,
        [row.id for row in rows],
        load=lambda place: _load(rows[place], inputs, config, budget),
        make=lambda batch: (
            _skip(_judged(outcome, judge, prompt), config) for outcome in evaluate_batch(candidates, batch, config)
        ),
        identity=lambda place: identity(rows[place].place),
        report=report,
        batch_size=config.batch_size,
    )
    if summary is None:
        return None
    write_lines(Path(config.output_dir) / "results.json", [encode(report.results, "results", indent=2)])
    show_results(report.results, config.output_dir)
    return report.results


def held_out_rows(config: EvaluateConfig) -> tuple[Inputs, list[EvalRow], ObjectTable | None]:
    """Return the inputs and their checked rows, with the table of objects for captions, if one is named.

    Rows behind `limit` are among them: they tell which pairs and sets it cuts. Raises UserError at rows that cannot be
    used, or not with these settings.
    """
    table = ObjectTable(read_synonyms(config.synonyms)) if config.synonyms else None
    inputs = read_inputs(**config.input_options())
    rows = read_rows(inputs, table)
    if not config.judge_model and (rated := [row.name for row in rows[: config.limit] if row.task == "rated"]):
        raise EvaluateError(f"{rated[0]} and {len(rated) - 1} more need a judge: set judge_url and judge_model.")
    return inputs, rows, table


def check_held_out(config: EvaluateConfig, inputs: Inputs, rows: Sequence[EvalRow], finished: Collection[str]) -> None:
    """Open the media of this process' rows that are not finished, unless rows without are left out."""
    if config.on_bad == "error":
        mine = rows[: config.limit][rank() :: world_size()]
        check_media([row for row in mine if row.id not in finished], inputs, config, f"\n{CORRECT}{SKIP}")


def run_settings(config: EvaluateConfig, adapters: dict[str, str]) -> dict[str, Any]:
    """Return all that log-probs and answers depend on, except the base's revision and the rows."""
    base = config.model_name_or_path
    weights = weights_digest(base) if Path(base).is_dir() else None  # count, not the folder's name
    return fixed_settings("evaluate", asdict(config)) | {
        "model_name_or_path": None if weights else base,
        "weights": weights,
        "adapters": {name: adapter_digest(path) for name, path in adapters.items()},
        "judge_prompt": read_prompt(config.judge_prompt) if config.judge_model else None,
    }


def _check_skipped(config: EvaluateConfig, finished: Sequence[Outcome]) -> None:
    """Raise if an earlier call left rows out: they would silently stay so."""
    skipped = [done.id for done in finished if done.reason]
    if skipped and config.on_bad == "error":
        raise EvaluateError(
            f"{config.output_dir}: {len(skipped)} rows were left out with on_bad=skip, the first is {skipped[0]!r}. "
            "Give on_bad=skip again, or name another output_dir."
        )


# --- the rows -----------------------------------------------------------------------------------------------------


def _load(row: EvalRow, inputs: Inputs, config: EvaluateConfig, budget: PixelBudget | None = None) -> Loaded | Outcome:
    source = inputs[row.place]
    try:
        return row, source, load_media(source, config.video_options(), budget)
    except MediaError as error:
        return _skip(Outcome(row.id, reason=f"{row.name}: {error}", kind="unreadable media"), config)


def _skip(outcome: Outcome, config: EvaluateConfig) -> Outcome:
    """Return an outcome; raise EvaluateError if its row cannot be used, and such rows are not to be left out."""
    if outcome.reason and config.on_bad == "error":
        remedy = CORRECT
        if outcome.kind == NO_JUDGEMENT:
            remedy = "The same command asks again; another judge or judge_prompt needs an output_dir of its own."
        raise EvaluateError(f"{outcome.reason}\n{remedy}{SKIP}")
    return outcome


def evaluate_batch(candidates: ModelSet, batch: Sequence[Loaded], config: EvaluateConfig) -> list[Outcome]:
    """Return the outcome of each row of a batch: a record for every candidate, or the reason why there is none."""
    settings = {name: getattr(config, name) for name in ("max_pixels", "num_images", "visual_prompt", "media_root")}
    collator = PreferenceCollator(candidates.model.processor, video=config.video_options(), **settings)
    probes: list[list[Probe] | RowError] = []
    for row, source, media in batch:
        try:
            probes.append(_probes(row, source, media, config, collator))
        except RowError as error:
            probes.append(error)
    results = run_probes(
        probes, candidates.model.encode, candidates.score, lambda trees: candidates.ask(trees, config.max_new_tokens)
    )
    outcomes = []
    for (row, *_), result in zip(batch, results, strict=True):
        if isinstance(result, RowError):
            outcomes.append(Outcome(row.id, reason=str(result), kind="unusable row"))
            continue
        about = {"id": row.id, "task": row.task, "cluster": row.cluster}
        records = [about | {"contestant": n} | row.facts | numbers(result[n]) for n in candidates.names]
        outcomes.append(Outcome(row.id, records))
    return outcomes


def _judged(outcome: Outcome, judge: AnsweringModel | None, prompt: str) -> Outcome:
    """Return an outcome whose answers are judged, if its row is one for the judge."""
    if not outcome.rows or outcome.rows[0]["task"] != "rated":
        return outcome
    replies = judgements(judge, outcome.rows, prompt)
    if failed := [reply.reason for reply in replies if isinstance(reply, Failure)]:
        reason = f"{outcome.id}: the judge gives no reply: {failed[0]}"
        return replace(outcome, rows=(), reason=reason, kind=NO_JUDGEMENT)
    return replace(outcome, rows=[row | {"judgement": reply} for row, reply in zip(outcome.rows, replies)])


def _probes(
    row: EvalRow, source: InputRow, media: Media, config: EvaluateConfig, collator: PreferenceCollator
) -> list[Probe]:
    if row.task != "preference":
        return question_probes(row, source, media)
    pair = preference_row(source)
    listed = listed_media(pair, collator)
    if listed and not (media.images or media.videos):  # a row that has only a list is asked about the first of it
        media = listed[0]
    options = {"seed": row_seed(config.seed, row.id), "damages": config.damages()}
    return preference_probes(pair, media, listed=listed, answered=config.answer_preferences, **options)
