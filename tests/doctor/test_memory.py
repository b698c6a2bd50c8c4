"""The doctor's memory: estimated against measured steps, by hand, and for models whose size is known."""

from dataclasses import replace

import pytest
import torch
from benchmarks.memory import Case, compare
from memory_plans import ADAPTER, LAYER, LINEAR, TOTAL, args_of, plan
from published_models import PARAMETERS, PUBLISHED
from trl import ModelConfig

from trl_vpo import LeanPOConfig, RRPOConfig
from trl_vpo.doctor import memory
from trl_vpo.doctor.activation_estimate import Activations, Call, DryStep
from trl_vpo.doctor.memory import GIB
from trl_vpo.doctor.memory_report import check_fit
from trl_vpo.doctor.workload import Workload
from trl_vpo.models.model_size import empty_model, model_sizes
from trl_vpo.training.sharding import Sharding

SMALL = {"hidden": 128, "layers": 2, "vocabulary": 2000, "prompt": 300, "response": 32}
CASES = [
    Case(**SMALL),
    Case(**SMALL, layout="separate", checkpointing=False, pairs=2),
    Case(**SMALL, numbers="bfloat16", method="rrpo"),
    Case(**SMALL, full=True, frozen=False, method="leanpo"),  # trains the tower
    Case(**SMALL, method="lpoi"),
]
SLOW = [
    Case(**SMALL | {"layers": 4}, every=2),
    Case(**SMALL, selective=True),
    Case(**SMALL, numbers="autocast", dropout=0.05, checkpointing=False),
    Case(**SMALL, full=True, method="leanpo", accumulates=True),
    Case(**SMALL, full=True, checkpointing=False),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_estimates_are_what_a_real_step_takes(case):
    row = compare(case)
    assert row["ratio"] == pytest.approx(1, abs=0.06), row


# --- by hand ------------------------------------------------------------------------------------------------------


def parts(*given, **more):
    return memory.estimate(*plan(*given, **more)).parts


def test_qlora_by_hand():
    args = args_of(RRPOConfig, optim="adamw_8bit", gradient_accumulation_steps=4)
    model_args = ModelConfig(use_peft=True, load_in_4bit=True, dtype="bfloat16")
    sizes = plan(args, model_args)[0].sizes
    assert (sizes.total, sizes.trained, sizes.quantized) == (TOTAL + ADAPTER, ADAPTER, LINEAR)
    assert (sizes.largest_quantized, sizes.head, sizes.layer) == (128, 256, LAYER + ADAPTER // 2)
    estimate = parts(args, model_args)
    assert estimate["weights"] == int(2 * (TOTAL - LINEAR) + LINEAR * (0.5 + 4 / 64) + 4 * ADAPTER)
    assert estimate["gradients"] == 4 * ADAPTER
    assert estimate["optimizer states"] == int(2 * ADAPTER * (1 + 4 / 256))
    assert estimate["inputs"] == 4 * 100  # all micro-batches of a step
    assert "reference model" not in estimate  # it is the model without its adapter
    eight = parts(args, ModelConfig(use_peft=True, load_in_8bit=True, dtype="bfloat16"))
    assert eight["weights"] == 2 * (TOTAL - LINEAR) + LINEAR + 4 * ADAPTER


def test_full_fine_tuning_by_hand():
    model_args = ModelConfig(dtype="float32")
    estimate = parts(args_of(bf16=False, gradient_accumulation_steps=2), model_args)
    assert estimate["weights"] == estimate["reference model"] == estimate["gradients"] == 4 * TOTAL
    assert estimate["optimizer states"] == 8 * TOTAL
    assert "reference model" not in parts(args_of(precompute_ref_log_probs=True), model_args)
    assert "reference model" not in parts(args_of(LeanPOConfig), model_args)
    lean = plan(args_of(LeanPOConfig, disable_dropout=False), model_args)[0]
    assert (lean.copies, lean.dropout, lean.stored, lean.autocast) == (1, True, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("adamw_torch_fused", torch.float32, 800),
        ("adamw_torch", torch.bfloat16, 400),
        ("adamw_8bit", torch.float32, 203.125),
        ("paged_adamw_8bit", torch.bfloat16, 203.125),
        ("paged_adamw_32bit", torch.bfloat16, 800),
        ("lion_32bit", torch.float32, 400),
        ("ademamix", torch.float32, 1200),
        ("sgd", torch.float32, 0),
        ("adafactor", torch.float32, 0),
    ],
)
def test_optimizer_states(name, dtype, size):
    assert memory.optimizer_bytes(name, 100, dtype) == size


@pytest.mark.parametrize(("name", "total"), PARAMETERS.items())
def test_published_models(name, total):
    sizes = model_sizes(empty_model(PUBLISHED[name]()[0]), quantized=False, skip=[])
    assert sizes.total == total
    planned = replace(plan(args_of(LeanPOConfig), ModelConfig(dtype="bfloat16"))[0], adapter=True)
    assert memory.fixed(replace(planned, sizes=replace(sizes, trained=0)))["weights"] == 2 * total


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "states", "communication"),
    [
        ("ddp", 4 * TOTAL, 4 * TOTAL, 8 * TOTAL, 4 * TOTAL),  # its buckets
        ("zero1", 2 * TOTAL, 2 * TOTAL, 3 * TOTAL, memory.BUCKET),
        ("zero2", 2 * TOTAL, TOTAL / 2, 3 * TOTAL, memory.BUCKET),  # float32 weights beside the optimizer's states
        ("zero3", TOTAL / 2, TOTAL / 2, 3 * TOTAL, memory.BUCKET + 2 * TOTAL),  # so small a model stays gathered
        ("fsdp", TOTAL, TOTAL, 2 * TOTAL, 2 * (2 * 256 + 3 * LAYER)),  # head, two layers, and their gradients
    ],
)
def test_what_four_processes_split(kind, weights, gradients, states, communication):
    args, model_args = args_of(LeanPOConfig, gradient_accumulation_steps=2), ModelConfig(dtype="float32")
    estimate = parts(args, model_args, sharding=Sharding(kind, 4))
    names = ("weights", "gradients", "optimizer states", "communication")
    assert [estimate[name] for name in names] == [weights, gradients, states, communication]
    if kind == "zero3":
        away = parts(args, model_args, sharding=Sharding(kind, 4, frozenset({"weights", "optimizer"})))
        assert not {"weights", "optimizer states"} & set(away)


