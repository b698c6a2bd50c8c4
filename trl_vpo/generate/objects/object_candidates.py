"""What in an image may be critical: from a row's text and a detector, or known boxes, to choices in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row, response_text
from trl_vpo.errors import InputError, RowError
from trl_vpo.generate.objects.boxes import Choice, annotated, choices, match
from trl_vpo.generate.objects.nouns import Candidate, candidates


@dataclass(frozen=True)
class Found:
    """The choices of one row, first the one to take; or why there is none."""

    choices: list[Choice]
    kind: str | None = None
    reason: str | None = None


class Finder:
    """Finds critical objects as an `lpoi.LPOIGenerateConfig` says. The detector is loaded when it is first needed."""

    def __init__(self, config: Any):
        self.config = config

    @cached_property
    def detector(self):
        from trl_vpo.generate.objects.detectors import Detector

        return Detector(
            self.config.detector,
            revision=self.config.detector_revision,
            device=self.config.device,
            dtype=self.config.detector_dtype,
            threshold=self.config.box_threshold,
        )

    def candidates(self, row: InputRow) -> list[Candidate]:
        """What the row's text, or its column of candidates, names. Opens no file.

        Raises:
            InputError: the row is no preference pair, or the column holds no names.
        """
        column = self.config.objects_column
        if column is None:
            try:
                pair = read_row(row.example)
            except RowError as error:
                raise InputError(str(error)) from error
            found = candidates(question_text(pair.prompt), response_text(pair.chosen))
            return found[: self.config.max_candidates]
        names = row.example.get(column)
        if not isinstance(names, list) or not all(isinstance(n, str) and any(map(str.isalpha, n)) for n in names):
            raise InputError(f"`{column}` is {names!r}: it needs a list of names (objects_column).")
        names = dict.fromkeys(" ".join(name.split()) for name in names)
        return [Candidate(name, "objects_column") for name in names][: self.config.max_candidates]

    def find(self, rows: Sequence[InputRow], images: Sequence[Image.Image]) -> list[Found]:
        """For each row with its RGB image, in the size in which it is stored."""
        if self.config.boxes == "annotations":
            return [self._annotated(row, image) for row, image in zip(rows, images)]
        return self._detected([self.candidates(row) for row in rows], images)

    def _annotated(self, row: InputRow, image: Image.Image) -> Found:
        named = self.candidates(row)
        try:
            boxes = annotated(row.example[self.config.annotations_column], image.size, self.config.categories)
        except InputError as error:
            return Found([], "unusable input", str(error))
        chosen = choices(match(boxes, named), named, image.size, self.config)
        return Found(chosen) if chosen else self._nothing(named, len(boxes))

    def _detected(self, named: Sequence[list[Candidate]], images: Sequence[Image.Image]) -> list[Found]:
        """One look for the candidates; where none is found, a second one for the fallback labels."""
        chosen: list[list[Choice]] = [[] for _ in images]
        counts = [0] * len(images)
        for second in (False, True):
            todo = [at for at in range(len(images)) if not chosen[at]]
            labels = [self.config.fallback_labels if second else [c.text for c in named[at]] for at in todo]
            found = self.detector.detect([images[at] for at in todo], labels, batch_size=self.config.batch_size)
            for at, detections in zip(todo, found):
                counts[at] += len(detections)
                chosen[at] = choices(detections, [] if second else named[at], images[at].size, self.config)
        return [Found(c) if c else self._nothing(n, count) for c, n, count in zip(chosen, named, counts)]

    def _nothing(self, named: Sequence[Candidate], boxes: int) -> Found:
        names = ", ".join(candidate.text for candidate in named) or "nothing that can be seen"
        least, most = self.config.min_box_area, self.config.max_box_area
        reason = f"the text names {names}; {boxes} boxes were found, none of {least:g} to {most:g} of the image."
        return Found([], "no object found", reason)


def question_text(prompt: list[dict] | str) -> str:
    """The text of the last user turn."""
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message["role"] == "user"]
    return " ".join(part["text"] for part in users[-1]["content"] if part["type"] == "text") if users else ""
