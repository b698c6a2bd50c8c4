"""The plan of the study: variants, sizes, splits, and the jobs that come of them. No torch in here.

A job is one training run with its evaluation, or the base's evaluation alone. Its settings hold all that its result
depends on, and their digest is part of the result's name: a change of plan or base never meets old results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BASE = Path("trl_vpo/testbed/base")
# Seeds of the world's draws. The quickstart's are 11 to 13, the base's own 0 and 1.
TUNING_SEED, VALIDATION_SEED, TEST_SEED = 900, 901, 902
TRAIN_SEED, SECOND_ROUND_SEED = 1000, 2000  # plus the seed of a run
EVERYTHING = ("balanced", "biased", "questions", "yes_no", "other")


@dataclass(frozen=True)
class Variant:
    """One method as it is trained here.

    Attributes:
        name: in tables.
        method: of `recipes/quickstart/<method>.yaml`.
        kind: of the samples it is trained on.
        options: that differ from the recipe's.
        whole: the phrases are the whole responses.
        note: what else there is to say.
    """

    name: str
    method: str
    kind: str = "clip"
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    note: str = ""


VARIANTS = {
    "sft": Variant(
        "SFT", "leanpo", options={"beta": 0, "target_margin": 0, "label_smoothing": 0, "nll_weight": 1},
        note="LeanPO's trainer with beta 0: the preference term is then a constant, and the NLL of the chosen "
        "response is left.",
    ),
    "dpo": Variant("DPO", "dpo"),
    "simpo": Variant(
        "SimPO", "leanpo", options={"label_smoothing": 0, "nll_weight": 0}, note="LeanPO without smoothing and NLL."
    ),
    "leanpo_plain": Variant(
        "LeanPO without smoothing", "leanpo", options={"label_smoothing": 0}, note="SimPO with LeanPO's NLL term."
    ),
    "leanpo": Variant("LeanPO", "leanpo"),
    "rrpo": Variant("RRPO", "rrpo"),
    "rrpo_no_kl": Variant("RRPO without KL", "rrpo", options={"alpha": 0}),
    "dpo_kl": Variant(
        "DPO + KL = RRPO without phrases", "rrpo", whole=True,
        note="One run under both names: with whole responses as phrases, RRPO's loss is DPO's plus the KL. The "
        "end-of-turn tokens, which follow every response alike, carry no reward in it.",
    ),
    "dpo_scenes": Variant("DPO", "dpo", "scene"),
    "lpoi_no_list": Variant("LPOI without list", "lpoi", "scene", {"list_weight": 0, "num_images": 2}),
    "lpoi_2": Variant("LPOI, N = 2", "lpoi", "scene", {"num_images": 2}),
    "lpoi_3": Variant("LPOI, N = 3", "lpoi", "scene", {"num_images": 3}),
    "lpoi_5": Variant("LPOI, N = 5", "lpoi", "scene", {"num_images": 5}),
    "lpoi_5_bare": Variant(
        "LPOI, N = 5, no ellipse", "lpoi", "scene", {"num_images": 5, "visual_prompt": False},
        note="Without the red ellipse around the hidden part: here red is also a colour of things.",
    ),
}  # fmt: skip
SMOOTHED = {"leanpo_plain": 0.0, "leanpo": 0.1, "leanpo_more": 0.2}  # variants by their label smoothing
MORE_SMOOTHING = Variant("LeanPO, smoothing 0.2", "leanpo", options={"label_smoothing": 0.2})
WATCHED = ("dpo", "simpo", "leanpo")  # evaluated while they train, for the figure
SELF_MADE = ("leanpo", "rrpo", "lpoi_5")
ROUNDS = ("leanpo", "rrpo")  # LPOI's pipeline adds boxes to given pairs: a second round would add the same


@dataclass(frozen=True)
class Scale:
    """The size of the study.

    Attributes:
        seeds: training runs of each variant; each has its own rows, order and LoRA initialisation.
        rows, steps, batch: of a training run.
        validation, test, more: samples of the splits; `more` is each of the test split's further parts.
        watched: validation rows that are evaluated while a figure's runs train, every `watch_steps`.
        rates: learning rates tried on the validation split; a single one is taken as it is.
        variants, noise, self_made: what is trained.
    """

    seeds: int = 5
    rows: int = 320
    steps: int = 40
    batch: int = 16
    validation: int = 120
    test: int = 200
    more: int = 60
    watched: int = 64
    watch_steps: int = 5
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    variants: tuple[str, ...] = tuple(VARIANTS)
    noise: tuple[float, ...] = (0.2, 0.4)
    self_made: bool = True


FULL = Scale()
QUICK = Scale(
    seeds=1,
    test=150,
    rates=(1e-3,),  # the quickstart's
    variants=("dpo", "simpo", "leanpo", "rrpo", "dpo_scenes", "lpoi_2", "lpoi_5"),
    noise=(),
    self_made=False,
)


@dataclass(frozen=True)
class Job:
    """One result to be made.

    Attributes:
        name: readable, and unique within a plan.
        group: jobs of one group are done by one process, in order.
        settings: all that the result depends on, JSON values.
    """

    name: str
    group: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.settings)

    @property
    def stem(self) -> str:
        return f"{self.name.replace('/', '-')}-{self.digest}"

    def result(self, out: Path) -> Path:
        return out / "results" / f"{self.stem}.json"

    def adapter(self, out: Path) -> Path:
        return out / "runs" / self.stem


def digest(settings: Any) -> str:
    """Return the digest of JSON values, whatever the order of their keys."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def base_digest(base: Path = BASE) -> str:
    """Return the digest of the base's weights, configuration and tokenizer."""
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in base.iterdir() if path.is_file()):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


