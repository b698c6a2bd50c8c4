"""The size of a video's frames where no `max_pixels` is given: the pixel budget of a model's own preprocessing.

Qwen's models see videos through qwen-vl-utils, whose version 0.0.14 is followed here (`fetch_video` in
`vision_process.py`); their processors alone would make frames several times as large. Of other families the processor
is the whole preprocessing: some have one fixed size, others a budget of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

LEAST, MOST = 128, 768  # squares of `factor` pixels in a frame: VIDEO_MIN_TOKEN_NUM, VIDEO_MAX_TOKEN_NUM
TOTAL = 2 * 0.9 * 128_000  # in all frames: FRAME_FACTOR and MODEL_SEQ_LEN
PROCESSORS = {"Qwen2VLVideoProcessor": False, "Qwen3VLVideoProcessor": True}  # True: its `size` is of all frames


@dataclass(frozen=True)
class PixelBudget:
    """The pixels that a row's videos may have.

    ``factor``: the sides of frames are multiples of it. ``own``: the processor's least and most pixels, of a frame or,
    with ``of_all``, of all frames. ``videos``: how many share the budget.
    """

    factor: int
    own: tuple[int, int]
    of_all: bool
    videos: int = 1

    def __str__(self) -> str:
        text = "{:,} to {:,} pixels a frame".format(*(tokens * self.factor**2 for tokens in (LEAST, MOST)))
        return f"{text}, as qwen-vl-utils 0.0.14" + (f", and at most {self.own[1]:,} in all" if self.of_all else "")

    def shared(self, videos: int) -> PixelBudget:
        """Return the budget of each of a row's videos."""
        return replace(self, videos=max(1, videos))

    def limits(self, frames: int, max_pixels: int | None = None) -> tuple[float, float]:
        """Return the least and most pixels of one of so many frames. ``max_pixels``: in the place of the budget."""
        frames = (frames + frames % 2) * self.videos  # two frames at a time, the last one repeated
        least, most = (pixels / frames if self.of_all else pixels for pixels in self.own)
        if max_pixels is not None:
            return least, min(max_pixels, most)
        area = self.factor**2
        # Never more than the processor's own: it would not be given to the model by a processor alone.
        high = min(max(min(MOST * area, TOTAL * area / frames), int(1.05 * LEAST * area)), most)
        return (max(LEAST * area, least) if LEAST * area <= high else min(least, high)), high

    def size(self, width: int, height: int, frames: int, max_pixels: int | None = None) -> tuple[int, int]:
        """Return the (width, height) of a video's frames for the model, by the processors' own `smart_resize`."""
        low, high = self.limits(frames, max_pixels)
        whole = [max(1, round(side / self.factor)) * self.factor for side in (width, height)]
        if math.prod(whole) > high:
            scale = math.sqrt(width * height / high)
            whole = [max(1, math.floor(side / scale / self.factor)) * self.factor for side in (width, height)]
        elif math.prod(whole) < low:
            scale = math.sqrt(low / (width * height))
            whole = [math.ceil(side * scale / self.factor) * self.factor for side in (width, height)]
        return whole[0], whole[1]

    def processor_size(self, frames: int) -> dict[str, int]:
        """Return the `size` with which the processor alone gives so many frames of one video that size."""
        low, high = (int(pixels * (frames if self.of_all else 1)) for pixels in self.limits(frames))
        return {"shortest_edge": low, "longest_edge": high}


def budget_of_run(trainer: Any) -> PixelBudget | None:
    """Return the budget of a training's videos; None where there is none, or no column of videos."""
    columns = trainer.train_dataset.column_names  # of a stream perhaps unknown
    budget = video_budget(trainer.processing_class, trainer.args.max_pixels)
    return budget if columns is None or {"video", "videos"} & set(columns) else None


def video_budget(processing_class: Any, max_pixels: int | None = None) -> PixelBudget | None:
    """Return the budget of a processor's videos; None: its own size, or `max_pixels` in the place of a budget."""
    processor = getattr(processing_class, "video_processor", None)
    kinds = [PROCESSORS[cls.__name__] for cls in type(processor).__mro__ if cls.__name__ in PROCESSORS]
    if max_pixels is not None or not kinds or not processor.do_resize:
        return None
    factor = processor.patch_size * processor.merge_size
    own = processor.size["shortest_edge"], processor.size["longest_edge"]
    if own[1] < MOST * factor**2:  # somebody has chosen smaller frames
        return None
    return PixelBudget(factor, own, kinds[0])
