"""Run by two processes (see test_wrappers.py): one step in each layout under a distributed engine, gradients compared.

torchrun --nproc_per_node 2 two_processes.py ddp|fsdp2|zero3
"""

import os
import sys
import tempfile
from pathlib import Path

ENGINE = sys.argv[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
if ENGINE == "zero3":
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
    del os.environ["ACCELERATE_USE_CPU"]
if ENGINE == "fsdp2":  # accelerate takes FSDP on the CPU for plain DDP: it has to be told that this is a device
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Qwen2VLDecoderLayer"
    del os.environ["ACCELERATE_USE_CPU"]
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, cpu, sm, backend=None: ("gloo", DistributedType.MULTI_GPU)

sys.path.insert(0, str(Path(__file__).parents[1]))  # families, helpers

import torch
import torch.distributed as dist
from datasets import Dataset
from families import LANGUAGE_MODEL, build
from helpers import row, write_image
from peft import LoraConfig
from transformers import TrainerCallback

import trl_vpo


class Keep(TrainerCallback):
    """The gradients of the first step, as they are before the optimizer takes them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad and p.grad is not None]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        self.grads = torch.cat([g.flatten().float() for g in whole]) if whole else None


def train(layout: str, folder: Path, data: Dataset, model, processor):
    keep = Keep()
    args = trl_vpo.RRPOConfig(
        str(folder / layout),
        layout=layout,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=ENGINE != "fsdp2",
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=ENGINE != "fsdp2",
        gradient_checkpointing_kwargs={"use_reentrant": ENGINE == "zero3"} if ENGINE != "fsdp2" else None,
        deepspeed={
            "zero_optimization": {"stage": 3},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
        }
        if ENGINE == "zero3"
        else None,
    )
    lora = LoraConfig(r=4, target_modules=LANGUAGE_MODEL)
    trainer = trl_vpo.RRPOTrainer(
        model, args=args, train_dataset=data, processing_class=processor, peft_config=lora, callbacks=[keep]
    )
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    kind = type(trainer.model_wrapped).__name__
    return trainer.scorer.layout, [(e["loss"], e["kl/chosen"], e["grad_norm"]) for e in logs], keep.grads, kind


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    images = [write_image(folder / f"{i}.png", size, i) for i, size in enumerate([(56, 56), (112, 56)])]
    pairs = [("a red square.", "a blue square."), ("two circles move.", "one circle moves to the left.")]
    data = Dataset.from_list([row("image", [images[i % 2]], *pairs[i % 2], id=str(i)) for i in range(8)])
    built = {layout: build("Qwen2-VL") for layout in ("separate", "shared", "auto")}  # before ZeRO-3 shards new models
    want = train("separate", folder, data, *built["separate"])
    for layout in ("shared", "auto"):
        got = train(layout, folder, data, *built[layout])
        assert got[0] == "shared" and want[0] == "separate", (got[0], want[0])
        for a, b in zip(got[1], want[1]):
            assert all(abs(x - y) <= 1e-4 * max(1e-3, abs(y)) for x, y in zip(a, b)), (layout, got[1], want[1])
        if want[2] is not None:
            difference = ((got[2] - want[2]).norm() / want[2].norm()).item()
            assert difference < 1e-4, (layout, difference)
    print(
        f"rank {dist.get_rank()} of {dist.get_world_size()}: {ENGINE} ({got[3]}) agrees, losses {want[1]}", flush=True
    )
    dist.destroy_process_group()


main()
