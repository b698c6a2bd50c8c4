"""Reading a run's folder (see `store`): its settings, and what is finished, also while workers are writing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trl_vpo.errors import GenerateError
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.results import encode

_SHARD = re.compile(r"\d{5,}-of-\d{5,}\.jsonl")
_KEYS = {"id", "rows", "reason", "kind", "notes"}


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings a run was begun with.

    Raises:
        GenerateError: the folder is no run.
    """
    path = Path(folder) / "settings.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise GenerateError(f"{folder} is no run of `trl-vpo generate`: it has no settings.json.") from error
    except ValueError as error:
        raise GenerateError(
            f"{path} is damaged ({error}). Put the original back, or delete the folder to start anew."
        ) from error


def check_settings(folder: str | Path, settings: dict[str, Any], *, partly: bool = False) -> None:
    """See that a run, if there is one in the folder, was begun with these settings (`partly`: with these and more).

    Raises:
        GenerateError: it was begun with others.
    """
    if not (Path(folder) / "settings.json").exists():
        return
    old, new = read_settings(folder), json.loads(encode(settings, "settings"))
    if partly:
        old = {key: value for key, value in old.items() if key in new}
    changes = [f"\n  {change}" for change in _changes(old, new)]
    if changes:
        raise GenerateError(
            f"{folder} was begun with other settings; rows of both would be mixed:{''.join(changes)}\nName "
            "another output_dir, or delete the folder to start anew."
        )


def read_outcomes(folder: str | Path) -> Iterator[Outcome]:
    """What is finished so far in a run, shard by shard, also while it is going on. Takes no lock, changes nothing.

    Raises:
        GenerateError: the folder is no run, or a shard is damaged.
    """
    read_settings(folder)
    return (_outcome(record) for path in _shard_files(folder) for _, _, record in read_lines(path))


class Finished(Sequence):
    """Outcomes, read from the shards whenever one is asked for. A context manager.

    Args:
        places: (shard, where the line begins) of each outcome.
    """

    def __init__(self, places: Sequence[tuple[Path, int]]):
        self._places = places

    def __enter__(self) -> Finished:
        with ExitStack() as stack:
            self._files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in self._places}}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Outcome:
        path, start = self._places[index]
        self._files[path].seek(start)
        return _outcome(json.loads(self._files[path].readline()))


def places(folder: Path) -> dict[str, tuple[Path, int]]:
    """id -> (shard, where its line begins), of all shards."""
    found: dict[str, tuple[Path, int]] = {}
    for path in _shard_files(folder):
        for start, _, record in read_lines(path):
            name = record["id"]
            if name in found:
                raise GenerateError(
                    f"input {name!r} was finished twice: {found[name][0]}, byte {found[name][1]}, and {path}, byte "
                    f"{start}. Two programs worked on the same inputs. Delete one of the lines, or the folder."
                )
            found[name] = (path, start)
    return found


def read_lines(path: Path) -> Iterator[tuple[int, bytes, dict]]:
    """(start, line, record) of a shard's whole lines. A torn last line is passed over: its worker died, or is writing.

    Raises:
        GenerateError: a line before the last is no record.
    """
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            record = _parse(line)
            if record is None:
                if not next(file, b""):
                    return
                raise GenerateError(
                    f"{path}, line {number} is damaged: {line[:80]!r}. A killed run leaves only a last line torn, so "
                    "something else wrote into the file or the disk failed. Delete this line, and its input is done "
                    "again."
                )
            yield start, line, record
            start += len(line)


def _shard_files(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder, "shards").glob("*.jsonl") if _SHARD.fullmatch(path.name))


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() == _KEYS else None


def _outcome(record: dict) -> Outcome:
    return Outcome(**record | {"rows": tuple(record["rows"])})


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """A line for each setting that differs; nested ones by their dotted names."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key, ...), new.get(key, ...), f"{name}.{key}".lstrip("."))
    elif old is ... and new is None:  # a setting that an older version did not have
        return
    elif old != new or isinstance(old, bool) != isinstance(new, bool):  # 1 is 1.0, but not true
        yield f"{name}: was {_shown(old)}, is {_shown(new)}"


def _shown(value: Any) -> str:
    if value is ...:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
