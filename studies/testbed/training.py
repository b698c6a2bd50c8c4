"""The training of a run, as by `trl-vpo train` with a recipe of the quickstart; and what the base says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.testbed import habits, plan
from trl_vpo.testbed import world
from trl_vpo.testbed.tiny_vlm import BASE

CAPTION_TOKENS, AT_ONCE = 72, 64
BASES = {"clip": BASE, "scene": habits.SCENES_BASE}  # that runs on clips and on scenes start from
PRECOMPUTED = ("dpo", "mdpo", "lpoi")  # recipes whose reference log-probs are computed once, for all rates


def train(run: plan.Run, data: Path, folder: Path, out: Path) -> None:
    """Train with a constant rate, so that a shorter run is the beginning of a longer one."""
    from trl_vpo.training.run import run_training

    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    run_training(plan.ALL[run.method].recipe, as_words(options_of(run, data, folder, out)))


def options_of(run: plan.Run, data: Path, folder: Path, out: Path) -> dict[str, Any]:
    """Return the options of `trl-vpo train` for a run."""
    method = plan.ALL[run.method]
    options = {
        "config": f"quickstart/{method.recipe}",
        "model_name_or_path": BASES[run.kind],
        "dataset_name": data,
        "output_dir": folder,
        "learning_rate": run.rate,
        "lr_scheduler_type": "constant",
        "max_steps": max(run.steps),
        "per_device_train_batch_size": plan.BATCH,
        "save_strategy": "steps",
        "save_steps": int(np.gcd.reduce(run.steps)),
        "save_only_model": True,
        "seed": run.seed,
        "frame_cache": out / "frames",
        **method.options,
    }
    if method.recipe in PRECOMPUTED:
        options |= {"precompute_ref_log_probs": True, "precompute_cache_dir": out / "reference"}
    return options


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Return settings as the words of a command line."""
    words = []
    for key, value in options.items():
        words += [f"--{key}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def sampled(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a response that the base samples for each row, with a random stream for each."""
    from datasets import Dataset

    from trl_vpo.data.inputs import Inputs, load_media, row_ids
    from trl_vpo.media.load import VideoOptions
    from trl_vpo.models.load import load_model
    from trl_vpo.models.requests import Request, Sampling

    model, dataset = load_model(str(BASE), device="cpu", batch_size=AT_ONCE), Dataset.from_list(rows)
    inputs, options = Inputs(dataset, row_ids(dataset), None, None), VideoOptions(num_frames=world.NUM_FRAMES)
    requests = [
        Request(row.example["prompt"], load_media(row, options), seed=int(row.id.rsplit("-", 1)[1])) for row in inputs
    ]
    answers = model.complete(requests, Sampling(max_new_tokens=CAPTION_TOKENS, temperature=1.0, top_p=1.0))
    return [answer.text for answer in answers]
