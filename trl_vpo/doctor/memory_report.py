"""The memory of a recipe as `trl-vpo doctor` shows it: a table, whether it fits, and which settings would help."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from torch import nn

from trl_vpo.doctor.measure import Measured
from trl_vpo.doctor.memory import GIB, NF4_BYTES, Estimate, Plan, estimate
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.model_size import model_sizes
from trl_vpo.runs.console import table
from trl_vpo.training.sharding import Sharding

NOTE = "Estimated from the model's own code on tensors without data, for the longest tokenized rows. "
ON_GPU = "Checked against real steps on CPUs, not calibrated on GPUs: context and fragmentation are guesses."
ON_CPU = "Of tensors alone: Python and its libraries take memory beside them."


@dataclass
class Remedy:
    """A setting to change, and the bytes after the change (None: not estimated)."""

    setting: str
    total: int | None = None


@dataclass
class MemoryReport:
    """The memory that a recipe takes on a GPU, or in a process on a CPU."""

    estimate: Estimate
    sharding: Sharding  # that it holds for
    available: int | None = None  # bytes of the GPU; None: unknown
    remedies: list[Remedy] = field(default_factory=list)  # where it does not fit
    measured: Measured | None = None  # where `--measure` asked for it
    on_cpu: bool = False

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.estimate.total <= self.available

    def __str__(self) -> str:
        where = "of tensors on the CPU" if self.on_cpu else "on a GPU"
        text = f"about {self.estimate.total / GIB:.1f} GiB {where} ({self.sharding}), peak in {self.estimate.moment}"
        if self.on_cpu:
            return text
        if self.available is None:
            return f"{text}; pass --gpu_memory GIB to check whether it fits"
        return f"{text}; it {'fits into' if self.fits else 'does not fit into'} {self.available / GIB:.1f} GiB"


def check_fit(plan: Plan, model: nn.Module, args: Any, available: int | None) -> MemoryReport:
    """Estimate a plan; where it does not fit, also with each remedy, and with all of them.

    Its empty model is made fake. `args` is the parsed recipe, `available` the bytes of the GPU, None if unknown.
    """
    on_cpu = plan.device == "cpu"
    report = MemoryReport(estimate(plan, model), plan.sharding, None if on_cpu else available, on_cpu=on_cpu)
    if report.fits is not False:
        return report
    plan = replace(plan, tower=report.estimate.tower)  # run once, where a remedy leaves it as it is
    changes = remedies(plan, args, model)
    for setting, change in changes.items():
        report.remedies.append(Remedy(setting, estimate(replace(plan, **change), model).total))
    if len(changes) > 1 and all(remedy.total > available for remedy in report.remedies):
        change = {name: value for change in changes.values() for name, value in change.items()}
        report.remedies.append(Remedy("all of these", estimate(replace(plan, **change), model).total))
    if not plan.adapter:
        report.remedies.append(Remedy("use_peft: true, an adapter instead of all weights"))
    return report


def remedies(plan: Plan, args: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the possible changes: settings of the recipe, and the fields of the plan that they change."""
    changes: dict[str, dict[str, Any]] = {}
    sharding, pairs = plan.sharding, args.per_device_train_batch_size
    if plan.load.call.features:
        settings = [f"max_pixels: {args.max_pixels // 2}" if args.max_pixels else "max_pixels"]
        if "pixel_values_videos" in plan.load.media:
            key = "num_frames" if args.num_frames else "max_frames"
            settings.append(f"{key}: {max(1, getattr(args, key) // 2)}")
        changes[f"half as many tokens of media ({' or '.join(settings)})"] = {"half_media": True}
    if pairs > 1:
        steps = args.gradient_accumulation_steps * pairs
        setting = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {steps}"
        changes[setting] = {"load": plan.pair, "accumulation": steps, "tower": None}
    if not plan.checkpointing:
        changes["gradient_checkpointing: true"] = {"checkpointing": True, "tower": None}
    if plan.copies > 1 and "precompute_ref_log_probs" not in args.refused:
        changes["precompute_ref_log_probs: true"] = {"copies": 1}
    if not plan.adapter and "8bit" not in plan.optimizer and "optimizer" not in sharding.offload:
        changes["optim: adamw_8bit"] = {"optimizer": "adamw_8bit"}
    if plan.weight_bytes is not None:
        return changes
    if plan.adapter and not sharding.splits_weights:  # 4-bit weights cannot be split
        sizes = model_sizes(model, quantized=True, skip=NOT_QUANTIZED)
        setting = "load_in_4bit: true, use_bnb_nested_quant: true"
        changes[setting] = {"weight_bytes": NF4_BYTES[True], "sizes": sizes}
        return changes
    wider = Sharding("fsdp", max(2, sharding.processes))
    if sharding.splits_weights:
        wider = replace(sharding, processes=2 * sharding.processes)
    changes[f"accelerate_config: fsdp2 or zero3, num_processes: {wider.processes}"] = {"sharding": wider}
    return changes


def show_memory(report: MemoryReport, console: Console) -> None:
    """Print the parts and the remedies."""
    parts = table(f"memory of a {'process' if report.on_cpu else 'GPU'}, estimated", "GiB")
    total = {"total": report.estimate.total}
    measured = report.measured and {
        "measured: tensors (max_memory_allocated)": report.measured.allocated,
        "measured: held by torch (max_memory_reserved)": report.measured.reserved,
    }
    for sizes in (report.estimate.parts, total, measured or {}):
        for name, size in sizes.items():
            parts.add_row(name, f"{size / GIB:.2f}")
        parts.add_section()
    console.print(parts)
    if report.remedies:
        changes = table("does not fit; possible changes", "GiB then", "")
        for remedy in report.remedies:
            size = "?" if remedy.total is None else f"{remedy.total / GIB:.2f}"
            fits = "" if remedy.total is None else "fits" if remedy.total <= report.available else "not enough"
            changes.add_row(remedy.setting, size, fits)
        console.print(changes)
    console.print(NOTE + (ON_CPU if report.on_cpu else ON_GPU), style="dim")
