"""One run: train an adapter by a method, and measure it at the checkpoints. A result is a line of results.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from studies.real import model as real_model
from studies.real.prompts import NEUTRAL, rule_rows

CHECKPOINTS = (15, 30)  # optimizer steps
BATCH, RANK = 4, 8
RATES = (1e-3, 5e-4, 2e-3)  # in the order in which they are run
SEEDS = (0, 1)
SHOWN = 4  # generated texts of a result that are kept in full: of held-out and of neutral prompts, by turns
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> the trainer's name and its options; else its defaults
    "DPO": ("VisualDPO", {}),
    "LeanPO": ("LeanPO", {}),
    "RRPO": ("RRPO", {}),
    "SimPO": ("SimPO", {}),
    "RRPO, alpha 0": ("RRPO", {"alpha": 0.0}),
}


@dataclass(frozen=True)
class Cell:
    method: str
    rate: float
    seed: int


def cells() -> list[Cell]:
    """All runs, so ordered that the first ones compare all methods."""
    return [Cell(method, rate, seed) for seed in SEEDS for rate in RATES for method in METHODS]


def missing(results: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The runs of which not all checkpoints have a result."""
    done = {(row["method"], row["rate"], row["seed"], row["steps"]) for row in results}
    return [cell for cell in cells() if any((*vars(cell).values(), step) not in done for step in CHECKPOINTS)]


# --- measures -----------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """What the base makes of the held-out texts; computed once, and every run is compared with it.

    Attributes:
        texts: kind -> tokens of prompts and responses; `neutral` are the base's own answers.
        states: kind -> the base's hidden states, of the kinds whose KL is measured.
        logps: kind -> log-prob of each response.
        asked: prompts that every model answers.
        said: the base's answers to them.
    """

    texts: dict[str, list[real_model.Text]]
    states: dict[str, list[Tensor]]
    logps: dict[str, list[float]]
    asked: list[str]
    said: list[real_model.Text]


WITH_KL = ("chosen", "neutral")


def measure_base(model: Any, tokenizer: Any, held_out: Sequence[Mapping[str, Any]]) -> Base:
    own = [row["prompt"] for row in held_out][:: max(1, len(held_out) // len(NEUTRAL))][: len(NEUTRAL)]
    asked = [prompt for both in zip(own, NEUTRAL) for prompt in both]
    said = real_model.answers(model, tokenizer, asked)
    text = lambda row, side: real_model.text(tokenizer, row["prompt"], row[side])  # noqa: E731
    texts = {side: [text(row, side) for row in held_out] for side in ("chosen", "rejected")}
    texts |= {side: [text(row, side) for row in rule_rows()] for side in ("right", "wrong")}
    texts["neutral"] = said[1::2]
    states = {kind: real_model.states(model, texts[kind]) for kind in WITH_KL}
    logps = {kind: real_model.logps(model, found)[0] for kind, found in texts.items()}
    return Base(texts, states, logps, asked, said)


def measure(model: Any, tokenizer: Any, base: Base, score: Callable[[list], list[float]]) -> dict[str, Any]:
    """The numbers of every held-out text: changes of log-probs and KL in nats, and what the model says now.

    Args:
        model: with its adapter.
        score: gives the base's log-probs of texts.
    """
    found: dict[str, Any] = {}
    for kind, texts in base.texts.items():
        sums, kl = real_model.logps(model, texts, base.states.get(kind))
        found[kind] = [round(now - before, 3) for now, before in zip(sums, base.logps[kind])]
        if kl:
            found[f"kl/{kind}"] = [round(value, 3) for value in kl]
    return found | spoken(tokenizer, base, real_model.answers(model, tokenizer, base.asked), score)


def spoken(tokenizer: Any, base: Base, said: Sequence[real_model.Text], score: Callable) -> dict[str, Any]:
    """How likely the base finds generated texts, per token; how many tokens they have; the first of them."""
    sums = score(list(said))
    shown = {prompt: tokenizer.decode(ids) for prompt, (_, ids) in list(zip(base.asked, said))[:SHOWN]}
    return {
        "base_logp": [round(value / len(ids), 3) for value, (_, ids) in zip(sums, said)],
        "tokens": [len(ids) for _, ids in said],
        "said": shown,
    }


def base_result(model: Any, tokenizer: Any, base: Base) -> dict[str, Any]:
    """The base's own line: log-probs instead of changes."""
    logps = {kind: [round(value, 3) for value in values] for kind, values in base.logps.items()}
    tokens = {f"length/{kind}": [len(ids) for _, ids in base.texts[kind]] for kind in WITH_KL}
    score = lambda texts: real_model.logps(model, texts)[0]  # noqa: E731
    return {"method": "base", "rate": 0.0, "seed": 0, "steps": 0, **logps, **tokens} | spoken(
        tokenizer, base, base.said, score
    )


