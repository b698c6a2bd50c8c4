"""The parts that the three pipelines are made of: an input row, a question to a model, what came of a row.

One input flows one way: **input row -> media -> requests to the model (and judge) -> outcome -> store**. A pipeline
says only which requests it makes and what it makes of the answers.
"""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from PIL import Image

from trl_vpo.data.media import Clip
from trl_vpo.data.rows import MARKERS


class GenerateError(ValueError):
    """A run that cannot start or go on: its settings, its inputs or its folder. The message says what to do."""


class InputError(ValueError):
    """An input row that cannot be used; it ends in `rejected.jsonl` with this message."""


@dataclass(frozen=True)
class Media:
    """The decoded media of one input row."""

    images: tuple[Image.Image, ...] = ()
    videos: tuple[Clip, ...] = ()


@dataclass(frozen=True)
class InputRow:
    """One annotated input. Media are still undecoded sources.

    Attributes:
        id: unique within the run; together with the run's seed it fixes everything random about the row.
        example: the row as the dataset gives it, without its `None` entries.
        images, videos: sources as in `trl_vpo.data.rows`; paths are absolute.
    """

    id: str
    example: dict[str, Any]
    images: tuple = ()
    videos: tuple = ()

    def user_message(self, text: str) -> dict:
        """A user's turn with a placeholder for each image and video, then `text`."""
        media = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * len(self.videos)
        return {"role": "user", "content": [*media, {"type": "text", "text": text}]}

    def media_columns(self) -> dict[str, list]:
        """The `images` and `videos` columns of a training row made from this input."""
        return {key: list(value) for key in ("images", "videos") if (value := getattr(self, key))}


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        messages: turns with `role` and typed contents; one {"type": "image"} or {"type": "video"} for each item of
            `media`, in order.
        media: what the placeholders stand for.
        seed: of this request's own random stream; see `stream_seed`.
    """

    messages: list[dict]
    media: Media = field(default_factory=Media)
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. `temperature` 0 is greedy decoding."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.9


@dataclass(frozen=True)
class Failure:
    """In the place of an answer: why there is none."""

    reason: str


class AnsweringModel(ABC):
    """Who answers: a model in this process (`local.LocalModel`) or behind a server (`server.ServerModel`)."""

    can_score: ClassVar[bool] = False

    @abstractmethod
    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[str | Failure]:
        """The answers, stripped, in the order of the requests. An empty or cut-off answer is a `Failure`."""

    def average_logps(self, requests: Sequence[Request], responses: Sequence[str]) -> list[float]:
        """Mean log-prob per response token (nats), LeanPO's reward before beta. Only where `can_score`."""
        raise NotImplementedError(f"{type(self).__name__} cannot score responses")

    @abstractmethod
    def record(self) -> dict[str, str | None]:
        """Who it is, for every row made: `model`, `adapter`, `revision` (and `server` behind one)."""


@dataclass(frozen=True)
class Outcome:
    """What came of one input: training rows, or the reason why there are none.

    Attributes:
        id: of the input row.
        rows: training rows that follow `trl_vpo.data.rows`; empty where the input was rejected.
        reason: why the input was rejected, as a sentence with the figures in it; None where rows were made.
        kind: a short name for the reason, by which the summary counts, such as "answered correctly".
        notes: figures and texts of this input for the run's summary; JSON values.
    """

    id: str
    rows: tuple[dict, ...] = ()
    reason: str | None = None
    kind: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.rows) == bool(self.reason):
            raise ValueError(f"outcome {self.id!r} needs rows or a reason, and not both")


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


def stream_seed(seed: int, row_id: str, purpose: str) -> int:
    """The seed (63 bits) of one random stream of one row, whatever the batch, the worker or the machine."""
    digest = hashlib.blake2b(f"{seed}\x1f{row_id}\x1f{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_blank(text: str) -> bool:
    """Return whether nothing of a text is seen: it is white space, zero-width characters or control characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)


def given_text(example: Mapping[str, Any], name: str, method: str) -> str:
    """A column that must hold text, stripped; `method` is who needs it.

    Raises:
        InputError: it is missing, empty or no text, or holds a media marker, which belongs into a prompt only.
    """
    value = example.get(name)
    if not isinstance(value, str) or is_blank(value):
        raise InputError(f"`{name}` is {value!r}: {method} needs it as a text that is not empty.")
    for marker in MARKERS:
        if marker in value:
            raise InputError(f"`{name}` holds the marker {marker}: take it out, media come from their columns.")
    return value.strip()


def mean(values: Iterable[float]) -> float | None:
    """The mean; None of no values."""
    values = list(values)
    return fmean(values) if values else None


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
