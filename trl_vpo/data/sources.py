"""Datasets by name: a Hub dataset, a local file, a folder of files, or a folder that `save_to_disk` wrote."""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

from trl_vpo.data.hub_names import check_on_hub
from trl_vpo.data.identity import cache_folder, file_identity
from trl_vpo.data.json_files import load_json, stream_json
from trl_vpo.data.paths import ROWS, check_exists, row_format
from trl_vpo.errors import DatasetError, as_user_errors
from trl_vpo.files import COMPRESSED, json_digest

OTHER_TABLES = {".csv", ".tsv", ".arrow", ".feather", ".xlsx"}  # nobody keeps media in them; not read here
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "skipped_rows.jsonl"}
_SHARD = re.compile(r"[-_](\d+)[-_]of[-_](\d+)(-[0-9a-f]{16})?$")


def load_splits(script_args: Any, mixture: Any, *, evaluate: bool, seed: int = 42) -> tuple:
    """Return the train dataset, and the evaluation dataset or None, that TRL's arguments ask for.

    `dataset_name` is a Hub dataset or a local path, relative to the working directory:
    - a .json, .jsonl or .parquet file: its split is "train"; JSON may be compressed (.gz, .bz2, .xz, .zst);
    - a folder of such files: each is a split by its name, `train.jsonl` and `test.jsonl` (shards as on the Hub);
    - a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.
    `datasets` (a mixture) works as in TRL. With `test_split_size` a test split is cut off the train split if there
    is none. Raises DatasetError if the path, its rows or a split do not exist.
    """
    train_name, test_name = script_args.dataset_train_split, script_args.dataset_test_split
    if mixture.datasets:
        from trl import get_dataset

        with as_user_errors("datasets"):
            splits = get_dataset(mixture)
    elif script_args.dataset_name:
        splits = named_splits(
            script_args.dataset_name,
            [train_name] + [test_name] * evaluate,
            config=script_args.dataset_config,
            streaming=script_args.dataset_streaming,
        )
    else:
        raise DatasetError("there is no data: set `dataset_name` to a Hub dataset, a file or a folder of files.")
    train, test = (splits.get(name) for name in (train_name, test_name))
    if not evaluate:
        return train, None
    if test is None and mixture.test_split_size:
        if not isinstance(train, Dataset):
            raise DatasetError(
                "test_split_size cannot cut a test split off a stream. Put train.jsonl and test.jsonl into one folder "
                "and name the folder, or leave out dataset_streaming."
            )
        halves = train.train_test_split(test_size=mixture.test_split_size, seed=seed)
        train, test = halves["train"], halves["test"]
    if test is None:
        raise DatasetError(
            f"eval_strategy asks for evaluation, but {script_args.dataset_name or 'the mixture'} has no split "
            f"{test_name!r}. Put train.jsonl and test.jsonl into one folder and name the folder, or set "
            'test_split_size, or eval_strategy to "no".'
        )
    return train, test


