"""Preference rows, trainers around models of `gpu_checks.models`, and clocks: what the parts of the check share."""

import gc
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import trl
from benchmarks.common import MIB
from benchmarks.model import pictures, text_row
from datasets import Dataset
from peft import LoraConfig

from gpu_checks.models import LANGUAGE_MODEL, Shape
from trl_vpo.doctor.live_bytes import LiveBytes
from trl_vpo.training.methods import method_classes


def preference_row(
    words: int, response: int, *, images: int = 0, frames: int = 0, side: int = 0, box: bool = False, seed: int = 0
) -> dict:
    """Return a row with `words` words and `images` noisy pictures, or a clip of `frames` of them, in its prompt.

    The responses have `response` tokens, with the end of the turn. `box`: a critical box, for LPOI.
    """
    rng = np.random.default_rng(seed)
    media = [{"type": "image"}] * images + [{"type": "video"}] * bool(frames)
    row = text_row(rng, media, words, response)
    paths = pictures(rng, images + frames, side, compress_level=0)
    row |= {"images": paths} if images else {"videos": [paths]} if frames else {}
    return row | ({"critical_box": [side // 4, side // 4, side // 2, side // 2]} if box else {})


def table(rows: list[dict]) -> Dataset:
    """Return rows of unlike columns as a dataset: a row has no media in the columns of others."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name, []) for name in columns} for row in rows])


def settings(method: str, device: str, **options: Any) -> Any:
    """Return the config of a method, or TRL's own for "trl"."""
    own = {} if method == "trl" else {"num_frames": 1024, "check_media": "off"}  # all frames that a clip has
    config_class = trl.DPOConfig if method == "trl" else method_classes(method)[0]
    defaults = {
        "output_dir": tempfile.mkdtemp(prefix="gpu-check-"),
        "max_length": None,
        "learning_rate": 5e-6,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "train_sampling_strategy": "sequential",  # rows are compared
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return config_class(**defaults | own | options)


def lora() -> LoraConfig:
    return LoraConfig(r=16, target_modules=LANGUAGE_MODEL)


def make_trainer(method: str, made: Shape, model: Any, data: Dataset, device: str, **options: Any) -> tuple:
    """(trainer, policy, batch of all rows on the device), as `train` would set them up; "trl" is the stock trainer."""
    args = settings(method, device, per_device_train_batch_size=len(data), **options)
    trainer = (trl.DPOTrainer if method == "trl" else method_classes(method)[1])(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=made.processor,
        peft_config=lora(),
    )
    trainer.current_gradient_accumulation_steps = 1
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = trainer.accelerator.prepare_model(trainer.model).train()
    return trainer, policy, next(iter(trainer.get_train_dataloader()))


def training_step(trainer: Any, policy: Any, batch: dict) -> Callable[[], None]:
    """Return a function that takes a whole step: reference, policy, backward, clipping, optimizer."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = trainer.create_optimizer()

    def step() -> None:
        trainer.training_step(policy, dict(batch), None)  # a new dict: what the trainer adds to it counts, too
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- clocks, memory -----------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Free what nobody holds, and begin new statistics."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held_mib(device: str) -> float:
    return torch.cuda.memory_allocated() / MIB if device == "cuda" else 0.0


def timed(run: Callable[[], Any], device: str, *, warm_up: int, repeats: int, limit: float = 8.0) -> dict:
    """Return seconds (median, minimum, maximum) of at most `repeats` runs, fewer when they take more than `limit`."""
    begin = time.perf_counter()
    for _ in range(warm_up):
        if time.perf_counter() - begin < limit / 2:
            run()
            synchronize(device)
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < limit:
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds), "runs": len(seconds)}


def peak_mib(run: Callable[[], Any], device: str, tensors: Any = ()) -> float:
    """Return the peak of all that is allocated while `run` runs: the allocator's, or the bytes of living tensors.

    `tensors` exist before; only the CPU has to be told.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB
    with LiveBytes(tensors) as live:
        run()
    return live.peak / MIB


def attention_kernels(call: Any) -> list[str] | None:
    """Return the names of the attention kernels that a call runs on the GPU; None where the profiler cannot tell."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = {event.key for event in profile.key_averages()}
    except Exception as error:  # CUPTI is missing, or not allowed
        print(f"profiler: {type(error).__name__}: {error}")
        return None
    wanted = ("flash", "fmha", "attention", "softmax", "cudnn")
    return sorted({name[:60] for name in names if any(word in name.lower() for word in wanted)})
