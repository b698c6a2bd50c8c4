"""The media settings of the adapters' training, from `run.json`, as the defaults of an evaluation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from trl_vpo.errors import EvaluateError
from trl_vpo.files import read_object
from trl_vpo.media.load import VideoOptions
from trl_vpo.runs.driver import rank

logger = logging.getLogger(__name__)

# If one setting of a group is given, the whole group counts as given.
GROUPS = (("num_frames", "fps"), ("max_frames",), ("max_pixels",), ("video_start", "video_end"))


def trained_media(adapters: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the media settings of the adapters' training, except those that are given.

    Adapters are folders, their checkpoints, or Hub names. A given setting that differs from an adapter's causes a
    warning, and so does an adapter without a `run.json` where the frames are not given; with a damaged one it is an
    EvaluateError. What is returned is printed.
    """
    framed = any(given.get(name) is not None for name in GROUPS[0])
    recorded = {path: settings for path in adapters if (settings := _recorded(path, framed)) is not None}
    defaults = agreed_media(recorded, given)
    if defaults and rank() == 0:
        print(f"Videos as in the training, by run.json: {_text(defaults)}.", file=sys.stderr)
    unknown = [path for path in adapters if path not in recorded]
    if unknown and not framed:
        usual = VideoOptions(**{name: defaults.get(name) for name in GROUPS[0]})
        sampling = _text({name: getattr(usual, name) for name in GROUPS[0]})
        logger.warning(
            f"{', '.join(unknown)}: no run.json, which `trl-vpo train` writes, so the frames of the training are "
            f"not known. Videos are sampled with {sampling}: give num_frames or fps if it had others."
        )
    return defaults


def agreed_media(recorded: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the media settings that all trainings have, by their names, except those that are given.

    Raises EvaluateError if trainings differ where none is given.
    """
    defaults: dict[str, Any] = {}
    for names in GROUPS:
        trained = {path: {name: settings[name] for name in names} for path, settings in recorded.items()}
        if any(given.get(name) is not None for name in names):
            evaluated = {name: given.get(name) for name in names}
            for path, values in trained.items():
                if values != evaluated:
                    logger.warning(
                        f"{path} was trained with {_text(values)}, and is evaluated with {_text(evaluated)}."
                    )
        elif len({tuple(values.items()) for values in trained.values()}) > 1:
            by_adapter = "; ".join(f"{path}: {_text(values)}" for path, values in trained.items())
            raise EvaluateError(
                f"the adapters' trainings have different settings ({by_adapter}). Give {names[0]} to evaluate all "
                "of them alike, or evaluate each in a run of its own."
            )
        elif trained:
            defaults |= next(iter(trained.values()))
    return defaults


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None) or f"no {next(iter(values))}"


def _recorded(adapter: str, framed: bool) -> dict[str, Any] | None:
    """Return the media settings of an adapter's training, defaults included; None without a `run.json`.

    One that is damaged is refused; where the frames are given (`framed`), a warning says that it counts as missing.
    """
    if (path := _run_json(adapter)) is None:
        return None
    names = [name for group in GROUPS for name in group]
    try:
        recipe = read_object(path, "recipe")["recipe"]
        options = VideoOptions(**{name: recipe[name] for name in names if recipe.get(name) is not None})
    except ValueError as error:
        if not framed:
            raise EvaluateError(
                f"{path}: {error} Correct the file, or give num_frames or fps, and max_pixels, as in the training."
            ) from error
        logger.warning(f"{path}: {error} None of its settings is used: give max_pixels, too, if the training had it.")
        return None
    return {name: getattr(options, name) for name in names}


def _run_json(adapter: str) -> Path | None:
    """Return the `run.json` of an adapter, from its folder, that of its training or the Hub; None if there is none."""
    folder = Path(adapter).absolute()
    if folder.is_dir():
        places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
        return next((path for place in places if (path := place / "run.json").exists()), None)
    try:
        return Path(hf_hub_download(adapter, "run.json"))
    except (OSError, ValueError, HfHubHTTPError):
        return None