# --- splits -------------------------------------------------------------------------------------------------------


def validation_split(kind: str, scale: Scale) -> dict[str, Any]:
    return {"kind": kind, "seed": VALIDATION_SEED, "parts": {"balanced": scale.validation}}


def test_split(kind: str, scale: Scale, parts: Sequence[str] = EVERYTHING) -> dict[str, Any]:
    """The parts of the test split that a run is measured on; what a part holds does not depend on the others."""
    counts = {part: scale.test if part == "balanced" else scale.more for part in parts}
    return {"kind": kind, "seed": TEST_SEED, "parts": counts}


def watched_split(watch: Mapping[str, Any]) -> dict[str, Any]:
    """The validation split of which the first rows are evaluated during training."""
    return {key: watch[key] for key in ("kind", "seed", "parts")}


def training_data(kind: str, seed: int, scale: Scale, **more: Any) -> dict[str, Any]:
    """Ground-truth pairs; `more`: noise, whole, or how the base makes pairs for itself."""
    return {"kind": kind, "seed": seed, "rows": scale.rows, **more}


# --- jobs ---------------------------------------------------------------------------------------------------------


def tuning_jobs(scale: Scale, base: str) -> list[Job]:
    """Every variant at every learning rate, measured on the validation split; none where there is one rate."""
    if len(scale.rates) < 2:
        return []
    jobs = []
    for key in scale.variants:
        for rate in scale.rates:
            variant = VARIANTS[key]
            data = training_data(variant.kind, TUNING_SEED, scale, whole=variant.whole)
            held_out = validation_split(variant.kind, scale)
            settings = _training(variant, scale, base, rate=rate, seed=TUNING_SEED, data=data, held_out=held_out)
            jobs.append(Job(f"tune/{key}/{rate:g}", f"tune-{key}", settings))
    return jobs


def final_jobs(scale: Scale, base: str, rates: Mapping[str, float]) -> list[Job]:
    """The jobs that are measured on the test split.

    Args:
        base: digest of the base.
        rates: variant -> its learning rate.
    """
    kinds = dict.fromkeys(VARIANTS[key].kind for key in scale.variants)
    jobs = [
        Job(f"base/{kind}", "base", {"base": base, "train": None, "held_out": test_split(kind, scale)})
        for kind in kinds
    ]
    for seed in range(scale.seeds):
        jobs += _seed_jobs(seed, scale, base, rates)
    return jobs


def _seed_jobs(seed: int, scale: Scale, base: str, rates: Mapping[str, float]) -> list[Job]:
    jobs = []

    def add(name: str, key: str, variant: Variant, parts: Sequence[str], watch: bool = False, **data: Any) -> Job:
        found = training_data(variant.kind, TRAIN_SEED + seed, scale, whole=variant.whole) | data
        settings = _training(
            variant, scale, base, rate=rates[key], seed=seed, data=found,
            held_out=test_split(variant.kind, scale, parts), watched=scale.watched if watch else 0,
        )  # fmt: skip
        jobs.append(Job(f"seed{seed}/{name}", f"seed{seed}-{variant.kind}", settings))
        return jobs[-1]

    for key in scale.variants:
        add(key, key, VARIANTS[key], EVERYTHING, watch=key in WATCHED)
    for noise in (0.0, *scale.noise) if scale.noise else ():
        for key in SMOOTHED:
            if noise or key not in VARIANTS:  # without noise, the others are trained already
                tuned = key if key in VARIANTS else "leanpo"
                variant = VARIANTS.get(key, MORE_SMOOTHING)
                add(noisy(key, noise), tuned, variant, ("balanced",), noise=noise)
    for key in SELF_MADE if scale.self_made else ():
        first = add(f"{key}-made", key, VARIANTS[key], ("balanced",), made_by="base")
        if key in ROUNDS:
            second = {"seed": SECOND_ROUND_SEED + seed, "made_by": first.stem}
            add(f"{key}-made-again", key, VARIANTS[key], ("balanced",), **second)
    return jobs


def noisy(key: str, noise: float) -> str:
    """The name of a run with flipped pairs; without noise a main variant has its own name."""
    return f"{key}-noise{round(100 * noise)}" if noise or key not in VARIANTS else key


def _training(
    variant: Variant, scale: Scale, base: str, *, rate: float, seed: int, data: dict, held_out: dict, watched: int = 0
) -> dict[str, Any]:
    options = {"learning_rate": rate, "max_steps": scale.steps, "per_device_train_batch_size": scale.batch}
    watch = {"rows": watched, "steps": scale.watch_steps, **validation_split(variant.kind, scale)} if watched else None
    train = {"method": variant.method, "seed": seed, "data": data, "watch": watch}
    return {"base": base, "train": train | {"options": {**variant.options, **options}}, "held_out": held_out}


def as_json(jobs: Sequence[Job]) -> str:
    return json.dumps([asdict(job) for job in jobs], indent=1)


def from_json(text: str) -> list[Job]:
    return [Job(**job) for job in json.loads(text)]
