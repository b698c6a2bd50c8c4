"""The outcome of one input of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The training rows made of one input, or the reason why there are none."""

    id: str  # of the input row
    rows: tuple[dict, ...] = ()  # training rows that follow `trl_vpo.data.rows`; empty if the input was rejected
    reason: str | None = None  # why the input was rejected, as a sentence with the figures; None if there are rows
    kind: str | None = None  # a short name of the reason, counted in the summary, such as "answered correctly"
    notes: dict[str, Any] = field(default_factory=dict)  # figures and texts for the run's summary; JSON values

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))  # JSON has lists
        if bool(self.rows) == bool(self.reason):
            raise ValueError(f"outcome {self.id!r} needs rows or a reason, and not both")
