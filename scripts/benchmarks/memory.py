"""Memory of a training step: what `trl-vpo doctor` estimates against what is measured.

Random Qwen2.5-VL models of several sizes; forward, backward, clipping and optimizer. Measured is the peak of the bytes
of all tensors that are alive, weights and the batch included (`activation_estimate.LiveBytes`): exact, the same in
every run, and what torch's allocator counts (`torch.cuda.max_memory_allocated` on a GPU) but for what kernels allocate
inside of themselves. The estimate is the doctor's for a CPU, without CUDA context and fragmentation.

Of some cases the resident memory of a process of its own is shown, too: with what libraries load on first use, the
buffers of BLAS, and freed memory that malloc keeps. It is no measure of the estimate.
"""

import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from peft import LoraConfig
from torch.utils._pytree import tree_leaves
from trl import ModelConfig

from benchmarks import model as bench_model
from benchmarks.common import MIB, memory_of, peak_mib, show
from trl_vpo.doctor import memory
from trl_vpo.doctor.activation_estimate import LiveBytes
from trl_vpo.doctor.workload import load_of
from trl_vpo.models import model_size as footprint
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.training.run import freeze_vision, quantization_config

COLUMNS = {
    "case": "case",
    "estimated_mib": "estimated MiB",
    "measured_mib": "measured MiB",
    "ratio": "estimated / measured",
    "moment": "at",
    "rss_mib": "resident MiB",
}


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        method: dpo, leanpo, rrpo or lpoi.
        hidden, layers, vocabulary: of the language model.
        prompt, response: tokens; `pairs`: in the micro-batch.
        layout, checkpointing, full: shared or separate; gradient checkpointing; full fine-tuning or LoRA.
        numbers: float32, autocast (bfloat16 on float32 weights), bfloat16 (weights and autocast) or 4bit (QLoRA).
        dropout: of LoRA.
        frozen: whether full fine-tuning leaves the vision tower as it is.
        accumulates: two micro-batches to a step.
    """

    method: str = "dpo"
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 8000
    prompt: int = 512
    response: int = 96
    pairs: int = 1
    layout: str = "shared"
    checkpointing: bool = True
    full: bool = False
    numbers: str = "float32"
    dropout: float = 0.0
    frozen: bool = True
    accumulates: bool = False

    def __str__(self) -> str:
        told = {k: v for k, v in asdict(self).items() if v != type(self).__dataclass_fields__[k].default}
        return ", ".join([self.method, *(f"{k}={v}" for k, v in told.items() if k != "method")])


CASES = [
    Case(),
    Case(layout="separate"),
    Case(checkpointing=False),
    Case(layout="separate", checkpointing=False, pairs=2),
    Case(hidden=512, layers=8, prompt=1024),
    Case(layers=8, prompt=2048),
    Case(hidden=768, pairs=4),
    Case(hidden=768, layers=8, layout="separate", checkpointing=False),
    Case(hidden=512, numbers="autocast", dropout=0.05, checkpointing=False),
    Case(hidden=512, numbers="bfloat16", dropout=0.05),
    Case(numbers="bfloat16", checkpointing=False, layout="separate"),
    Case(method="leanpo", hidden=512, layers=6, prompt=1024),
    Case(method="leanpo", hidden=512, full=True),
    Case(method="leanpo", prompt=1024, full=True, checkpointing=False),
    Case(method="leanpo", prompt=1024, full=True, accumulates=True, numbers="autocast"),
    Case(method="leanpo", prompt=1024, full=True, frozen=False),
    Case(method="leanpo", prompt=1024, full=True, frozen=False, checkpointing=False),
    Case(hidden=512, full=True),
    Case(method="rrpo", pairs=2, vocabulary=32000),
    Case(method="rrpo", layers=8, prompt=1024, response=256, vocabulary=64000),
    Case(method="rrpo", full=True, vocabulary=32000),
    Case(method="rrpo", vocabulary=32000, numbers="bfloat16"),
    Case(hidden=512, numbers="4bit"),
    Case(hidden=512, numbers="4bit", checkpointing=False),
    Case(method="lpoi", prompt=280),
    Case(method="lpoi", prompt=280, pairs=2, checkpointing=False),
    Case(method="lpoi", prompt=280, layout="separate"),
]


def configured(case: Case, folder: str):
    """(trainer class, its config, the parsed recipe's model options)."""
    import trl_vpo

    name = {"dpo": "VisualDPO", "leanpo": "LeanPO", "rrpo": "RRPO", "lpoi": "LPOI"}[case.method]
    args = getattr(trl_vpo, f"{name}Config")(
        folder,
        layout=case.layout,
        per_device_train_batch_size=case.pairs,
        gradient_accumulation_steps=2 if case.accumulates else 1,
        gradient_checkpointing=case.checkpointing,
        bf16=case.numbers != "float32",
        disable_dropout=case.dropout == 0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    dtype = "bfloat16" if case.numbers in ("bfloat16", "4bit") else "float32"
    model_args = ModelConfig(use_peft=not case.full, dtype=dtype, load_in_4bit=case.numbers == "4bit")
    return getattr(trl_vpo, f"{name}Trainer"), args, model_args


def model_config(case: Case, processor):
    config = bench_model.model(processor).config
    heads = case.hidden // 32
    sizes = {"hidden_size": case.hidden, "intermediate_size": 3 * case.hidden, "vocab_size": case.vocabulary}
    sizes |= {"num_hidden_layers": case.layers, "num_attention_heads": heads, "num_key_value_heads": heads // 4}
    for key, value in sizes.items():
        setattr(config.text_config, key, value)
    config.text_config.layer_types = ["full_attention"] * case.layers
    config.vision_config.out_hidden_size = case.hidden
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def lora(case: Case) -> LoraConfig | None:
    if case.full:
        return None
    return LoraConfig(r=16, lora_dropout=case.dropout, target_modules=bench_model.LANGUAGE_MODEL)


def rows(case: Case):
    return bench_model.rows(case.prompt, case.response, box=case.method == "lpoi", pairs=case.pairs)


def estimated(case: Case) -> memory.Estimate:
    processor = bench_model.processor()
    trainer, args, model_args = configured(case, tempfile.mkdtemp())
    config = model_config(case, processor)
    model = footprint.empty_model(config)
    base = model
    if (adapter := lora(case)) is not None:
        model, _ = footprint.adapt(model, adapter)
    elif case.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not footprint.VISION.search(name))
    collator = trainer.make_collator(processor, args)
    load = load_of(
        [collator.encode(row) for row in rows(case)],
        base,
        layout=case.layout,
        media_tokens={config.image_token_id},
        pad_token_id=processor.tokenizer.pad_token_id,
        compares=trainer.needs_kl,
    )
    sizes = footprint.sizes(model, quantized=model_args.load_in_4bit, skip=NOT_QUANTIZED)
    needs = trainer.needs_reference
    plan = memory.plan_of(
        args, model_args, sizes=sizes, load=load, pair=load, config=config, needs_reference=needs, device="cpu"
    )
    return memory.estimate(plan, model)


def make_step(case: Case):
    """(trainer, batch, a function that takes an optimizer step, with the states of an earlier one)."""
    processor = bench_model.processor()
    kind, args, model_args = configured(case, tempfile.mkdtemp())
    torch.manual_seed(0)
    model = type(bench_model.model(processor))(model_config(case, processor)).to(getattr(torch, model_args.dtype))
    if model_args.load_in_4bit:
        args.model_init_kwargs = {"dtype": model_args.dtype}
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        model = folder
    trainer = kind(
        model=model,
        args=args,
        train_dataset=rows(case),
        processing_class=processor,
        quantization_config=quantization_config(model_args),
        peft_config=lora(case),
    )
    if case.full and case.frozen:
        freeze_vision(trainer.model)
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    if case.checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = trainer.accelerator.prepare_model(trainer.model)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))

    def steps() -> None:
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trainer.optimizer.step()
        policy.zero_grad(set_to_none=True)
        for _ in range(args.gradient_accumulation_steps):
            trainer.training_step(policy, dict(batch), None)
        trainer.accelerator.clip_grad_norm_(policy.parameters(), 1.0)
        trainer.optimizer.step()

    return trainer, batch, steps


