"""The methods on the small world, in a few minutes on two CPU cores: `trl-vpo quickstart`.

It writes clips and scenes, builds preference rows, trains with the recipes `quickstart/METHOD` through the entry
point of `trl-vpo train`, and compares each method with the base model on held-out samples, all drawn without habits.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trl_vpo.data.paths import check_output_dir
from trl_vpo.report.plot import style
from trl_vpo.report.plot.curves import training_figure
from trl_vpo.runs.console import table
from trl_vpo.runs.quiet import quiet_libraries
from trl_vpo.testbed import language, rows, world

METHODS = {"dpo": ("DPO", "clip"), "leanpo": ("LeanPO", "clip"), "rrpo": ("RRPO", "clip"), "lpoi": ("LPOI", "scene")}
METHODS |= {"simpo": ("SimPO", "clip"), "tdpo": ("TDPO", "clip"), "ddpo": ("DDPO", "clip")}
METHODS |= {"mdpo": ("mDPO", "scene"), "dpa": ("DPA", "clip")}  # of these only those that are named
TRAIN_ROWS, HELD_OUT_ROWS = 320, 150
TRAIN_SEED, HELD_OUT_SEED = 11, 12
CAPTION_TOKENS = 32
NEXT = """
Next:
  trl-vpo view {out}/data/{kind}s_train.jsonl -o page.html
      the rows of the last method; a page for your browser
  trl-vpo plot {runs} -o curves.html
On your own rows (`trl-vpo import --list`: the formats that are converted):
  trl-vpo recipes
      what there is, and the GPUs that it is written for
  trl-vpo doctor rrpo/qwen2_5_vl_7b --dataset_name train.jsonl
      checks the rows, and whether they fit into memory
  trl-vpo train rrpo --config rrpo/qwen2_5_vl_7b --dataset_name train.jsonl"""


console = Console()


@dataclass
class HeldOut:
    """A held-out set: its dataset, and the facts behind each row."""

    dataset: Any  # a `datasets.Dataset`
    samples: list[world.Sample]

    def check(self, texts: list[str]) -> list[language.CaptionCheck]:
        return [language.check_caption(text, sample.things) for text, sample in zip(texts, self.samples)]


@dataclass
class Measured:
    """One line of the table: measures of preferences (`trl_vpo.evaluate.measures`) and the checked captions."""

    preferences: dict[str, float]
    captions: list[language.CaptionCheck]

    @property
    def hallucination(self) -> float:
        return sum(caption.hallucinated for caption in self.captions) / len(self.captions)

    @property
    def unparsed(self) -> int:
        return sum(not caption.parsed for caption in self.captions)


@dataclass
class Result:
    method: str
    kind: str
    before: Measured
    after: Measured
    seconds: float
    history: list[dict]


def run_quickstart(out: Path, methods: Sequence[str]) -> None:
    """Train and measure these methods, print the table, and save adapters and curves in a folder."""
    began = time.perf_counter()
    check_output_dir(str(out))
    held_out = prepare(out / "data")
    bases, results = {}, []
    for method in methods:
        kind = METHODS[method][1]
        results.append(run_method(method, out, held_out[kind], bases.get(kind)))
        bases[kind] = results[-1].before
    show_results(results)
    figure, _ = training_figure({result.method: result.history for result in results})
    curves = style.save(figure, out / "curves.png")
    runs = " ".join(str(out / method) for method in methods)
    console.print(f"\nAdapters: {runs}\nCurves:   {curves}", soft_wrap=True)
    console.print(f"All of it took {time.perf_counter() - began:.0f} s.")
    console.print(NEXT.format(out=out, kind=results[-1].kind, runs=runs), highlight=False, soft_wrap=True)


def prepare(folder: Path) -> dict[str, HeldOut]:
    """Write the data of `write_data` and import TRL."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs comes with the package
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries(bars=False)
    held_out = write_data(folder)
    with console.status("importing TRL, which takes half a minute ..."):
        import torch
        import transformers

        importlib.import_module("trl_vpo.trainers.base")
    transformers.logging.set_verbosity_error()  # a first-time user can do nothing about the warnings
    torch.set_num_threads(1)  # so small a model gains nothing from a second thread, and loses much on a busy machine
    return held_out


def write_data(folder: Path) -> dict[str, HeldOut]:
    """Write media and rows of both kinds, for training and held out, and return the held-out sets by kind."""
    from datasets import Dataset

    held_out = {}
    for kind in ("clip", "scene"):
        for split, count, seed in (("train", TRAIN_ROWS, TRAIN_SEED), ("held_out", HELD_OUT_ROWS, HELD_OUT_SEED)):
            media = folder / f"{kind}s_{split}"
            title = f"writing {count} {kind}s ({split.replace('_', '-')})"
            bar = partial(track, description=f"{title:34s}", total=count, console=console)
            samples, written = rows.write_preferences(kind, count, seed, media, progress=bar)
            rows.write_jsonl(written, media.with_suffix(".jsonl"))
        held_out[kind] = HeldOut(Dataset.from_list(written), samples)
    return held_out


