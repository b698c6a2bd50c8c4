"""The base of the three methods' pipelines.

One input flows one way: **input row -> media -> requests to the model (and judge) -> outcome -> store**. A pipeline
makes the requests and turns the answers into outcomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from PIL import Image

from trl_vpo.data.inputs import InputRow
from trl_vpo.media.load import Media
from trl_vpo.models.requests import AnsweringModel, Request
from trl_vpo.runs.outcome import Outcome


class Pipeline(ABC):
    """Input rows -> outcomes. Each method's file has one. The model is None for a dry run."""

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
        """Return whether a run with these settings asks a model at all."""
        return True

    @abstractmethod
    def check(self, row: InputRow) -> None:
        """Raise InputError if a row lacks what the method needs. Opens no file."""

    @abstractmethod
    def preview(self, row: InputRow, media: Media) -> list[tuple[str, Request]]:
        """Return (title, request) for each question about a row, in order, for `--dry_run`.

        An earlier answer within a question is a placeholder in angle brackets.
        """

    @abstractmethod
    def make(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Outcome]:
        """Return one outcome for each input, in order. Nothing about a row depends on its neighbours in the batch."""

    def select(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Apply what only the run as a whole can decide, such as keeping the best share. See `runs.results.Report`."""
        return outcomes

    @abstractmethod
    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return figures about the data by name. Rows and reasons are counted elsewhere."""


def training_row(
    row: InputRow, *, prompt: str, chosen: str, rejected: str, generated_by: dict, **columns: Any
) -> dict:
    """Return a row to train on: the plain question with the untouched media, both responses, and further columns."""
    return {
        "id": row.id,
        **{key: value for key, value in row.example.items() if key == "source" and value is not None},
        "prompt": [row.user_message(prompt)],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        **row.media_columns(),
        **columns,
        "generated_by": generated_by,
    }


def image_request(images: Sequence[Image.Image], text: str, seed: int = 0) -> Request:
    """Return a question about images, or none: one user turn."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    return Request([{"role": "user", "content": content}], Media(images=tuple(images)), seed)
