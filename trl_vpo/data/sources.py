"""Where rows come from: a Hub dataset, a local file, a folder of files, or a folder that `save_to_disk` wrote."""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "skipped_rows.jsonl"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


class DatasetError(ValueError):
    """A dataset or split that is not there. The message names what is."""


def load_splits(script_args: Any, mixture: Any, *, evaluate: bool, seed: int = 42) -> tuple:
    """The train dataset, and the evaluation dataset or None, that TRL's arguments ask for.

    `dataset_name` is a Hub dataset or a local path, relative to the working directory:
    - a .json, .jsonl or .parquet file: its split is "train";
    - a folder of such files: each is a split by its name, `train.jsonl` and `test.jsonl` (shards as on the Hub);
    - a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.
    `datasets` (a mixture) works as in TRL. With `test_split_size` a test split is cut off the train split if there
    is none.

    Raises:
        DatasetError: the path, its rows or a split do not exist.
    """
    if mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
        names = [n for n in (script_args.dataset_train_split, script_args.dataset_test_split) if n in splits]
        parts = {name: splits[name] for name in names}
    elif script_args.dataset_name:
        wanted = [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluate
        parts = named_splits(
            script_args.dataset_name,
            wanted,
            config=script_args.dataset_config,
            streaming=script_args.dataset_streaming,
        )
    else:
        raise DatasetError("there is no data: set `dataset_name` to a Hub dataset, a file or a folder of files.")
    train, test = (parts.get(name) for name in (script_args.dataset_train_split, script_args.dataset_test_split))
    if not evaluate:
        return train, None
    if test is None and mixture.test_split_size and isinstance(train, Dataset):
        halves = train.train_test_split(test_size=mixture.test_split_size, seed=seed)
        train, test = halves["train"], halves["test"]
    if test is None and mixture.test_split_size:
        raise DatasetError(
            "test_split_size cannot cut a test split off a stream. Put train.jsonl and test.jsonl into one folder and "
            "name the folder, or leave out dataset_streaming."
        )
    if test is None:
        raise DatasetError(
            f"eval_strategy asks for evaluation, but {script_args.dataset_name or 'the mixture'} has no split "
            f"{script_args.dataset_test_split!r}. Put train.jsonl and test.jsonl into one folder and name the folder, "
            'or set test_split_size, or eval_strategy to "no".'
        )
    return train, test


def named_splits(
    name: str, wanted: list[str], *, config: str | None = None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """The splits of a Hub dataset or a local path that are wanted and exist. The first one must.

    Raises:
        DatasetError: the path, its rows or the first split do not exist.
    """
    path = Path(name)
    if path.suffix in BUILDERS or path.exists():
        available = local_splits(path)
        load = lambda split: _load_local(available[split], streaming)  # noqa: E731
    else:
        available = load_dataset(name, name=config, streaming=streaming)
        load = available.__getitem__
    if wanted[0] not in available:
        raise DatasetError(f"{name} has no split {wanted[0]!r}; it has {', '.join(available) or 'none'}.")
    return {split: load(split) for split in wanted if split in available}


def local_splits(path: Path) -> dict[str, Any]:
    """The splits of a local path: lists of files, or datasets that `save_to_disk` wrote.

    Raises:
        DatasetError: nothing there, or nothing with rows.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist (seen from {Path.cwd()}).")
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise DatasetError(f"{path} is not one of {', '.join(BUILDERS)}.")
        return {"train": [path]}
    if (path / "dataset_dict.json").exists():
        return dict(load_from_disk(str(path)))
    if (path / "state.json").exists():
        return {"train": load_from_disk(str(path))}
    files = sorted(f for f in path.iterdir() if f.suffix in BUILDERS and f.name not in NOT_ROWS)
    splits: dict[str, list[Path]] = {}
    for file in files or sorted((path / "data").glob("*.parquet")):  # a clone of a Hub dataset keeps them in data/
        splits.setdefault(_SHARD.sub("", file.stem), []).append(file)
    if not splits:
        raise DatasetError(f"{path} has no {', '.join(BUILDERS)} files and no saved dataset.")
    for split, parts in splits.items():
        if len({BUILDERS[f.suffix] for f in parts}) > 1:
            raise DatasetError(f"split {split!r} of {path} mixes formats: {', '.join(f.name for f in parts)}.")
    return splits


def _load_local(split: Any, streaming: bool) -> Dataset | IterableDataset:
    if not isinstance(split, list):
        return split.to_iterable_dataset() if streaming else split
    files = [str(file) for file in split]
    try:
        return load_dataset(BUILDERS[split[0].suffix], data_files=files, split="train", streaming=streaming)
    except Exception as error:  # `datasets` wraps the builder's errors in one of its own
        reason = error.__cause__ or error
        raise DatasetError(f"{', '.join(files)} cannot be read as rows: {reason}") from error