# --- training -----------------------------------------------------------------------------------------------------


def messages(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as a row of the trainers."""
    sides = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {side: [{"role": role, "content": pair[side]}] for side, role in sides.items()}


def run(cell: Cell, folder: Path, pairs: Sequence[Mapping[str, Any]], base: Base, out: Path) -> Iterator[dict]:
    """Train; gives a result for each checkpoint."""
    model, tokenizer = real_model.load(folder)
    measured = lambda adapted: _measured(model, adapted, tokenizer, base)  # noqa: E731
    rows = [messages(pair) for pair in pairs]
    trainer = make_trainer(cell, METHODS[cell.method], CHECKPOINTS, model, tokenizer, rows, out)
    yield from train(trainer, cell, CHECKPOINTS, measured)


def train(trainer: Any, cell: Cell, checkpoints: Sequence[int], measured: Callable[[Any], dict]) -> list[dict]:
    """Train; gives what is measured at each checkpoint, with CPU times and the log."""
    from transformers import TrainerCallback

    results: list[dict[str, Any]] = []
    clock = time.process_time()

    class Checkpoints(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in checkpoints:
                nonlocal clock
                trained = time.process_time() - clock
                numbers = measured(kwargs["model"])
                spent = {"training": round(trained, 1), "measuring": round(time.process_time() - clock - trained, 1)}
                results.append({**vars(cell), "steps": state.global_step, **numbers, "cpu_seconds": spent})
                clock = time.process_time()

    trainer.add_callback(Checkpoints())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for result in results:
        entries = [entry for entry in logged if entry["step"] <= result["steps"]]
        result["log"] = {
            key: [round(entry[key], 4) for entry in entries]
            for key in ("loss", "grad_norm", "loss/smoothing")
            if entries and key in entries[0]
        }
    return results


def _measured(model: Any, adapted: Any, tokenizer: Any, base: Base) -> dict[str, Any]:
    """The measures of a model in training, without dropout; the base is the same model without its adapter."""

    def score(texts: list) -> list[float]:
        with adapted.disable_adapter():
            return real_model.logps(model, texts)[0]

    model.eval()
    try:
        return measure(model, tokenizer, base, score)
    finally:
        model.train()


def make_trainer(
    cell: Cell,
    method: tuple[str, Mapping[str, Any]],
    checkpoints: Sequence[int],
    model: Any,
    processor: Any,
    rows: Sequence[Mapping],
    out: Path,
) -> Any:
    """The trainer of a cell, with a new adapter."""
    from datasets import Dataset
    from peft import LoraConfig

    import trl_vpo

    name, options = method
    config, trainer = getattr(trl_vpo, f"{name}Config"), getattr(trl_vpo, f"{name}Trainer")
    if cell.method == "DPO":  # its reference is computed once for all runs
        options = {**options, "precompute_ref_log_probs": True, "precompute_cache_dir": str(out / "reference")}
    folder = out / "-".join([cell.method.replace(", ", "-").replace(" ", "-"), f"{cell.rate:g}", str(cell.seed)])
    args = config(
        str(folder), learning_rate=cell.rate, lr_scheduler_type="constant", max_steps=max(checkpoints),
        per_device_train_batch_size=BATCH, seed=cell.seed, bf16=True, use_cpu=True, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    return trainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=processor,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="language"),
    )
