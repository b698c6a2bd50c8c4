"""Twenty steps of RRPO on real video files: decoding, processor, training, all as `trl-vpo train` does it.

The clips are written by PyAV, H.264 where its FFmpeg has libx264, else MPEG-4. The model is the 2B one, 4-bit where
bitsandbytes is installed (it is saved first: models are quantized while they are loaded), else bfloat16.
"""

import math
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from transformers import TrainerCallback
from trl import ModelConfig

from gpu_checks import models
from gpu_checks.trainers import free, lora, peak_mib, preference_row, settings, synchronize, table
from trl_vpo import RRPOTrainer
from trl_vpo.training.run import quantization_config

CLIPS, FRAMES, RATE = 4, 144, 24


def cells(options: Any) -> list[dict]:
    numbers = "4bit" if find_spec("bitsandbytes") else "bfloat16"
    note = {} if numbers == "4bit" else {"instead": "bitsandbytes is not installed: LoRA on bfloat16 weights"}
    return [{"method": "rrpo", "model": "2B", "numbers": numbers, "steps": 2 if options.tiny else 20} | note]


def write_clip(path: Path, seed: int, width: int, height: int, frames: int) -> str:
    """Write a clip of a moving square, and return the codec."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        image = np.random.default_rng(seed).integers(0, 128, (height, width, 3), dtype=np.uint8)
        side = height // 4
        for i in range(frames):
            picture, left = image.copy(), i * (width - side) // frames
            picture[side : 2 * side, left : left + side] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return codec


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self, device: str):
        self.seconds: list[float] = []
        self._device = device

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(self._device)
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._begin)


def run(cell: dict, options: Any) -> list[dict]:
    device, steps = options.device, cell["steps"]
    free(device)
    begin = time.perf_counter()
    made = models.whole(cell["model"], options.tiny)
    size = (made.side, made.side, 12) if options.tiny else (640, 360, FRAMES)
    rows, folder = [], Path(tempfile.mkdtemp(prefix="gpu-check-"))
    for i in range(CLIPS):
        path = folder / f"{i}.mp4"
        codec = write_clip(path, i, *size)
        row = preference_row(16, 8 if options.tiny else 128, frames=1, side=28, seed=i)
        rows.append(row | {"videos": [str(path)]})
    trainer = _trainer(cell, made, table(rows), folder, options)
    clock = Clock(device)
    trainer.add_callback(clock)
    ready = time.perf_counter() - begin
    peak = peak_mib(trainer.train, device, [*trainer.model.parameters(), *trainer.model.buffers()])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = any(bool(p.any()) for name, p in trainer.model.named_parameters() if "lora_B" in name)
    row = {"codec": codec, "losses": [round(losses[0], 4), round(losses[-1], 4)], "peak_mib": peak}
    row["ok"] = len(clock.seconds) == steps and all(map(math.isfinite, losses)) and moved
    row |= {"seconds": median(clock.seconds), "seconds_first": clock.seconds[0], "seconds_to_load": ready}
    return [row]


def _trainer(cell: dict, made: models.Shape, data: Any, folder: Path, options: Any) -> Any:
    device, quantized = options.device, cell["numbers"] == "4bit"
    args = settings(
        "rrpo",
        device,
        max_steps=cell["steps"],
        per_device_train_batch_size=1,
        num_frames=4 if options.tiny else 16,
        logging_strategy="steps",
        logging_steps=1,
        bf16=True,
    )
    model, quantization = models.build(made, device, torch.bfloat16), None
    if quantized:
        model.save_pretrained(folder / "model")
        model = str(folder / "model")
        free(device)
        args.model_init_kwargs = {"dtype": "bfloat16", "attn_implementation": "sdpa"}
        quantization = quantization_config(ModelConfig(dtype="bfloat16", use_peft=True, load_in_4bit=True))
    return RRPOTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=made.processor,
        quantization_config=quantization,
        peft_config=lora(),
    )
