"""The memory of a recipe as `trl-vpo doctor` shows it: a table, whether it fits, and which settings would help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from trl_vpo.doctor.activation_estimate import Activations
from trl_vpo.doctor.measure import Measured
from trl_vpo.doctor.memory import GIB, NF4_BYTES, Estimate, Plan, estimate
from trl_vpo.doctor.workload import Workload
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.model_size import model_sizes
from trl_vpo.training.sharding import Sharding

NOTE = (
    "Estimated from the model's own code on tensors without data, for the longest tokenized rows. "
    "Checked against the bytes of real steps on CPUs, not calibrated on GPUs: context and fragmentation are guesses."
)


@dataclass
class Remedy:
    """A setting to change, and what the recipe would take then. `total` None: not estimated."""

    setting: str
    total: int | None = None


@dataclass
class MemoryReport:
    """The memory that a recipe takes on a GPU.

    Attributes:
        estimate: by what takes it.
        sharding: the processes that it holds for.
        available: bytes of the GPU; None: unknown.
        remedies: what to change where it does not fit.
        measured: the peak of real steps, where `--measure` asked for it.
    """

    estimate: Estimate
    sharding: Sharding
    available: int | None = None
    remedies: list[Remedy] = field(default_factory=list)
    measured: Measured | None = None

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.estimate.total <= self.available

    def __str__(self) -> str:
        size = f"about {self.estimate.total / GIB:.1f} GiB on a GPU ({self.sharding})"
        text = f"{size}, the most in {self.estimate.moment}"
        if self.available is None:
            return f"{text}; --gpu_memory GIB says whether it fits"
        return f"{text}; it {'fits into' if self.fits else 'does not fit into'} {self.available / GIB:.1f} GiB"


def check_fit(plan: Plan, model: nn.Module, args: Any, available: int | None) -> MemoryReport:
    """Estimate a plan; where it does not fit, also with each remedy, and with all of them.

    Args:
        plan: what is planned.
        model: its empty model; it is made fake.
        args: the parsed recipe, for the values that it has now.
        available: bytes of the GPU; None: unknown.
    """
    report = MemoryReport(estimate(plan, model), plan.sharding, available)
    if report.fits is not False:
        return report
    plan = every = replace(plan, tower=report.estimate.tower)  # of whatever a remedy leaves as it is
    for setting, change in remedies(plan, args, model):
        report.remedies.append(Remedy(setting, estimate(change(plan), model).total))
        every = change(every)
    if len(report.remedies) > 1 and not any(remedy.total <= available for remedy in report.remedies):
        report.remedies.append(Remedy("all of these", estimate(every, model).total))
    if not plan.adapter:
        report.remedies.append(Remedy("use_peft: true, an adapter instead of all weights"))
    return report


def remedies(plan: Plan, args: Any, model: nn.Module) -> list[tuple[str, Callable[[Plan], Plan]]]:
    """List what may be changed: (settings, what they do to a plan)."""
    changes: list[tuple[str, Callable[[Plan], Plan]]] = []
    sharding, pairs = plan.sharding, args.per_device_train_batch_size
    if any(call.features for call in plan.load.calls):
        changes.append((_smaller_media(args, plan.load), _halve_media))
    if pairs > 1:
        steps = args.gradient_accumulation_steps * pairs
        setting = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {steps}"
        changes.append((setting, lambda p: replace(p, load=p.pair, accumulation=steps, tower=None)))
    if not plan.checkpointing:
        changes.append(("gradient_checkpointing: true", lambda p: replace(p, checkpointing=True, tower=None)))
    if plan.copies > 1 and "precompute_ref_log_probs" not in args.refused:
        changes.append(("precompute_ref_log_probs: true", lambda p: replace(p, copies=1)))
    if not plan.adapter and "8bit" not in plan.optimizer and "optimizer" not in sharding.offload:
        changes.append(("optim: adamw_8bit", lambda p: replace(p, optimizer="adamw_8bit")))
    if plan.weight_bytes is not None:
        return changes
    if plan.adapter and not sharding.splits_weights:  # 4-bit weights cannot be split
        sizes = model_sizes(model, quantized=True, skip=NOT_QUANTIZED)
        setting = "load_in_4bit: true, use_bnb_nested_quant: true"
        changes.append((setting, lambda p: replace(p, weight_bytes=NF4_BYTES[True], sizes=sizes)))
    else:
        processes = max(2, sharding.processes * (2 if sharding.splits_weights else 1))
        wider = replace(sharding, kind=sharding.kind if sharding.splits_weights else "fsdp", processes=processes)
        setting = f"accelerate_config: fsdp2 or zero3, num_processes: {processes}"
        changes.append((setting, lambda p: replace(p, sharding=wider)))
    return changes


def _smaller_media(args: Any, load: Workload) -> str:
    settings = [f"max_pixels: {args.max_pixels // 2}" if args.max_pixels else "max_pixels"]
    if any("pixel_values_videos" in inputs for inputs in load.media):
        key = "num_frames" if args.num_frames else "max_frames"
        settings.append(f"{key}: {max(1, getattr(args, key) // 2)}")
    return f"half as many tokens of media ({' or '.join(settings)})"


def _halve_media(plan: Plan) -> Plan:
    return replace(plan, load=plan.load.halved(), pair=plan.pair.halved(), tower=_scaled(plan.tower, 0.5))


def _scaled(tower: Activations | None, share: float) -> Activations | None:
    """A tower's memory for a share of its pixels. (Its gradients do not shrink, but count for nothing here.)"""
    return tower and Activations(int(tower.peak * share), int(tower.gradients * share), int(tower.kept * share))


def show_memory(report: MemoryReport, console: Console) -> None:
    """Print the parts and the remedies."""
    table = Table("memory of a GPU, estimated", "GiB", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in report.estimate.parts.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("total", f"{report.estimate.total / GIB:.2f}")
    if report.measured is not None:
        table.add_section()
        table.add_row("measured: tensors (max_memory_allocated)", f"{report.measured.allocated / GIB:.2f}")
        table.add_row("measured: held by torch (max_memory_reserved)", f"{report.measured.reserved / GIB:.2f}")
    console.print(table)
    if report.remedies:
        table = Table("it does not fit; what would help", "GiB then", "", title_justify="left")
        for remedy in report.remedies:
            if remedy.total is None:
                table.add_row(remedy.setting, "?", "")
            else:
                fits = "fits" if remedy.total <= report.available else "not enough"
                table.add_row(remedy.setting, f"{remedy.total / GIB:.2f}", fits)
        console.print(table)
    console.print(NOTE, style="dim")
