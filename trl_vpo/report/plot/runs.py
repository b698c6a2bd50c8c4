"""Training runs as their folders hold them.

A run is the `output_dir` of `trl-vpo train` or a checkpoint in it, finished or not. Its log comes from
trainer_state.json, its settings from run.json or from the marker of a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_vpo.errors import PlotError
from trl_vpo.files import read_object
from trl_vpo.report.plot.history import History

STATE = "trainer_state.json"
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
    state = max(states, key=lambda file: (file.stat().st_mtime_ns, file.parent == path))
    history = _read_json(state).get("log_history")
    if not history:
        raise PlotError(f"{state}: nothing was logged. Set logging_steps to less than the number of steps.")
    record, marker = path / "run.json", state.parent / "complete.json"
    if marker.is_file() and not (state.parent == path and record.is_file()):
        return Run(path, history, _read_json(marker).get("run") or {})
    return Run(path, history, _read_json(record) if record.is_file() else {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise PlotError(f"{path}: {error}") from error


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
