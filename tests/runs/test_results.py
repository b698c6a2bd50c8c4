"""The results of a run: rows that `load_dataset` takes, rejected inputs, and a summary."""

import json

from datasets import load_dataset
from workers import Sum, outcome, work

from trl_vpo.data.rows import read_row
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.store import Run, read_outcomes, read_settings

COUNT = 12
IDS = [f"r{i}" for i in range(COUNT)]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(folder, cache):
    return load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=cache)


def test_results(tmp_path):
    folder = tmp_path / "run"
    summary = work(folder, COUNT)
    assert summary == {"inputs": 12, "kept": 9, "rows": 12, "rejected": 3} | {
        "rejected_by_kind": {"answered correctly": 3}, "figures": {"sum": 66}
    }  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == summary
    rows = lines(folder / "rows.jsonl")
    front = ["r0-0", "r6-0"]  # the first to show the plain columns, and images
    behind = ["r0-1", "r1-0", "r2-0", "r4-0", "r5-0", "r5-1", "r8-0", "r9-0", "r10-0", "r10-1"]
    assert [r["id"] for r in rows] == front + behind
    assert {tuple(row) for row in rows} == {("id", "prompt", "chosen", "rejected", "images")}
    assert [r["images"] for r in rows[:3]] == [None, ["/media/r6.png"], None]
    assert lines(folder / "rejected.jsonl") == [
        {"id": f"r{i}", "kind": "answered correctly", "reason": f"the answer {i} is right"} for i in (3, 7, 11)
    ]
    assert list(read_outcomes(folder)) == [outcome(name) for name in IDS]
    assert read_settings(folder) == {"seed": 0}
    trained = [read_row(example | {"images": None}) for example in load(folder, tmp_path / "c")]  # r6 has no marker
    assert len(trained) == 12 and trained[0].chosen == rows[0]["chosen"]


def test_columns_and_types_that_come_late_load(tmp_path):
    """`load_dataset` takes the types from the first 10 MB; here only the last row has a box, a fraction, ..."""
    text = "x" * 60_000

    def row(i):
        last = i == 199
        row = {"id": f"r{i}", "prompt": text, "chosen": "a", "rejected": "b", "score": 0.5 if last else 1}
        row["critical_box"] = [0, 1, 2, 3] if last else None
        row["videos"] = [{"path": "/v.mp4", "video_start": 1.5}] if last else ["/v.mp4"]
        return row | ({"late": "yes"} if last else {})

    with Run(tmp_path / "run", {}) as run:
        for i in range(200):
            run.write(Outcome(f"r{i}", rows=(row(i),), notes={"n": i}))
        run.finish([f"r{i}" for i in range(200)], Sum())
    assert (tmp_path / "run/rows.jsonl").stat().st_size > 11e6
    loaded = load(tmp_path / "run", tmp_path / "c")
    assert [row["id"] for row in loaded.select(range(3))] == ["r0", "r199", "r1"]
    assert loaded[1]["critical_box"] == [0, 1, 2, 3]
    assert (loaded[1]["score"], loaded[1]["late"]) == (0.5, "yes")
    assert loaded[1]["videos"][0]["video_start"] == 1.5
    assert loaded[150]["videos"] == ["/v.mp4"]


def test_the_report_selects_the_rows(tmp_path):
    report = Sum()
    report.select = lambda outcomes: [
        Outcome(o.id, reason="too long", kind="outside keep_top") if o.id == "r2" else o for o in outcomes
    ]
    report.summarize = lambda outcomes: {"rejected": [o.id for o in outcomes if o.reason]}
    with Run(tmp_path / "run", {}) as run:
        for name in IDS[:4]:
            run.write(outcome(name))
        summary = run.finish(IDS[:4], report)
    assert summary["figures"] == {"rejected": ["r2", "r3"]}
    assert summary["rejected_by_kind"] == {"answered correctly": 1, "outside keep_top": 1}
    assert [row["id"] for row in lines(tmp_path / "run/rows.jsonl")] == ["r0-0", "r0-1", "r1-0"]
