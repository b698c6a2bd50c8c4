"""Rows of a dataset as they are stored: numbered, media as paths and bytes, through the dataset's own transform."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Json, LargeList, List, Video

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


class RawRows:
    """The rows of a dataset as they are stored: media as paths and bytes, and JSON text as the values that it says.

    Of a dataset with a transform of its own, they are the transformed ones.

    Args:
        media: names of the columns with media that are read; None: all. The columns without are always read: they
            tell which layout a row has.
        json: names of the columns whose JSON text is read; None: all.
    """

    def __init__(self, dataset: Dataset, media: Container[str] | None = None, json: Container[str] | None = None):
        self._transformed = dataset if transform_of(dataset) else None
        features = dataset.features  # a copy each time
        raw = {name: raw_media(feature) for name, feature in features.items()}
        shown = dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]
        names = [name for name in shown if media is None or name in media or raw[name] is features[name]]
        self._names, self._json = names, Features({name: raw[name] for name in names if json is None or name in json})
        self._table = dataset.select_columns(names).with_format("arrow")

    def read(self, start: int, stop: int) -> Iterator[dict]:
        """Give some rows; all of them are in memory at once."""
        if self._transformed is not None:
            yield from (self._transformed[index] for index in range(start, stop))
            return
        columns = self._table[start:stop].to_pydict() if self._names else {}
        columns |= self._json.decode_batch({name: columns[name] for name in self._json})
        for i in range(stop - start):
            yield {name: values[i] for name, values in columns.items()}


def raw_rows(
    dataset: Dataset, start: int = 0, stop: int | None = None, *, media: Container[str] | None = COLUMNS
) -> Iterator[dict]:
    """Give rows as `RawRows` reads them, by default with the media that a training reads; some are in memory."""
    rows, stop = RawRows(dataset, media), len(dataset) if stop is None else stop
    for first in range(start, stop, CHUNK):
        yield from rows.read(first, min(first + CHUNK, stop))


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


def raw_media(feature: Any, kinds: tuple[type, ...] = (object,)) -> Any:
    """Return a feature whose media of these kinds are not decoded; itself where it holds none."""
    if isinstance(feature, kinds) and hasattr(feature, "decode") and not isinstance(feature, Json):
        return replace(feature, decode=False)
    if isinstance(feature, (List, LargeList)):
        inner = raw_media(feature.feature, kinds)
        return feature if inner is feature.feature else replace(feature, feature=inner)
    if isinstance(feature, dict):
        inner = {name: raw_media(value, kinds) for name, value in feature.items()}
        return feature if all(inner[name] is value for name, value in feature.items()) else inner
    return feature
