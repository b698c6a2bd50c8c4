"""Read from an accelerate config what the processes share: states of the training, rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trl_vpo.errors import RecipeError, UserError
from trl_vpo.runs.recipe_file import read_accelerate_config
from trl_vpo.runs.values import group_size


@dataclass
class Sharding:
    """How a model and its states are split between processes."""

    kind: str = "none"  # or "ddp", "zero1", "zero2", "zero3", "fsdp"
    processes: int = 1
    offload: frozenset[str] = frozenset()  # of "weights" and "optimizer", what lies in CPU memory
    gathers_once: bool = False  # FSDP that keeps gathered weights until the backward pass

    @property
    def is_zero(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def splits_weights(self) -> bool:
        return self.kind in ("zero3", "fsdp")

    @property
    def splits_gradients(self) -> bool:
        return self.kind in ("zero2", "zero3", "fsdp")

    @property
    def owners(self) -> int:
        """The number of processes that share the optimizer's states."""
        return self.processes if self.is_zero or self.kind == "fsdp" else 1

    def __str__(self) -> str:
        if self.kind == "none":
            return "one process"
        return f"{self.kind} on {self.processes} processes" + "".join(f", {x} offloaded" for x in sorted(self.offload))


def launched(options: list[str]) -> Sharding:
    """Read the options of `accelerate launch`, as `launch_options` gives them; without a config file it is DDP.

    Raises UserError for a DeepSpeed config file that cannot be read.
    """
    given = dict(zip(options[::2], options[1::2]))
    file = given.get("--config_file")
    config = read_accelerate_config(file) if file else {}
    processes = int(given.get("--num_processes") or config.get("num_processes") or 1)
    kind = str(config.get("distributed_type", "MULTI_GPU")).upper()
    if kind == "DEEPSPEED":
        return _read_deepspeed(config.get("deepspeed_config") or {}, processes)
    if kind == "FSDP":
        fsdp = config.get("fsdp_config") or {}
        reshard = str(fsdp.get("fsdp_reshard_after_forward", True)).lower()
        offload = frozenset({"weights", "optimizer"} if fsdp.get("fsdp_offload_params") else ())
        return Sharding("fsdp", processes, offload, gathers_once=reshard in ("false", "shard_grad_op"))
    return Sharding("ddp", processes) if processes > 1 else Sharding()


def check_groups(options: list[str]) -> None:
    """Refuse an accelerate config whose processes cannot share rows as it says, by the options of the launcher.

    Raises RecipeError.
    """
    file = dict(zip(options[::2], options[1::2])).get("--config_file")
    section = read_accelerate_config(file).get("parallelism_config") if file else None
    sizes = {name: (section or {}).get(f"parallelism_config_{name}_size", 1) for name in ("sp", "cp", "tp")}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise RecipeError(f"{file}: {name}_size is {size!r}: give a whole number of at least 1.")
    try:
        group_size(sizes, launched(options).processes)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def _read_deepspeed(options: dict, processes: int) -> Sharding:
    stage = options.get("zero_stage", 2)
    devices = {"weights": options.get("offload_param_device"), "optimizer": options.get("offload_optimizer_device")}
    if path := options.get("deepspeed_config_file"):
        try:
            zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            raise UserError(f"the DeepSpeed config {path} cannot be read: {error}") from error
        stage = zero.get("stage", 0)
        parts = {"weights": "offload_param", "optimizer": "offload_optimizer"}
        devices = {part: (zero.get(key) or {}).get("device") for part, key in parts.items()}
    offload = frozenset(part for part, device in devices.items() if device not in (None, "none"))
    return Sharding(f"zero{stage}", processes, offload)
