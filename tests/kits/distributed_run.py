"""Cases of one optimizer step and one evaluation, run by several processes and by one (see test_distributed.py).

    torchrun --nproc_per_node 2 distributed_run.py ddp|zero2|zero3|fsdp2 OUT [CASE ...]

Rank 0 writes OUT: what each case gave. The engines run on the CPU, over gloo. The case "bad row" comes last and ends
in an error: rank 1 meets a row whose image is gone.
"""

import os
import sys
from pathlib import Path

ENGINE = sys.argv[1] if __name__ == "__main__" else None  # None: imported by the test, for one process
if ENGINE:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_HOME": "/nonexistent"}
if ENGINE in ("zero2", "zero3"):
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
elif ENGINE == "ddp":
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
elif ENGINE == "fsdp2":  # accelerate takes FSDP on the CPU for plain DDP: it has to be told that this is a device
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, cpu, sm, backend=None: ("gloo", DistributedType.MULTI_GPU)

import copy
import functools
import tempfile
import time

import families
import torch
import transformers as T
from accelerate import ParallelismConfig, PartialState
from datasets import Dataset
from helpers import message, row, write_clip, write_image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from trainer_kit import METHODS, PAIRS, fresh, lora, shake, trainable, trainer_of
from transformers import TrainerCallback

from trl_vpo.evaluate.callback import EvaluationCallback
from trl_vpo.forward.parts import part_of
from trl_vpo.models.load import NOT_QUANTIZED