# --- what would help ----------------------------------------------------------------------------------------------


def test_remedies_in_their_order(monkeypatch):
    monkeypatch.setattr(DryStep, "run_tower", lambda self, media: Activations(1000))  # the model is one of text
    videos = {"pixel_values_videos": torch.zeros(1)}
    load = Workload(Call(8, 400, True, 60, features=1600), inputs=10_000, laid_out=10_000, media=videos)
    pair = Workload(Call(2, 400, True, 15, features=400), inputs=2500, laid_out=2500, media=videos)
    args = args_of(per_device_train_batch_size=4, gradient_checkpointing=False, num_frames=8, max_pixels=4096)
    planned, model = plan(args, ModelConfig(use_peft=True, dtype="bfloat16"), load=load)
    report = check_fit(replace(planned, pair=pair), model, args, GIB // 2)
    assert report.fits is False
    assert [remedy.setting for remedy in report.remedies] == [
        "half as many tokens of media (max_pixels: 2048 or num_frames: 4)",
        "per_device_train_batch_size: 1, gradient_accumulation_steps: 4",
        "gradient_checkpointing: true",
        "load_in_4bit: true, use_bnb_nested_quant: true",
        "all of these",
    ]
    *alone, together = [remedy.total for remedy in report.remedies]
    assert all(total < report.estimate.total for total in alone[:3])  # there is too little in this model to quantize
    assert together < min(alone)
    assert load.halved().call == Call(8, 300, True, 60, features=800)


def test_remedies_of_full_fine_tuning():
    model_args = ModelConfig(dtype="float32")
    report = check_fit(*plan(args_of(), model_args), args_of(), 1)
    settings = [remedy.setting for remedy in report.remedies]
    assert settings[:3] == [
        "precompute_ref_log_probs: true",
        "optim: adamw_8bit",
        "accelerate_config: fsdp2 or zero3, num_processes: 2",
    ]
    assert settings[-1].startswith("use_peft: true") and report.remedies[-1].total is None
    rrpo = args_of(RRPOConfig)
    report = check_fit(*plan(rrpo, model_args, sharding=Sharding("fsdp", 4)), rrpo, 1)
    settings = [remedy.setting for remedy in report.remedies]
    assert "precompute_ref_log_probs: true" not in settings  # RRPO cannot
    assert "accelerate_config: fsdp2 or zero3, num_processes: 8" in settings


def test_what_fits_needs_no_remedy():
    model_args = ModelConfig(dtype="float32")
    report, unknown = (check_fit(*plan(args_of(), model_args), args_of(), size) for size in (24 * GIB, None))
    assert report.fits and not report.remedies and "fits into 24.0 GiB" in str(report)
    assert unknown.fits is None and not unknown.remedies and "--gpu_memory" in str(unknown)
    assert unknown.estimate.parts["CUDA context, fragmentation"] >= memory.CONTEXT
