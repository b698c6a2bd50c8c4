"""How much memory a recipe takes on each GPU, by what is in it, and what would make it less.

The estimate adds up what is there all the time (weights, a reference model, optimizer states), what a step adds
(`activation_estimate.py`), and what the processes need to exchange. A step has three moments that may take the
most: the vision tower's pass, the backward pass, and the optimizer's. Checked against the bytes of real training steps
on CPUs, within 25 % (`scripts/benchmark.py memory`). Not calibrated on GPUs: `CONTEXT` and `FRAGMENTATION` are
guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from trl_vpo.doctor.activation_estimate import Activations, DryStep
from trl_vpo.doctor.workload import Load
from trl_vpo.models.model_size import Sizes
from trl_vpo.training.sharding import Sharding

GIB = 2**30
CONTEXT = GIB // 2  # of CUDA and its libraries
FRAGMENTATION = 0.1  # of all that comes and goes within a step
BUCKET = 2 * 500_000_000  # DeepSpeed's reduce_bucket_size by default, bytes
LIVE_WEIGHTS = 1_050_000_000  # ZeRO-3's max_live_parameters and prefetch bucket by default, numbers
NF4_SCALES = {False: 4 / 64, True: 1 / 64 + 4 / 64 / 256}  # bytes per weight, without and with nested quantization
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZER_STATES = {  # states of a weight; all others are Adam's kin, with two
    "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "schedule_free_sgd": 1, "sgd": 0, "adafactor": 0, "lomo": 0,
}  # fmt: skip


# --- what is estimated --------------------------------------------------------------------------------------------


@dataclass
class Tower:
    """The vision tower: widths, layers, activation function, rotary positions or not, and whether it is trained."""

    hidden: int = 0
    intermediate: int = 0
    layers: int = 0
    activation: str = ""
    rotary: bool = False
    trained: bool = False

    @classmethod
    def of(cls, config: Any, trained: bool) -> Tower:
        """From a model's config; nothing for a text model."""
        vision = getattr(config, "vision_config", None)
        if vision is None:
            return cls()
        named = lambda *names: next((v for n in names if (v := getattr(vision, n, None))), 0)  # noqa: E731
        hidden = named("embed_dim", "hidden_size")  # Qwen2-VL's hidden_size is the language model's
        inner = named("intermediate_size") or int(hidden * (named("mlp_ratio") or 4))
        rotary = hasattr(vision, "spatial_merge_size")  # Qwen's
        return cls(hidden, inner, named("depth", "num_hidden_layers"), str(named("hidden_act")), rotary, trained)


@dataclass
class Plan:
    """All that an estimate needs.

    Attributes:
        sizes: numbers of weights.
        load, pair: the heaviest micro-batch, and that of one pair.
        dtype: of the weights as loaded.
        autocast: dtype of autocast; None: none.
        weight_bytes: of a quantized weight; None: nothing is quantized.
        adapter: whether an adapter is trained.
        copies: how many models are held, 2 with a reference.
        optimizer: its name.
        checkpointing, accumulates, dropout: gradient checkpointing, gradient accumulation, dropout.
        device: "cuda", or "cpu" to be compared with what is measured there.
    """

    sizes: Sizes
    load: Load
    pair: Load
    dtype: torch.dtype
    autocast: torch.dtype | None
    weight_bytes: float | None
    adapter: bool
    copies: int
    optimizer: str
    checkpointing: bool
    accumulates: bool
    dropout: bool = False
    tower: Tower = field(default_factory=Tower)
    sharding: Sharding = field(default_factory=Sharding)
    device: str = "cuda"

    @property
    def stored(self) -> torch.dtype:
        """dtype of weights that are not quantized: DeepSpeed casts all of them."""
        return self.autocast if self.autocast and self.sharding.kind.startswith("zero") else self.dtype

    @property
    def computed(self) -> torch.dtype:
        """dtype of the weights that a layer meets: FSDP and DeepSpeed cast what they gather."""
        return self.autocast if self.autocast and self.sharding.kind not in ("none", "ddp") else self.dtype

    @property
    def trained_dtype(self) -> torch.dtype:
        """dtype of the weights that are trained. PEFT casts adapters up, under FSDP TRL some down."""
        if self.sharding.kind.startswith("zero"):
            return self.stored
        if self.adapter and self.weight_bytes is not None and self.sharding.kind == "fsdp":
            return torch.bfloat16
        return torch.float32 if self.adapter or (self.autocast and self.sharding.kind == "fsdp") else self.dtype


