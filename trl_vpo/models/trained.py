"""The media settings of a training, from the adapters' or the model's `run.json`, as the defaults of what answers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_vpo.errors import ModelError
from trl_vpo.files import read_object
from trl_vpo.media.load import VideoOptions
from trl_vpo.models.source import find_run_json
from trl_vpo.runs.driver import rank

logger = logging.getLogger(__name__)

# If one setting of a group is given, the whole group counts as given.
GROUPS = (("num_frames", "fps"), ("max_frames",), ("max_pixels",), ("video_start", "video_end"))
SIZES = GROUPS[:3]  # without the window, which is of the data


def trained_media(
    adapters: Sequence[str],
    given: Mapping[str, Any],
    model: str,
    revision: str | None = None,
    groups: Sequence[tuple[str, ...]] = GROUPS,
) -> dict[str, Any]:
    """Return the media settings of the adapters' training, without adapters of the model's, except those given.

    All are folders, their checkpoints, or Hub names. A given setting that differs from that of a training causes a
    warning, and so does an adapter without a `run.json` where the frames are not given; with a damaged one it is a
    ModelError. What is returned is printed.
    """
    framed = any(given.get(name) is not None for name in GROUPS[0])
    asked = dict.fromkeys(adapters) or {model: revision}
    found = {path: _recorded(find_run_json(path, revision), framed) for path, revision in asked.items()}
    recorded = {path: settings for path, settings in found.items() if settings is not None}
    defaults = agreed_media(recorded, given, groups)
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


def agreed_media(
    recorded: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
    groups: Sequence[tuple[str, ...]] = GROUPS,
) -> dict[str, Any]:
    """Return the media settings that all trainings have, by their names, except those that are given.

    Raises ModelError if trainings differ where none is given.
    """
    defaults: dict[str, Any] = {}
    framed = any(given.get(name) is not None for name in GROUPS[0])
    for names in groups:
        trained = {path: {name: settings[name] for name in names} for path, settings in recorded.items()}
        if names == ("max_frames",):  # it does nothing without fps
            trained = {p: values for p, values in trained.items() if (given if framed else recorded[p]).get("fps")}
        if any(given.get(name) is not None for name in names):
            evaluated = {name: given.get(name) for name in names}
            for path, values in trained.items():
                if values != evaluated:
                    logger.warning(f"{path} was trained with {_text(values)}, and is run with {_text(evaluated)}.")
        elif len({tuple(values.items()) for values in trained.values()}) > 1:
            by_adapter = "; ".join(f"{path}: {_text(values)}" for path, values in trained.items())
            raise ModelError(
                f"the adapters' trainings have different settings ({by_adapter}). Give {names[0]} to evaluate all "
                "of them alike, or evaluate each in a run of its own."
            )
        elif trained:
            defaults |= next(iter(trained.values()))
    return defaults


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None) or f"no {next(iter(values))}"


def _recorded(path: Path | None, framed: bool) -> dict[str, Any] | None:
    """Return the media settings in a `run.json`, defaults included; None without one.

    One that is damaged is refused; where the frames are given (`framed`), a warning says that it counts as missing.
    """
    if path is None:
        return None
    names = [name for group in GROUPS for name in group]
    try:
        if not {"method", "recipe", "contents"} & read_object(path).keys():  # of another tool
            return None
        recipe = read_object(path, "recipe")["recipe"]
        options = VideoOptions(**{name: recipe[name] for name in names if recipe.get(name) is not None})
    except ValueError as error:
        if not framed:
            raise ModelError(
                f"{path}: {error} Correct the file, or give num_frames or fps, and max_pixels, as in the training."
            ) from error
        logger.warning(f"{path}: {error} None of its settings is used: give max_pixels, too, if the training had it.")
        return None
    return {name: getattr(options, name) for name in names}
