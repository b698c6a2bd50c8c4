"""A run of the comparison, trained as by `trl-vpo train`, and its rows: a row for each checkpoint.

All that is measured of a checkpoint is in its row, under `samples` also of each held-out sample, so that tables and
intervals are made from the rows alone. Log-probs, KL (base || model, along the chosen response) and log masses are in
nats per caption; masses are shares of a sentence's probability (`mass`), means over the sentences of a caption.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from studies.testbed import habits, made, pairs, plan, truth
from studies.testbed.training import AT_ONCE, BASES, CAPTION_TOKENS, sampled, train
from trl_vpo.testbed import language, world
from trl_vpo.testbed.rows import write_jsonl, write_rows
from trl_vpo.testbed.tiny_vlm import BASE

OTHER = {"clip": "scene", "scene": "clip"}
FELL = 0.1  # nats: a chosen response that loses more has fallen
Row = dict[str, Any]


def run_cells(run: plan.Run, out: Path) -> list[Row]:
    """Train a run, measure its checkpoints, and return their rows."""
    import torch

    torch.set_num_threads(1)  # so small a model gains nothing from a second thread
    torch.backends.mkldnn.enabled = False  # its sums depend on the CPU
    began = time.process_time()
    steps = ".".join(map(str, run.steps))  # `cell` must not sweep away what `run` is training
    folder = out / "runs" / f"{run.method}-{run.pairs}-{run.rate:g}-{run.seed}-{steps}"
    data, figures = (None, {}) if run.method == "base" else training_data(run, out)
    if data:
        train(run, data, folder, out)
    trained = time.process_time()
    candidates = {steps: str(folder / f"checkpoint-{steps}") for steps in run.steps if steps}
    measured = measure(candidates, out, run.kind)
    spent = {"training": trained - began, "measuring": time.process_time() - trained}
    about = figures | {"cpu_seconds": spent, "base": digest(run.kind), "arithmetic": arithmetic()}
    rows = [dict(zip(plan.KEYS, cell)) | summary(measured[cell[3]], measured[0]) | about for cell in run.cells()]
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def arithmetic() -> str:
    """Return `portable` if this process uses no instructions but those of every x86 CPU with AVX2, else `native`.

    torch and MKL choose other instructions, and so another order of sums, on another CPU. Training at high rates
    amplifies that: after 60 steps of DPO at 3e-3 the log-probs of two CPUs differed by 0.02 nats, after 120 by 0.5.
    `command.PORTABLE` asks for the same ones everywhere, for a third more time.
    """
    import torch

    avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return "portable" if avx2 and os.environ.get("MKL_CBWR") == "COMPATIBLE" else "native"


@cache
def digest(kind: str) -> str:
    """Return the digest of the weights, configuration and tokenizer that runs on clips or scenes start from."""
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in BASES[kind].iterdir() if path.is_file()):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def training_data(run: plan.Run, out: Path) -> tuple[Path, Row]:
    """Return the rows of a run, and the figures of pairs that the base made."""
    if run.pairs in made.ROUNDS:
        return made.training_rows(run, out)
    method, pairs_of = plan.ALL[run.method], "near" if run.pairs == "scenes" else run.pairs
    where = plan.ROWS, plan.TRAIN_SEED + run.seed, out / "data"
    data = pairs.training_rows(pairs_of, run.kind, *where, sampled, boxed=method.boxed)
    return pairs.with_whole_phrases(data) if method.whole else data, {}


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(adapters: Mapping[int, str], out: Path, kind: str) -> dict[int, Row]:
    """Return what each adapter comes to on each held-out clip or scene, by its steps; the base's is at 0."""
    from trl_vpo.data.inputs import load_media, read_inputs
    from trl_vpo.evaluate.candidates import load_candidates
    from trl_vpo.evaluate.rows import read_rows
    from trl_vpo.evaluate.run import evaluate_batch

    samples, path = held_out(out, kind)
    config = _config(path, list(adapters.values()), BASES[kind])
    models, inputs = load_candidates(config.adapters, **config.model_options()), read_inputs(**config.input_options())
    batch = [
        (row, inputs[row.place], load_media(inputs[row.place], config.video_options())) for row in read_rows(inputs)
    ]
    outcomes = evaluate_batch(models, batch, config)
    found = {0: _BASES[kind]} if kind in _BASES else {}
    for number, (steps, name) in enumerate(zip((0, *adapters), models.names)):
        if steps not in found:
            records = [outcome.rows[number] for outcome in outcomes]
            with models.use(name):
                model = models.model.model
                found[steps] = of_samples(records, samples, masses(model, samples)) | retained(model, samples)
                if kind == "scene":
                    found[steps] |= habits.measured(model, _processor(), habits.scenes(len(samples)))
    _BASES[kind] = found[0]
    return found


