"""Write data of the small world, which ships with the package: what the other examples use without data of your own.

    python examples/small_world.py FOLDER [COUNT]

FOLDER gets `train.jsonl` and `held_out.jsonl` (pairs about clips), `questions.jsonl` (annotated questions about other
clips, for `trl-vpo generate`), and the clips.
"""

import sys
from pathlib import Path

from trl_vpo.testbed import rows
from trl_vpo.testbed.tiny_vlm import BASE  # noqa: F401 - a model of 1.3 M parameters that knows this world


def write(folder: str | Path, count: int = 32) -> Path:
    """Write `count` samples of each kind."""
    folder = Path(folder)
    for name, seed in (("train", 1), ("held_out", 2)):
        _, pairs = rows.write_preferences("clip", count, seed, folder / f"{name}_clips")
        rows.write_jsonl(pairs, folder / f"{name}.jsonl")
    questions = rows.write_inputs("clip", count, 3, folder / "question_clips")
    rows.write_jsonl((row for row in questions if row["answer_kind"] == "open"), folder / "questions.jsonl")
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1], *map(int, sys.argv[2:])))
