"""Critical objects of images: the possible ones in order, from a row's text and a detector or from known boxes, and
the one that is chosen.

A choice is kept if it has a mask (with `mask_model`) and is a hard negative (with `hard_negative`): the model says
that the object is in the image although it is hidden. Otherwise the input's next choice is tried.
"""

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
from trl_vpo.generate.objects.detectors import Detector
from trl_vpo.generate.objects.nouns import Candidate, candidates
from trl_vpo.generate.objects.segment import Segmenter, masked_by
from trl_vpo.generate.pipeline import image_request
from trl_vpo.media.masking import masked_image_list
from trl_vpo.models.requests import AnsweringModel, stream_seed
from trl_vpo.text.inflection import with_article
from trl_vpo.text.responses import Failure
from trl_vpo.text.yes_no import read_yes_no


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
    """A finder of critical objects, set up by an `lpoi.LPOIGenerateConfig`. It loads weights at their first use."""

    def __init__(self, config: Any, model: AnsweringModel | None):
        self.config = config
        self.model = model

    @cached_property
    def detector(self):
        return Detector(
            self.config.detector,
            revision=self.config.detector_revision,
            device=self.config.device,
            dtype=self.config.detector_dtype,
            threshold=self.config.box_threshold,
        )

    @cached_property
    def segmenter(self):
        revision, dtype = self.config.mask_model_revision, self.config.detector_dtype
        return Segmenter(self.config.mask_model, revision=revision, device=self.config.device, dtype=dtype)

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

    def settle(self, cases: Sequence[Case]) -> None:
        """Take each case's first choice that has a mask and is a hard negative, if the settings require these."""
        config = self.config
        while cases:
            for case in cases:
                case.choice = case.choices.pop(0)
            if not (config.mask_model or config.hard_negative or config.visibility_check):
                return
            self._draw(cases)
            drawn = [case for case in cases if case.images]
            settled = self._claimed(drawn) if config.hard_negative else drawn
            cases = [case for case in cases if case not in settled and not case.reason]
            for case in cases:
                if not case.choices and case.asked:
                    labels = ", ".join(item["label"] for item in case.asked)
                    case.reject("no hard negative", f"the model does not claim what is hidden ({labels}).")
                elif not case.choices:
                    case.reject("empty mask", f"{config.mask_model} finds no outline in the box of any object.")
            cases = [case for case in cases if case.choices]

    def _draw(self, cases: Sequence[Case]) -> None:
        """Draw the image list of each choice; none if the mask is empty."""
        options = {"n": self.config.num_images, "visual_prompt": self.config.visual_prompt}
        if not self.config.mask_model:
            for case in cases:
                case.images = masked_image_list(case.image, case.choice.box, **options)
            return
        masks = self.segmenter.masks([case.image for case in cases], [case.choice.box for case in cases])
        for case, mask in zip(cases, masks):
            case.images = masked_by(case.image, mask, **options) if mask.any() else []

    def _claimed(self, cases: Sequence[Case]) -> list[Case]:
        """Return the cases whose object the model claims though it is hidden."""
        claims = self._ask([(case, case.images[-1], "hidden") for case in cases])
        for case, claim in zip(cases, claims):
            if isinstance(claim, Failure):
                case.reject("no answer", f"the question about the hidden {case.choice.label!r}: {claim.reason}")
            else:
                case.asked.append({"label": case.choice.label, "claimed": claim})
        return [case for case, claim in zip(cases, claims) if claim is True]

    def look(self, cases: Sequence[Case]) -> None:
        """Ask about the object at each place of the list."""
        questions = [(case, image, f"place {k}") for case in cases for k, image in enumerate(case.images)]
        claims = iter(self._ask(questions))
        for case in cases:
            at_places = [next(claims) for _ in case.images]
            case.claimed_at = [None if isinstance(claim, Failure) else claim for claim in at_places]

    def _ask(self, questions: Sequence[tuple[Case, Image.Image, str]]) -> list[bool | Failure]:
        """Ask, greedily, whether each case's object is in an image. Only a yes is a claim."""
        requests = []
        for case, image, purpose in questions:
            seed = stream_seed(self.config.seed, case.row.id, f"{purpose}: {case.choice.label}")
            requests.append(image_request([image], self.question(case.choice), seed))
        answers = self.model.answer(requests, self.config.sampling(temperature=0.0))
        return [
            answer if isinstance(answer, Failure) else read_yes_no(answer, self.question(case.choice)).value == "yes"
            for (case, *_), answer in zip(questions, answers, strict=True)
        ]

    def question(self, choice: Choice) -> str:
        return self.config.presence_question.replace("{object}", with_article(choice.label))
