"""The parts of a training step's time: the ratios between methods rest on them.

The step of `step`, with a clock around its parts: the vision tower, the reference pass, the policy's forward, and the
backward, which under gradient checkpointing computes the forward again. `without_reference` is the share that would be
left if the reference cost nothing: no reference-free method can take a smaller share of this method's step.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from benchmarks.common import show, summary
from benchmarks.step import LAYOUTS, make_rows, make_trainer

PARTS = ("vision", "reference", "policy", "backward")
COLUMNS = {
    "method": "method",
    "layout": "layout",
    "prompt": "prompt",
    "response": "response",
    "seconds": "seconds (min-max)",
    **{part: part for part in PARTS},
    "rest": "rest",
    "without_reference": "share without reference",
}


class Clock:
    """Seconds of each part; what runs inside of another part counts for itself alone."""

    def __init__(self, device: str):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._cuda, self._inner = device == "cuda", [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole, inner = self._now() - begin, self._inner.pop()
            self._inner[-1] += whole
            self.seconds[name] += whole - inner

    def watch(self, trainer: Any) -> None:
        """Put the clock around the calls that the parts consist of."""
        model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
        self._around(model.model.visual, "forward", lambda: "vision")
        self._around(trainer, "concatenated_forward", lambda: "policy" if torch.is_grad_enabled() else "reference")
        self._around(trainer.accelerator, "backward", lambda: "backward")

    def _around(self, owner: object, attribute: str, name: Callable[[], str]) -> None:
        call = getattr(owner, attribute)

        def timed(*args, **kwargs):
            with self.part(name()):
                return call(*args, **kwargs)

        setattr(owner, attribute, timed)

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(step: Callable[[], None], clock: Clock, repeats: int) -> dict[str, float]:
    """Medians over the repeats, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ("seconds", *PARTS)}
    for repeat in range(repeats + 1):
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        begin = time.perf_counter()
        step()
        whole = time.perf_counter() - begin
        for name, value in {"seconds": whole, **clock.seconds}.items() if repeat else ():
            seconds[name].append(value)
    row = summary(seconds.pop("seconds")) | {name: median(values) for name, values in seconds.items()}
    row["rest"] = row["seconds"] - sum(row[part] for part in PARTS)
    return row | {"without_reference": 1 - row["reference"] / row["seconds"]}


def run(args: Namespace) -> list[dict]:
    rows = []
    for prompt in args.prompt:
        data = make_rows(prompt, args.response)
        for method in args.method.split(","):
            for layout in LAYOUTS:
                trainer, step, (tokens,) = make_trainer(method, layout, data, args.response, args.device)
                clock = Clock(args.device)
                clock.watch(trainer)
                row = {"method": method, "layout": layout, "prompt": tokens, "response": args.response}
                rows.append(row | measure(step, clock, args.repeats))
    show(f"parts of a training step, seconds, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows
