"""Benchmarks: one question each, all candidates in turn in the same run.

    python scripts/benchmark.py step --prompt 512,1536,6144
    python scripts/benchmark.py uneven --uneven 4000,300,300,300 --processes 2
    python scripts/benchmark.py phases --prompt 1536
    python scripts/benchmark.py kl
    python scripts/benchmark.py lpoi
    python scripts/benchmark.py methods --prompt 512
    python scripts/benchmark.py decode
    python scripts/benchmark.py growth
    python scripts/benchmark.py memory
    python scripts/benchmark.py knobs --prompt 1536 --method dpo

Prints a table (medians with minimum and maximum) and, as its last line, one JSON object. Machines are noisy: quote the
ratios of one run, not the seconds. Memory is measured in a process of its own for each candidate.
"""

import argparse
import importlib
import json
from pathlib import Path

BENCHMARKS = {
    "step": "a training step: stock trl.DPOTrainer against ours, shared and separate layout",
    "uneven": "a micro-batch of unlike prompts: one call of all rows against a call for each row",
    "phases": "where a step's time goes: vision, reference, policy, backward",
    "kl": "RRPO's KL with a 152,000-token vocabulary: chunked against plain logits",
    "lpoi": "LPOI's step for lists of 2, 5 and 9 images: ours against the official scheme",
    "methods": "a training step of every method against DPO's",
    "decode": "16 frames of a long video: ours against other loaders",
    "growth": "seconds and memory against frames, list length and dataset rows",
    "memory": "memory of a training step: what the doctor estimates against what is measured",
    "knobs": "checkpointing and offloading: what each kind saves and costs",
}


def numbers(text: str) -> list[int]:
    return [int(part.replace("_", "")) for part in text.split(",")]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    lines = "\n".join(f"  {name:8}{what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description="Benchmarks, one question each:\n" + lines,
        epilog="example: python scripts/benchmark.py step --prompt 1536 --method dpo --repeats 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--response", type=int, default=96, help="response tokens")
    parser.add_argument("--batch", type=int, default=1, help="pairs in a batch")
    parser.add_argument("--method", default="dpo,leanpo,rrpo", metavar="M,M", help="methods of training steps")
    parser.add_argument("--processes", type=int, default=1, help="processes of `uneven`")
    parser.add_argument("--vocabulary", type=int, default=152_000, help="tokens of `kl`'s vocabulary")
    for name, default, text in (
        ("prompt", [512, 1536, 6144], "prompt tokens"),
        ("uneven", [4000, 300, 300, 300], "prompt tokens of the rows of `uneven`"),
        ("tokens", [128, 512, 2048], "responses of `kl`"),
        ("lists", [2, 5, 9], "images of a list, for `lpoi` and `growth`"),
        ("seconds", [60, 600], "lengths of `decode`'s clips"),
        ("gops", [12, 48, 250], "frames to a keyframe there"),
        ("frames", [4, 16, 64], "frames of `growth`"),
        ("rows", [1_000, 10_000, 100_000, 1_000_000], "rows of `growth`"),
    ):
        parser.add_argument(f"--{name}", type=numbers, default=default, metavar="N,N", help=text)
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each candidate, after one warm-up")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)  # a memory measurement's own process
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    module = importlib.import_module(f"benchmarks.{args.name}")
    if args.candidate:
        print(json.dumps(module.measure_memory(args)))
        return
    result = json.dumps({"benchmark": args.name, "rows": module.run(args)})
    if args.out:
        args.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
