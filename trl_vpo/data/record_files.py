"""The records of one file: of a JSON list, JSON lines or parquet, or the entries of one JSON object."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_vpo.data.json_files import load_packed, raw_records
from trl_vpo.data.messages import drop_none
from trl_vpo.errors import DatasetError, ImportFormatError


def read_records(path: Path, keyed: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """Give (kind, number or key, record) of a file, as `raw_records` does; of parquet the rows, numbered from 0.

    `keyed`: the records stand by keys in one JSON object, and have the fields `key` and `value`.
    """
    try:
        if keyed:
            entries = load_packed(path)
            if not isinstance(entries, dict):
                raise ImportFormatError(f"{path} is not one JSON object. Name the authors' file as it is.")
            yield from (("entry", key, {"key": key, "value": value}) for key, value in entries.items())
            return
        if path.suffix.lower() != ".parquet":
            yield from raw_records(path)
            return
        batches = pq.ParquetFile(path).iter_batches(batch_size=100)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from (("row", number, drop_none(row)) for number, row in enumerate(rows))
    except DatasetError as error:
        raise ImportFormatError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        raise ImportFormatError(f"{path} cannot be read as a parquet file ({error}). Fetch it again.") from error
