"""What each way to save memory saves and costs: a training step under each of them, in turn.

Kept is what lies in the GPU's memory between forward and backward pass, weights and batch not counted; the peak is of
the whole step. On a CPU both are counted exactly, as the tensors that would lie on the GPU (`DeviceBytes`). What is
moved to the host is counted apart. Such moves are copies within the same memory here: their seconds say nothing about
a GPU, and get no ratio.
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers.modeling_utils
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from trl.models import get_act_offloading_ctx_manager

from benchmarks.common import MIB, in_turn, show, summary
from benchmarks.step import make_rows, make_trainer
from trl_vpo.doctor.live_bytes import LiveBytes

KNOBS = {
    "nothing": {"gradient_checkpointing": False},
    "gradient_checkpointing": {},
    "every_n_layers: 2": {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    "selective: true": {"gradient_checkpointing_kwargs": {"selective": True}},
    "offload: true": {"gradient_checkpointing_kwargs": {"offload": True}},
    "selective and offload": {"gradient_checkpointing_kwargs": {"selective": True, "offload": True}},
    "activation_offloading alone": {"gradient_checkpointing": False, "activation_offloading": True},
    "activation_offloading and checkpointing": {"activation_offloading": True},
}
COLUMNS = {
    "knob": "setting",
    "method": "method",
    "seconds": "seconds (min-max)",
    "time_vs_nothing": "time / nothing's",
    "kept_mib": "kept MiB",
    "kept_vs_nothing": "kept / nothing's",
    "host_mib": "on the host, MiB",
    "peak_mib": "peak MiB",
}


class DeviceBytes(LiveBytes):
    """Count the bytes that would lie on a GPU, and apart from them those that are moved to the host."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.host, self._moving = LiveBytes(), False
        super().__init__(tensors)

    def hold(self, tensor: Tensor) -> None:
        if self._moving:
            self.host.hold(tensor)
        else:
            super().hold(tensor)

    def watch(self, hooks: saved_tensors_hooks) -> None:
        """Take what these hooks pack for moved to the host, and what they unpack for brought back."""
        pack, unpack = hooks.pack_hook, hooks.unpack_hook

        def packed(tensor: Tensor) -> Any:
            self._moving = True
            try:
                return pack(tensor)
            finally:
                self._moving = False

        def unpacked(value: Any) -> Tensor:
            tensor = unpack(value)
            return tensor.clone() if self.host.holds(tensor) else tensor

        hooks.pack_hook, hooks.unpack_hook = packed, unpacked


@contextlib.contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """Let trainers that are made meanwhile take the CPU for an accelerator to move activations from."""
    stream = SimpleNamespace(**dict.fromkeys(("synchronize", "wait_stream"), lambda *_: None))
    calls = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: contextlib.nullcontext()}
    device = SimpleNamespace(**calls, empty_cache=lambda: None)
    plain = partial(get_act_offloading_ctx_manager, use_pin_memory=False, use_streams=False)
    with (
        patch("torch.accelerator.is_available", lambda: True),
        patch("torch.accelerator.current_accelerator", lambda: torch.device("cpu")),
        patch("torch.get_device_module", lambda _: device),
        patch("trl.trainer.dpo_trainer.get_act_offloading_ctx_manager", plain),
    ):
        yield


def make(method: str, knob: str, data: Any, args: Namespace):
    """(trainer, a function that takes one training step)."""
    moves = args.device == "cpu" and "activation_offloading" in KNOBS[knob]
    with cpu_as_accelerator() if moves else contextlib.nullcontext():
        trainer, step, _ = make_trainer(method, "auto", data, args.response, args.device, **KNOBS[knob])
    return trainer, step


def measure(trainer: Any, step: Callable[[], None], device: str) -> dict[str, float]:
    """Bytes of one step: kept for the backward pass, on the host meanwhile, and at the peak."""
    numbers, backward = {}, trainer.accelerator.backward
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        now = lambda: {"kept_mib": (torch.cuda.memory_allocated() - before) / MIB}  # noqa: E731
    else:
        live = DeviceBytes([*trainer.model.parameters(), *trainer.model.buffers()])
        before = live.now
        now = lambda: {"kept_mib": (live.now - before) / MIB, "host_mib": live.host.now / MIB}  # noqa: E731

    def record(loss: Tensor, **kwargs: Any) -> None:
        numbers.update(now())
        backward(loss, **kwargs)

    with patch.object(trainer.accelerator, "backward", record):
        if device == "cuda":
            step()
            return numbers | {"peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB}

        class Watched(save_on_cpu):
            def __init__(self, **kwargs: Any):
                super().__init__(**kwargs)
                live.watch(self)

        if trainer.args.activation_offloading:
            live.watch(trainer.maybe_activation_offload_context)
        with patch.object(transformers.modeling_utils, "save_on_cpu", Watched), live:
            step()
    return numbers | {"peak_mib": (live.peak - before) / MIB}


def run(args: Namespace) -> list[dict]:
    rows = []
    for prompt in args.prompt:
        data = make_rows(prompt, args.response, args.batch)
        for method in args.method.split(","):
            made = {knob: make(method, knob, data, args) for knob in KNOBS}
            timed = in_turn({knob: step for knob, (_, step) in made.items()}, args.repeats, args.device)
            first = len(rows)
            for knob, (trainer, step) in made.items():
                row = {"knob": knob, "method": method, "prompt": prompt, "response": args.response}
                rows.append(row | summary(timed[knob]) | measure(trainer, step, args.device))
                rows[-1]["kept_vs_nothing"] = rows[-1]["kept_mib"] / rows[first]["kept_mib"]
                if args.device == "cuda" or "offload" not in knob:
                    rows[-1]["time_vs_nothing"] = rows[-1]["seconds"] / rows[first]["seconds"]
        show(f"a step of {prompt} prompt tokens, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows
