"""The benchmarks run, at sizes at which their numbers mean nothing, and their last line is the promised JSON."""

import json
from itertools import product

import benchmark
import pytest

from trl_vpo.training.methods import METHODS


@pytest.fixture
def rows_of(capsys, tmp_path):
    def run(name, *options, repeats=1):
        benchmark.main([name, *options, "--repeats", str(repeats), "--out", str(tmp_path / "out.json")])
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed == json.loads((tmp_path / "out.json").read_text())
        assert set(printed) == {"benchmark", "rows"} and printed["benchmark"] == name
        for row in printed["rows"]:
            assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
            assert row.get("peak_mib", 1) > 0
        return printed["rows"]

    return run


@pytest.mark.slow
def test_kl(rows_of):
    rows = rows_of("kl", "--vocabulary", "1000", "--tokens", "8", repeats=2)
    assert [(row["method"], row["response"]) for row in rows] == [("plain", 8), ("chunked", 8)]
    assert rows[0]["ratio_vs_plain"] == rows[0]["memory_vs_plain"] == 1


def test_decode(rows_of):
    rows = rows_of("decode", "--seconds", "1", "--gops", "12")
    assert {row["clip"] for row in rows} == {"1 s, keyframe every 12"}
    assert [row["method"] for row in rows[:2]] == ["ours", "transformers (pyav)"]
    assert rows[0]["ratio_vs_ours"] == 1
    assert min(row["ratio_vs_fastest"] for row in rows if row["method"] != "ours again") == 1


@pytest.mark.slow
def test_growth(rows_of):
    rows = rows_of("growth", "--frames", "2", "--lists", "2", "--rows", "200", "--response", "8")
    assert [(row["part"], row["size"]) for row in rows] == [("frames", 2), ("lists", 2), ("loader", 200)]
    assert rows[0]["time_vs_first"] == rows[0]["memory_vs_first"] == 1
    assert {"own_mib", "prepared", "prepare_seconds_per_1000", "prepare_peak_mib", "prepare_own_mib"} <= set(rows[2])


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "method", "pairs"), [(300, "dpo", 1), (600, "leanpo", 3)])
def test_step(rows_of, prompt, method, pairs):
    rows = rows_of("step", "--prompt", str(prompt), "--response", "8", "--method", method, "--batch", str(pairs))
    order = [("trl", "separate"), (method, "shared"), (method, "separate")]
    assert [(row["method"], row["layout"], row["batch"]) for row in rows] == [(*names, pairs) for names in order]
    assert all(row["ratio_vs_trl"] > 0 and row["memory_vs_trl"] > 0 for row in rows)
    assert rows[1]["share_of_ideal"] == pytest.approx(rows[1]["ratio_vs_trl"] / rows[1]["ideal_ratio"])
    more = rows[0]["prompt"] - prompt  # what the chat template adds
    assert 0 <= more < 20
    total = sum(prompt - i * prompt // (2 * pairs) + more for i in range(pairs))
    assert rows[1]["ideal_ratio"] == pytest.approx(2 * (total + 8 * pairs) / (total + 16 * pairs))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_uneven(rows_of, processes):
    rows = rows_of(
        "uneven", "--uneven", "600,300", "--response", "8", "--method", "dpo", "--processes", str(processes)
    )
    assert [(row["processes"], row["calls"]) for row in rows] == [(processes, 1), (processes, 2)]
    assert rows[1]["ratio_vs_single"] == 1 and rows[0]["ratio_vs_single"] > 0


@pytest.mark.slow
def test_phases(rows_of):
    rows = rows_of("phases", "--prompt", "300", "--response", "8", "--method", "dpo,leanpo")
    assert [(r["method"], r["layout"]) for r in rows] == list(product(("dpo", "leanpo"), ("shared", "separate")))
    parts = ("vision", "reference", "policy", "backward", "rest")
    for row in rows:
        assert all(row[part] > 0 for part in parts if part != "reference")
        assert sum(row[part] for part in parts) == pytest.approx(row["seconds"])
        assert (row["reference"] > 0) == (row["method"] == "dpo")
        assert row["without_reference"] == pytest.approx(1 - row["reference"] / row["seconds"])


@pytest.mark.slow
def test_knobs(rows_of):
    rows = rows_of("knobs", "--prompt", "300", "--response", "8", "--method", "dpo")
    kept = {row["knob"]: row["kept_vs_nothing"] for row in rows}
    assert kept.pop("nothing") == 1 > max(kept.values()) and min(kept.values()) > 0
    assert {row["knob"] for row in rows if row["host_mib"]} == {knob for knob in kept if "offload" in knob}
    assert {row["knob"] for row in rows if "time_vs_nothing" not in row} == {
        knob for knob in kept if "offload" in knob
    }


@pytest.mark.slow
def test_methods(rows_of):
    rows = rows_of("methods", "--prompt", "280", "--response", "8")
    assert [row["method"] for row in rows] == list(METHODS)
    ratios = {row["method"]: row["time_vs_dpo"] for row in rows}
    assert ratios["dpo"] == 1 and ratios["lpoi"] > ratios["mdpo"] > 0


@pytest.mark.slow
def test_lpoi(rows_of):
    rows = rows_of("lpoi", "--lists", "2", "--response", "8")
    assert [row["method"] for row in rows] == ["official", "separate", "shared", "precomputed"]
    assert all(row["ratio_vs_official"] > 0 for row in rows)
