"""The testbed's base as a model that answers, and questions about its clips."""

from transformers import AutoModelForImageTextToText

from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.load import load_model
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Request, Sampling
from trl_vpo.testbed import world
from trl_vpo.testbed.tiny_vlm import BASE

GREEDY = Sampling(max_new_tokens=48, temperature=0)
QUESTIONS = ("Describe the video.", "What moves first?", "What colour is the square?")


def plain():
    return AutoModelForImageTextToText.from_pretrained(BASE)


def load(name=BASE, **settings) -> LocalModel:
    return load_model(str(name), **{"device": "cpu", "dtype": "float32", **settings})


def asked(text: str, *, images=(), videos=(), seed=0) -> Request:
    media = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
    return Request(messages, Media(tuple(images), tuple(videos)), seed)


def questions(count: int) -> list[Request]:
    """Clips and questions of three lengths, so that a batch has padding."""
    samples = world.draw_samples("clip", count, seed=3, habits=False)
    clips = [load_video(sample.frames, VideoOptions(num_frames=len(sample.frames))) for sample in samples]
    return [asked(QUESTIONS[i % 3], videos=[clip], seed=100 + i) for i, clip in enumerate(clips)]
