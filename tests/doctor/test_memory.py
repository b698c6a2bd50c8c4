"""The doctor's memory: estimated against measured steps, by hand, and for models whose size is known."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from families import FAMILIES, build
from peft import LoraConfig
from trl import ModelConfig
from trl.kernels import chunked_divergence, chunked_logprob

from trl_vpo import LeanPOConfig, RRPOConfig, VisualDPOConfig
from trl_vpo.doctor import memory, memory_report
from trl_vpo.doctor.activation_estimate import TOKEN_CHUNK, Call, DryStep, LiveBytes
from trl_vpo.doctor.memory import GIB
from trl_vpo.doctor.workload import Load
from trl_vpo.forward.scoring import VOCAB_CHUNK
from trl_vpo.models import model_size as footprint
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.training.sharding import Sharding, launched, read_sharding

ROOT = Path(__file__).parents[2]
from benchmarks.memory import Case, compare  # noqa: E402

SMALL = {"hidden": 128, "layers": 3, "vocabulary": 4000, "prompt": 300, "response": 32}
CASES = [
    Case(**SMALL),
    Case(**SMALL, layout="separate", checkpointing=False, pairs=2),
    Case(**SMALL, numbers="autocast", dropout=0.05, checkpointing=False),
    Case(**SMALL, numbers="bfloat16", method="rrpo"),
    Case(**SMALL, full=True, method="leanpo", accumulates=True),
    Case(**SMALL, full=True, checkpointing=False),
    Case(**SMALL, method="lpoi"),
]
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "architectures": ["Qwen2ForCausalLM"],
}
LAYER = 4 * 64 + 3 * 8 + 3 * 8 * 16 + 2 * 8  # attention with biases of q, k, v; MLP; norms
LINEAR = 2 * (4 * 64 + 3 * 8 * 16)
TOTAL = 2 * LAYER + 2 * 32 * 8 + 8
ADAPTER = 2 * 2 * (8 + 8)  # rank 2 on q_proj of two layers
LOAD = Load([Call(rows=2, length=10, masked=0, scored=12)], inputs=100)


# --- against measurements -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimates_are_what_a_real_step_takes(case):
    found = compare(case)
    assert found["ratio"] == pytest.approx(1, abs=0.05), found


def test_a_trained_tower_is_estimated_by_formula():
    case = Case(**SMALL, full=True, frozen=False, method="leanpo", checkpointing=False)
    found = compare(case)
    assert found["ratio"] == pytest.approx(1, abs=0.25), found
    frozen = compare(replace(case, frozen=True))
    assert found["estimated_mib"] > 1.2 * frozen["estimated_mib"]  # so it is of weight here


def test_live_bytes_count_storages_once_until_they_are_freed():
    before = torch.zeros(10)
    live = LiveBytes([before, before.view(2, 5)])
    assert live.now == 40
    with live:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:]
        c = a + 1
        del a, c
        assert live.now == 40 + 400  # the view keeps all of it
        del b
        assert (live.now, live.peak) == (40, 840)
        live.restart()
        torch.zeros(5)
    assert live.peak == 60


def test_live_bytes_are_those_of_the_allocator():
    """torch.profiler reports what the CPU's allocator gives and takes, inside of operations, too."""
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT))
    ids = torch.zeros(4, 200, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        before = live.now
        model(ids).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(ids).logits.sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert live.peak - before == pytest.approx(max(itertools.accumulate(sizes)), rel=0.05)


def test_trl_kernels_have_the_chunks_that_are_counted():
    assert chunked_logprob.TOKEN_CHUNK_SIZE == chunked_divergence.TOKEN_CHUNK_SIZE == TOKEN_CHUNK
    assert chunked_divergence.VOCAB_CHUNK_SIZE == VOCAB_CHUNK  # we choose that of the log-probs


def dry(layers=2, **options):
    model = footprint.empty_model(T.Qwen2Config(**TEXT | {"num_hidden_layers": layers}))
    return DryStep(model, weights=torch.float32, device="cpu", **options)


def test_a_checkpointed_layer_keeps_its_input():
    call = [Call(rows=3, length=20, masked=0, scored=6)]
    two, three = (dry(n).run(call, checkpointing=True, gradients="grown") for n in (2, 3))
    assert three.kept - two.kept == 3 * 20 * 8 * 4  # (R, L, H) float32
    whole = dry().run(call, checkpointing=False, gradients="grown")
    assert whole.kept > 5 * two.kept


def test_gradients_are_counted_once():
    call, weights = [Call(rows=3, length=20, masked=0, scored=6)], TOTAL * 4
    step = dry()
    grown, kept, dropped = (step.run(call, checkpointing=True, gradients=g) for g in ("grown", "kept", "dropped"))
    assert kept.gradients == dropped.gradients == 0
    assert dropped.peak == pytest.approx(kept.peak, rel=0.05)  # both hold the gradient that is being made
    assert 0 < grown.gradients <= weights
    assert grown.peak - grown.gradients <= kept.peak + 32 * 8 * 4


def test_masks_take_memory():
    def kept(masked):
        return dry().run([Call(2, 64, masked, 6)], checkpointing=True, gradients="grown").kept

    assert kept(64) - kept(0) == 2 * 64 * 64  # bool
    assert kept(64) > kept(16) > kept(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_language_model_runs_dry(family):
    model, _ = build(family)
    model.config.architectures = [type(model).__name__]
    step = DryStep(footprint.empty_model(model.config), weights=torch.bfloat16, autocast=torch.bfloat16)
    calls = [Call(rows=2, length=40, masked=12, scored=10, compared=4, features=16)]
    lean, rich = (step.run(calls, checkpointing=c, gradients="grown") for c in (True, False))
    assert 0 < lean.kept < rich.kept < rich.peak


# --- by hand ------------------------------------------------------------------------------------------------------


def plan(args, model_args, *, sizes=None, sharding=None, load=LOAD):
    """(plan, empty model) of a two-layer text model, with LoRA on q_proj if the recipe says so."""
    config = T.Qwen2Config(**TEXT)
    model = footprint.empty_model(config)
    if model_args.use_peft:
        model, _ = footprint.adapt(model, LoraConfig(r=2, target_modules=["q_proj"]))
    counted = footprint.sizes(model, quantized=model_args.load_in_4bit or model_args.load_in_8bit, skip=NOT_QUANTIZED)
    made = memory.plan_of(
        args, model_args, sizes=sizes or counted, load=load, pair=load, config=config,
        needs_reference=not isinstance(args, LeanPOConfig), sharding=sharding,
    )  # fmt: skip
    return made, model


def parts(*given, **more):
    return memory.estimate(*plan(*given, **more)).parts


def config(kind=VisualDPOConfig, **more):
    given = {"bf16": True, "report_to": "none", "per_device_train_batch_size": 1, **more}
    return kind("out", use_cpu=True, **given)


def test_qlora_by_hand():
    args = config(RRPOConfig, optim="adamw_8bit", gradient_accumulation_steps=4)
    model_args = ModelConfig(use_peft=True, load_in_4bit=True, dtype="bfloat16")
    made, _ = plan(args, model_args)
    assert (made.sizes.total, made.sizes.trained, made.sizes.quantized) == (TOTAL + ADAPTER, ADAPTER, LINEAR)
    assert (made.sizes.largest_quantized, made.sizes.head, made.sizes.layer) == (128, 256, LAYER + ADAPTER // 2)
    found = parts(args, model_args)
    assert found["weights"] == int(2 * (TOTAL - LINEAR) + LINEAR * (0.5 + 4 / 64) + 4 * ADAPTER)
    assert found["gradients"] == 4 * ADAPTER
    assert found["optimizer states"] == int(2 * ADAPTER * (1 + 4 / 256))
    assert found["inputs"] == 100
    assert "reference model" not in found  # it is the model without its adapter
    eight = parts(args, ModelConfig(use_peft=True, load_in_8bit=True, dtype="bfloat16"))
    assert eight["weights"] == 2 * (TOTAL - LINEAR) + LINEAR + 4 * ADAPTER


def test_full_fine_tuning_by_hand():
    model_args = ModelConfig(dtype="float32")
    made = parts(config(bf16=False, gradient_accumulation_steps=2), model_args)
    assert made["weights"] == made["reference model"] == made["gradients"] == 4 * TOTAL
    assert made["optimizer states"] == 8 * TOTAL
    assert "reference model" not in parts(config(precompute_ref_log_probs=True), model_args)
    assert "reference model" not in parts(config(LeanPOConfig), model_args)
    lean = plan(config(LeanPOConfig, disable_dropout=False), model_args)[0]
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


def test_known_models():
    """Their repositories say 8,292,166,656 and 3,754,622,976 parameters, 16.6 and 7.5 GB in bfloat16."""
    for shape, total in ((SEVEN, 8_292_166_656), (THREE, 3_754_622_976)):
        model = footprint.empty_model(qwen(shape))
        sizes = footprint.sizes(model, quantized=False, skip=[])
        assert sizes.total == total
        made = replace(plan(config(LeanPOConfig), ModelConfig(dtype="bfloat16"))[0], sizes=sizes, adapter=True)
        found = memory._fixed(replace(made, sizes=replace(sizes, trained=0)))
        assert found["weights"] == 2 * total


SEVEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
THREE = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


def qwen(shape):
    """A Qwen2.5-VL config; both models have the same tower."""
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    made = T.Qwen2_5_VLConfig(
        text_config={**shape, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": shape["hidden_size"]},
        tie_word_embeddings=shape["tie_word_embeddings"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    return made


# --- several processes --------------------------------------------------------------------------------------------


def test_accelerate_configs(tmp_path):
    folder = ROOT / "recipes" / "accelerate"
    read = {file.stem: read_sharding(file, None) for file in folder.glob("*.yaml")}
    assert read.pop("cpu2").processes == 2
    assert read == {
        "single_gpu": Sharding(),
        "ddp": Sharding("ddp", 8),
        "multi_node": Sharding("ddp", 16),
        "zero2": Sharding("zero2", 8),
        "zero3": Sharding("zero3", 8),
        "zero3_offload": Sharding("zero3", 2, frozenset({"weights", "optimizer"})),
        "fsdp2": Sharding("fsdp", 8),
    }
    assert launched(["--config_file", str(folder / "zero2.yaml"), "--num_processes", "4"]) == Sharding("zero2", 4)
    assert launched(["--num_processes", "2"]) == Sharding("ddp", 2)
    assert launched([]) == Sharding()
    deepspeed, named = tmp_path / "ds.json", tmp_path / "named.yaml"
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}))
    named.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n")
    assert read_sharding(named, 3) == Sharding("zero1", 3, frozenset({"optimizer"}))
    deepspeed.write_text("no json")
    with pytest.raises(ValueError, match=r"ds\.json cannot be read"):
        read_sharding(named, 3)


def test_what_is_split_by_hand():
    args, model_args = config(LeanPOConfig, gradient_accumulation_steps=2), ModelConfig(dtype="float32")

    def under(kind, offload=frozenset()):
        return parts(args, model_args, sharding=Sharding(kind, 4, offload))

    ddp = under("ddp")
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer states"]) == (4 * TOTAL, 4 * TOTAL, 8 * TOTAL)
    assert ddp["communication"] == 4 * TOTAL  # its buckets
    two = under("zero2")  # bfloat16 weights, float32 ones beside the optimizer's states
    assert (two["weights"], two["gradients"], two["optimizer states"]) == (2 * TOTAL, 2 * TOTAL // 4, 12 * TOTAL // 4)
    one = under("zero1")
    assert (one["gradients"], one["optimizer states"]) == (2 * TOTAL, 12 * TOTAL // 4)
    three = under("zero3")
    assert (three["weights"], three["gradients"]) == (2 * TOTAL // 4, 2 * TOTAL // 4)
    assert three["communication"] == memory.BUCKET + 2 * TOTAL  # a model this small stays gathered
    fsdp = under("fsdp")
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer states"]) == (TOTAL, TOTAL, 2 * TOTAL)
    assert fsdp["communication"] == 2 * (2 * 256 + 3 * LAYER)  # head, two layers, and their gradients
    away = under("zero3", frozenset({"weights", "optimizer"}))
    assert "weights" not in away and "optimizer states" not in away


# --- what would help ----------------------------------------------------------------------------------------------


def judged(args, model_args, there, **more):
    made, model = plan(args, model_args, **more)
    return memory_report.judge(made, model, args, there)


def test_remedies_in_their_order():
    load = Load([Call(8, 400, 400, 60, features=1600)], inputs=10_000, laid_out=10_000, patches=[3200], videos=True)
    pair = Load([Call(2, 400, 400, 15, features=400)], inputs=2500, laid_out=2500, patches=[800], videos=True)
    args = config(per_device_train_batch_size=4, gradient_checkpointing=False, num_frames=8, max_pixels=4096)
    made, model = plan(args, ModelConfig(use_peft=True, dtype="bfloat16"), load=load)
    verdict = memory_report.judge(replace(made, pair=pair), model, args, there=GIB // 2)
    assert verdict.fits is False
    assert [remedy.what for remedy in verdict.remedies] == [
        "half as many tokens of media (max_pixels: 2048 or num_frames: 4)",
        "per_device_train_batch_size: 1, gradient_accumulation_steps: 4",
        "gradient_checkpointing: true",
        "load_in_4bit: true, use_bnb_nested_quant: true",
        "all of these",
    ]
    *alone, together = [remedy.total for remedy in verdict.remedies]
    assert all(total < verdict.found.total for total in alone[:3])  # there is too little in this model to quantize
    assert together < min(alone)
    assert load.halved().calls == [Call(8, 300, 300, 60, features=800)]


def test_remedies_of_full_fine_tuning():
    args = config()
    verdict = judged(args, ModelConfig(dtype="float32"), there=1)
    said = [remedy.what for remedy in verdict.remedies]
    assert said[:3] == [
        "precompute_ref_log_probs: true",
        "optim: adamw_8bit",
        "accelerate_config: fsdp2 or zero3, num_processes: 2",
    ]
    assert said[-1].startswith("use_peft: true") and verdict.remedies[-1].total is None
    rrpo = judged(config(RRPOConfig), ModelConfig(dtype="float32"), there=1, sharding=Sharding("fsdp", 4))
    said = [remedy.what for remedy in rrpo.remedies]
    assert "precompute_ref_log_probs: true" not in said  # RRPO cannot
    assert "accelerate_config: fsdp2 or zero3, num_processes: 8" in said


def test_what_fits_needs_no_remedy():
    verdict = judged(config(), ModelConfig(dtype="float32"), there=24 * GIB)
    assert verdict.fits and not verdict.remedies and "fits into 24.0 GiB" in str(verdict)
    unknown = judged(config(), ModelConfig(dtype="float32"), there=None)
    assert unknown.fits is None and not unknown.remedies and "--gpu_memory" in str(unknown)
    assert unknown.found.parts["CUDA context, fragmentation"] >= memory.CONTEXT