class ChangedTrainer(METHODS["dpo"][1]):
    """A subclass that changes the loss, takes no notice of `num_items_in_batch`, and logs a number of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, scores = super().compute_loss(model, inputs, return_outputs=True)
        if not self.model.training:
            return loss + 10
        self._metrics["train"]["mine"].append(self.accelerator.gather(loss.detach()).mean().item())
        return loss + 1e-3 * scores.sums.square().mean()


EVERYWHERE = r".*\.(q|k|v|o|gate|up|down|out)_proj|.*\.(qkv|fc1|fc2|proj)"  # LoRA on the vision tower, too
CASES = {
    # What is compared: one process that accumulates four micro-batches, and two processes that accumulate two.
    **{f"{m}-shared": {"method": m, "layout": "shared"} for m in ("dpo", "leanpo", "rrpo", "lpoi")},
    "dpo-separate": {"method": "dpo", "layout": "separate"},
    # The last micro-batch of rank 1 has one row, and only the mean loss at the end tells of the second step.
    "seven rows": {"method": "leanpo", "rows": 7, "max_steps": 2, "learning_rate": 0.1, "logging_first_step": True,
                   "logging_steps": 5},
    "changed loss": {"method": "changed"},
    "a stream of three files": {"method": "dpo", "layout": "shared", "shards": 3},
    "vision trained": {"method": "rrpo", "peft_config": lora(target_modules="all"),
                       "vision_learning_rate": 0.5, "projector_learning_rate": 0.25},
    "unlike clips": {"method": "dpo", "name": "LLaVA-NeXT-Video", "kind": "unlike", "layout": "shared"},
    "contrast": {"method": "dpo", "kind": "contrast", "anchor_weight": 0.5},
    "images and clips": {"method": "rrpo", "name": "LLaVA-OneVision", "kind": "both", "num_frames": 4},
    "unlike prompts": {"method": "dpo", "name": "text", "kind": "prompts", "layout": "shared", "scale": 0.3,
                       "peft_config": lora(text=True), "loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 2.0]},
    # The two processes compute each row together: they accumulate as often as one.
    "sp, Qwen2.5": {"method": "rrpo", "name": "Qwen2.5-VL", "kind": "both", "sp_size": 2,
                    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
                    "ddp_find_unused_parameters": False},
    # Three steps make rounding grow, the more the larger they are.
    "sp, Qwen3": {"method": "lpoi", "name": "Qwen3-VL", "sp_size": 2, "max_steps": 3, "learning_rate": 0.1,
                  "peft_config": lora(target_modules=EVERYWHERE),
                  "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    # The load-balancing loss is one of a micro-batch: no row fills up the last one of the evaluation.
    "experts": {"method": "dpo", "name": "Qwen3-VL MoE", "router_aux_loss_coef": 1.0, "evaluated": 4},
    "sp, experts": {"method": "leanpo", "name": "Qwen3-VL MoE", "router_aux_loss_coef": 1.0, "evaluated": 4,
                    "sp_size": 2},
    "unlike prompts, auto": {"method": "dpo", "name": "text", "kind": "prompts", "scale": 0.3,
                             "peft_config": lora(text=True)},
}  # fmt: skip
SLOW = {  # of the slow job: the other methods; rows that processes share, two for each family, and four
    **{m: {"method": m, "eval_divergence": True} for m in ("simpo", "tdpo", "ddpo", "dpa")},
    "mdpo": {"method": "mdpo", "kind": "pictures"},
    "vision trained, recomputed": {
        "method": "dpo",
        "peft_config": lora(target_modules=EVERYWHERE),
        "gradient_checkpointing": True,
    },
    "projector trained": {
        "method": "rrpo",
        "gradient_checkpointing": True,
        "peft_config": lora(target_modules=rf"{families.LANGUAGE_MODEL}|.*merger\.mlp\.[02]"),
    },
    "unlike clips, separate": {"method": "rrpo", "name": "LLaVA-NeXT-Video", "kind": "unlike", "layout": "separate"},
    "symmpo": {"method": "symmpo", "kind": "others"},
    **{f"{m}-separate": {"method": m, "layout": "separate"} for m in ("leanpo", "rrpo", "lpoi")},
    **{
        f"sp, {name}": {"method": "dpo", "name": name, "sp_size": 2, "use_weighting": True}
        for name in families.FAMILIES
    },
    "sp, separate": {"method": "leanpo", "name": "Qwen2.5-VL", "layout": "separate", "sp_size": 2},
    "sp 2 of 4": {"method": "rrpo", "name": "Qwen3-VL", "kind": "both", "sp_size": 2, "measures": True},
    "sp 4 of 4": {"method": "dpo", "name": "Qwen2.5-VL", "sp_size": 4, "precompute_ref_log_probs": True},
}  # two heads have keys of their own: four ranks share them
QUANTIZED = {f"{m}, 4 bits": {"method": m, "four_bits": True} for m in ("dpo", "rrpo")}


def wide_model():
    """A Qwen2-VL, and its processor, whose widths are multiples of 64, as 4 bits need on a CPU."""
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return families._qwen("Qwen2VL", vision, rope={"mrope_section": [2, 3, 3]}, text=text)


def load_four_bits(folder):
    quantization = T.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
    return T.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantization)


@functools.cache
def four_bit_model():
    model, processor = wide_model()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(sys.argv[2]).with_suffix(".base") if ENGINE else own  # only the first process writes a model
        model.save_pretrained(folder)
        PartialState().wait_for_everyone()
        return load_four_bits(folder), processor


def rows_of(kind, count, folder):
    """Rows in the order in which two ranks take them, two each in turn: rank 0 gets 0, 1, 4, 5, rank 1 the rest."""
    images = [write_image(folder / f"{i}.png", size, i) for i, size in enumerate([(56, 56), (112, 56), (56, 112)])]
    long, short = (write_clip(folder / f"{n}.mp4", n, seed=n % 3) for n in (12, 5))
    text, picture = (None, ()), ("image", images[:1])
    media = {
        "images": [text, text, picture, ("image", images[1:2])],  # rank 0 has text only, rank 1 images only
        "list": [("image", images[:1])],
        "unlike": [text, text, ("video", [long]), ("video", [short])],  # rank 1 makes two calls of its micro-batches
        "both": [picture, ("video", [long]), ("video", [short]), ("video", [long])],
        "prompts": [text],
        "contrast": [picture, text, text, picture],  # rank 0 has contrasts and text, rank 1 text and a pair
        "pictures": [picture, ("image", images[1:2])],
        "others": [picture, ("image", images[1:2])],
    }[kind]
    rows = []
    for i in range(count):
        of_kind, sources = media[i % len(media)]
        more, prompt = {"id": f"row{i}", "images": None, "videos": None, "weight": (1.0, 0.5, None, 2.0)[i % 4]}, {}
        if kind == "list":
            more |= {"image_list": images[: 2 + i % 2], "critical_box": None}
        if kind == "prompts" and i % 4 == 0:  # rank 0 would make two calls of its micro-batches, rank 1 one
            prompt = {"prompt": message("user", "a red square moves left. " * 60)}
        if kind == "contrast":
            more |= {"rejected_images": images[1:2] if i % 4 == 0 else None}
        if kind == "others":
            more |= {"other_images": images[2:], "other_chosen": message("assistant", PAIRS[i - 1][0])}
        rows.append(more | row(of_kind, sources, *PAIRS[i % len(PAIRS)], **prompt))
        if more.get("rejected_images"):
            rows[-1]["rejected"] = None
    return rows


class Watch(TrainerCallback):
    """The gradients that the optimizer would get, and a log that one rank writes alone."""

    def __init__(self, trainer):
        self.trainer, self.names, self.grads = trainer, set(trainable(trainer.model)), None

    def params(self):
        return {name: p for name, p in self.trainer.model.named_parameters() if name in self.names}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before, self.grads = {name: whole(p).clone() for name, p in self.params().items()}, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.log({"alone": 1.0})
        if all(p.grad is not None for p in self.params().values()):
            self.grads = {name: whole(p.grad) for name, p in self.params().items()}

    def on_step_end(self, args, state, control, **kwargs):
        if self.grads is None:  # DeepSpeed keeps them to itself: plain SGD subtracted them, times the learning rate
            rates = {"vision": args.vision_learning_rate, "projector": args.projector_learning_rate}
            steps = {name: self.before[name] - whole(p) for name, p in self.params().items()}
            rate_of = lambda name: rates.get(part_of(name)) or args.learning_rate  # noqa: E731
            self.grads = {name: step / rate_of(name) for name, step in steps.items()}


def whole(weight):
    """A weight or gradient that may be sharded, as a plain tensor. All ranks call this."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone().float()
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().float()