@cache
def held_out(out: Path, kind: str) -> tuple[list[world.Sample], Path]:
    """Write the held-out pairs; a fifth of their things have combinations that are in no training set."""
    samples = world.draw_samples(kind, plan.TEST, plan.TEST_SEED, habits=False, unseen=True)
    name = "held-out" if kind == "clip" else "held-out-scenes"
    rows = write_rows(samples, plan.TEST_SEED, out / "data" / name, keep=True)
    return samples, write_jsonl(rows, out / "data" / f"{name}-{plan.TEST}.jsonl")


def _config(path: Path, adapters: Sequence[str], base: Path):
    from trl_vpo.evaluate.config import EvaluateConfig

    return EvaluateConfig(
        model_name_or_path=str(base), adapters=list(adapters), dataset_name=str(path), device="cpu",
        batch_size=AT_ONCE, max_new_tokens=CAPTION_TOKENS, num_frames=world.NUM_FRAMES, sensitivity=["none"],
        answer_preferences=True, visual_prompt=False,
    )  # fmt: skip


_TRUE: dict[tuple[str, int], Any] = {}  # by kind and number of the held-out sample
_BASES: dict[str, Row] = {}  # the base's own values by kind of samples: all runs of a process share them


def masses(model, samples: Sequence[world.Sample]) -> list[Any]:
    from studies.testbed.mass import TrueCaption

    kind = samples[0].kind
    if (kind, 0) not in _TRUE:
        processor, rng = _processor(), np.random.default_rng(plan.TEST_SEED)
        for number, sample in enumerate(samples):
            _TRUE[kind, number] = TrueCaption(processor, sample, language.draw_wording(rng))
    return [_TRUE[kind, number].measure(model) for number in range(len(samples))]


def retained(model, samples: Sequence[world.Sample]) -> dict[str, list[float]]:
    """Return what is left of abilities that are not trained: short answers, and captions of the other kind."""
    from studies.testbed.pretraining import answer, answers_right, short_questions

    processor, rng = _processor(), np.random.default_rng(plan.TEST_SEED)
    found = {}
    for name, items in short_questions(samples, rng).items():
        found[f"{name}_right"] = list(map(float, answers_right(model, processor, samples, items, max_new_tokens=8)))
    other = OTHER[samples[0].kind]
    others = world.draw_samples(other, len(samples), plan.TEST_SEED, habits=False)
    said = answer(model, processor, others, [language.PROMPTS[other]] * len(others))
    checks = [truth.check_caption(text, sample.things) for text, sample in zip(said, others)]
    found[f"{other}_hallucination"] = [float(check.hallucinated) for check in checks]
    found[f"{other}_ungrammatical"] = [float(not check.parsed) for check in checks]
    return found


@cache
def _processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(BASE)


def of_samples(records: Sequence[Row], samples: Sequence[world.Sample], found: Sequence[Any]) -> dict[str, list]:
    """Return each measure's values, one for each sample.

    `visibility`, of scenes, is Kendall's tau of the chosen response's log-prob and how much of the object is visible.
    """
    from trl_vpo.evaluate.measures import visibility

    checks = [truth.check_caption(record["response"], s.things) for record, s in zip(records, samples)]
    values = {
        "chosen_logp": [record["chosen_logp"] for record in records],
        "rejected_logp": [record["rejected_logp"] for record in records],
        "kl": [record["chosen_kl"] for record in records],
        "log_true": [mass.log_true for mass in found],
        "true_mass": [float(mass.true.mean()) for mass in found],
        "false_mass": [float(mass.false.mean()) for mass in found],
        "outside_mass": [float(mass.outside.mean()) for mass in found],
        "hallucination": [float(check.hallucinated) for check in checks],
        "ungrammatical": [float(not check.parsed) for check in checks],
    }
    if samples[0].kind == "scene":
        taus = visibility([record["image_logps"] for record in records])["visibility/tau"]  # (N, 2)
        values["visibility"] = taus[:, 0].tolist()
    return values


def summary(own: Mapping[str, list], base: Mapping[str, list]) -> Row:
    """Return a row's numbers: means over samples, changes against the base, and the values of each sample.

    `chosen_change_right` and `fell_right` are of pairs that the base ranks rightly: what a method has no reason to
    lower there.
    """
    now, was = ({name: np.array(values) for name, values in of.items()} for of in (own, base))
    change = now["chosen_logp"] - was["chosen_logp"]
    right = was["chosen_logp"] > was["rejected_logp"]
    means = [name for name in now if name not in ("chosen_logp", "rejected_logp")]
    row = {
        "accuracy": (now["chosen_logp"] > now["rejected_logp"]).mean(),
        "margin": (now["chosen_logp"] - now["rejected_logp"]).mean(),
        "chosen_change": change.mean(),
        "chosen_change_right": change[right].mean(),
        "fell_right": (change[right] < -FELL).mean(),
        "rejected_change": (now["rejected_logp"] - was["rejected_logp"]).mean(),
        **{name: now[name].mean() for name in means},
    }
    row = {name: round(float(value), 5) for name, value in row.items()}
    samples = now | {"chosen_change": change, "right": right}
    return row | {"samples": {name: [round(float(value), 4) for value in of] for name, of in samples.items()}}
