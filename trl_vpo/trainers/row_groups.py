"""Groups of processes that share each row: sequence parallelism, by `sp_size` of accelerate's `ParallelismConfig`.

accelerate and `Trainer` hand `sp_size` to DeepSpeed, which cuts rows of tokens before a model embeds their media. So
it is kept from them, and the packed row is cut inside of the model call (see `trl_vpo.forward.sequence_parallel`). To
`Trainer`, all processes are equal; what it must know is that those of a group have the same rows.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.utils import recursively_apply
from datasets import IterableDataset
from torch.distributed.device_mesh import init_device_mesh
from transformers import TrainingArguments
from trl import DPOTrainer

from trl_vpo.forward.sequence_parallel import SequenceRanks
from trl_vpo.runs.values import group_size


def sp_size(args: TrainingArguments) -> int:
    """Return how many processes share a row, by `parallelism_config` or the launcher's; 1: each has rows of its own.

    Raises RecipeError.
    """
    return group_size({name: _size(args, name) for name in ("sp", "cp", "tp")}, args.world_size)


def _size(args: TrainingArguments, name: str) -> int:
    if args.parallelism_config is not None:
        return getattr(args.parallelism_config, f"{name}_size")
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", 1)) if launched else 1


class RowGroups:
    """The groups of processes that share a row each; without sequence parallelism every process is one."""

    def __init__(self, accelerator: Accelerator, size: int):
        self.size, self.count = size, accelerator.num_processes // size  # processes in a group; groups
        self.index, place = divmod(accelerator.process_index, size)  # the group of this process
        self.speaks = place == 0  # this process counts for its group, where something is counted once per row
        self.ranks = None  # the group, for the model call; None where it is one process
        self._state, self._mesh = accelerator.state, None
        if size > 1:
            # The names by which accelerate's data loaders know who gets the same batch.
            names = ("dp_replicate", "tp")
            self._mesh = init_device_mesh(accelerator.device.type, (self.count, size), mesh_dim_names=names)
            self.ranks = SequenceRanks(self._mesh.get_group("tp"), size, place)
            accelerator.gather = functools.partial(self._gather, accelerator.gather)

    def _gather(self, gather: Any, tensors: Any) -> Any:
        """Gather from one process of each group."""

        def once(tensor):
            return tensor.unflatten(0, (self.count * self.size, -1))[:: self.size].flatten(0, 1)

        return recursively_apply(once, gather(tensors))

    @contextlib.contextmanager
    def share_rows(self) -> Iterator[None]:
        """Let accelerate prepare data loaders that give the processes of a group the same batches.

        Of a stream it would give each process some of the files: other batches than one process has, and where the
        files are not equal, one process waits for ever. So it does not learn of them, and deals out rows.
        """
        before = self._state.device_mesh
        self._state.device_mesh = self._mesh or before
        try:
            with patch.object(IterableDataset, "n_shards", 1):
                yield
        finally:
            self._state.device_mesh = before


class RowGroupsTrainer(DPOTrainer):
    """`trl.DPOTrainer` whose processes may share rows; `row_groups` says how."""

    def create_accelerator_and_postprocess(self):
        size = sp_size(self.args)
        with contextlib.ExitStack() as hidden:
            if size > 1:
                hidden.enter_context(patch.object(self.args, "parallelism_config", None))
                hidden.enter_context(patch.dict(os.environ, {"ACCELERATE_USE_PARALLELISM_CONFIG": "false"}))
            super().create_accelerator_and_postprocess()
        self.row_groups = RowGroups(self.accelerator, size)

    def _get_dataloader(self, *args, **kwargs):
        with self.row_groups.share_rows():
            return super()._get_dataloader(*args, **kwargs)

    def get_total_train_batch_size(self, args):
        return super().get_total_train_batch_size(args) // self.row_groups.size
