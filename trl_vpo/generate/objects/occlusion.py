"""Hide the chosen object, and ask whether the model still claims to see it.

A choice is kept if it has a mask (with `mask_model`) and is a hard negative (with `hard_negative`): the model says
that the object is in the image although it is hidden. Otherwise the input's next choice is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from trl_vpo.generate.objects.boxes import Choice
from trl_vpo.generate.objects.object_candidates import Case
from trl_vpo.generate.pipeline import image_request
from trl_vpo.media.masking import masked_image_list
from trl_vpo.models.requests import AnsweringModel, stream_seed
from trl_vpo.text.inflection import with_article
from trl_vpo.text.responses import Failure
from trl_vpo.text.yes_no import read_yes_no


class Occlusion:
    """Hidden objects and the questions about them, set up by an `lpoi.LPOIGenerateConfig`."""

    def __init__(self, config: Any, model: AnsweringModel | None):
        self.config = config
        self.model = model

    @cached_property
    def segmenter(self):
        from trl_vpo.generate.objects.segment import Segmenter

        revision, dtype = self.config.mask_model_revision, self.config.detector_dtype
        return Segmenter(self.config.mask_model, revision=revision, device=self.config.device, dtype=dtype)

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
        from trl_vpo.generate.objects.segment import masked_by

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
        if not questions:
            return []
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
