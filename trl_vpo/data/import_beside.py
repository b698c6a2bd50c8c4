"""What lies beside the file of a benchmark: annotations, subtitles, the objects of COCO.

A function takes the file's path, and returns the fields that are added to each of its records.
"""

import json
import re
from pathlib import Path
from typing import Any

from trl_vpo.errors import ImportFormatError


def named(path: Path) -> dict:
    return {"file": path.name.split(".")[0]}


def _near(path: Path, name: str) -> Path:
    """Return a file or folder that lies beside a file or one folder above."""
    found = next((place for place in (path.parent / name, path.parent.parent / name) if place.exists()), None)
    if found is None:
        raise ImportFormatError(f"{path}: {name} lies neither beside it nor in the folder above. Put it there.")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ImportFormatError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from error


def amber_truth(path: Path) -> dict:
    return {"annotations": {entry["id"]: entry for entry in _json(_near(path, "annotations.json"))}}


def subtitle_folder(path: Path) -> dict:
    folder = _near(path, "subtitle")
    if not any(folder.glob("*.srt")):
        raise ImportFormatError(f"{folder} has no .srt files. Put the subtitles into it, without a further folder.")
    return {"subtitles": folder}


def coco_objects(path: Path) -> dict:
    """Give the objects of an image of COCO 2014: those that are outlined, and those that its captions mention."""
    from trl_vpo.text.chair import ObjectTable, read_synonyms

    table, folder = ObjectTable(read_synonyms(_near(path, "synonyms_refine.txt"))), _near(path, "annotations")
    found: dict[int, set[str]] = {}
    captions: dict[int, list[str]] = {}
    for part in ("train", "val"):
        outlined = _json(folder / f"instances_{part}2014.json")
        names = {category["id"]: table.name(category["name"]) for category in outlined["categories"]}
        for one in outlined["annotations"]:
            found.setdefault(one["image_id"], set()).add(names[one["category_id"]])
        for one in _json(folder / f"captions_{part}2014.json")["annotations"]:
            captions.setdefault(one["image_id"], []).append(one["caption"])

    def objects(number: int) -> set[str]:
        if number not in captions:
            raise ValueError(f"`image_id` {number} is not an image of COCO 2014's captions.")
        said = (mention.object for caption in captions[number] for mention in table.mentions(caption))
        return found.get(number, set()) | set(said)

    return {"coco": objects}


def spoken(path: Path) -> str:
    """Return the text of a subtitle file, a line for each that is shown."""
    try:
        shown = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    lines = (re.sub("<.*?>", "", line).strip() for line in shown)
    spoken = [line for line in lines if line and not line.isdigit() and "-->" not in line]
    return "\n".join(["The subtitles of the video:", *spoken])
