"""Estimate the memory that a recipe takes on each GPU.

The estimate adds up what is held all the time (weights, a reference model, optimizer states), what a step adds
(`activation_estimate.py`), and what the processes exchange. Three moments of a step may take the most: the vision
tower's pass, the backward pass, and the optimizer's. Checked against the bytes of real training steps on CPUs, within
25 % (`scripts/benchmark.py memory`). Not calibrated on GPUs: `CONTEXT` and `FRAGMENTATION` are guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from trl_vpo.doctor.activation_estimate import Activations, DryStep
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.doctor.workload import Workload, workload_of
from trl_vpo.forward.tree import Tree
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.model_size import Sizes, model_sizes
from trl_vpo.training.sharding import Sharding

GIB = 2**30
CONTEXT = GIB // 2  # of CUDA and its libraries
FRAGMENTATION = 0.1  # of the memory that is freed within a step
BUCKET = 2 * 500_000_000  # DeepSpeed's reduce_bucket_size by default, bytes
LIVE_WEIGHTS = 1_050_000_000  # ZeRO-3's max_live_parameters and prefetch bucket by default, numbers
NF4_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / 64 / 256}  # of a weight, without and with nested scales
COPIES_A_STATE = {"adamw_torch", "stable_adamw", "rmsprop", "adagrad"}  # on GPUs: all weights at once, not fused
OPTIMIZER_STATES = {  # states of a weight; all others are Adam's kin, with two
    "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "schedule_free_sgd": 1, "sgd": 0, "adafactor": 0, "lomo": 0,
}  # fmt: skip


# --- what is estimated --------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The inputs of an estimate; change fields to estimate a variant."""

    sizes: Sizes
    load: Workload  # the heaviest micro-batch ...
    pair: Workload  # ... and that of one pair
    dtype: torch.dtype  # of the weights as loaded
    autocast: torch.dtype | None
    weight_bytes: float | None  # of a quantized weight; None: nothing is quantized
    adapter: bool
    copies: int  # models that are held, 2 with a reference
    optimizer: str
    checkpointing: bool
    accumulation: int  # micro-batches to a step
    options: dict | None = None  # of checkpointing
    dropout: bool = False
    sharding: Sharding = field(default_factory=Sharding)
    half_media: bool = False  # half as many tokens of media
    tower: Activations | None = None  # of the vision tower's pass over whole media; None: it is run
    device: str = "cuda"  # or "cpu"

    @property
    def stored(self) -> torch.dtype:
        """dtype of weights that are not quantized: DeepSpeed casts all of them."""
        return self.autocast if self.autocast and self.sharding.is_zero else self.dtype

    @property
    def computed(self) -> torch.dtype:
        """dtype of the weights that a layer meets: FSDP and DeepSpeed cast what they gather."""
        return self.autocast if self.autocast and self.sharding.kind not in ("none", "ddp") else self.dtype

    @property
    def trained_dtype(self) -> torch.dtype:
        """dtype of the weights that are trained. PEFT casts adapters up, under FSDP TRL some down."""
        fsdp = self.sharding.kind == "fsdp"
        if self.sharding.is_zero:
            return self.stored
        if self.adapter and self.weight_bytes is not None and fsdp:
            return torch.bfloat16
        return torch.float32 if self.adapter or (self.autocast and fsdp) else self.dtype

    @property
    def gradients(self) -> str:
        """The treatment of gradients in a step, see `DryStep`."""
        return "dropped" if self.sharding.splits_gradients else "kept" if self.accumulation > 1 else "grown"


def plan_of(recipe: LoadedRecipe, longest: list[Tree], device: str = "cuda") -> Plan:
    """Plan a recipe whose model is built, with the micro-batch that its longest rows make."""
    args, model_args = recipe.args, recipe.model_args
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    in_bits = NF4_BYTES[model_args.use_bnb_nested_quant] if model_args.load_in_4bit else 1.0
    needs_reference = recipe.trainer_class.needs_reference and not args.precompute_ref_log_probs
    return Plan(
        sizes=model_sizes(recipe.model, quantized=quantized, skip=NOT_QUANTIZED),
        load=workload_of(longest, recipe),
        pair=workload_of(longest[:1], recipe),
        dtype=recipe.dtype,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        weight_bytes=in_bits if quantized else None,
        adapter=model_args.use_peft,
        copies=2 if needs_reference and not model_args.use_peft else 1,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=args.gradient_checkpointing,
        options=args.gradient_checkpointing_kwargs,
        accumulation=args.gradient_accumulation_steps,
        dropout=not args.disable_dropout,
        sharding=recipe.sharding,
        device=device,
    )