def measured(case: Case) -> int:
    """Peak of the bytes of all tensors alive."""
    trainer, batch, steps = make_step(case)
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    there = [t for m in models for t in (*m.parameters(), *m.buffers())]
    there += [t.quant_state.absmax for t in there if getattr(t, "quant_state", None) is not None]
    live = LiveBytes([*there, *(x for x in tree_leaves(batch) if isinstance(x, torch.Tensor))])
    with live:
        steps()
    return live.peak


def compare(case: Case) -> dict:
    found, peak = estimated(case), measured(case)
    return {
        "case": str(case),
        "estimated_mib": found.total / MIB,
        "measured_mib": peak / MIB,
        "ratio": found.total / peak,
        "moment": found.moment,
        "parts": {name: round(size / MIB, 2) for name, size in found.parts.items()},
    }


def measure_memory(args: Namespace) -> dict:
    """Resident memory of a case: what its model and its step add, at the peak."""
    case = next(case for case in CASES if str(case) == args.contestant)
    made = SimpleNamespace()

    def everything() -> None:
        made.trainer, _, steps = make_step(case)
        steps()

    return {"rss_mib": peak_mib(everything, args.device)}


def run(args: Namespace) -> list[dict]:
    compared = [compare(case) for case in CASES]
    for row in compared[:: max(1, len(CASES) // 4)]:
        row |= memory_of(args, row["case"])
    show("memory of a training step", compared, COLUMNS)
    return compared
