"""What the processes of a training share: read from the accelerate config that a recipe or an option names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass
class Sharding:
    """What is split between processes.

    Attributes:
        kind: "none", "ddp", "zero1", "zero2", "zero3" or "fsdp".
        processes: how many there are.
        offload: of "weights" and "optimizer", what lies in CPU memory.
        gathers_once: FSDP that keeps gathered weights until the backward pass.
    """

    kind: str = "none"
    processes: int = 1
    offload: frozenset[str] = frozenset()
    gathers_once: bool = False

    @property
    def splits_weights(self) -> bool:
        return self.kind in ("zero3", "fsdp")

    @property
    def splits_gradients(self) -> bool:
        return self.kind in ("zero2", "zero3", "fsdp")

    def __str__(self) -> str:
        if self.kind == "none":
            return "one process"
        return f"{self.kind} on {self.processes} processes" + "".join(f", {x} offloaded" for x in sorted(self.offload))


def launched(options: list[str]) -> Sharding:
    """What options of `accelerate launch` mean, as `trl_vpo.training.launch.launch_options` gives them."""
    given = dict(zip(options[::2], options[1::2]))
    file, processes = given.get("--config_file"), given.get("--num_processes")
    return read_sharding(Path(file) if file else None, int(processes) if processes else None)


def read_sharding(file: Path | None, processes: int | None) -> Sharding:
    """What an accelerate config splits.

    Args:
        file: the config; None: DDP, where there is more than one process.
        processes: how many there are; None: as many as the file says.

    Raises:
        ValueError: a DeepSpeed config file that the accelerate config names cannot be read.
    """
    said = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else {}
    processes = processes or int(said.get("num_processes") or 1)
    kind = str(said.get("distributed_type", "MULTI_GPU")).upper()
    if kind == "DEEPSPEED":
        return _read_deepspeed(said.get("deepspeed_config") or {}, processes)
    if kind == "FSDP":
        options = said.get("fsdp_config") or {}
        reshard = str(options.get("fsdp_reshard_after_forward", True)).lower()
        offload = frozenset({"weights", "optimizer"} if options.get("fsdp_offload_params") else ())
        return Sharding("fsdp", processes, offload, gathers_once=reshard in ("false", "shard_grad_op"))
    return Sharding("ddp", processes) if processes > 1 else Sharding()


def _read_deepspeed(options: dict, processes: int) -> Sharding:
    if path := options.get("deepspeed_config_file"):
        try:
            zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            raise ValueError(f"the DeepSpeed config {path} cannot be read: {error}") from error
        found = {"weights": zero.get("offload_param"), "optimizer": zero.get("offload_optimizer")}
        offload = frozenset(what for what, to in found.items() if (to or {}).get("device", "none") != "none")
        return Sharding(f"zero{zero.get('stage', 0)}", processes, offload)
    found = {"weights": options.get("offload_param_device"), "optimizer": options.get("offload_optimizer_device")}
    offload = frozenset(what for what, to in found.items() if (to or "none") != "none")
    return Sharding(f"zero{options.get('zero_stage', 2)}", processes, offload)
