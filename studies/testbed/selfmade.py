"""Preference data that the base of the testbed makes for itself: `python -m studies.testbed.selfmade`.

For each method: annotated clips or scenes go through `trl-vpo generate` (recipe `quickstart/METHOD-generate`), the
rows train an adapter (`quickstart/METHOD-selfmade`), and it is measured as in the quickstart. LeanPO's responses and
RRPO's rejected ones are the base's own; LPOI's pairs are given and get their boxes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from trl_vpo import cli
from trl_vpo.testbed import language, quickstart, rows, world
from trl_vpo.testbed.quickstart import console

INPUT_CLIPS, INPUT_SCENES, INPUT_SEED = 320, 320, 13
PIPELINES = ("leanpo", "rrpo", "lpoi")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on preference data that the base makes for itself.")
    parser.add_argument("--out", type=Path, default=Path("outputs/selfmade"), help="default: outputs/selfmade")
    parser.add_argument("--methods", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    args = parser.parse_args()
    quickstart.prepare(args.out / "data")
    inputs, data = write_inputs(args.out / "data"), {}
    for method in args.methods:
        data[method] = generate(method, inputs[method], args.out)
        if quickstart.kind_of(method) == "clip":
            true = true_rejections(data[method])
            console.print(f"{true} of the rejected responses are true by the world's own facts.")
    for kind in ("clip", "scene"):
        recipes = {m: f"quickstart/{m}-selfmade" for m in args.methods if quickstart.kind_of(m) == kind}
        if recipes:
            quickstart.compare_on(kind, recipes, args.out, cli.main, data)


def write_inputs(folder: Path) -> dict[str, Path]:
    """Write the inputs of each method; their samples are neither the quickstart's nor the held-out ones.

    LeanPO's are captions only: the base was taught to take hints for no other question.
    """
    clips = rows.write_inputs("clip", INPUT_CLIPS, INPUT_SEED, folder / "clips_input")
    scenes = rows.write_inputs("scene", INPUT_SCENES, INPUT_SEED, folder / "scenes_input")
    captions = [row for row in clips if row["answer_kind"] == "open"]
    inputs = {"leanpo": ("captions", captions), "rrpo": ("questions", clips), "lpoi": ("pairs", scenes)}
    return {method: rows.write_jsonl(own, folder / f"{name}_input.jsonl") for method, (name, own) in inputs.items()}


def generate(method: str, inputs: Path, out: Path) -> Path:
    """Run (or continue) a method's pipeline; return the file of the rows."""
    from trl_vpo.generate.run import run_generation

    console.rule(f"{method}: making preference data")
    run = out / f"{method}-data"
    options = ["--config", f"quickstart/{method}-generate", "--dataset_name", inputs, "--output_dir", run]
    run_generation(method, [str(word) for word in options])
    return run / "rows.jsonl"


def true_rejections(data: Path) -> int:
    """Return how many rejected responses of the rows about clips are true in the world."""
    samples = world.draw_samples("clip", INPUT_CLIPS, INPUT_SEED, habits=False)
    count = 0
    for row in map(json.loads, data.read_text(encoding="utf-8").splitlines()):
        question, rejected = (row[side][0]["content"][-1]["text"] for side in ("prompt", "rejected"))
        count += is_true(question, rejected, samples[int(row["id"].split("-")[1])].things)
    return count


def is_true(question: str, answer: str, things: tuple[world.Thing, ...]) -> bool:
    """Return whether an answer to a question about a clip is true, by the facts and not by a rule that reads answers.

    A short answer is true if it names the fact that was asked for, whatever else it says.
    """
    if question in language.PROMPTS.values():
        return language.check_caption(answer, things).exact
    (thing,) = things
    if question.startswith(("Is ", "Does ")):
        claimed = set(re.findall(r"\w+", question)) & {*world.COLOURS, *world.SHAPES, *world.MOTIONS}
        return answer.lower().startswith("yes") == (claimed <= {thing.colour, thing.shape, thing.motion})
    fact = {"What": thing.colour, "Which": thing.shape, "Where": thing.motion}[question.split()[0]]
    return fact in re.findall(r"\w+", answer)


if __name__ == "__main__":
    main()
