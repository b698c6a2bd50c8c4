"""Real runs of `trl-vpo generate` with the base of the testbed."""

import json
from pathlib import Path

from trl_vpo.generate.run import run_generation
from trl_vpo.testbed import rows
from trl_vpo.testbed.tiny_vlm import BASE

RECIPES = Path(__file__).parents[2] / "recipes/quickstart"
KINDS = {"leanpo": "clip", "rrpo": "clip", "lpoi": "scene"}  # of the inputs


def write_inputs(folder, clips=4, scenes=12):
    """Three questions about each clip, and a pair about each scene: kind -> file."""
    files = {}
    for kind, count in (("clip", clips), ("scene", scenes)):
        files[kind] = rows.write_jsonl(rows.write_inputs(kind, count, 13, folder / kind), folder / f"{kind}.jsonl")
    return files


def options(method, dataset, folder, *more):
    recipe = RECIPES / f"{method}-generate.yaml"
    named = ["--config", recipe, "--model_name_or_path", BASE, "--dataset_name", dataset, "--output_dir", folder]
    return [str(word) for word in (*named, "--batch_size", 5, *more)]


def generate(method, dataset, folder, *more):
    return run_generation(method, options(method, dataset, folder, *more))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(folder):
    return [(folder / name).read_bytes() for name in ("rows.jsonl", "rejected.jsonl")]
