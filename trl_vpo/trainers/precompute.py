"""Reference log-probs computed once, before the first step, and kept on disk: `precompute_ref_log_probs=True`.

An entry is found by all that a row's log-probs depend on (see `trl_vpo.trainers.fingerprint`), so that exactly the
rows that changed are computed again. The cache is a folder of `<context>.<rank>.<run>.jsonl` files. Each process
writes one of its own, a line per row as soon as its batch is done: an interrupted run continues where it stopped.
"""

import json
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.raw_rows import raw_rows, transform_of
from trl_vpo.data.rows import COLUMNS, REF_SUMS, ROW_INDEX
from trl_vpo.trainers.fingerprint import context_key, row_key
from trl_vpo.trainers.setup import sharding

logger = get_logger(__name__)


class ReferenceCache:
    """The reference's sums of a trainer's rows; built before a policy that is its own reference changes."""

    def __init__(self, trainer: Any):
        args = trainer.args
        if not isinstance(trainer.data_collator, PreferenceCollator):
            kind = type(trainer.data_collator).__name__
            _refuse(f"it is not known which settings of {kind} change a batch. Use the trainer's own collator")
        if sharding(trainer):
            _refuse("it runs before training begins, when FSDP and ZeRO-3 have no whole model. Use DDP or ZeRO-2")
        self.folder = Path(args.precompute_cache_dir or Path(args.output_dir) / "_reference_cache")
        self._trainer = trainer
        self._context = context_key(trainer)

    def attach_all(self) -> None:
        """Attach the sums to every dataset of the trainer, as `DPOTrainer.__init__` does for text."""
        trainer, args = self._trainer, self._trainer.args
        size = args.precompute_ref_batch_size
        trainer.train_dataset = self.attach(trainer.train_dataset, "train", size or args.per_device_train_batch_size)
        size, sets = size or args.per_device_eval_batch_size, trainer.eval_dataset
        if isinstance(sets, dict):
            trainer.eval_dataset = {name: self.attach(rows, name, size) for name, rows in sets.items()}
        elif sets is not None:
            trainer.eval_dataset = self.attach(sets, "eval", size)

    def attach(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return `dataset` with the sums of each row's branches in the column `REF_SUMS`. All ranks call this."""
        if not isinstance(dataset, Dataset):
            _refuse(f"the {name} rows are an IterableDataset, which cannot be read up front. Use a Dataset")
        if REF_SUMS in dataset.column_names:  # of this trainer: preparing drops others'
            return dataset
        process, collator = self._trainer.accelerator, self._trainer.data_collator
        rows = self._bar(iterable=raw_rows(dataset), total=len(dataset), desc=f"Looking up {name} rows", leave=False)
        keys = [row_key(row, collator) for row in rows]
        drawn = transform_of(dataset) and keys != [row_key(row, collator) for row in raw_rows(dataset)]
        if any(gather_object([bool(drawn)])):  # else ranks that saw no other row would wait
            _refuse(f"the transform of the {name} rows gives other rows each time. Take it off")
        sums = self._read()
        missing = {key: index for index, key in enumerate(keys) if key not in sums}  # equal rows are computed once
        missing = sorted(set(gather_object(list(missing.values()))))
        if missing:
            # Every rank runs a batch, however few rows there are: on the first one they agree on the layout.
            groups = self._trainer.row_groups
            mine = missing[groups.index :: groups.count] or missing[:1]
            self._compute(dataset, {index: keys[index] for index in mine}, name, batch_size)
            process.wait_for_everyone()
            sums = self._read()
            if not all(key in sums for key in keys):
                _refuse(f"{self.folder} is not the same folder on all machines. Set precompute_cache_dir to one")
        dataset = dataset.add_column(REF_SUMS, [sums[key] for key in keys])
        self._trainer._prepared.add(dataset)
        return dataset

    @torch.no_grad()
    def _compute(self, dataset: Dataset, keys: dict[int, str], name: str, batch_size: int) -> None:
        """Score the rows with the numbers `keys`; each batch is written as soon as it is done."""
        trainer = self._trainer
        model, process = trainer.model, trainer.accelerator
        loader = DataLoader(
            dataset.select_columns([c for c in dataset.column_names if c in (*COLUMNS, ROW_INDEX)]).select(list(keys)),
            batch_size=batch_size,
            collate_fn=trainer.data_collator,
            num_workers=trainer.args.dataloader_num_workers,
        )
        if next(model.parameters()).device.type != process.device.type:  # DeepSpeed moves it when training begins
            model.to(process.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._context}.{process.process_index}.{uuid.uuid4().hex[:12]}.jsonl"
        waiting = iter(keys.values())
        with (
            self._bar(total=len(keys), desc=f"Reference log-probs of {name} rows") as bar,
            path.open("x", encoding="utf-8") as shard,
        ):
            for batch in loader:
                batch = trainer._prepare_inputs(batch)
                sums = trainer.reference_scores(batch).sums.tolist()  # (S,)
                rows = [sums[a:b] for a, b in pairwise([*batch["chosen"].tolist(), len(sums)])]
                bad = [label for label, row in zip(batch["names"], rows) if not np.isfinite(row).all()]
                if bad:
                    raise ValueError(f"the reference's log-probs are not finite for: {'; '.join(bad)}.")
                shard.writelines(json.dumps({"row": next(waiting), "logps": row}) + "\n" for row in rows)
                shard.flush()
                bar.update(len(rows))

    def _bar(self, **kwargs) -> tqdm:
        return tqdm(**kwargs, disable=self._trainer.args.disable_tqdm or not self._trainer.accelerator.is_main_process)

    def _read(self) -> dict[str, list[float]]:
        """Read row key -> sums. A line that an interrupted run left half-written is skipped."""
        sums = {}
        for path in sorted(self.folder.glob(f"{self._context}.*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    entry = json.loads(line)
                    sums[entry["row"]] = [float(value) for value in entry["logps"]]
                except (ValueError, TypeError, KeyError):
                    logger.warning(f"{path}, line {number} is not complete; its row is computed again.")
        return sums


def _refuse(problem: str) -> None:
    raise ValueError(f"precompute_ref_log_probs=True: {problem}, or set precompute_ref_log_probs=False.")