def engine_options():
    if ENGINE not in ("zero2", "zero3"):
        return {"use_cpu": ENGINE != "fsdp2"}
    zero = {"zero_optimization": {"stage": int(ENGINE[-1])}, "zero_allow_untested_optimizer": True}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"use_cpu": True, "deepspeed": zero | dict.fromkeys(sizes, "auto")}


def run_case(
    method,
    name="Qwen2-VL",
    kind=None,
    rows=8,
    evaluated=5,
    processes=1,
    sp_size=1,
    four_bits=False,
    scale=0.05,
    measures=False,
    shards=None,
    **more,
):
    """The log of the step, the metrics of the evaluation, gradients and saved adapter by name, layout and wrapper."""
    if method == "changed":
        method, more = "dpo", {**more, "kind": ChangedTrainer}
    with tempfile.TemporaryDirectory() as folder:
        data = rows_of(kind or ("list" if method == "lpoi" else "images"), rows, Path(folder))
        options = {
            "max_steps": 1, "gradient_accumulation_steps": 4 // max(processes // sp_size, 1), "optim": "sgd",
            "learning_rate": 1.0, "max_grad_norm": 1e9, "train_sampling_strategy": "sequential",
            "eval_dataset": Dataset.from_list(data[:evaluated]), **engine_options(), **more,
        }  # fmt: skip
        if processes > 1 and sp_size > 1:
            options["parallelism_config"] = ParallelismConfig(sp_size=sp_size)
        model, processor = copy.deepcopy(four_bit_model()) if four_bits else (None, None)
        options = {"model": model, "processor": processor, "peft_config": lora(), "peft": None, **options}
        data = Dataset.from_list(data).to_iterable_dataset(num_shards=shards) if shards else data
        trainer = trainer_of(method, folder, data, name=name, **options)
        if four_bits:  # DPOTrainer made their LoRA bfloat16, which is too coarse to compare sums
            for weight in trainable(trainer.model).values():
                weight.data = weight.data.float()
        shake(trainer.model, scale=scale)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        if rows % 2:  # accelerate would fill the last batch up
            pairs = [list(range(i, min(i + 2, rows))) for i in range(0, rows, 2)]
            mine = pairs[trainer.args.process_index :: processes]
            loader = DataLoader(trainer.train_dataset, batch_sampler=mine, collate_fn=trainer.data_collator)
            trainer.get_train_dataloader = lambda: loader
        train_loss = trainer.train().training_loss
        logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry][-1]
        assert ("alone" in trainer.state.log_history[0]) == trainer.is_world_process_zero()
        trainer.save_model(f"{folder}/saved")
        scores = trainer.evaluate()
        trainer.accelerator.wait_for_everyone()
        saved = f"{folder}/saved/adapter_model.safetensors"
        return {
            "measures": measures_of(trainer, trainer.train_dataset.select(range(3))) if measures else {},
            "logged": logged | {"train_loss": train_loss},
            "eval": {k: v for k, v in scores.items() if not k.endswith(("runtime", "per_second", "time"))},
            "grads": watch.grads,
            "saved": load_file(saved) if trainer.is_world_process_zero() else None,
            "layout": trainer.scorer.layout,
            "wrapper": type(trainer.model_wrapped).__name__,
        }


