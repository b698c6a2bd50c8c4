"""A question to a model, its answer, and the interface of whoever answers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.load import Media
from trl_vpo.text.responses import Failure


@dataclass(frozen=True)
class Request:
    """One question to a model: turns with `role` and typed contents.

    One {"type": "image"} or {"type": "video"} stands in them for each item of `media`, in order.
    """

    messages: list[dict]
    media: Media = field(default_factory=Media)
    seed: int = 0  # of this request's own random stream, see `stream_seed`


@dataclass(frozen=True)
class Answer:
    """A model's answer as it is, stripped and without its thoughts; it may be empty."""

    text: str
    tokens: int  # before the one that ends it, those of thoughts included
    ended: bool  # False where the limit of new tokens cut it off


@dataclass(frozen=True)
class Sampling:
    """The way an answer is drawn. `temperature` 0 is greedy decoding."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.9


class AnsweringModel(ABC):
    """A model that answers: in this process (`local.LocalModel`) or behind a server (`server.ServerModel`)."""

    can_score: ClassVar[bool] = False
    video_budget: PixelBudget | None = None  # of the videos of a request; None: whoever answers decides

    @abstractmethod
    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[str | Failure]:
        """Return the answers, stripped, in the order of the requests. An empty or cut-off answer is a `Failure`."""

    def average_logps(self, requests: Sequence[Request], responses: Sequence[str]) -> list[float]:
        """Return the mean log-prob per response token (nats), LeanPO's reward before beta. Only where `can_score`."""
        raise NotImplementedError(f"{type(self).__name__} cannot score responses")

    @abstractmethod
    def record(self) -> dict[str, str | None]:
        """Return what each row says of the model: `model`, `adapter`, `revision`, and `server` behind one."""


def stream_seed(seed: int, row_id: str, purpose: str) -> int:
    """Return the seed (63 bits) of one random stream of one row, whatever the batch, the worker or the machine."""
    digest = hashlib.blake2b(f"{seed}\x1f{row_id}\x1f{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
