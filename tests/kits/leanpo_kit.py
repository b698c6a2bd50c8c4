"""Inputs and scripted models for LeanPO's pipeline."""

import hashlib

import numpy as np
from scripted_models import ScriptedModel, text_of

from studies.testbed.lessons import HINT, REFLECTION
from trl_vpo.data.inputs import InputRow
from trl_vpo.generate.leanpo import LeanPOGenerateConfig, LeanPOPipeline
from trl_vpo.media.load import Clip, Media
from trl_vpo.text.responses import Failure

PROMPTS = {"hint_prompt": HINT, "reflection_prompt": REFLECTION}
TRUTH = "a red square moves left."


class Scripted(ScriptedModel):
    """Answers by stage: {stage: {row id: answer}}, or one answer for all rows; rewards by response."""

    can_score = True

    def __init__(self, script=None, rewards=None):
        super().__init__(self.answer_by_stage)
        first = {"hint": "first.", "reflection": TRUTH, "damaged": "a blue square moves up.", "plain": TRUTH}
        self.script = first | (script or {})
        self.rewards = rewards or {}
        self.scored = []  # (request, response)

    def answer_by_stage(self, request):
        answer = self.script[stage(request)]
        return answer[row_id(request)] if isinstance(answer, dict) else answer

    def average_logps(self, requests, responses):
        self.scored += zip(requests, responses)
        return [self.rewards.get(response, -1.0) for response in responses]


def stage(request):
    text = text_of(request)
    if text.startswith("You said:"):
        return "reflection"
    if text.startswith("Hint:"):
        return "hint"
    return "damaged" if len(request.media.videos[0].frames) == 2 else "plain"


def row_id(request):
    return request.media.videos[0].source


class Server(Scripted):
    can_score = False


class Hashed(ScriptedModel):
    """Answers and rewards that depend on everything in a request: its text, pixels, seed and sampling."""

    can_score = True

    def __init__(self):
        super().__init__(None)

    def answer(self, requests, sampling):
        return [self._words(self._rng(request, sampling)) for request in requests]

    def average_logps(self, requests, responses):
        return [-self._rng(request, response).random() for request, response in zip(requests, responses)]

    @staticmethod
    def _words(rng):
        if rng.random() < 0.1:
            return Failure("the model said nothing")
        return " ".join(map(str, rng.choice(["a", "red", "square", "moves", "left"], 5)))

    @staticmethod
    def _rng(request, more):
        pixels = [video.frames.tobytes() for video in request.media.videos]
        content = repr((request.messages, request.seed, more)).encode() + b"".join(pixels)
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))


def item(id="r0", question="What moves?", answer=TRUTH, frames=16):
    """One input with its decoded clip of noise, which is named after it."""
    pixels = np.random.default_rng(int(id[1:])).integers(0, 256, (frames, 28, 28, 3), dtype=np.uint8)
    clip = Clip(pixels, np.arange(frames) / 4, 4.0, frames, frames / 4, id)
    row = InputRow(id, {"question": question, "answer": answer, "source": "s"}, videos=(f"/data/{id}.mp4",))
    return row, Media(videos=(clip,))


def pipeline(model, **settings):
    return LeanPOPipeline(LeanPOGenerateConfig(**PROMPTS | settings), model, None, {"pipeline": "leanpo"})