def measures_of(trainer, rows):
    """What `EvaluationCallback` measures, and what `compute_metrics` would get: every row once."""
    chosen, _ = trainer.predict(rows).predictions
    return EvaluationCallback(trainer, rows, sensitivity=()).measure() | dict(enumerate(chosen.tolist()))


def meet_bad_row(when):
    """Train until rank 1 meets row 6, whose image is deleted after the check of the dataset; write the time down."""
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of("list", 8, Path(folder))
        rows[6]["image_list"] = [write_image(Path(folder) / f"gone{i}.png", seed=i) for i in range(2)]
        rows[6]["images"] = None
        options = {"max_steps": 4, "train_sampling_strategy": "sequential", "dataloader_num_workers": 1}
        trainer = trainer_of("lpoi", folder, rows, name="Qwen2-VL", use_cpu=True, **options)
        trainer.accelerator.wait_for_everyone()
        Path(rows[6]["image_list"][1]).unlink(missing_ok=True)
        try:
            trainer.train()
        except Exception:
            if trainer.args.process_index == 1:
                when.write_text(str(time.time()))
            raise


def main():
    import torch.distributed as dist

    out, cases = Path(sys.argv[2]), sys.argv[3:] or list(CASES)
    PartialState(cpu=ENGINE != "fsdp2")
    if ENGINE.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for name in {CASES.get(case, {}).get("name", "Qwen2-VL") for case in cases}:
        fresh(name)  # ZeRO-3 would shard models that are built after the first trainer
    if set(QUANTIZED) & set(cases):
        four_bit_model()
    done = {}
    for case in cases:
        if case == "bad row":
            meet_bad_row(out.with_suffix(".failed"))
        done[case] = run_case(**(CASES | QUANTIZED | SLOW)[case], processes=dist.get_world_size())
        # In one piece: both ranks write to the same pipe.
        sys.stdout.write(f"rank {dist.get_rank()} of {dist.get_world_size()}: {ENGINE}, {case}\n")
        sys.stdout.flush()
        if dist.get_rank() == 0:
            torch.save(done, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
