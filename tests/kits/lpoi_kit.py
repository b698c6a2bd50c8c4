"""Rows, detectors and models for LPOI's pipeline."""

import json

from helpers import message, row, write_image
from scripted_models import ScriptedModel, text_of

from trl_vpo.data.inputs import InputRow, load_media
from trl_vpo.data.rows import read_row
from trl_vpo.generate.lpoi import LPOIGenerateConfig, LPOIPipeline
from trl_vpo.media.images import load_image
from trl_vpo.media.masking import check_box

MADE = {"pipeline": "lpoi", "model": None}
CHOSEN = "A man walks a dog. There is a tree behind them."
BOXES = {"dog": [5, 5, 25, 25], "man": [30, 2, 50, 50], "tree": [2, 30, 20, 52], "bench": [20, 20, 54, 54]}
DOG, MAN, TREE, BENCH = ({"label": label, "box": box} for label, box in BOXES.items())


class Claims(ScriptedModel):
    """Says what `says(question, image)` returns: a text, a `Failure`, or whether it claims the object."""

    def __init__(self, says):
        def said(request):
            answer = says(text_of(request), request.media.images[0])
            return ("Yes." if answer else "No.") if isinstance(answer, bool) else answer

        super().__init__(said)

    @property
    def questions(self):
        return [[text_of(request) for request in requests] for requests, _ in self.calls]


class Fixed:
    """A detector that gives its detections of the names it is asked for; keeps the names it was asked for."""

    def __init__(self, *detections):
        self.detections, self.asked, self.sizes = detections, [], []

    def detect(self, images, candidates, *, batch_size):
        self.asked += [list(names) for names in candidates]
        self.sizes += [image.size for image in images]
        return [[d for d in self.detections if d.label in names] for names in candidates]


def make_row(tmp_path, name="a", *, chosen=CHOSEN, question="Where is the bench?", image=None, **more):
    image = image or write_image(tmp_path / f"{name}.png")
    more = {"source": "test", "prompt": message("user", "<image>", question), **more}
    return InputRow(name, row("image", [image], chosen, "A cat.", id=name, **more), images=(image,))


def pipeline(model=None, finds=None, **settings):
    settings = {"boxes": "detector" if finds else "annotations"} | settings
    job = LPOIPipeline(LPOIGenerateConfig(**settings), model, generated_by=MADE)
    if finds:
        job.finder.detector = finds
    return job


def run(job, *rows):
    for each in rows:
        job.check(each)
    return job.make([(each, load_media(each, job.config.video_options())) for each in rows])


def made_row(outcome):
    """The row of an outcome, which training can read."""
    assert outcome.reason is None, outcome.reason
    (made,) = outcome.rows
    read = read_row(made, media_form="ranking")
    if read.critical_box is not None:
        check_box(read.critical_box, load_image(made["images"][0]).size)
    json.dumps(made), json.dumps(outcome.notes)
    return made
