"""Objects that are hidden: the image list of a choice, and whether the model still claims what it cannot see.

A choice is kept if it has a mask, where masks are wanted, and if it is a hard negative, where these are: the model
says that the object is in the image although it is hidden. Else the input's next choice is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from trl_vpo.data.inputs import InputRow
from trl_vpo.generate.objects.boxes import Choice
from trl_vpo.media.load import Media
from trl_vpo.media.masking import masked_image_list
from trl_vpo.models.requests import AnsweringModel, Request, stream_seed
from trl_vpo.text.inflection import with_article
from trl_vpo.text.responses import Failure
from trl_vpo.text.yes_no import read_yes_no


@dataclass(eq=False)
class Case:
    """One input on its way: what may be critical, what is, and why nothing is once that is known."""

    row: InputRow
    image: Image.Image  # RGB, in the size in which it is stored: boxes refer to that
    choices: list[Choice]  # still to be tried
    kind: str | None
    reason: str | None
    choice: Choice | None = None
    images: list[Image.Image] = field(default_factory=list)  # the list of the choice, where it is needed
    asked: list[dict] = field(default_factory=list)  # about hidden objects
    claimed_at: list[bool | None] = field(default_factory=list)

    def reject(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason


class Hiding:
    """Hides objects and asks about them, as an `lpoi.LPOIGenerateConfig` says."""

    def __init__(self, config: Any, model: AnsweringModel | None):
        self.config = config
        self.model = model

    @cached_property
    def segmenter(self):
        from trl_vpo.generate.objects.segment import Segmenter

        return Segmenter(
            self.config.mask_model,
            revision=self.config.mask_model_revision,
            device=self.config.device,
            dtype=self.config.detector_dtype,
        )

    def settle(self, cases: Sequence[Case]) -> None:
        """Take each case's first choice that has a mask and is a hard negative, where these are wanted."""
        config = self.config
        while cases:
            for case in cases:
                case.choice = case.choices.pop(0)
            if not (config.mask_model or config.hard_negative or config.visibility_check):
                return
            self.draw(cases)
            drawn = [case for case in cases if case.images]
            taken = self._claimed(drawn) if config.hard_negative else drawn
            cases = [case for case in cases if case not in taken and not case.reason]
            for case in cases:
                if not case.choices:
                    self._give_up(case)
            cases = [case for case in cases if case.choices]

    def draw(self, cases: Sequence[Case]) -> None:
        """The image list of each choice; none where the mask is empty."""
        how = {"n": self.config.num_images, "visual_prompt": self.config.visual_prompt}
        if not self.config.mask_model:
            for case in cases:
                case.images = masked_image_list(case.image, case.choice.box, **how)
            return
        from trl_vpo.generate.objects.segment import masked_by

        masks = self.segmenter.masks([case.image for case in cases], [case.choice.box for case in cases])
        for case, mask in zip(cases, masks):
            case.images = masked_by(case.image, mask, **how) if mask.any() else []

    def _claimed(self, cases: Sequence[Case]) -> list[Case]:
        """The cases whose object the model claims though it is hidden."""
        answers = self._ask([(case, case.images[-1], "hidden") for case in cases])
        for case, answer in zip(cases, answers):
            if isinstance(answer, Failure):
                case.reject("no answer", f"the question about the hidden {case.choice.label!r}: {answer.reason}")
            else:
                case.asked.append({"label": case.choice.label, "claimed": answer})
        return [case for case, answer in zip(cases, answers) if answer is True]

    def _give_up(self, case: Case) -> None:
        if case.asked:
            labels = ", ".join(item["label"] for item in case.asked)
            case.reject("no hard negative", f"the model does not claim what is hidden ({labels}).")
        else:
            case.reject("empty mask", f"{self.config.mask_model} finds no outline in the box of any object.")

    def look(self, cases: Sequence[Case]) -> None:
        """Ask about the object at each place of the list."""
        questions = [(case, image, f"place {k}") for case in cases for k, image in enumerate(case.images)]
        answers = iter(self._ask(questions))
        for case in cases:
            found = [next(answers) for _ in case.images]
            case.claimed_at = [None if isinstance(answer, Failure) else answer for answer in found]

    def _ask(self, questions: Sequence[tuple[Case, Image.Image, str]]) -> list[bool | Failure]:
        """Whether the model claims the case's object in an image; greedy. Neither yes nor no is no claim."""
        if not questions:
            return []
        requests = []
        for case, image, purpose in questions:
            seed = stream_seed(self.config.seed, case.row.id, f"{purpose}: {case.choice.label}")
            requests.append(request([image], self.question(case.choice), seed))
        answers = self.model.answer(requests, self.config.sampling(temperature=0.0))
        return [
            answer if isinstance(answer, Failure) else read_yes_no(answer, self.question(case.choice)).value == "yes"
            for (case, *_), answer in zip(questions, answers, strict=True)
        ]

    def question(self, choice: Choice) -> str:
        return self.config.presence_question.replace("{object}", with_article(choice.label))


def request(images: Sequence[Image.Image], text: str, seed: int = 0) -> Request:
    """A question about images: one user turn."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    return Request([{"role": "user", "content": content}], Media(images=tuple(images)), seed)
