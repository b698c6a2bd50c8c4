"""The media of a row's trunks: loaded, drawn where a method compares several, and as processors are given them."""

from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

from trl_vpo.data.row_media import Sources
from trl_vpo.data.rows import Row
from trl_vpo.media.corruptions import corrupted
from trl_vpo.media.load import Clip, Media, frame_size, load_image, load_video
from trl_vpo.media.masking import blanked_clips, masked_clips, masked_image_list


def trunk_media(row: Row, collator: Any) -> list[Media]:
    """Return the media of each trunk of a row: its own, and those that its responses are compared on.

    A corruption follows from the row's texts. It is the same for policy and reference, in every epoch, on any machine.
    """
    if row.media_list is not None:
        return [_loaded(sources, collator) for sources in row.media_list]
    if row.images and row.critical_box is not None:
        # The box is in pixels of the image as stored, so the list is drawn before anything is scaled.
        image = load_image(row.images[0], media_root=collator.media_root, limit=collator.max_pixels is None)
        drawn = ranked(row, Media((image,)), collator.num_images, collator.visual_prompt, collator.media_root)
        return [Media(tuple(_image(image, collator) for image in item.images)) for item in drawn]
    own = _loaded((row.images, row.videos), collator)
    if row.critical_box is not None or row.critical_span is not None:
        return ranked(row, own, collator.num_images, collator.visual_prompt, collator.media_root)
    if collator.media_contrast is None or not (row.images or row.videos):
        return [own]
    seed = crc32(repr([row.prompt, row.chosen, row.rejected]).encode())
    return [own, corrupted(own, collator.media_contrast, seed)]


def ranked(row: Row, media: Media, n: int, visual_prompt: bool, media_root: Any) -> list[Media]:
    """Return N media from fully visible to fully hidden, drawn as the row's box or span says.

    `media`: the row's one image, as it is stored, or its one clip.
    """
    if row.images:
        images = masked_image_list(media.images[0], row.critical_box, n, visual_prompt=visual_prompt)
        return [Media((image,)) for image in images]
    if row.critical_span is not None:
        clips = blanked_clips(media.videos[0], row.critical_span, n)
    else:
        size = frame_size(row.videos[0], media_root=media_root)
        clips = masked_clips(media.videos[0], row.critical_box, size, n, visual_prompt=visual_prompt)
    return [Media((), (clip,)) for clip in clips]


def _loaded(sources: Sources, collator: Any) -> Media:
    images, videos = sources
    budget = collator.budget and collator.budget.shared(len(videos))
    where = {"budget": budget, "media_root": collator.media_root, "cache": collator.frame_cache}
    clips = [v.sized(budget) if isinstance(v, Clip) else load_video(v, collator.video, **where) for v in videos]
    return Media(tuple(_image(source, collator) for source in images), tuple(clips))


def _image(source: Any, collator: Any) -> Image.Image:
    return load_image(source, max_pixels=collator.max_pixels, media_root=collator.media_root)


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