def named_splits(
    name: str, splits: list[str], *, config: str | None = None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """Return those of the splits that a Hub dataset or a local path has; the first of them has to exist."""
    path = Path(name)
    local = bool(row_format(path)) or path.exists()
    if local:
        available = local_splits(path)
    else:
        check_on_hub(name, key="dataset_name", kind="dataset", file="")
        try:
            available = load_dataset(name, name=config, streaming=streaming)
        except (ValueError, OSError) as error:
            raise DatasetError(
                f"the Hub dataset {name} cannot be loaded: {error}. Where there is a network: `hf download {name} "
                "--repo-type dataset --local-dir FOLDER`; then give the path of FOLDER."
            ) from error
    if splits[0] not in available:
        about = _folder_of_a_run(path) if local else ""
        raise DatasetError(f"{name} has no split {splits[0]!r}; it has {', '.join(available) or 'none'}.{about}")
    chosen = {split: available[split] for split in splits if split in available}
    return {split: _load_local(part, streaming) for split, part in chosen.items()} if local else chosen


def local_splits(path: Path) -> dict[str, Any]:
    """Return the splits of a local path: lists of files, or datasets that `save_to_disk` wrote."""
    check_exists(path)
    if path.is_file():
        if not row_format(path):
            raise DatasetError(
                f"{path} is not one of {', '.join(ROWS)}, nor JSON that ends in {', '.join(COMPRESSED)}."
            )
        return {"train": [path]}
    try:
        if (path / "dataset_dict.json").exists():
            return dict(load_from_disk(str(path)))
        if (path / "state.json").exists():
            return {"train": load_from_disk(str(path))}
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{path} was written by `save_to_disk` and cannot be read: {error}") from error
    return _folder_splits(path)


def _folder_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder by split; a clone of a Hub dataset keeps them in data/."""
    inner = folder / "data"
    files = sorted(folder.iterdir()) + (sorted(inner.iterdir()) if inner.is_dir() else [])
    files = [file for file in files if file.is_file() and file.name not in NOT_ROWS and file.name[0] not in "._"]
    splits: dict[str, list[Path]] = {}
    for file in filter(row_format, files):
        name = file.name.split(".")[0] if file.suffix.lower() in COMPRESSED else file.stem
        splits.setdefault(_SHARD.sub("", name), []).append(file)
    unread = []
    for file in files:
        suffixes = ["", "", *(suffix.lower() for suffix in file.suffixes)]
        packed = suffixes[-2] in ROWS  # in a way that is not read; archives of media are no rows
        table = suffixes[-1] in OTHER_TABLES and file.name.split(".")[0] in splits
        unread += [file] if not row_format(file) and (packed or table) else []
    if unread:
        raise DatasetError(
            f"{', '.join(map(str, unread))} would not be read: rows come from {', '.join(ROWS)}, JSON also with "
            f"{', '.join(COMPRESSED)} behind it. Convert it, or move it out of the folder."
        )
    if not splits:
        raise DatasetError(f"{folder} has no {', '.join(ROWS)} files and no saved dataset.")
    for split, parts in splits.items():
        _check_parts(folder, split, parts)
    return splits


def _folder_of_a_run(folder: Path) -> str:
    """Say which command wrote a folder that was taken for one of rows, and where its rows are."""
    has = lambda *names: any((folder / name).is_file() for name in names)  # noqa: E731
    if has("settings.json") and has("results.json"):
        return " `trl-vpo evaluate` wrote it: it holds results, and no rows."
    if has("settings.json") and has("rows.jsonl"):
        return f" `trl-vpo generate` wrote it: name {folder / 'rows.jsonl'}."
    if has("settings.json") and (folder / "shards").is_dir():
        return " It is a run that is not finished: give its command again, and name its rows.jsonl then."
    if has("run.json", "trainer_state.json", "adapter_config.json", "config.json"):
        return " It is the folder of a model or of its training, and holds no rows: name a dataset."
    return ""


def _check_parts(folder: Path, split: str, parts: list[Path]) -> None:
    """Raise DatasetError for formats that mix, shards of several sets, and shards that are missing."""
    names = ", ".join(part.name for part in parts)
    if len({row_format(part) for part in parts}) > 1:
        raise DatasetError(f"split {split!r} of {folder} mixes formats: {names}. Keep one of them.")
    shards = [_SHARD.search(part.name.split(".")[0]) for part in parts]
    totals = {shard and int(shard[2]) for shard in shards}
    if totals == {None} and len(parts) == 1:
        return
    numbers = [int(shard[1]) for shard in shards if shard]
    if len(totals) > 1 or None in totals or len(set(numbers)) < len(numbers):
        raise DatasetError(
            f"{folder} has the split {split!r} more than once: {names}. Keep one file, or one set of shards."
        )
    (total,) = totals
    first = 1 if total in numbers else 0
    missing = sorted(set(range(first, first + total)) - set(numbers))
    if missing:
        raise DatasetError(
            f"split {split!r} of {folder} has {len(parts)} of its {total} shards; the ones with the numbers "
            f"{', '.join(map(str, missing))} are missing. Fetch them again, or rename the others."
        )


def _load_local(split: Any, streaming: bool) -> Dataset | IterableDataset:
    if not isinstance(split, list):
        return split.to_iterable_dataset() if streaming else split
    if row_format(split[0]) == "json":
        return stream_json(split) if streaming else load_json(split)
    files = [str(file) for file in split]
    try:
        # A folder of its own for each state of the files: `datasets` knows them by their time alone.
        state = json_digest([[str(file.resolve()), *file_identity(file)] for file in split])
        cache = cache_folder() / "parquet" / state
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir=str(cache))
    except Exception as error:  # `datasets` wraps the builder's errors in one of its own
        reason = error.__cause__ or error
        raise DatasetError(f"{', '.join(files)} cannot be read as rows: {reason}") from error
