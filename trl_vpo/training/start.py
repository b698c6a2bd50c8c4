"""What is printed when a training starts: what is trained on what, how, and where the results go."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from trl_vpo.media.budget import video_budget

LAYOUTS = {
    None: "{}, one row without padding if that agrees with padded rows",
    True: "{}, one row without padding",
    False: "{}, padded rows",
}


def describe_start(trainer: Any, given: Any, repo: str | None = None) -> dict[str, str]:
    """Return name -> text of a trainer that was built from the rows `given`, before it wraps its model.

    `repo`: where results are pushed to.
    """
    args, model = trainer.args, trainer.model
    trained, every = _size(p for p in model.parameters() if p.requires_grad), _size(model.parameters())
    groups = trainer.row_groups
    sizes = [args.per_device_train_batch_size, args.gradient_accumulation_steps, groups.count]
    unit = "process" if groups.count == 1 else "processes"
    if groups.size > 1:
        unit = f"group{'s' * (groups.count > 1)} of {groups.size} processes"
    return {
        "method": f"{trainer._name} on {model.config.name_or_path or type(model).__name__}",
        "rows": _rows(trainer, given),
        "trained": f"{trained:,} of {every:,} parameters ({trained / max(every, 1):.2%})",
        "batch": "{} = {} per device x {} accumulated x {} {}".format(math.prod(sizes), *sizes, unit),
        "layout": LAYOUTS[trainer.scorer.packs].format(trainer.scorer.layout),
        "media": describe_media(args, trainer.processing_class, trainer.train_dataset.column_names),
        "results": f"{args.output_dir}{f', pushed to {repo}' if repo else ''}",
    }


def describe_media(args: Any, processing_class: Any, columns: Iterable[str] | None) -> str:
    """Say what is read of the media that the rows' columns name, and how large. None: unknown columns."""
    columns = set(columns or ("videos", "images"))
    pixels = (
        f"at most about {args.max_pixels:,} pixels each" if args.max_pixels else "as large as the processor makes them"
    )
    sizes: dict[str, list[str]] = {}  # size -> media
    if {"video", "videos", "video_list"} & columns:
        frames = (
            f"at most {args.max_frames} frames, {args.fps:g} a second," if args.fps else f"{args.num_frames} frames"
        )
        size, count = pixels, args.max_frames if args.fps else args.num_frames
        own = video_budget(processing_class) if args.max_pixels else None
        if own and (least := own.limits(count, args.max_pixels)[0]) > args.max_pixels:
            size = (
                f"about {least:,.0f} pixels each: the processor makes none smaller, so max_pixels saves nothing more"
            )
        if budget := video_budget(processing_class, args.max_pixels):
            most = budget.limits(count)[1]
            size = f"at most {most:,.0f} pixels a frame (the model's own budget)"
        sizes[size] = [f"{frames} of a video"]
    if {"image", "images", "image_list"} & columns:
        sizes.setdefault(pixels, []).append("images")
    kinds = [", ".join([*media, size]) for size, media in sizes.items()]
    if kinds and args.media_form == "ranking":
        kinds.append(f"{args.num_images} of each by its box or span")
    elif kinds and args.media_contrast is not None:
        kinds.append(f"where a row gives no second media, of each a copy with {args.media_contrast}")
    return "; ".join(kinds) or "none, the rows are text"


def _rows(trainer: Any, given: Any) -> str:
    if not hasattr(trainer.train_dataset, "__len__"):
        return "streamed"
    kept = len(trainer.train_dataset)
    skipped = f" ({len(given) - kept:,} skipped: skipped_rows.jsonl)" if len(given) > kept else ""
    held_out = trainer.eval_dataset
    sets = held_out.values() if isinstance(held_out, dict) else [held_out] if held_out is not None else []
    counts = [f"{len(rows):,}" if hasattr(rows, "__len__") else "streamed" for rows in sets]
    return f"{kept:,}{skipped}" + (f", {' + '.join(counts)} to evaluate on" if counts else "")


def _size(parameters: Iterable[nn.Parameter]) -> int:
    """Count weights, also those that ZeRO-3 has on other processes, and those that lie packed in 4 bits."""
    return sum(
        (getattr(p, "ds_numel", 0) or p.numel()) * (2 * p.element_size() if type(p).__name__ == "Params4bit" else 1)
        for p in parameters
    )
