"""Training runs as their folders hold them.

A run is the `output_dir` of `trl-vpo train` or a checkpoint in it, finished or not. Its log comes from
trainer_state.json, its settings from run.json or from the marker of a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trl_vpo.errors import PlotError
from trl_vpo.files import read_object
from trl_vpo.report.plot.curves import PANELS, History

STATE = "trainer_state.json"
REMEDY = "Restore it, or plot a copy of the folder without it."
KEYS = tuple(panel.key for panel in PANELS)
MOST = 2**37  # steps of a training, and seconds of a time stamp
METHOD_NAMES = {"dpo": "DPO", "leanpo": "LeanPO", "rrpo": "RRPO", "lpoi": "LPOI", "simpo": "SimPO", "tdpo": "TDPO"}
METHOD_NAMES |= {"ddpo": "DDPO", "mdpo": "mDPO", "dpa": "DPA", "symmpo": "SymMPO"}


@dataclass
class Run:
    """A training run."""

    path: Path  # as it was given
    history: History  # `trainer.state.log_history`
    record: dict[str, Any] = field(default_factory=dict)  # run.json: method, recipe, versions, ...; may be unknown
    name: str = ""  # in legends

    @property
    def method(self) -> str:
        method = str(self.record.get("method", ""))
        return METHOD_NAMES.get(method, method)


def read_runs(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read the runs of folders and name each differently. Raises PlotError, also at a run that is given twice."""
    if names is not None and len(names) != len(paths):
        raise PlotError(f"{len(names)} names for {len(paths)} runs: give one for each.")
    if twice := _repeated(str(Path(path).resolve()) for path in paths):
        raise PlotError(f"{', '.join(twice)} is given twice.")
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, names or _names(runs)):
        run.name = name
    if again := _repeated(run.name for run in runs):
        raise PlotError(f"two runs are named {again[0]!r}: give each a name of its own.")
    return runs


def read_run(path: str | Path) -> Run:
    """Read a run from its folder: from the newest trainer_state.json of the folder and of its checkpoints.

    Raises PlotError if there is none, it cannot be read, or nothing was logged.
    """
    path = Path(path)
    if not path.is_dir():
        raise PlotError(f"{path}: there is no such folder. Give the output_dir of a run of `trl-vpo train`.")
    states = [*path.glob(STATE), *path.glob(f"checkpoint-*/{STATE}")]
    if not states:
        raise PlotError(
            f"{path} has no {STATE}, neither itself nor in a checkpoint. Either it is not the output_dir of a run, or "
            "the run was interrupted before its first checkpoint."
        )
    found = [(state, _read_history(state), _read_record(state.parent, path)) for state in states]
    state, history, record = max(found, key=lambda one: (_saved(one[2]), len(one[1]), one[0].parent == path))
    if not history:
        raise PlotError(f"{state}: nothing was logged. Set logging_steps to less than the number of steps.")
    return Run(path, history, record.get("run", record))


def _saved(record: Mapping[str, Any]) -> str:
    """Return when a state was saved, as its run recorded it: in a copy all files are new."""
    at = record.get("saved")
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at else str(record.get("finished", ""))


def _read_history(state: Path) -> History:
    history = _read_json(state).get("log_history")
    logs = history if isinstance(history, list) else [None]
    if not all(isinstance(entry, dict) and _is_count(entry.get("step")) for entry in logs):
        raise PlotError(f"{state}: its log_history does not list what was logged at which step. {REMEDY}")
    for entry in logs:
        for key, value in entry.items():
            drawn = key in KEYS or (key.startswith("eval_") and key.endswith(KEYS))
            if drawn and not _is_number(value):
                raise PlotError(f"{state}: at step {entry['step']}, {key} is not a number. {REMEDY}")
    return logs


def _read_record(folder: Path, run: Path) -> dict[str, Any]:
    """Return the marker of a checkpoint or run.json; of the run's own folder, run.json comes first."""
    files = [folder / "complete.json", run / "run.json"]
    files = [file for file in (files if folder != run else files[::-1]) if file.is_file()]
    record = _read_json(files[0]) if files else {}
    about = record.get("run", record)
    parts = [about, *(about.get(key) or {} for key in ("recipe", "versions"))] if isinstance(about, dict) else [about]
    if not all(isinstance(part, dict) for part in parts) or not _is_count(record.get("saved") or 0):
        raise PlotError(f"{files[0]} does not hold what `trl-vpo train` writes there. {REMEDY}")
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < MOST


def _is_number(value: Any) -> bool:
    try:
        return float(value) is not None
    except (TypeError, ValueError, OverflowError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise PlotError(f"{path}: {error} {REMEDY}") from error


def _repeated(values) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the methods (`run` if unknown); those that are not unique get as much of the path as tells them apart."""
    methods = [run.method or "run" for run in runs]
    parts = [run.path.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(runs):
        depth += 1
    shared = {"run", *_repeated(methods)}
    return [f"{m} ({'/'.join(part[-depth:])})" if m in shared else m for m, part in zip(methods, parts)]
