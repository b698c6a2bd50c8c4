"""The parts that the three pipelines are made of: an input row, a question to a model, what came of a row.

One input flows one way: **input row -> media -> requests to the model (and judge) -> outcome -> store**. A pipeline
says only which requests it makes and what it makes of the answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from trl_vpo.data.inputs import InputRow
from trl_vpo.media.load import Media
from trl_vpo.models.requests import AnsweringModel, Request
from trl_vpo.runs.outcome import Outcome


class Pipeline(ABC):
    """Input rows -> outcomes. Each method's file has one.

    Args:
        config: the method's generation config (`trl_vpo.generate.config`).
        model: who answers; None for a dry run.
        judge: who judges, where the method has a judge; None without one.
        generated_by: the value of each row's `generated_by` column: pipeline, model, adapter, revision, settings.
    """

    name: ClassVar[str]

    def __init__(
        self,
        config: Any,
        model: AnsweringModel | None,
        judge: AnsweringModel | None = None,
        generated_by: dict | None = None,
    ):
        self.config = config
        self.model = model
        self.judge = judge
        self.generated_by = generated_by or {}

    @classmethod
    def needs_model(cls, config: Any) -> bool:
        """Whether a run with these settings asks a model at all."""
        return True

    @abstractmethod
    def check(self, row: InputRow) -> None:
        """Whether a row has what the method needs. Opens no file.

        Raises:
            InputError: what is missing.
        """

    @abstractmethod
    def preview(self, row: InputRow, media: Media) -> list[tuple[str, Request]]:
        """(title, request) for what the models would be asked about a row, in order; `--dry-run` shows it.

        Where a question holds an earlier answer, the preview says so in angle brackets.
        """

    @abstractmethod
    def make(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Outcome]:
        """One outcome for each input, in order. Nothing about a row depends on its neighbours in the batch."""

    def select(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Called once, with all outcomes of a run: what the run as a whole decides, such as keeping the best share.

        Returns one outcome for each given one, in order; a row that is dropped becomes a rejected outcome.
        """
        return outcomes

    @abstractmethod
    def summarize(self, outcomes: Iterable[Outcome]) -> dict[str, Any]:
        """What a run says about its data: name -> figure. Counts of rows and of reasons are the store's."""


def training_row(
    row: InputRow, *, prompt: str, chosen: str, rejected: str, generated_by: dict, **columns: Any
) -> dict:
    """A row to train on: the plain question with the untouched media, both responses, and further columns."""
    source = row.example.get("source")
    return {
        "id": row.id,
        **({"source": source} if source is not None else {}),
        "prompt": [row.user_message(prompt)],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        **row.media_columns(),
        **columns,
        "generated_by": generated_by,
    }
