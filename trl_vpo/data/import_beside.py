"""What lies beside the file of a benchmark: annotations, subtitles, the objects of COCO.

A function takes the file's path, and returns the fields that are added to each of its records.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from trl_vpo.errors import DatasetError, ImportFormatError, UserError


def named(path: Path) -> dict:
    """Give the file's name without its endings."""
    return {"file": re.sub(r"(\.(jsonl?|ndjson|parquet|gz|bz2|xz|zst))+$", "", path.name, flags=re.IGNORECASE)}


def _near(path: Path, name: str) -> Path:
    """Return a file or folder that lies beside a file or one folder above."""
    found = next((place for place in (path.parent / name, path.parent.parent / name) if place.exists()), None)
    if found is None:
        raise ImportFormatError(f"{path}: {name} lies neither beside it nor in the folder above. Put it there.")
    return found


def _json(path: Path) -> Any:
    from trl_vpo.data.json_files import load_packed  # not needed to list the formats

    try:
        return load_packed(path)
    except DatasetError as error:
        raise ImportFormatError(str(error)) from error


def amber_truth(path: Path) -> dict:
    entries = _json(found := _near(path, "annotations.json"))
    for number, times in Counter(str(entry["id"]) for entry in entries).most_common(1):
        if times > 1:
            raise ImportFormatError(f"{found}: {times} entries have the id {number}. Leave one of them.")
    return {"annotations": {str(entry["id"]): entry for entry in entries}}


def subtitle_folder(path: Path) -> dict:
    """Give the subtitle files of a folder by the videos' names."""
    folder = _near(path, "subtitle")
    files = {file.stem: file for file in folder.iterdir() if file.suffix.lower() == ".srt"}
    if not files:
        raise ImportFormatError(f"{folder} has no .srt files. Put the subtitles into it, without a further folder.")
    return {"subtitles": files}


def clips(path: Path) -> dict:
    """Give the videos of all records of a file, in order; None for a record without one."""
    from trl_vpo.data.json_files import parse_record  # not needed to list the formats
    from trl_vpo.data.record_files import read_records

    def video(raw: Any) -> Any:
        try:
            return parse_record(raw).get("video")
        except ValueError:  # said where the record is read
            return None

    return {"clips": [video(raw) for _, _, raw in read_records(path)]}


def coco_objects(path: Path) -> dict:
    """Give the objects of an image of COCO 2014: those that are outlined, and those that its captions mention."""
    from trl_vpo.text.chair import ObjectTable, read_synonyms

    words, folder = _near(path, "synonyms_refine.txt"), _near(path, "annotations")
    table = ObjectTable(read_synonyms(words))
    found: dict[int, set[str]] = {}
    captions: dict[int, list[str]] = {}
    for part in ("train", "val"):
        outlined = _json(folder / f"instances_{part}2014.json")
        try:
            names = {category["id"]: table.name(category["name"]) for category in outlined["categories"]}
        except UserError as error:
            raise ImportFormatError(f"{words}: {error}") from error
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
    """Return the text of a subtitle file, a line for each that is shown, without numbers, times and formatting."""
    try:
        shown = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    shown = re.sub(r"^(?:[ \t]*\d+[ \t]*\n)?[ \t]*[\d:,.]+[ \t]*-->.*", "", shown, flags=re.MULTILINE)
    shown = re.sub(r"</?(?:i|b|u|font)\b[^>]*>", "", shown, flags=re.IGNORECASE)
    return "\n".join(line.strip() for line in shown.splitlines() if line.strip())
