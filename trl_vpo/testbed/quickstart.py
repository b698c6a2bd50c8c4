"""The methods on the small world, in a few minutes on two CPU cores: `trl-vpo quickstart`.

It writes clips and scenes with rows to train on and held-out ones, drawn without habits, and compares the methods as
`trl-vpo compare` does, with the recipes `quickstart/METHOD`; those for images, on scenes. The inputs of
`quickstart/METHOD-generate` are about the clips and scenes to train on.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import track

from trl_vpo.data.paths import check_output_dir
from trl_vpo.runs.console import make_console
from trl_vpo.runs.quiet import quiet_libraries
from trl_vpo.testbed import language, rows

ON_SCENES = {"lpoi", "mdpo", "symmpo"}  # the other methods train on clips
TRAIN_ROWS, HELD_OUT_ROWS = 320, 100
TRAIN_SEED, HELD_OUT_SEED = 11, 12
EVALUATION = {"max_new_tokens": 72, "sensitivity": "none", "batch_size": 32}
NEXT = """
Next:
  trl-vpo view {data}/{kind}s_train.jsonl -o page.html
      the rows of the last method; a page for your browser
  trl-vpo plot {runs} -o curves.html
On your own rows (`trl-vpo import --list`: the formats that are converted):
  trl-vpo recipes
      what there is, and the GPUs that it is written for
  trl-vpo doctor rrpo/qwen2_5_vl_7b --dataset_name train.jsonl
      checks the rows, and whether they fit into memory
  trl-vpo train rrpo --config rrpo/qwen2_5_vl_7b --dataset_name train.jsonl"""


console = make_console()


def run_quickstart(out: Path, methods: Sequence[str], command, *, data_only: bool = False) -> None:
    """Compare these methods, on clips and on scenes; `command` runs a `trl-vpo` command."""
    began = time.perf_counter()
    check_output_dir(str(out))
    if data_only:
        write_data(out / "data")
        console.print(f"Rows and media: {out / 'data'}", soft_wrap=True)
        return
    prepare(out / "data")
    runs: list[Path] = []
    for kind in ("clip", "scene"):
        recipes = {method: f"quickstart/{method}" for method in methods if kind == kind_of(method)}
        if recipes:
            runs += compare_on(kind, recipes, out, command)
    console.print(f"All of it took {time.perf_counter() - began:.0f} s.")
    shown = {"data": out / "data", "kind": kind_of(runs[-1].name), "runs": " ".join(map(str, runs))}
    console.print(NEXT.format(**shown), soft_wrap=True)


def kind_of(method: str) -> str:
    """Return the kind of samples that a method is trained on."""
    return "scene" if method in ON_SCENES else "clip"


def prepare(folder: Path) -> None:
    """Write the data of `write_data` and import TRL."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs comes with the package
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread
    quiet_libraries(bars=False)
    write_data(folder)
    with console.status("importing TRL, which takes half a minute ..."):
        import torch
        import transformers

        importlib.import_module("trl_vpo.compare.run")
    transformers.logging.set_verbosity_error()  # a first-time user can do nothing about the warnings
    torch.set_num_threads(1)  # of a torch that was there before


def write_data(folder: Path) -> None:
    """Write media and rows of both kinds, to train on and held out, inputs to generate from, and captions' objects."""
    for kind in ("clip", "scene"):
        for split, count, seed in (("train", TRAIN_ROWS, TRAIN_SEED), ("held_out", HELD_OUT_ROWS, HELD_OUT_SEED)):
            media = folder / f"{kind}s_{split}"
            title = f"writing {count} {kind}s ({split.replace('_', '-')})"
            bar = partial(track, description=f"{title:34s}", total=count, console=console)
            samples, written = rows.write_preferences(kind, count, seed, media, progress=bar)
            if split == "held_out":
                written += [rows.caption_row(sample, row) for sample, row in zip(samples, written, strict=True)]
            rows.write_jsonl(written, media.with_suffix(".jsonl"))
    write_generation_inputs(folder)
    (folder / "objects.txt").write_text("".join(f"{name}\n" for name in language.all_objects()), encoding="utf-8")


def write_generation_inputs(folder: Path) -> None:
    """Write what LeanPO, RRPO and LPOI make pairs from, about the clips and scenes to train on.

    LeanPO is given captions, for which the base was taught to take hints; RRPO questions, whose wrong answers need no
    judge to be seen.
    """
    inputs = {}
    for kind in ("clip", "scene"):
        inputs[kind] = rows.write_inputs(kind, TRAIN_ROWS, TRAIN_SEED, folder / f"{kind}s_train", keep=True)
    captions = [row for row in inputs["clip"] if row["answer_kind"] == "open"]
    questions = [row for row in inputs["clip"] if row["answer_kind"] != "open"]
    for name, own in (("captions", captions), ("questions", questions), ("pairs", inputs["scene"])):
        rows.write_jsonl(own, folder / f"{name}_input.jsonl")


def compare_on(kind: str, recipes: dict[str, str], out: Path, command) -> list[Path]:
    """Compare methods (method: recipe) on held-out samples of a kind, and return the folders of their trainings."""
    from trl_vpo.compare.plan import Plan, Training
    from trl_vpo.compare.run import run_compare

    own = {"dataset_name": str(out / f"data/{kind}s_train.jsonl"), "disable_tqdm": False}
    trainings = [Training(method, method, recipe, own) for method, recipe in recipes.items()]
    keys = EVALUATION | {"synonyms": str(out / "data/objects.txt")}
    plan = Plan(trainings, str(out / f"data/{kind}s_held_out.jsonl"), out / f"{kind}s", keys)
    run_compare(plan, command)
    return [plan.folder(training) for training in trainings]
