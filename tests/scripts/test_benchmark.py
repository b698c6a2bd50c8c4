"""The benchmarks run, at sizes at which their numbers mean nothing, and their last line is the promised JSON."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def rows_of(main, capsys, tmp_path):
    def run(name, *options, repeats=1):
        main([name, *options, "--repeats", str(repeats), "--out", str(tmp_path / "out.json")])
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed == json.loads((tmp_path / "out.json").read_text())
        assert set(printed) == {"benchmark", "rows"} and printed["benchmark"] == name
        for row in printed["rows"]:
            assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        return printed["rows"]

    return run


def test_kl(rows_of):
    rows = rows_of("kl", "--vocabulary", "1000", "--tokens", "8", repeats=2)
    assert [(row["method"], row["response"]) for row in rows] == [("plain", 8), ("chunked", 8)]
    assert rows[0]["ratio_vs_plain"] == rows[0]["memory_vs_plain"] == 1
    assert all(row["peak_mib"] > 0 for row in rows)


def test_decode(rows_of):
    rows = rows_of("decode", "--seconds", "1", "--gops", "12")
    assert {row["clip"] for row in rows} == {"1 s, keyframe every 12"}
    assert [row["method"] for row in rows[:2]] == ["ours", "transformers (pyav)"]
    assert (
        rows[0]["ratio_vs_ours"] == 1 and min(r["ratio_vs_fastest"] for r in rows if r["method"] != "ours again") == 1
    )


@pytest.mark.slow
def test_growth(rows_of):
    rows = rows_of("growth", "--frames", "2", "--lists", "2", "--rows", "200", "--response", "8")
    assert [(row["part"], row["size"]) for row in rows] == [("frames", 2), ("lists", 2), ("loader", 200)]
    assert all(row["peak_mib"] > 0 for row in rows)
    assert rows[0]["time_vs_first"] == rows[0]["memory_vs_first"] == 1
    assert {"own_mib", "prepared", "prepare_seconds_per_1000", "prepare_peak_mib", "prepare_own_mib"} <= set(rows[2])


@pytest.mark.slow
def test_step(rows_of):
    rows = rows_of("step", "--prompt", "300", "--response", "8", "--method", "dpo")
    assert [(row["method"], row["layout"]) for row in rows] == [
        ("trl", "separate"),
        ("dpo", "shared"),
        ("dpo", "separate"),
    ]
    assert all(row["peak_mib"] > 0 and row["ratio_vs_trl"] > 0 and row["memory_vs_trl"] > 0 for row in rows)
    assert rows[1]["share_of_ideal"] == pytest.approx(rows[1]["ratio_vs_trl"] / rows[1]["ideal_ratio"])


@pytest.mark.slow
def test_step_of_several_pairs(rows_of):
    rows = rows_of("step", "--prompt", "600", "--response", "8", "--method", "leanpo", "--batch", "3")
    assert [(row["method"], row["batch"]) for row in rows] == [("trl", 3), ("leanpo", 3), ("leanpo", 3)]
    prompts = [600, 500, 400]  # and what the chat template adds
    more = rows[0]["prompt"] - 600
    assert 0 <= more < 20
    ideal = 2 * (sum(prompts) + 3 * more + 24) / (sum(prompts) + 3 * more + 48)
    assert rows[1]["ideal_ratio"] == pytest.approx(ideal)


@pytest.mark.slow
def test_phases(rows_of):
    rows = rows_of("phases", "--prompt", "300", "--response", "8", "--method", "dpo,leanpo")
    assert [(r["method"], r["layout"]) for r in rows] == [
        (m, lay) for m in ("dpo", "leanpo") for lay in ("shared", "separate")
    ]
    parts = ("vision", "reference", "policy", "backward", "rest")
    for row in rows:
        assert all(row[part] > 0 for part in parts if part != "reference")
        assert sum(row[part] for part in parts) == pytest.approx(row["seconds"])
        assert (row["reference"] > 0) == (row["method"] == "dpo")
        assert row["without_reference"] == pytest.approx(1 - row["reference"] / row["seconds"])


@pytest.mark.slow
def test_lpoi(rows_of):
    rows = rows_of("lpoi", "--lists", "2", "--response", "8")
    assert [row["method"] for row in rows] == ["official", "separate", "shared", "precomputed"]
    assert all(row["peak_mib"] > 0 and row["ratio_vs_official"] > 0 for row in rows)