def plan_of(
    args: Any,
    model_args: Any,
    *,
    sizes: Sizes,
    load: Load,
    pair: Load,
    config: Any,
    needs_reference: bool,
    sharding: Sharding | None = None,
    device: str = "cuda",
) -> Plan:
    """The plan of a parsed recipe: `args`, `model_args`, what was counted for it, and the model's config."""
    four = 0.5 + NF4_SCALES[model_args.use_bnb_nested_quant]
    holds_reference = needs_reference and not args.precompute_ref_log_probs and not model_args.use_peft
    return Plan(
        sizes=sizes,
        load=load,
        pair=pair,
        dtype=DTYPES.get(model_args.dtype) or getattr(config, "dtype", None) or torch.float32,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        weight_bytes=four if model_args.load_in_4bit else 1.0 if model_args.load_in_8bit else None,
        adapter=model_args.use_peft,
        copies=2 if holds_reference else 1,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
        dropout=not args.disable_dropout,
        tower=Tower.of(config, sizes.trains_tower),
        sharding=sharding or Sharding(),
        device=device,
    )


# --- the estimate -------------------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """Bytes on one GPU by what they are, at the moment that takes the most."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(plan: Plan, model: Any) -> Estimate:
    """The memory of a plan for an empty model, with its adapter, which `DryStep` makes fake.

    - weights: numbers times bytes, once more for a reference model, divided by the processes that share them.
    - gradients and optimizer states of trained weights: see `optimizer_bytes`; DeepSpeed adds float32 weights to them.
    - inputs: ids, masks and pixels of the batch.
    - activations: what the language model keeps for the backward pass, and the vision tower, if it is trained.
    - working memory: what is there besides at the worst moment: a layer computed again, logits, the vision tower.
    - communication: buckets of gradients, gathered weights.
    - CUDA context and fragmentation: `CONTEXT`, and `FRAGMENTATION` of all that is not there all the time.
    """
    shards = plan.sharding.processes
    split = lambda on: shards if on else 1  # noqa: E731
    trained = plan.sizes.trained * plan.trained_dtype.itemsize
    gradients = int(trained / split(plan.sharding.splits_gradients))
    fixed = _fixed(plan)
    step = DryStep(
        model,
        weights=plan.computed,
        adapter=plan.trained_dtype,
        autocast=plan.autocast,
        dropout=plan.dropout,
        device=plan.device,
    )
    done = step.run(
        plan.load.calls,
        checkpointing=plan.checkpointing,
        gradients=_gradients(plan),
        inputs=0 if plan.tower.trained else plan.load.laid_out,  # a trained tower keeps them longer
    )
    tower = _tower(plan)
    moments = {
        "the vision tower's pass": {"gradients": gradients * plan.accumulates, "working memory": tower["pass"]},
        "the backward pass": _backward(plan, done, tower["kept"], gradients),
        "the optimizer's step": {"gradients": gradients, "working memory": _optimizer_working(plan)},
    }
    for parts in moments.values():
        parts["communication"] = _communication(plan, trained)
        if plan.device == "cuda":
            coming = sum(size for name, size in parts.items() if name != "gradients")
            parts["CUDA context, fragmentation"] = CONTEXT + int(FRAGMENTATION * coming)
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Estimate(moment, {name: int(size) for name, size in (fixed | parts).items() if size})


def _fixed(plan: Plan) -> dict[str, float]:
    """What is there all the time."""
    sizes, sharding = plan.sizes, plan.sharding
    own = sizes.trained if plan.adapter else 0
    base = (sizes.total - own - sizes.quantized) * plan.stored.itemsize + sizes.quantized * (plan.weight_bytes or 0)
    extra = 0 if plan.adapter else sizes.trained * (plan.trained_dtype.itemsize - plan.stored.itemsize)
    policy = base + extra + own * plan.trained_dtype.itemsize
    share = sharding.processes if sharding.splits_weights else 1
    on_gpu = "weights" not in sharding.offload
    states = optimizer_bytes(plan.optimizer, sizes.trained, plan.trained_dtype)
    if sharding.kind.startswith("zero"):
        states = sizes.trained * 4 + optimizer_bytes(plan.optimizer, sizes.trained, torch.float32)
    owners = sharding.processes if sharding.kind not in ("none", "ddp") else 1
    return {
        "weights": policy / share * on_gpu,
        "reference model": (plan.copies - 1) * base / share * on_gpu,
        "optimizer states": states / owners * ("optimizer" not in sharding.offload),
        "inputs": plan.load.inputs,
    }


