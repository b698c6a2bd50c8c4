"""The memory of a recipe as `trl-vpo doctor` shows it: a table, whether it fits, and which settings would help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_vpo.doctor.memory import GIB, NF4_SCALES, Estimate, Plan, estimate
from trl_vpo.models import model_size as footprint
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.training.sharding import Sharding

NOTE = (
    "Estimated from the model's own code on tensors without data, for the longest tokenized rows. "
    "Checked against the bytes of real steps on CPUs, not calibrated on GPUs: context and fragmentation are guesses."
)


@dataclass
class Remedy:
    """A setting to change, and what the recipe would take then. `total` None: not estimated."""

    what: str
    total: int | None = None


@dataclass
class Verdict:
    """What a recipe takes on a GPU.

    Attributes:
        found: the estimate.
        sharding: what it holds for.
        there: bytes of the GPU; None: unknown.
        remedies: what to change where it does not fit.
    """

    found: Estimate
    sharding: Sharding
    there: int | None = None
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        return None if self.there is None else self.found.total <= self.there

    def __str__(self) -> str:
        said = f"about {self.found.total / GIB:.1f} GiB on a GPU ({self.sharding}), the most in {self.found.moment}"
        if self.there is None:
            return f"{said}; --gpu_memory GIB says whether it fits"
        return f"{said}; it {'fits into' if self.fits else 'does not fit into'} {self.there / GIB:.1f} GiB"


def judge(plan: Plan, model: Any, args: Any, there: int | None) -> Verdict:
    """Estimate a plan; where it does not fit, also what each remedy would do, and all of them.

    Args:
        plan: what is planned.
        model: its empty model; it is made fake.
        args: the parsed recipe, for the values that it has now.
        there: bytes of the GPU; None: unknown.
    """
    verdict = Verdict(estimate(plan, model), plan.sharding, there)
    if verdict.fits is not False:
        return verdict
    everything = plan
    for what, change in changes(plan, args, model):
        verdict.remedies.append(Remedy(what, estimate(change(plan), model).total))
        everything = change(everything)
    if len(verdict.remedies) > 1 and not any(r.total <= there for r in verdict.remedies):
        verdict.remedies.append(Remedy("all of these", estimate(everything, model).total))
    if not plan.adapter:
        verdict.remedies.append(Remedy("use_peft: true, an adapter instead of all weights"))
    return verdict


def changes(plan: Plan, args: Any, model: Any) -> list[tuple[str, Callable[[Plan], Plan]]]:
    """What may be changed: (settings, what they do to a plan)."""
    found: list[tuple[str, Callable[[Plan], Plan]]] = []
    sharding, pairs = plan.sharding, args.per_device_train_batch_size
    if any(call.features for call in plan.load.calls):
        found.append(
            (_smaller_media(args, plan.load.videos), lambda p: replace(p, load=p.load.halved(), pair=p.pair.halved()))
        )
    if pairs > 1:
        steps = args.gradient_accumulation_steps * pairs
        what = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {steps}"
        found.append((what, lambda p: replace(p, load=p.pair, accumulates=True)))
    if not plan.checkpointing:
        found.append(("gradient_checkpointing: true", lambda p: replace(p, checkpointing=True)))
    if plan.copies > 1 and "precompute_ref_log_probs" not in args.refused:
        found.append(("precompute_ref_log_probs: true", lambda p: replace(p, copies=1)))
    if not plan.adapter and "8bit" not in plan.optimizer and "optimizer" not in sharding.offload:
        found.append(("optim: adamw_8bit", lambda p: replace(p, optimizer="adamw_8bit")))
    if plan.weight_bytes is not None:
        return found
    if plan.adapter and not sharding.splits_weights:  # 4-bit weights cannot be split
        bits, in_4_bit = 0.5 + NF4_SCALES[True], footprint.sizes(model, quantized=True, skip=NOT_QUANTIZED)
        what = "load_in_4bit: true, use_bnb_nested_quant: true"
        found.append((what, lambda p: replace(p, weight_bytes=bits, sizes=in_4_bit)))
    else:
        wider = replace(sharding, processes=2 * sharding.processes) if sharding.splits_weights else None
        wider = wider or Sharding("fsdp", max(2, sharding.processes))
        what = f"accelerate_config: fsdp2 or zero3, num_processes: {wider.processes}"
        found.append((what, lambda p: replace(p, sharding=wider)))
    return found


def _smaller_media(args: Any, videos: bool) -> str:
    settings = [f"max_pixels: {args.max_pixels // 2}" if args.max_pixels else "max_pixels"]
    if videos and args.num_frames:
        settings.append(f"num_frames: {max(1, args.num_frames // 2)}")
    elif videos:
        settings.append(f"max_frames: {max(1, args.max_frames // 2)}")
    return f"half as many tokens of media ({' or '.join(settings)})"


def show_memory(verdict: Verdict, console: Console) -> None:
    """Print the parts and the remedies."""
    table = Table("memory of a GPU, estimated", "GiB", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in verdict.found.parts.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("total", f"{verdict.found.total / GIB:.2f}")
    console.print(table)
    if verdict.remedies:
        table = Table("it does not fit; what would help", "GiB then", "", title_justify="left")
        for remedy in verdict.remedies:
            known = remedy.total is not None
            fits = "" if not known else "fits" if remedy.total <= verdict.there else "not enough"
            table.add_row(remedy.what, f"{remedy.total / GIB:.2f}" if known else "?", fits)
        console.print(table)
    console.print(NOTE, style="dim")
