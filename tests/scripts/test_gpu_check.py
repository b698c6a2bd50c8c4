"""The check of a CUDA machine, as a dry run on the CPU: its figures mean nothing here, but all of its parts run."""

import json
import os
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import gpu_check
import pytest
from gpu_checks import models, parity


@pytest.fixture
def check(capsys, tmp_path):
    """Run the command, and return (exit status, rows by part, printed lines, the page)."""

    def run(*options):
        files = [tmp_path / f"gpu_check.{kind}" for kind in ("json", "md")]
        status = gpu_check.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), *options])
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1] == f"gpu_check: {files[0]} {files[1]}"
        machine, *rows = json.loads(files[0].read_text())
        assert (machine["part"], machine["device"], machine["tiny"]) == ("machine", "cpu", True)
        assert machine["card"].startswith("no GPU") and {"torch", "trl", "date"} < set(machine)
        parts = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(r["part"] for r in rows)}
        return status, parts, printed, files[1].read_text()

    return run


def test_dry_run(check):
    status, parts, printed, page = check("--seconds", "3000")
    assert status == 0, [row for rows in parts.values() for row in rows if row.get("ok") is False]
    assert list(parts) == ["parity", "step", "kl", "memory", "qlora"]
    assert not [row["note"] for rows in parts.values() for row in rows if "note" in row]
    assert all(row["seconds"] > 0 and row["method"] for rows in parts.values() for row in rows)

    exact = [row for row in parts["parity"] if row["dtype"] == "float32"]
    assert {(row["family"], row["asked"]) for row in exact} == {
        (f, a) for f in models.FAMILIES for a in parity.LAYOUTS
    }
    assert all(0 < row["logps_error"] < 1e-5 and 0 < row["gradient_error"] < 1e-5 for row in exact)
    rounded = [row for row in parts["parity"] if row["dtype"] == "bfloat16"]
    assert {row["family"] for row in rounded} == set(models.FAMILIES)
    assert all(1e-4 < row["gradient_error"] < 1.5 * row["alone_gradient_error"] for row in rounded)

    ours = [row for row in parts["step"] if row["method"] != "trl"]
    assert {row["method"] for row in ours} == {"dpo", "rrpo", "leanpo", "lpoi"}
    assert {row["model"] for row in ours} == {"2B", "7B"} and {row["media"] for row in ours} == {"image", "text"}
    compared = [row for row in ours if row["method"] != "lpoi"]
    assert all(row["ratio_vs_trl"] > 0 and 0 < row["memory_vs_trl"] < 0.5 for row in compared)
    assert all(row["peak_mib"] > row["activations_mib"] > 0 for row in parts["step"])

    assert {(row["method"], row["model"]) for row in parts["memory"]} == {
        (row["method"], row["model"]) for row in ours
    }
    assert all(abs(row["ratio"] - 1) < 0.1 for row in parts["memory"])
    kernels = [row for row in parts["kl"] if row["candidate"] == "chunked"]
    assert [row["method"] for row in kernels] == ["logps", "kl"] and all(row["value_error"] < 1e-4 for row in kernels)
    (trained,) = parts["qlora"]
    assert trained["numbers"] == ("4bit" if find_spec("bitsandbytes") else "bfloat16") and trained["steps"] == 2
    assert trained["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert (
        "its figures mean nothing" in page
        and "| dpo | sdpa | " in page
        and "## RRPO on video files" in page
        and page.count("\n## ") == 5
    )
    assert sum(line.startswith("part=") for line in printed) == sum(map(len, parts.values()))


def test_wrong_results_are_found(check, monkeypatch):
    ours = parity.ours

    def without_siblings(trainer, policy, batch, weights):
        """Every response but the first is scored as if it stood somewhere else."""
        logps, gradients = ours(trainer, policy, batch, weights)
        return logps.roll(1, 0), gradients

    monkeypatch.setattr(models, "FAMILIES", ("Qwen3-VL",))
    monkeypatch.setattr(parity, "ours", without_siblings)
    status, parts, printed, page = check("--parts", "parity")
    assert status == 1 and list(parts) == ["parity"]
    assert all(row["ok"] is False and row["logps_error"] > 0.1 for row in parts["parity"])
    assert printed[-2].endswith(": 3 wrong, 0 not measured") and page.count("| NO |") == 3


def run_stand_in(cell, options):
    if cell["method"] == "hangs":
        time.sleep(60)
    if cell["method"] == "crashes":
        os._exit(7)
    if cell["method"] == "too big":
        raise MemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    if cell["method"] == "fails":
        raise ValueError("a reason\nand more")
    return [{"seconds": 1.0}]


def test_trouble_is_a_row(check, monkeypatch):
    names = ["hangs", "works", "crashes", "too big", "fails", "works"]
    stand_in = SimpleNamespace(cells=lambda options: [{"method": name} for name in names], run=run_stand_in)
    monkeypatch.setitem(sys.modules, "gpu_checks.kl", stand_in)
    monkeypatch.setitem(sys.modules, "gpu_checks.qlora", None)  # an import of it fails
    monkeypatch.setattr(gpu_check, "CELL_SECONDS", 1)
    status, parts, _, _ = check("--parts", "kl,qlora")
    notes = [row.get("note") for row in parts["kl"]]
    assert notes[:1] + notes[1::4] == ["stopped after 1 s: it hangs", None, None]
    assert notes[2] == "the process ended with status 7 (see gpu_check.log)"
    assert notes[3:5] == ["out of memory", "ValueError: a reason"]
    assert [row.get("ok") for row in parts["kl"]] == [False, None, False, None, False, None] and status == 1
    assert parts["qlora"][0]["note"].startswith("not run: import of gpu_checks.qlora halted")


def test_time_that_is_over_is_a_row(check, monkeypatch):
    cells = [{"method": "works"}, {"method": "hangs"}, {"method": "works"}]
    monkeypatch.setitem(sys.modules, "gpu_checks.kl", SimpleNamespace(cells=lambda options: cells, run=run_stand_in))
    status, parts, _, _ = check("--parts", "kl", "--seconds", "2")
    over = "the time of this part was over"
    assert [row.get("note") for row in parts["kl"]] == [None, f"stopped after 2 s: {over}", f"not reached: {over}"]
    assert status == 0