def optimizer_bytes(name: str, trained: int, dtype: torch.dtype) -> float:
    """Bytes of an optimizer's states: two for every weight as it is stored, for Adam's kin.

    8-bit optimizers take a byte, and 4 bytes for 256 of them; bitsandbytes' others float32. Paged ones may lie in CPU
    memory for a time; they are counted.
    """
    states = next((n for key, n in OPTIMIZER_STATES.items() if key in name), 2)
    if "8bit" in name:
        return trained * states * (1 + 4 / 256)
    if "4bit" in name:
        return trained * states * (0.5 + 4 / 128)
    return trained * states * (4 if "32bit" in name or "bnb" in name else dtype.itemsize)


def _gradients(plan: Plan) -> str:
    if plan.sharding.splits_gradients:
        return "dropped"
    return "kept" if plan.accumulates else "grown"


def _backward(plan: Plan, done: Activations, tower: float, gradients: int) -> dict[str, float]:
    there = gradients if plan.accumulates or plan.sharding.splits_gradients else done.gradients
    rest = done.peak - done.gradients
    kept = min(done.kept, rest)
    dequantized = plan.sizes.largest_quantized * (plan.autocast or plan.dtype).itemsize
    return {"gradients": there, "activations": kept + tower, "working memory": rest - kept + dequantized}


def _tower(plan: Plan) -> dict[str, float]:
    """Bytes of the vision tower's pass, and of what it keeps where it is trained.

    Counted on CLIP, SigLIP, InternVL, Idefics2 and Qwen2-, 2.5- and 3-VL, in numbers for a patch. At work, an MLP has
    4 * hidden + 3 * intermediate, attention 6 * hidden, or 10 float32 ones with rotary positions. A block keeps for
    its backward pass 9 * hidden, rotary 11, gated 14, and 2 * intermediate, 3 with QuickGELU, 4 gated; with gradient
    checkpointing only its input.
    """
    tower, number = plan.tower, (plan.autocast or plan.dtype).itemsize
    gated = tower.activation == "silu"
    attention = 10 * tower.hidden * 4 if tower.rotary else 6 * tower.hidden * number
    block = max(attention, (4 * tower.hidden + 3 * tower.intermediate) * number)
    work = plan.load.laid_out + max(plan.load.patches, default=0) * block
    if not tower.trained:
        return {"pass": work, "kept": 0}
    inner = 4 if gated else 3 if tower.activation == "quick_gelu" else 2
    whole = (14 if gated else 11 if tower.rotary else 9) * tower.hidden + inner * tower.intermediate
    kept = sum(plan.load.patches) * tower.layers * (tower.hidden if plan.checkpointing else whole) * number
    return {"pass": work + kept, "kept": plan.load.laid_out + kept}


def _optimizer_working(plan: Plan) -> float:
    """Adam without a fused kernel updates all weights at once on GPUs, through a copy of one state."""
    if plan.device == "cpu" or plan.optimizer not in ("adamw_torch", "stable_adamw", "rmsprop", "adagrad"):
        return 0
    owners = plan.sharding.processes if plan.sharding.kind not in ("none", "ddp") else 1
    return plan.sizes.trained * 4 / owners


def _communication(plan: Plan, trained: float) -> float:
    """DDP: its buckets are a second copy of the gradients. DeepSpeed: one bucket, and in stage 3 the weights that it
    keeps gathered. FSDP: the LM head, and two layers with their gradients."""
    sharding, sizes = plan.sharding, plan.sizes
    number = plan.computed.itemsize
    if sharding.kind == "ddp":
        return trained
    if sharding.kind == "zero3":
        return BUCKET + min(LIVE_WEIGHTS, sizes.total) * number
    if sharding.kind == "fsdp":
        whole = sizes.total if sharding.gathers_once else sizes.head + 2 * sizes.layer
        return (whole + (0 if plan.adapter else sizes.head + sizes.layer)) * number
    return BUCKET if sharding.kind.startswith("zero") else 0
