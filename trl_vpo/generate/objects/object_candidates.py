"""Possible critical objects of an image, in order: from a row's text and a detector, or from known boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row, response_text
from trl_vpo.errors import InputError, RowError
from trl_vpo.generate.objects.boxes import Choice, annotated, choices, match
from trl_vpo.generate.objects.nouns import Candidate, candidates


@dataclass(eq=False)
class Case:
    """One input on its way: the objects to choose from, the one that is chosen, or why none is."""

    row: InputRow
    image: Image.Image  # RGB, in the size in which it is stored: boxes refer to that
    choices: list[Choice] = field(default_factory=list)  # still to try, in order
    kind: str | None = None
    reason: str | None = None
    choice: Choice | None = None
    images: list[Image.Image] = field(default_factory=list)  # the list of the choice, if it is needed
    asked: list[dict] = field(default_factory=list)  # about hidden objects
    claimed_at: list[bool | None] = field(default_factory=list)

    def reject(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason


class Finder:
    """A finder of critical objects, set up by an `lpoi.LPOIGenerateConfig`. It loads the detector at its first use."""

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
        """Return what the row's text, or its column of candidates, names. Opens no file."""
        try:
            pair = read_row(row.example)
        except RowError as error:
            raise InputError(str(error)) from error
        column = self.config.objects_column
        if column is None:
            question = pair.prompt
            if not isinstance(question, str):  # the text of the last user turn
                users = [message for message in question if message["role"] == "user"]
                parts = [part for message in users[-1:] for part in message["content"]]
                question = " ".join(part["text"] for part in parts if part["type"] == "text")
            named = candidates(question, response_text(pair.chosen))
        else:
            names = row.example.get(column)
            if not isinstance(names, list) or not all(isinstance(n, str) and any(map(str.isalpha, n)) for n in names):
                raise InputError(f"`{column}` is {names!r}: it needs a list of names (objects_column).")
            names = dict.fromkeys(" ".join(name.split()) for name in names)
            named = [Candidate(name, "objects_column") for name in names]
        return named[: self.config.max_candidates]

    def find(self, cases: Sequence[Case]) -> None:
        """Give each case its choices, or the reason why there are none."""
        config = self.config
        named = [self.candidates(case.row) for case in cases]
        counts = [0] * len(cases)  # boxes of each case
        if config.boxes == "annotations":
            for at, case in enumerate(cases):
                try:
                    boxes = annotated(case.row.example[config.annotations_column], case.image.size, config.categories)
                except InputError as error:
                    case.reject("unusable input", str(error))
                    continue
                counts[at] = len(boxes)
                case.choices = choices(match(boxes, named[at]), named[at], case.image.size, config)
        else:
            self._detect(cases, named, counts)
            self._detect(cases, None, counts)
        for case, candidates_of_row, count in zip(cases, named, counts):
            if not case.choices and not case.reason:
                names = ", ".join(candidate.text for candidate in candidates_of_row) or "nothing that can be seen"
                boxes = f"boxes found: {count}, none of {config.min_box_area:g} to {config.max_box_area:g}"
                case.reject("no object found", f"the text names {names}; {boxes} of the image.")

    def _detect(self, cases: Sequence[Case], named: Sequence[list[Candidate]] | None, counts: list[int]) -> None:
        """Look for each case's candidates (None: the fallback labels) if it has no choice yet."""
        todo = [at for at, case in enumerate(cases) if not case.choices]
        looked_for = [named[at] if named else [] for at in todo]
        labels = [[c.text for c in listed] if named else self.config.fallback_labels for listed in looked_for]
        images = [cases[at].image for at in todo]
        results = self.detector.detect(images, labels, batch_size=self.config.batch_size)
        for at, listed, detections in zip(todo, looked_for, results):
            counts[at] += len(detections)
            cases[at].choices = choices(detections, listed, cases[at].image.size, self.config)
