"""The media of a row's trunks, as processors are given them."""

import numpy as np
from transformers.video_utils import VideoMetadata

from trl_vpo.media.load import Clip


def video_metadata(clip: Clip) -> VideoMetadata:
    """Return the clip's real times in the processors' terms: `frames_indices / fps` are its timestamps in seconds.

    At a constant rate that is a whole number or NTSC's, `fps` is that rate, as if the processor had sampled the
    frames itself; otherwise the indices count milliseconds. `total_num_frames / fps` is the time that the frames stand
    for: Qwen2.5-VL divides it by their number, and rounds positions down, so that it has to be exact.
    """

    def off(rate: float) -> float:
        return float(np.abs(clip.timestamps - np.round(clip.timestamps * rate) / rate).max())

    rate = min((max(1, round(clip.fps)), max(1, round(clip.fps * 1.001)) / 1.001), key=off)
    if off(rate) > 1e-3:  # more than containers round
        rate = 1000
    total = round((clip.duration if clip.span is None else clip.span) * rate, 6)
    height, width = clip.frames.shape[1:3]
    return VideoMetadata(
        total_num_frames=int(total) if total == int(total) else total,
        fps=rate,
        frames_indices=np.round(clip.timestamps * rate).astype(int).tolist(),
        duration=round(clip.duration, 3),
        height=height,
        width=width,
        video_backend="pyav",
    )
