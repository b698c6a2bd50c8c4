"""Public benchmarks through lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), on a base model with an adapter.

lmms-eval brings the tasks: their data, prompts and scoring. The model answers as it does everywhere else here, so any
family works, frames are sampled as in training, and the adapter is not merged. VideoHallucer, which lmms-eval does not
have, is in `tasks/`. Importing this module needs no lmms-eval.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trl_vpo.errors import EvaluateError
from trl_vpo.evaluate.lmms.tasks import videohallucer
from trl_vpo.files import atomic_write, read_object
from trl_vpo.models.config import AnsweringConfig
from trl_vpo.models.load import load_model
from trl_vpo.models.trained import SIZES, trained_media
from trl_vpo.runs.digests import adapter_digest, files_digest, weights_digest
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.store import Run, read_outcomes

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

    from trl_vpo.evaluate.lmms.model import BenchmarkModel

logger = logging.getLogger(__name__)

TASKS = Path(__file__).parent / "tasks"
RESULTS = "results.json"
LOGPROBS = {"loglikelihood", "multiple_choice"}
SUPPORTED = {"generate_until", "generate_until_agentic", *LOGPROBS}
# Their scoring asks a GPT model about every answer, and counts the answer as wrong where it gets no reply.
JUDGED = {"hallusion_bench_image", "tempcompass_captioning"}
# The same for the answers that their rules cannot read.
PARTLY_JUDGED = {"tempcompass_multi_choice", "tempcompass_yes_no", "tempcompass_caption_matching"}
# What an answer depends on, beside the task and the adapter.
FIXED = (
    "model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit",
    "num_frames", "fps", "max_frames", "max_pixels", "max_new_tokens", "seed",
)  # fmt: skip

Table = dict[str, dict[str, float]]  # task or group -> metric -> value, in lmms-eval's names


def run_benchmarks(
    benchmarks: Sequence[str],
    *,
    model: str,
    adapter: str | None = None,
    output_dir: str | Path,
    limit: int | None = None,
    batch_size: int = 1,
    include_path: str | Path | None = None,
    **settings: Any,
) -> dict[str, Table]:
    """Run tasks or groups of lmms-eval on a base model, with an adapter if one is given.

    Each benchmark has a folder in `output_dir`: `results.json` with its metrics and settings, `samples_TASK.jsonl`
    with every answer, and what the task itself writes (submission files). Called again with the same settings,
    finished benchmarks are read, not run, and one that was killed continues: its answers so far are in `shards`. Under
    `accelerate launch` every process answers its share.

    `include_path` is a folder with further tasks, `settings` are other fields of `AnsweringConfig`. Media settings
    that are not given are those of the training of the adapter, or of the model, where its `run.json` tells.

    Return benchmark -> task or group -> metric -> value, with lmms-eval's names and scales and without figures that
    are not defined; empty in all processes but the first.
    """
    try:
        import lmms_eval.tasks  # noqa: F401
    except ImportError as error:
        raise EvaluateError(
            f"public benchmarks need lmms-eval, which cannot be imported ({error}): pip install trl-vpo[lmms]"
        ) from error
    adapters = [adapter] if adapter else []
    settings = trained_media(adapters, settings, model, settings.get("model_revision"), SIZES) | settings
    config = AnsweringConfig(model_name_or_path=model, limit=limit, batch_size=batch_size, **settings)
    manager = _task_manager(include_path)
    simple = {name: _check(manager, name, limit) for name in benchmarks}
    common = _record(config, adapter)
    records = {name: common | _files(manager, name, include_path) for name in benchmarks}
    folders = {name: Path(output_dir) / name for name in benchmarks}
    tables = {name: _finished(folder, records[name]) for name, folder in folders.items()}
    if all(table is not None for table in tables.values()):
        return tables
    from trl_vpo.evaluate.lmms.model import BenchmarkModel  # needs lmms-eval

    base, options = load_model(**config.model_options(), adapter=adapter), config.video_options()
    budget = {"video_budget": str(base.video_budget) if base.video_budget else None}
    answering = BenchmarkModel(base, options, max_new_tokens=config.max_new_tokens, seed=config.seed)
    for name, table in tables.items():
        if table is None:
            answering.is_simple = simple[name]
            tables[name] = _run(name, answering, manager, folders[name], records[name] | budget)
    return {name: table for name, table in tables.items() if table is not None}


# --- tasks ----------------------------------------------------------------------------------------------------------


def _task_manager(include_path: str | Path | None) -> TaskManager:
    import loguru
    from huggingface_hub.constants import HF_HOME
    from lmms_eval.tasks import TaskManager

    loguru.logger.remove()  # only lmms-eval logs through it, and by default everything
    loguru.logger.add(sys.stderr, level="WARNING")

    # Some tasks look for their videos there and fail where it is not set; this is its default.
    os.environ.setdefault("HF_HOME", HF_HOME)
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluateError(f"include_path: {include_path} is not a folder.")
    folders = [str(TASKS), *([str(include_path)] if include_path is not None else [])]
    return TaskManager("WARNING", include_path=folders, model_name="trl_vpo")


def _check(manager: TaskManager, name: str, limit: int | None) -> bool:
    """Return whether a benchmark's tasks are lmms-eval's "simple" ones; refuse one that cannot be run here."""
    from lmms_eval.utils import load_yaml_config

    tasks, kinds = _tasks(manager, name), set()
    for task in tasks:
        if subset := videohallucer.subset_of(task):
            videohallucer.check(subset, limit)
        try:
            config = load_yaml_config(manager.task_index[task]["yaml_path"], mode="full")
        except Exception as error:  # a task runs code of its own when it is imported
            raise EvaluateError(f"lmms-eval's task {task} cannot be loaded: {error}") from error
        kinds.add(config.get("output_type", "generate_until"))
    if kinds - SUPPORTED:
        raise EvaluateError(f"{name} asks for {', '.join(sorted(kinds - SUPPORTED))}, which is not supported.")
    _check_judge(name, tasks)
    return bool(kinds & LOGPROBS)


def _tasks(manager: TaskManager, name: str) -> list[str]:
    """Return the single tasks of a task, a group or a tag."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index.get(name)
    if entry is None:
        close = difflib.get_close_matches(name.lower(), manager.all_tasks, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`lmms-eval tasks list` shows what it has."
        raise EvaluateError(f"lmms-eval has no benchmark {name!r}. {hint}")
    if entry["type"] in ("task", "python_task"):
        return [name]
    parts = entry["task"] if entry["task"] != -1 else load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    tasks = []
    for part in parts:
        inner = part["task"] if isinstance(part, dict) else part
        for one in inner if isinstance(inner, list) else [inner]:
            tasks += _tasks(manager, one["task"] if isinstance(one, dict) else one)
    return tasks


def _check_judge(name: str, tasks: list[str]) -> None:
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("AZURE_API_KEY"):
        return
    if judged := JUDGED.intersection(tasks):
        others = f" Or name the others alone: {', '.join(t for t in tasks if t not in judged)}." * (len(tasks) > 1)
        raise EvaluateError(
            f"{name}: a GPT model judges every answer to {', '.join(sorted(judged))}, and without one all count as "
            f"wrong. Set OPENAI_API_KEY (and OPENAI_API_URL for another server).{others}"
        )
    for task in PARTLY_JUDGED.intersection(tasks):
        logger.warning(f"{task}: without OPENAI_API_KEY, answers that its rules cannot read count as wrong.")


# --- results --------------------------------------------------------------------------------------------------------


def _record(config: AnsweringConfig, adapter: str | None) -> dict[str, Any]:
    values, base = asdict(config), Path(config.model_name_or_path)
    return {key: values[key] for key in FIXED} | {
        "from_adapter": adapter,
        "weights": weights_digest(base) if base.is_dir() else None,  # another model in the same place is not this one
        "adapter_files": adapter_digest(adapter) if adapter else None,
        "limit": config.limit,
        "lmms_eval": version("lmms-eval"),
    }


def _answered(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the answers depend on: weights, not the name of their folder."""
    names = {"limit", "from_adapter", *(["model_name_or_path"] if record.get("weights") else [])}
    return {key: value for key, value in record.items() if key not in names}


def _files(manager: TaskManager, name: str, include_path: str | Path | None) -> dict[str, Any]:
    """The files here that a benchmark reads: `include_path`, if one of its tasks is from there, and VideoHallucer."""
    tasks, record = _tasks(manager, name), {"include_path": None, "include_files": None}
    folder = Path(include_path or "").absolute()
    paths = [Path(str(manager.task_index[task]["yaml_path"])).absolute() for task in (name, *tasks)]
    if include_path is not None and any(path.is_relative_to(folder) for path in paths):
        # Without Python's caches and what is hidden, such as a repository's own files.
        visible = [file for file in folder.rglob("[!.]*") if file.is_file() and file.suffix != ".pyc"]
        visible = [file for file in visible if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
        record = {"include_path": str(folder), "include_files": files_digest(folder, visible)}
    return record | videohallucer.record(filter(None, map(videohallucer.subset_of, tasks)))


def _finished(folder: Path, record: dict[str, Any]) -> Table | None:
    """The metrics of an earlier run with these settings; None where there was none, or one with another limit."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        stored = read_object(path, "settings", "metrics")
    except ValueError as error:
        raise EvaluateError(f"{path}: {error} Delete the file: the answers are stored beside it.") from error
    if changed := sorted(key for key, value in _answered(record).items() if stored["settings"].get(key) != value):
        raise EvaluateError(
            f"{path} holds results with another {', '.join(changed)}. Give a new output_dir, or delete that folder."
        )
    if stored["settings"].get("limit") != record["limit"]:
        return None
    logger.info(f"{folder.name}: finished before, read from {path}.")
    return stored["metrics"]


def _run(name: str, model: BenchmarkModel, manager: TaskManager, folder: Path, record: dict[str, Any]) -> Table | None:
    from lmms_eval.evaluator import simple_evaluate

    with Run(folder, _answered(record), rank=model.rank, world_size=model.world_size) as run:
        answers = {outcome.id: outcome.rows[0]["answer"] for outcome in read_outcomes(folder)}  # of all processes
        model.begin(answers, lambda name, answer: run.write(Outcome(name, ({"answer": answer},))))
        results = simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            limit=record["limit"],
            verbosity="WARNING",
            # Scoring reads from here where a task may write, and that it gets documents without their images.
            cli_args=SimpleNamespace(output_path=str(folder), process_with_media=False),
        )
    return _write(results, folder, record) if results is not None else None


def _write(results: dict[str, Any], folder: Path, record: dict[str, Any]) -> Table:
    """Write the files of a finished benchmark; `results.json` comes last and whole."""
    from lmms_eval.utils import handle_non_serializable

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options)

    folder.mkdir(parents=True, exist_ok=True)
    samples = results.pop("samples", {})
    for task, rows in samples.items():
        lines = "".join(as_json(row) + "\n" for row in sorted(rows, key=lambda row: row["doc_id"]))
        (folder / f"samples_{task}.jsonl").write_text(lines, encoding="utf-8")
    metrics: Table = {}
    for task, values in results["results"].items():  # "none" is lmms-eval's name for answers that passed no filter
        figures = {k.removesuffix(",none"): float(value) for k, value in values.items() if hasattr(value, "__float__")}
        figures = {key: value for key, value in figures.items() if math.isfinite(value)}
        if figures or task in samples:
            metrics[task] = figures
    kept = {key: results[key] for key in ("n-samples", "versions", "higher_is_better", "configs") if key in results}
    with atomic_write(folder / RESULTS) as part:
        part.write_text(as_json({"settings": record, "metrics": metrics, **kept}, indent=2), encoding="utf-8")
    return metrics
