"""The answers of a benchmark that is at work, so that a killed run continues where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.store import Run, read_outcomes


class StoredAnswers(dict):
    """Answers by request, such as "mvbench_x/7: answer 1", in the folder of a run; each is written when it is set.

    All processes read what any of them wrote, so that their number may change. `settings` are all that the answers
    depend on: a folder with others is refused. JSON values. A context manager, as `Run` is.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, rank: int = 0, world_size: int = 1):
        self._run = Run(folder, dict(settings), rank=rank, world_size=world_size)
        super().__init__((outcome.id, outcome.rows[0]["answer"]) for outcome in read_outcomes(folder))

    def __setitem__(self, request: str, answer: Any) -> None:
        self._run.write(Outcome(request, ({"answer": answer},)))
        super().__setitem__(request, answer)

    def __enter__(self) -> StoredAnswers:
        return self

    def __exit__(self, *error) -> None:
        self._run.close()
