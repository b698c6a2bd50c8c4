"""LPOI's critical objects (Pesaran Zadeh et al., ACL 2025, arXiv 2505.21061): ordinary preference pairs of one image.

The critical object is the first thing that the text names and that has a usable box: noun phrases of the chosen
response's first sentence, then of the question, then of the rest of the chosen response; else any detection. The row
stays as it is and gets the box, from which training draws the list of images (`trl_vpo.media.masking`). What is ours
and not the paper's is in docs/generate.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_vpo.data.inputs import InputRow, portable
from trl_vpo.errors import InputError
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.generate.objects.boxes import area_share
from trl_vpo.generate.objects.critical_object import Case, Finder
from trl_vpo.generate.pipeline import Pipeline, image_request
from trl_vpo.media.images import load_image
from trl_vpo.media.load import Media
from trl_vpo.media.masking import masked_image_list
from trl_vpo.models.config import option
from trl_vpo.models.requests import Request
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.similarity import mean

# Names to look for if nothing that the text names is found.
FALLBACK_LABELS = (
    "person animal bird cat dog horse cow sheep car bus truck train bicycle motorcycle boat airplane chair table bed "
    "couch lamp food fruit plate cup bottle book phone computer screen hat bag umbrella toy building sign tree flower"
)
WHERE = ("objects_column", "first sentence", "question", "rest", "any")
TOP_LABELS = 20
REPLACED = {"id", "image", "images", "image_list", "critical_box"}  # columns of the input that the new row replaces


@dataclass
class LPOIGenerateConfig(GenerateConfig):
    """Settings of LPOI's pipeline. No model is needed unless `hard_negative` or `visibility_check` is on."""

    boxes: str = option("detector", "Source of the boxes.", choices=["detector", "annotations"])
    detector: str = option("IDEA-Research/grounding-dino-tiny", "Grounding DINO, MM Grounding DINO or OWLv2.")
    detector_revision: str = option("main", "Revision of the detector.")
    detector_dtype: str = option("float32", "Dtype of the detector and the mask model.")
    box_threshold: float | None = option(None, "Minimum score of a detection; unset: the detector's own.")
    annotations_column: str = option("objects", "Column of the known boxes.")
    categories: list[str] | None = option(None, "Names of the annotations' category numbers, from 0.")
    objects_column: str | None = option(
        None, "Column with a row's own candidates, the preferred first, instead of noun phrases."
    )
    max_candidates: int = option(40, "Maximum number of names looked for in a row.")
    fallback_labels: list[str] = option(
        FALLBACK_LABELS.split, "Names to look for if no candidate is found. Empty: reject the row."
    )
    min_box_area: float = option(0.005, "Smallest share of the image that a critical box covers.")
    max_box_area: float = option(0.9, "Largest share of the image that a critical box covers.")
    instances: str = option(
        "best",
        "Of several boxes of one object, take the best, as published, or the union, which hides all of them. "
        "The summary says how often there are several.",
        choices=["best", "union"],
    )
    mask_model: str | None = option(
        None, "SAM 2; rows then have an `image_list` of files in which only the outline is hidden."
    )
    mask_model_revision: str = option("main", "Revision of the mask model.")
    num_images: int = option(5, "Length of the image list for masks and questions; as in training.")
    visual_prompt: bool = option(True, "Draw a red ellipse around the hidden part; as in training.")
    hard_negative: bool = option(False, "Keep an object only if the model still claims it when it is hidden.")
    visibility_check: bool = option(False, "Ask about the object at each place of the list; report the answers.")
    presence_question: str = option(
        "Is there {object} in the image? Answer yes or no.",
        "Question about the object; {object} is the object with its article.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_box_area < self.max_box_area <= 1:
            areas = f"min_box_area {self.min_box_area} and max_box_area {self.max_box_area}"
            raise ValueError(f"{areas}: give shares from 0 to 1, the first the smaller one.")
        if self.presence_question.count("{object}") != 1:
            raise ValueError(f"presence_question is {self.presence_question!r}: it must contain {{object}} once.")


class LPOIPipeline(Pipeline):
    """A pair with one image -> the same row with a critical object.

    Further columns: `critical_box` [x0, y0, x1, y1] in pixels of the image, `critical_object`, `box_source` (detector
    or annotation), `box_score` (None for an annotation); with a mask model, `image_list` too.
    """

    config: LPOIGenerateConfig

    def __init__(self, config, model, judge=None, generated_by=None):
        super().__init__(config, model, judge, generated_by)
        self.finder = Finder(config, model)

    @classmethod
    def needs_model(cls, config: LPOIGenerateConfig) -> bool:
        return config.hard_negative or config.visibility_check

    def check(self, row: InputRow) -> None:
        if len(row.images) != 1 or row.videos:
            given = f"{len(row.images)} images and {len(row.videos)} videos"
            raise InputError(f"the row has {given}: LPOI takes one image.")
        column = self.config.annotations_column
        if self.config.boxes == "annotations" and row.example.get(column) is None:
            raise InputError(f"the row has no `{column}`, where its boxes should be (annotations_column).")
        self.finder.candidates(row)

    def preview(self, row: InputRow, media: Media) -> list[tuple[str, Request]]:
        question = self.config.presence_question.replace("{object}", "<the object>")
        if self.config.boxes == "annotations":
            (case,) = self._open([(row, media)])
            if case.reason:
                raise InputError(case.reason)
            choice = case.choices[0]
            drawn = {"n": self.config.num_images, "visual_prompt": self.config.visual_prompt}
            images = masked_image_list(case.image, choice.box, **drawn)
            title = f"critical object: {choice.label} ({choice.where}), box {list(choice.box)}"
            text = self.finder.question(choice) if self.needs_model(self.config) else "(no model is asked)"
            return [(title, image_request(images, text))]
        named = self.finder.candidates(row)
        names = ", ".join(f"{candidate.text} ({candidate.where})" for candidate in named) or "(no candidates)"
        requests = [(f"{self.config.detector} looks for", image_request(media.images, names))]
        if self.needs_model(self.config):
            requests.append(("about an object, hidden with its box", image_request(media.images, question)))
        return requests

    def make(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Outcome]:
        cases = self._open(batch)
        self.finder.settle([case for case in cases if not case.reason])
        if self.config.visibility_check:
            self.finder.look([case for case in cases if not case.reason])
        return [self._outcome(case) for case in cases]

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Count where objects were named, their boxes and labels, and the model's claims if it was asked.

        `hard_negatives` has the number of objects `asked` about, the share of them `claimed` though hidden, and the
        share of the `inputs` that had one.
        """
        kept = [outcome.notes for outcome in outcomes if outcome.rows]
        labels = Counter(note["label"] for note in kept)
        figures: dict[str, Any] = {
            "named_in": {where: sum(note["where"] == where for note in kept) for where in WHERE},
            "box_area_mean": mean([note["area"] for note in kept]),
            "box_score_mean": mean([note["score"] for note in kept if note["score"] is not None]),
            "several_instances": mean([note["instances"] > 1 for note in kept]),
            "labels": dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:TOP_LABELS]),
        }
        if self.config.hard_negative:
            hidden_objects = [outcome.notes["asked"] for outcome in outcomes if outcome.notes.get("asked")]
            claims = [item["claimed"] for items in hidden_objects for item in items]
            inputs = [any(item["claimed"] for item in items) for items in hidden_objects]
            figures["hard_negatives"] = {"asked": len(claims), "claimed": mean(claims), "inputs": mean(inputs)}
        if self.config.visibility_check:
            places = zip(*(note["claimed_at"] for note in kept))
            figures["claimed_at"] = [mean([claim for claim in place if claim is not None]) for place in places]
        return figures

    def _open(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Case]:
        shrunk = self.config.max_pixels is not None
        cases = [
            Case(row, load_image(row.images[0], limit=False) if shrunk else media.images[0]) for row, media in batch
        ]
        self.finder.find(cases)
        return cases

    def _outcome(self, case: Case) -> Outcome:
        notes: dict[str, Any] = {"asked": case.asked} if case.asked else {}
        if case.reason:
            return Outcome(case.row.id, reason=case.reason, kind=case.kind, notes=notes)
        choice = case.choice
        notes |= {"label": choice.label, "where": choice.where, "score": choice.score, "instances": choice.instances}
        notes |= {"area": area_share(choice.box, case.image.size)}
        notes |= {"claimed_at": case.claimed_at} if self.config.visibility_check else {}
        kept = {key: value for key, value in case.row.example.items() if key not in REPLACED}
        row = {
            "id": case.row.id,
            **kept,
            **case.row.media_columns(),
            "critical_box": list(choice.box),
            "critical_object": choice.label,
            "box_source": "annotation" if self.config.boxes == "annotations" else "detector",
            "box_score": choice.score,
            "generated_by": self.generated_by,
        }
        if self.config.mask_model:
            folder = Path(self.config.output_dir).absolute() / "media"
            row["image_list"] = [*case.row.images, *(portable(image, folder) for image in case.images[1:])]
        return Outcome(case.row.id, rows=(row,), notes=notes)
