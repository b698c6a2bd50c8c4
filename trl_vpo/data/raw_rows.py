"""Rows of a dataset as they are stored: numbered, media as paths and bytes, through the dataset's own transform."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Image, IterableDataset, LargeList, List, Video

from trl_vpo.data.columns import COLUMNS, REF_SUMS, ROW_INDEX
from trl_vpo.errors import RowError

CHUNK = 128  # rows in memory at a time


def number_rows(dataset: Dataset, args: Any) -> Dataset:
    """Return a dataset with the rows' numbers and raw media; columns of these names that others made are dropped."""
    dataset = dataset.remove_columns([c for c in (ROW_INDEX, REF_SUMS) if c in dataset.column_names])
    transform = transform_of(dataset)
    if transform and args.remove_unused_columns:  # as the trainer will
        dataset = dataset.select_columns([c for c in dataset.column_names if c in COLUMNS])
    columns = [*dataset.format["columns"], ROW_INDEX]
    dataset = dataset.add_column(ROW_INDEX, np.arange(len(dataset)))
    if transform:
        return dataset.with_transform(_Numbering(transform, args.remove_unused_columns), columns=columns)
    return undecoded(dataset.with_format(None, columns, dataset.format["output_all_columns"]), args)


def number_stream(dataset: IterableDataset, args: Any) -> IterableDataset:
    """Return a stream with the rows' numbers and raw media."""
    numbered = lambda example, index: {**example, ROW_INDEX: index}  # noqa: E731
    return undecoded(dataset.with_format(None), args).map(numbered, with_indices=True)


def transform_of(dataset: Dataset) -> Callable | None:
    """Return the transform that `with_transform` or `set_transform` was given."""
    transform = dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None
    return transform.transform if isinstance(transform, _Numbering) else transform


@dataclass
class _Numbering:
    """A dataset's own transform, whose rows keep their numbers."""

    transform: Callable
    columns_removed: bool

    def __call__(self, batch: dict) -> dict:
        numbers = batch.get(ROW_INDEX)
        columns = {name: values for name, values in batch.items() if name != ROW_INDEX}
        try:
            rows = self.transform(columns)
        except Exception as error:
            hint = "Set remove_unused_columns=False, where it needs others." if self.columns_removed else ""
            where = f"rows {numbers[0]} to {numbers[-1]}: " if numbers else ""
            raise RowError(
                f"{where}the dataset's own transform fails ({type(error).__name__}: {error}). It was given "
                f"{', '.join(f'`{name}`' for name in columns)}. {hint}"
            ) from error
        return rows | ({ROW_INDEX: numbers} if numbers else {})


def raw_rows(dataset: Dataset, start: int = 0, stop: int | None = None) -> Iterator[dict]:
    """Give rows whose media stay paths and bytes; of a dataset with a transform of its own, the transformed rows.

    Columns that hold media and are not read are left out. The others tell which layout a row has.
    """
    stop = len(dataset) if stop is None else stop
    if transform_of(dataset):
        for index in range(start, stop):
            yield dataset[index]
        return
    media = [name for name, feature in dataset.features.items() if raw_media(feature, (Video, Image)) is not feature]
    texts = dataset.select_columns([name for name in dataset.features if name not in media])
    media = [name for name in media if name in COLUMNS]
    table = dataset.select_columns(media).with_format("arrow") if media else None
    for first in range(start, stop, CHUNK):
        last = min(first + CHUNK, stop)
        columns = texts[first:last] | (table[first:last].to_pydict() if table else {})
        for i in range(last - first):
            yield {name: values[i] for name, values in columns.items()}


def undecoded(dataset: Dataset | IterableDataset, args: Any) -> Dataset | IterableDataset:
    """Return a dataset with `datasets.Video` columns as {path, bytes}: PyAV decodes them, in the workers, sampled.

    `Image` columns too with `args.media_root`: `datasets` would take a relative path from the working directory.
    """
    kinds = (Video,) if args.media_root is None else (Video, Image)
    for column, feature in (dataset.features or {}).items():  # a stream may not know its features
        raw = raw_media(feature, kinds)
        if raw is not feature:
            dataset = dataset.cast_column(column, raw)
    return dataset


def raw_media(feature: Any, kinds: tuple[type, ...]) -> Any:
    """Return a feature whose media are not decoded; itself where it holds none of these kinds."""
    if isinstance(feature, kinds):
        return replace(feature, decode=False)
    if isinstance(feature, (List, LargeList)):
        inner = raw_media(feature.feature, kinds)
        return feature if inner is feature.feature else replace(feature, feature=inner)
    if isinstance(feature, dict):
        inner = {name: raw_media(value, kinds) for name, value in feature.items()}
        return feature if all(inner[name] is value for name, value in feature.items()) else inner
    return feature
