"""A request as OpenAI's chat messages: images and clips become data URLs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from trl_vpo.data.rows import place_media
from trl_vpo.errors import ModelError, RowError
from trl_vpo.media.images import shrink
from trl_vpo.media.load import Clip
from trl_vpo.models.requests import Request

# Every frame is a keyframe, so that a server finds each one whichever way it seeks; frames that were sampled far apart
# have little in common anyway. Half of the colour resolution is lost (yuv420p), because many decoders take no other.
H264 = {"crf": "10", "preset": "veryfast", "g": "1", "bf": "0"}
JPEG_QUALITY = 95


def chat_messages(request: Request, *, media: str = "video", max_pixels: int | None = None) -> list[dict]:
    """Return the request's messages with its media in the place of their placeholders.

    A message that is only text has a plain string as content, because not all servers take parts everywhere. With
    `media` "video" a clip is one `video_url` part, with "frames" a text with their times, then one `image_url` each.
    Placeholders and media that differ in number raise ModelError.
    """
    images, videos = iter(request.media.images), iter(request.media.videos)
    try:
        messages = place_media(request.messages, len(request.media.images), len(request.media.videos))
    except RowError as error:
        raise ModelError(f"a request to a server: {error}") from error

    def expand(part: dict) -> Iterator[dict]:
        if part["type"] == "image":
            yield _image_part(shrink(next(images), max_pixels), "png")
        elif part["type"] != "video":
            yield {"type": "text", "text": part["text"]}
        elif media == "video":
            yield _data_part("video", "mp4", clip_to_mp4(next(videos), max_pixels=max_pixels))
        else:
            clip = next(videos)
            times = ", ".join(f"{time:.1f}" for time in clip.timestamps)
            yield {"type": "text", "text": f"A video as {len(clip.frames)} frames, shown at {times} seconds:"}
            for frame in clip.frames:
                yield _image_part(shrink(Image.fromarray(frame), max_pixels), "jpeg")

    sent = []
    for message in messages:
        parts = [expanded for part in message["content"] for expanded in expand(part)]
        if all(part["type"] == "text" for part in parts):
            parts = "".join(part["text"] for part in parts)
        sent.append({"role": message["role"], "content": parts})
    return sent


def every_frame(clips: Sequence[Clip]) -> dict:
    """Return the request fields that have every frame of the clips shown.

    vLLM loads 32 frames of a video, or two a second, and processors such as Qwen3-VL's sample once more, unless a
    request says otherwise: https://github.com/vllm-project/vllm/pull/34778. A vLLM before 0.18 takes
    no `media_io_kwargs` from requests; start it with `--media-io-kwargs '{"video": {"num_frames": -1}}'`. Other
    servers pass over the fields, or refuse them: they may be sent frames.
    """
    rates = {clip.sample_fps for clip in clips}
    loaded = {"num_frames": max(len(clip.frames) for clip in clips), "fps": math.ceil(max(rates)) + 1}  # upper limits
    timed = {"fps": rates.pop()} if len(rates) == 1 else {}
    return {"media_io_kwargs": {"video": loaded}, "mm_processor_kwargs": {"do_sample_frames": False, **timed}}


def clip_to_mp4(clip: Clip, *, max_pixels: int | None = None) -> bytes:
    """Return the sampled frames as an h264 mp4 that plays them at the clip's `sample_fps`.

    h264 wants even sizes: an odd one gets its last row or column twice.
    """
    frames = [np.asarray(shrink(Image.fromarray(frame), max_pixels)) for frame in clip.frames]
    height, width = frames[0].shape[:2]
    even = ((0, height % 2), (0, width % 2), (0, 0))
    rate = max(Fraction(clip.sample_fps).limit_denominator(1000), Fraction(1, 1000))  # as containers keep it
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=dict(H264))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for frame in frames:
            picture = np.ascontiguousarray(np.pad(frame, even, mode="edge"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _image_part(image: Image.Image, format: str) -> dict:
    file = io.BytesIO()
    image.save(file, format=format, quality=JPEG_QUALITY)
    return _data_part("image", format, file.getvalue())


def _data_part(kind: str, subtype: str, data: bytes) -> dict:
    url = f"data:{kind}/{subtype};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
