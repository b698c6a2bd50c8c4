"""Growth: of a DPO step with a clip's frames in the prompt, of an LPOI step with its list, of loading with rows.

The first two: our shared layout, 64 tokens for two frames of the clip, 256 for an image of the list. The third: rows
of text in an Arrow file on disk, shuffled, 50 batches of 4 pairs through the collator. Its `peak MiB` is all that the
process holds more at its peak, `own MiB` what of it is no mapped file, after the batches; `prepare` is the check of
all rows before training, without their media, a thousand rows at a time; `own MiB` likewise.
"""

import itertools
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader

from benchmarks import lpoi
from benchmarks import model as bench_model
from benchmarks.common import MIB, in_turn, memory_of, peak_mib, show, status_kib, summary
from benchmarks.step import make_trainer, settings
from trl_vpo import VisualDPOConfig, VisualDPOTrainer
from trl_vpo.data.check import prepare_dataset

SIDE = 224  # pixels: 8 x 8 = 64 tokens
BATCHES, PAIRS = 50, 4
PREPARED = 100_000  # rows; the time for a thousand is the same beyond
COLUMNS = {
    "part": "what",
    "size": "size",
    "prompt": "prompt tokens",
    "seconds": "seconds (min-max)",
    "peak_mib": "peak MiB",
    "time_vs_first": "time / first's",
    "memory_vs_first": "memory / first's",
}
LOADER = {
    "size": "rows",
    "seconds": "seconds of 50 batches (min-max)",
    "peak_mib": "peak MiB",
    "own_mib": "own MiB",
    "prepared": "rows prepared",
    "prepare_seconds_per_1000": "prepare, s / 1000 rows",
    "prepare_peak_mib": "prepare, peak MiB",
    "prepare_own_mib": "prepare, own MiB",
}


def make(part: str, size: int, args: Namespace):
    """A step and the number of tokens in its prompt."""
    if part == "lists":
        return lpoi.make("shared", size, args)
    data = bench_model.clip_row(size, args.response, SIDE)
    _, step, (prompt,) = make_trainer("dpo", "shared", data, args.response, args.device)
    return step, prompt


def write_rows(folder: str, count: int, response: int) -> None:
    """`count` rows on disk: a few hundred different ones, again and again."""

    def text_only(row: dict) -> dict:
        return {"prompt": [{"role": "user", "content": row["prompt"][0]["content"][-1]["text"]}]}

    rows = bench_model.rows(64, response, images=1, side=28, pairs=200).remove_columns("images")
    table = rows.map(text_only, remove_columns="prompt").data.table.combine_chunks()
    Dataset(pa.concat_tables([table] * -(-count // 200)).slice(0, count)).save_to_disk(folder)


def loader_numbers(folder: str, args: Namespace) -> dict:
    processor = bench_model.processor()
    config = VisualDPOConfig(**settings("cpu") | {"check_media": "off"})
    collator = VisualDPOTrainer.make_collator(processor, config)
    collator([bench_model.rows(64, args.response, images=1, side=28)[0]])  # what the first call of anything takes
    seconds: list[float] = []

    def batches() -> None:
        loader = DataLoader(load_from_disk(folder), batch_size=PAIRS, shuffle=True, collate_fn=collator)
        begin = time.perf_counter()
        for _ in itertools.islice(loader, BATCHES):
            pass
        seconds.append(time.perf_counter() - begin)

    before = status_kib("RssAnon")
    numbers = {"peak_mib": peak_mib(batches, "cpu"), "own_mib": (status_kib("RssAnon") - before) / 1024}
    for _ in range(args.repeats - 1):
        batches()
    data = load_from_disk(folder)
    data = data.select(range(min(len(data), PREPARED)))
    kwargs = {"name": "train", "processing_class": processor, "phrases": False}
    begin, before = time.perf_counter(), status_kib("RssAnon")
    numbers["prepare_peak_mib"] = peak_mib(lambda: prepare_dataset(data, config, **kwargs), "cpu")
    numbers["prepare_seconds_per_1000"] = (time.perf_counter() - begin) / len(data) * 1000
    numbers["prepare_own_mib"] = (status_kib("RssAnon") - before) / 1024
    return numbers | summary(seconds) | {"prepared": len(data)}


def measure_memory(args: Namespace) -> dict:
    part, size = args.candidate.split(":", 1)
    if part == "loader":
        return loader_numbers(size, args)
    return {"peak_mib": peak_mib(make(part, int(size), args)[0], args.device)}


def run(args: Namespace) -> list[dict]:
    rows = [*_steps("frames", args.frames, args), *_steps("lists", args.lists, args)]
    show(f"our step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    loaded = [_loader(size, args) for size in args.rows]
    show("rows on disk", loaded, LOADER)
    return rows + loaded


def _steps(part: str, sizes: list[int], args: Namespace) -> list[dict]:
    steps, prompts = {}, {}
    for size in sizes:
        steps[size], prompts[size] = make(part, size, args)
    rows = []
    for size, seconds in in_turn(steps, args.repeats, args.device).items():
        row = {"part": part, "size": size, "prompt": prompts[size], **summary(seconds)}
        rows.append(row | memory_of(args, f"{part}:{size}"))
        rows[-1]["time_vs_first"] = row["seconds"] / rows[0]["seconds"]
        rows[-1]["memory_vs_first"] = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    return rows


def _loader(size: int, args: Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        write_rows(folder, size, args.response)
        disk = sum(path.stat().st_size for path in Path(folder).iterdir()) / MIB
        return {"part": "loader", "size": size, "disk_mib": disk, **memory_of(args, f"loader:{folder}", repeats=3)}
