"""Memory of a training step: what `trl-vpo doctor` estimates against what is measured.

Random Qwen2.5-VL models of several sizes; forward, backward, clipping and optimizer. Measured is the peak of the bytes
of all tensors that are alive, weights and the batch included (`LiveBytes`): exact, the same in every run, and what
torch's allocator counts (`torch.cuda.max_memory_allocated` on a GPU) but for what kernels allocate inside of
themselves. The estimate is the doctor's for a CPU, without CUDA context and fragmentation.

Of some cases the resident memory of a process of its own is shown, too: with what libraries load on first use, the
buffers of BLAS, and freed memory that malloc keeps. It is no measure of the estimate.
"""

import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass, fields

import torch
from peft import LoraConfig
from trl import ModelConfig

from benchmarks import model as bench_model
from benchmarks.common import MIB, memory_of, peak_mib, show
from trl_vpo.doctor.live_bytes import LiveBytes
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.doctor.measure import STEPS, measure_training
from trl_vpo.doctor.memory import Estimate, estimate, plan_of
from trl_vpo.models.model_size import adapt
from trl_vpo.training.methods import method_classes
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
    """One training step."""

    method: str = "dpo"
    hidden: int = 256  # of the language model, as the next two
    layers: int = 4
    vocabulary: int = 8000
    prompt: int = 512  # tokens
    response: int = 96
    pairs: int = 1  # in the micro-batch
    layout: str = "shared"
    checkpointing: bool = True
    every: int = 1  # the layers that are checkpointed
    selective: bool = False  # checkpointing keeps what attention computed
    full: bool = False  # full fine-tuning, else LoRA
    numbers: str = "float32"  # or autocast (bfloat16 on float32 weights), bfloat16 (both), 4bit (QLoRA)
    dropout: float = 0.0  # of LoRA
    frozen: bool = True  # whether full fine-tuning leaves the vision tower as it is
    accumulates: bool = False  # two micro-batches to a step

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in fields(self)}
        changed = [f"{k}={v}" for k, v in asdict(self).items() if v != defaults[k] and k != "method"]
        return ", ".join([self.method, *changed])


CASES = [
    Case(),
    Case(layout="separate"),
    Case(checkpointing=False),
    Case(every=2),
    Case(prompt=2048, selective=True),
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


def recipe_of(case: Case) -> LoadedRecipe:
    """The case as a recipe, without its models."""
    config_class, _ = method_classes(case.method)
    args = config_class(
        tempfile.mkdtemp(),
        layout=case.layout,
        per_device_train_batch_size=case.pairs,
        gradient_accumulation_steps=2 if case.accumulates else 1,
        gradient_checkpointing=case.checkpointing,
        gradient_checkpointing_kwargs={"selective": case.selective, "every_n_layers": case.every},
        max_steps=STEPS,
        save_strategy="no",
        logging_strategy="no",
        bf16=case.numbers != "float32",
        disable_dropout=case.dropout == 0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    dtype = "bfloat16" if case.numbers in ("bfloat16", "4bit") else "float32"
    model_args = ModelConfig(use_peft=not case.full, dtype=dtype, load_in_4bit=case.numbers == "4bit")
    processor = bench_model.processor()
    config = bench_model.model(processor).config
    heads = case.hidden // 32
    sizes = {"hidden_size": case.hidden, "intermediate_size": 3 * case.hidden, "vocab_size": case.vocabulary}
    sizes |= {"num_hidden_layers": case.layers, "num_attention_heads": heads, "num_key_value_heads": heads // 4}
    config.text_config.update(sizes | {"layer_types": ["full_attention"] * case.layers})
    config.vision_config.out_hidden_size = case.hidden
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return LoadedRecipe(case.method, None, args, model_args, None, config=config, processor=processor)


def lora(case: Case) -> LoraConfig | None:
    if case.full:
        return None
    return LoraConfig(r=16, lora_dropout=case.dropout, target_modules=bench_model.LANGUAGE_MODEL)


def rows(case: Case):
    return bench_model.rows(case.prompt, case.response, box=case.method == "lpoi", pairs=case.pairs)


def estimated(case: Case) -> Estimate:
    recipe = recipe_of(case)
    recipe.build()
    if not case.full:
        recipe.model, _ = adapt(recipe.model, lora(case))
    elif case.frozen:
        freeze_vision(recipe.model)
    trees = list(map(recipe.collator().encode, rows(case)))
    return estimate(plan_of(recipe, trees, device="cpu"), recipe.model)


def make_trainer(case: Case):
    recipe = recipe_of(case)
    torch.manual_seed(0)
    model = type(bench_model.model(recipe.processor))(recipe.config).to(getattr(torch, recipe.model_args.dtype))
    if recipe.model_args.load_in_4bit:  # a model is quantized while it is loaded
        recipe.args.model_init_kwargs = {"dtype": recipe.model_args.dtype}
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        model = folder
    data = rows(case)
    trainer = recipe.trainer_class(
        model=model,
        args=recipe.args,
        train_dataset=data.select([*range(len(data))] * recipe.args.gradient_accumulation_steps),
        processing_class=recipe.processor,
        quantization_config=quantization_config(recipe.model_args),
        peft_config=lora(case),
    )
    if case.full and case.frozen:
        freeze_vision(trainer.model)
    return trainer


def compare(case: Case) -> dict:
    estimate, peak = estimated(case), measure_training(make_trainer(case), LiveBytes).allocated
    return {
        "case": str(case),
        "estimated_mib": estimate.total / MIB,
        "measured_mib": peak / MIB,
        "ratio": estimate.total / peak,
        "moment": estimate.moment,
        "parts": {name: round(size / MIB, 2) for name, size in estimate.parts.items()},
    }


def measure_memory(args: Namespace) -> dict:
    """Resident memory of a case: what its model and its steps add, at the peak."""
    case = next(case for case in CASES if str(case) == args.candidate)
    return {"rss_mib": peak_mib(lambda: make_trainer(case).train(), args.device)}


def run(args: Namespace) -> list[dict]:
    compared = [compare(case) for case in CASES]
    for row in compared[:: max(1, len(CASES) // 4)]:
        row |= memory_of(args, row["case"])
    show("memory of a training step", compared, COLUMNS)
    return compared
