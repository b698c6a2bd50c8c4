"""Zero-shot object detectors of transformers: names of objects in, boxes with scores out.

| model type | published as | text of the prompt | threshold |
| --- | --- | --- | --- |
| grounding-dino | IDEA-Research/grounding-dino-tiny | "red square. dog." | 0.35 |
| mm-grounding-dino | openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg | "red square. dog." | 0.35 |
| owlv2 | google/owlv2-base-patch16-ensemble | ["a photo of a red square", "a photo of a dog"] | 0.2 |

The scores are read from the logits, and not with `post_process_grounded_object_detection`: that gives each box one
label only, which for Grounding DINO is a string of all words above a threshold, across names, and for OWLv2 can be
the padding of another image's names. Here a box has a score for each name: the sigmoid of its largest token logit
(Grounding DINO) or of its logit (OWLv2). That of a box's best name is the score which post-processing gives, except
that Grounding DINO's also counts the full stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trl_vpo.errors import GenerateError
from trl_vpo.generate.objects.boxes import Detection, clip_box
from trl_vpo.text.inflection import with_article

if TYPE_CHECKING:
    import torch
    from PIL import Image

THRESHOLDS = {"grounding-dino": 0.35, "mm-grounding-dino": 0.35, "owlv2": 0.2}


def load_model(
    name: str,
    processor_class: str,
    model_class: str,
    kinds: Sequence[str],
    role: str,
    *,
    revision: str = "main",
    device: str | None = None,
    dtype: str = "float32",
) -> tuple[str, Any, Any]:
    """Load a Hub model or a folder with classes of transformers; return its type, its processor and the model.

    `kinds` are its possible types; messages call it by its `role`. The device is "cpu", or None for this process'
    accelerator. Raises GenerateError.
    """
    import transformers
    from accelerate import PartialState

    from trl_vpo.models.load import LOAD_ERRORS, OWN_CODE

    options = {"revision": revision, **OWN_CODE}
    try:
        kind = transformers.AutoConfig.from_pretrained(name, **options).model_type
        if kind in kinds:
            processor = getattr(transformers, processor_class).from_pretrained(name, **options)
            options |= {"dtype": dtype, "use_safetensors": True}
            model = getattr(transformers, model_class).from_pretrained(name, **options)
    except LOAD_ERRORS as error:
        raise GenerateError(f"the {role} {name} cannot be loaded: {error}") from error
    if kind not in kinds:
        raise GenerateError(f"the {role} {name} is of type {kind!r}; it must be one of {', '.join(kinds)}.")
    return kind, processor, model.to("cpu" if device == "cpu" else PartialState().device).eval()


class Detector:
    """A detector with a minimum score, the `threshold` (default: the table's); options as in `load_model`."""

    def __init__(self, name: str, *, threshold: float | None = None, **options: Any):
        self.name = name
        self.kind, self.processor, self.model = load_model(
            name, "AutoProcessor", "AutoModelForZeroShotObjectDetection", tuple(THRESHOLDS), "detector", **options
        )
        self.threshold = THRESHOLDS[self.kind] if threshold is None else threshold

    def detect(
        self, images: Sequence[Image.Image], candidates: Sequence[Sequence[str]], *, batch_size: int = 8
    ) -> list[list[Detection]]:
        """Look for names in RGB images; return the detections of each image, best first.

        There is one for each (box, name) whose score is above the threshold, with the name as it was given. Boxes are
        clipped to the image and rounded outwards; one outside of the image is empty.
        """
        detections: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, int], list] = {}  # padding pixels would change the detections next to them
        for place, (image, names) in enumerate(zip(images, candidates, strict=True)):
            for part in self._parts(list(dict.fromkeys(names))):
                by_size.setdefault(image.size, []).append((place, part))
        for jobs in by_size.values():
            for start in range(0, len(jobs), batch_size):
                places, names = zip(*jobs[start : start + batch_size])
                for place, result in zip(places, self._run([images[place] for place in places], names)):
                    detections[place] += result
        return [sorted(of_image, key=lambda d: (-d.score, d.label, d.box)) for of_image in detections]

    def _parts(self, names: list[str]) -> Iterator[list[str]]:
        """Yield the names in lists that fit the model's longest text."""
        if self.kind == "owlv2":
            yield from [names] if names else []
            return
        part, tokens, limit = [], 2, self.model.config.max_text_len  # two of them open and close the text
        for name in names:
            length = len(self.processor.tokenizer(_dino_text([name]), add_special_tokens=False)["input_ids"])
            if length + 2 > limit:
                raise GenerateError(f"{name!r} is too long for {self.name}: {length} tokens. Give a shorter name.")
            if tokens + length > limit:
                yield part
                part, tokens = [], 2
            part, tokens = [*part, name], tokens + length
        if part:
            yield part

    def _run(self, images: Sequence[Image.Image], names: Sequence[list[str]]) -> list[list[Detection]]:
        import torch

        with torch.no_grad():
            scores, boxes = (self._owl if self.kind == "owlv2" else self._dino)(images, names)
        results = []
        for image, labels, score, box in zip(images, names, scores, boxes):
            if score.isnan().any():
                raise GenerateError(f"the scores of {self.name} are nan: use detector_dtype float32.")
            above = (score > self.threshold).nonzero().tolist()
            boxes_of = {q: clip_box(box[q].tolist(), image.size) for q, _ in above}
            results.append([Detection(labels[k], boxes_of[q], score[q, k].item()) for q, k in above])
        return results

    def _dino(self, images: Sequence, names: Sequence[list[str]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return scores (Q, K) and boxes (Q, 4) of each image, for Q queries and K names."""
        import torch

        inputs = self._inputs(images=images, text=[_dino_text(labels) for labels in names], padding=True)
        outputs = self.model(**inputs)
        ids, tokenizer = inputs["input_ids"], self.processor.tokenizer  # (B, T)
        dots = ids == tokenizer.convert_tokens_to_ids(".")
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
        number = (dots.cumsum(-1) - dots.long()).masked_fill(dots | special, -1)  # (B, T): the token's name
        probabilities = outputs.logits.float().sigmoid()[..., : ids.size(1)]  # (B, Q, T)
        scores = [
            torch.stack([p[:, n == k].amax(-1) for k in range(len(labels))], -1).cpu()
            for p, n, labels in zip(probabilities, number, names)
        ]
        return scores, _corners(outputs.pred_boxes, images)

    def _owl(self, images: Sequence, names: Sequence[list[str]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Do as `_dino`. The model sees the image padded to a square, at its upper left corner."""
        texts = [[f"a photo of {with_article(name)}" for name in labels] for labels in names]
        outputs = self.model(**self._inputs(images=images, text=texts, truncation=True))
        probabilities = outputs.logits.float().sigmoid().cpu()  # (B, Q, most names)
        scores = [p[:, : len(labels)] for p, labels in zip(probabilities, names)]
        return scores, _corners(outputs.pred_boxes, images, square=True)

    def _inputs(self, **kwargs) -> Any:
        return self.processor(**kwargs, return_tensors="pt").to(self.model.device, self.model.dtype)


def _dino_text(names: Sequence[str]) -> str:
    """Return lower case, each name closed by a full stop, which no name may hold itself."""
    return " ".join(f"{' '.join(re.sub('[.?]', ' ', name).lower().split())}." for name in names)


def _corners(boxes: torch.Tensor, images: Sequence[Image.Image], square: bool = False) -> torch.Tensor:
    """Turn centre, width and height as shares (B, Q, 4) into corners in pixels of the images, on the CPU."""
    import torch

    centre, extent = boxes.float().cpu().split(2, -1)  # (B, Q, 2)
    sides = [(max(image.size),) * 2 if square else image.size for image in images]
    corners = torch.cat([centre - extent / 2, centre + extent / 2], -1)
    return corners * torch.tensor(sides).repeat(1, 2)[:, None]