# --- the estimate -------------------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """Bytes on one GPU, by part, at the moment of the peak; and those of the vision tower alone."""

    moment: str
    parts: dict[str, int]
    tower: Activations | None  # None: it cannot be run apart from the language model

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(plan: Plan, model: nn.Module) -> Estimate:
    """Estimate a plan's memory for an empty model, with its adapter, which is made fake.

    Inputs are those of all micro-batches of a step: transformers loads them at its beginning. Activations are what the
    forward pass keeps for the backward pass. Working memory is everything else at the peak: a layer that is
    recomputed, logits, the vision tower.
    """
    step = DryStep(
        model,
        weights=plan.computed,
        adapter=plan.trained_dtype,
        autocast=plan.autocast,
        dropout=plan.dropout,
        checkpointing=plan.checkpointing,
        options=plan.options,
        gradients=plan.gradients,
        device=plan.device,
    )
    load, share = (plan.load.halved(), 0.5) if plan.half_media else (plan.load, 1)
    known, text = _passes(step, plan, load)
    tower = known or Activations()
    keeps_inputs = known is None or tower.kept > 0  # for the backward pass of what reads them
    inputs = {"inputs": load.inputs * plan.accumulation}
    trained = plan.sizes.trained * plan.trained_dtype.itemsize
    gradients = int(trained / (plan.sharding.processes if plan.sharding.splits_gradients else 1))
    kept = min(text.kept, text.peak - text.gradients)
    copies = plan.device != "cpu" and plan.optimizer in COPIES_A_STATE
    dequantized = plan.sizes.largest_quantized * (plan.autocast or plan.dtype).itemsize
    moments = {
        "the vision tower's pass": {
            "gradients": gradients * (plan.accumulation > 1 or tower.kept > 0),
            "working memory": load.laid_out + (tower.peak - tower.gradients) * share,
        },
        "the backward pass": {
            "gradients": text.gradients if plan.gradients == "grown" else gradients,
            "activations": kept + tower.kept * share + load.laid_out * keeps_inputs,
            "working memory": text.peak - text.gradients - kept + dequantized,
        },
        "the optimizer's step": {
            "gradients": gradients,
            "working memory": plan.sizes.trained * 4 / plan.sharding.owners * copies,
        },
    }
    for parts in moments.values():
        parts["communication"] = _communication(plan, trained)
        if plan.device == "cuda":
            transient = sum(size for name, size in parts.items() if name != "gradients")
            parts["CUDA context, fragmentation"] = CONTEXT + int(FRAGMENTATION * transient)
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Estimate(moment, {name: int(size) for name, size in (fixed(plan) | inputs | parts).items() if size}, known)


def _passes(step: DryStep, plan: Plan, load: Workload) -> tuple[Activations | None, Activations]:
    """Return the passes of the vision tower and of the language model; None and the whole model's, if that is one."""
    try:
        tower = plan.tower or step.run_tower(plan.load.media)
        return tower, step.run(load.call, 0 if tower.kept else load.laid_out)
    except Exception:  # model code of any origin: its tower or decoder cannot be run apart
        if plan.load.layout is None:
            raise
    whole, share = step.run_whole(plan.load.layout, plan.load.call), load.call.length / plan.load.call.length
    return None, Activations(int(whole.peak * share), whole.gradients, int(whole.kept * share))


def fixed(plan: Plan) -> dict[str, float]:
    """Return the bytes that are held all the time, by part."""
    sizes, sharding = plan.sizes, plan.sharding
    adapter = sizes.trained if plan.adapter else 0
    base = (sizes.total - adapter - sizes.quantized) * plan.stored.itemsize
    base += sizes.quantized * (plan.weight_bytes or 0)
    extra = 0 if plan.adapter else sizes.trained * (plan.trained_dtype.itemsize - plan.stored.itemsize)
    policy = base + extra + adapter * plan.trained_dtype.itemsize
    share = sharding.processes if sharding.splits_weights else 1
    on_gpu = "weights" not in sharding.offload
    states = optimizer_bytes(plan.optimizer, sizes.trained, plan.trained_dtype)
    if sharding.is_zero:
        states = sizes.trained * 4 + optimizer_bytes(plan.optimizer, sizes.trained, torch.float32)
    return {
        "weights": policy / share * on_gpu,
        "reference model": (plan.copies - 1) * base / share * on_gpu,
        "optimizer states": states / sharding.owners * ("optimizer" not in sharding.offload),
    }


def optimizer_bytes(name: str, trained: int, dtype: torch.dtype) -> float:
    """Return the bytes of an optimizer's states, those of paged ones included.

    8-bit optimizers take a byte, and 4 bytes for 256 of them; bitsandbytes' others float32; the rest as weights are.
    """
    states = next((n for key, n in OPTIMIZER_STATES.items() if key in name), 2)
    if "8bit" in name:
        return trained * states * (1 + 4 / 256)
    return trained * states * (4 if "32bit" in name or "bnb" in name else dtype.itemsize)


def _communication(plan: Plan, trained: float) -> float:
    """Return the bytes of buffers between processes.

    DDP: buckets, a second copy of the gradients. DeepSpeed: one bucket; in stage 3 the weights that it keeps gathered.
    FSDP: the LM head, and two layers with their gradients.
    """
    sharding, sizes, number = plan.sharding, plan.sizes, plan.computed.itemsize
    if sharding.kind == "ddp":
        return trained
    if sharding.kind == "zero3":
        return BUCKET + min(LIVE_WEIGHTS, sizes.total) * number
    if sharding.kind == "fsdp":
        whole = sizes.total if sharding.gathers_once else sizes.head + 2 * sizes.layer
        return (whole + (0 if plan.adapter else sizes.head + sizes.layer)) * number
    return BUCKET if sharding.is_zero else 0