def run_method(
    method: str,
    out: Path,
    held_out: HeldOut,
    base: Measured | None,
    recipe: str | None = None,
    data: Path | None = None,
) -> Result:
    """Train one method from its recipe and measure it, and the base too unless it is known already."""
    name, kind = METHODS[method]
    console.rule(f"{name} on {kind}s")
    from trl_vpo.evaluate.callback import EvaluationCallback, measures_of
    from trl_vpo.training.run import run_training

    recipe = recipe or f"quickstart/{method}"
    data = data or out / "data" / f"{kind}s_train.jsonl"
    options = {"--config": recipe, "--dataset_name": data, "--output_dir": out / method}
    options["--disable_tqdm"] = "false"
    argv = [str(word) for option in options.items() for word in option]
    began = time.perf_counter()
    trainer = run_training(method, argv, left=lambda folder: "The same command starts it from scratch.")
    seconds = time.perf_counter() - began
    with console.status(f"measuring {name} on {len(held_out.samples)} held-out {kind}s ..."):
        policy, reference = EvaluationCallback(trainer, held_out.dataset, sensitivity=()).records()
        after = Measured(measures_of(policy, reference), held_out.check(answer_prompts(trainer, held_out.dataset)))
        if base is None:
            with trainer.model.disable_adapter():
                base = Measured(measures_of(reference), held_out.check(answer_prompts(trainer, held_out.dataset)))
    return Result(name, kind, base, after, seconds, trainer.state.log_history)


def answer_prompts(trainer, dataset) -> list[str]:
    """Return the greedy response of a trainer's model to each prompt of a dataset; media as in its training."""
    from trl_vpo.data.inputs import Inputs, load_media, row_ids
    from trl_vpo.models.local import LocalModel
    from trl_vpo.models.requests import Request, Sampling

    model = LocalModel(trainer.model.get_base_model(), trainer.processing_class)
    inputs, media = Inputs(dataset, row_ids(dataset), None, None), trainer.args.video_options()
    requests = [Request(row.example["prompt"], load_media(row, media)) for row in inputs]
    answers = model.complete(requests, Sampling(max_new_tokens=CAPTION_TOKENS, temperature=0))
    return [answer.text for answer in answers]


def show_results(results: list[Result]) -> None:
    """Print the table, and what it says in words."""
    console.print(results_table(results))
    for result in results:
        console.print(f"[bold]{result.method}[/bold]: {in_words(result)}", highlight=False)


def results_table(results: list[Result]) -> Table:
    """Return one line per method below the base on its kind of samples; log-probs and KL in nats per caption."""
    changes = ("Δ logp\nchosen", "Δ logp\nrejected", "KL from\nbase")
    headings = ("method", "preference\naccuracy", "halluci-\nnation", *changes, "seconds")
    rows_shown = table(*headings, title="Held-out, balanced samples: the base before, each method after")
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        before = of_kind[0].before
        rows_shown.add_row(f"base ({kind}s)", *_shares(before), "", "", "", "", style="dim")
        for result in of_kind:
            now, was = result.after.preferences, before.preferences
            moved = [f"{now[side] - was[side]:+.2f}" for side in ("logps/chosen", "logps/rejected")]
            kl = f"{now['kl/chosen']:.3f}"
            rows_shown.add_row(result.method, *_shares(result.after), *moved, kl, f"{result.seconds:.0f}")
        rows_shown.add_section()
    return rows_shown


def _shares(measured: Measured) -> tuple[str, str]:
    return f"{measured.preferences['preference/accuracy']:.1%}", f"{measured.hallucination:.1%}"


def in_words(result: Result) -> str:
    """Say in words what the numbers of one method mean, also that it does not help."""
    before, after = result.before, result.after
    was, now = before.preferences, after.preferences
    pairs = list(zip(before.captions, after.captions))
    fixed = sum(old.hallucinated and not new.hallucinated for old, new in pairs)
    broken = sum(new.hallucinated and not old.hallucinated for old, new in pairs)
    parts = [f"{fixed} of {len(pairs)} captions fixed, {broken} newly wrong"]
    clear = 2 * math.sqrt(fixed + broken)  # twice the standard deviation of fixed - broken, were there no effect
    if fixed - broken > clear:
        parts.append("it hallucinates less than the base")
    elif broken - fixed > clear:
        parts.append("it does not help here: it hallucinates more than the base")
    else:
        parts.append("it does not help here: no clear change in hallucination")
    accuracy, average = (now[f"preference/{name}"] for name in ("accuracy", "accuracy_average"))
    if accuracy <= was["preference/accuracy"]:
        parts.append("it does not prefer the true captions more often than the base does")
    if f"{average:.3f}" != f"{accuracy:.3f}":
        parts.append(f"by log-prob per token, its preference accuracy is {average:.1%}")
    moved = now["logps/chosen"] - was["logps/chosen"]
    if moved < 0:
        parts.append(f"it makes the true captions themselves less likely ({moved:+.2f} nats)")
    if after.unparsed:
        parts.append(f"{after.unparsed} of its captions are outside the world's grammar (base: {before.unparsed})")
    return "; ".join(parts) + "."
