"""Checkpoints on disk: which are complete, taken, deleted; and which runs may continue from them."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from trl_vpo.errors import CheckpointError
from trl_vpo.training.checkpoints import (
    delete_older,
    find_problems,
    mark_complete,
    newest_complete,
    read_marker,
    what_is_left,
)
from trl_vpo.training.run_identity import compare_runs

FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def write_checkpoint(folder, *, marked=True, **content):
    """Write the files that transformers writes, and the marker."""
    folder.mkdir(parents=True)
    save_file({"lora": torch.arange(64.0)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": torch.arange(64.0)}, folder / name)
    torch.save({"cpu": torch.arange(64)}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    if marked:
        mark_complete(folder, step=2, run={"method": "rrpo"}, **content)
    return folder


# --- what is wrong with one -----------------------------------------------------------------------------------------


def test_a_complete_checkpoint_has_no_problems(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    (folder / "notes.txt").write_text("of the user")
    assert find_problems(folder) == []
    marker = read_marker(folder)
    assert set(marker["files"]) == set(FILES) and marker["run"] == {"method": "rrpo"}
    assert marker["files"]["adapter_model.safetensors"]["size"] > 256  # 64 floats and a header


@pytest.mark.parametrize("name", FILES)
def test_a_missing_cut_or_changed_file_is_named(tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    data = (folder / name).read_bytes()
    for wrong in (data[:-1] + bytes([data[-1] ^ 1]), data[: len(data) // 2]):
        (folder / name).write_bytes(wrong)
        assert find_problems(folder) == [f"{name} is not what was saved"]
    (folder / name).unlink()
    assert find_problems(folder) == [f"{name} is missing"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"method": "rrpo"', '"method": "lpoi"', r"complete\.json is not what was saved"),
        ('"step": 2', '"step": 4', r"complete\.json is not what was saved"),
        ('"format": 2', '"format": 1', r"another version of TRL-VPO saved it\n.* continue with the version"),
    ],
)
def test_no_byte_of_the_marker_may_change(tmp_path, old, new, message):
    marker = write_checkpoint(tmp_path / "checkpoint-2") / "complete.json"
    text = marker.read_text()
    assert old in text
    marker.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        newest_complete(tmp_path)


def test_without_its_marker_no_checkpoint_is_finished(tmp_path):
    """It was killed just before it wrote the marker, or is of another program. Other ranks may not have saved."""
    (problem,) = find_problems(write_checkpoint(tmp_path / "checkpoint-2", marked=False))
    assert problem.startswith("complete.json, the last file, is missing")
    assert find_problems(tmp_path / "checkpoint-9") == ["there is no such folder"]


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        (["adapter_model.safetensors"], ["adapter_model.safetensors or model.safetensors"]),  # pickles do not count
        (FILES[1:4], FILES[1:4]),  # as saved with save_only_model: transformers would go on with a new optimizer
    ],
)
def test_what_an_exact_continuation_needs(tmp_path, removed, missing):
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    torch.save({}, folder / "pytorch_model.bin")
    for name in removed:
        (folder / name).unlink()
    mark_complete(folder)
    assert find_problems(folder) == [f"{name} is missing" for name in missing]


def test_sharded_states_lie_elsewhere(tmp_path):
    """Those of DeepSpeed, which writes `latest` after its folder, and of FSDP."""
    for number, names in enumerate(
        (
            ["latest", "global_step2/mp_rank_00_model_states.pt", "global_step2/zero_pp_rank_0_optim_states.pt"],
            ["pytorch_model_fsdp_0/a.distcp", "optimizer_0/a.distcp", "scheduler.pt", "rng_state_1.pth"],
        )
    ):
        for name in (*names, "trainer_state.json"):
            path = tmp_path / f"checkpoint-{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        mark_complete(tmp_path / f"checkpoint-{number}")
        assert find_problems(tmp_path / f"checkpoint-{number}") == []


# --- which is taken -------------------------------------------------------------------------------------------------


def test_the_newest_complete_one_is_taken(tmp_path, capsys):
    for step in (2, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    write_checkpoint(tmp_path / "checkpoint-11", marked=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_bytes(b"cut")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-9"
    first, second = capsys.readouterr().out.splitlines()
    assert "checkpoint-11 is not complete: complete.json" in first
    assert "checkpoint-10 is not complete: optimizer.pt" in second and "checkpoint-9 is taken instead" in second


def test_a_clock_that_is_behind_changes_nothing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint-2")
    monkeypatch.setattr("trl_vpo.training.checkpoints.time.time", lambda: 0.0)
    write_checkpoint(tmp_path / "checkpoint-4")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"


def test_nothing_finished_and_nothing_left(tmp_path, capsys):
    assert newest_complete(tmp_path) is None and capsys.readouterr().out.splitlines() == []
    write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    assert newest_complete(tmp_path) is None
    assert "checkpoint-2" in capsys.readouterr().out.splitlines()[0]
    assert "from scratch" in what_is_left(tmp_path)
    write_checkpoint(tmp_path / "checkpoint-4")
    assert "checkpoint-4" in what_is_left(tmp_path)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4: optimizer\.pt is missing"):
        newest_complete(tmp_path)


def test_a_run_from_scratch_leaves_earlier_checkpoints(tmp_path, capsys):
    """Its numbers begin again at the first step; those of the earlier run are taken when nothing else is complete."""
    for saved, step in enumerate((6, 8, 2, 4)):
        write_checkpoint(tmp_path / f"checkpoint-{step}", saved=saved)
    write_checkpoint(tmp_path / "checkpoint-5", marked=False)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"
    first, second = capsys.readouterr().out.splitlines()
    assert "checkpoint-5 is not complete" in first
    assert f"checkpoint-8, checkpoint-6 of an earlier run in {tmp_path} passed over" in second
    assert f"is {tmp_path}/checkpoint-4" in what_is_left(tmp_path)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-8"


# --- which are deleted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "best", "in_use", "left"),
    [
        (None, None, (), [2, 4, 6, 8, 20]),
        (1, None, (), [8, 20]),
        (2, None, (), [6, 8, 20]),
        (2, 2, (), [2, 8, 20]),
        (1, 2, (), [2, 8, 20]),  # the newest one and the best one always stay
        (3, 2, (), [2, 6, 8, 20]),
        (1, None, (4,), [4, 8, 20]),  # while it is uploaded
    ],
)
def test_older_ones_are_deleted(tmp_path, limit, best, in_use, left):
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (2, 4, 6, 8, 20)}  # 20 is of an earlier run
    for folder in folders.values():
        folder.mkdir()
        (folder / "complete.json").touch()
    best = best and f"elsewhere/checkpoint-{best}"
    delete_older(tmp_path, limit, folders[8], best=best, in_use={folders[step] for step in in_use})
    assert sorted(int(f.name.split("-")[1]) for f in tmp_path.iterdir()) == left


def test_half_written_ones_are_deleted_first(tmp_path):
    for step in (2, 4, 6):
        write_checkpoint(tmp_path / f"checkpoint-{step}", marked=step != 4)
    delete_older(tmp_path, 2, tmp_path / "checkpoint-6")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def test_saving_over_an_older_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    save_file({"lora": torch.ones(64)}, folder / "adapter_model.safetensors")
    assert find_problems(folder) == ["adapter_model.safetensors is not what was saved"]
    mark_complete(folder)
    assert find_problems(folder) == []


# --- whose it is ----------------------------------------------------------------------------------------------------

FILES_OF_BASE = {"model.safetensors": "1a", "config.json": "2b", "chat_template.jinja": "3c"}
RUN = {
    "method": "rrpo",
    "recipe": {"max_steps": 8, "lora_r": 8, "dataset_name": "a.jsonl", "model_name_or_path": "Qwen/Qwen2.5-VL-7B"},
    "processes": 2,
    "rows per step": 8,
    "distributed": "DistributedType.MULTI_GPU",
    "mixed precision": "no",
    "ZeRO stage": 2,
    "model files": FILES_OF_BASE,
    "scheduler": "cosine",
    "versions": {"torch": "2.15.0"},
}


def changed(**recipe):
    return {"recipe": RUN["recipe"] | recipe}


@pytest.mark.parametrize(
    ("change", "refused", "warned"),
    [
        ({}, [], []),
        ({"method": "lpoi"}, ["method: rrpo when it was saved, lpoi now"], []),
        ({"processes": 4, "rows per step": 16}, ["processes: 2 .* 4 now", "rows per step: 8 .* 16 now"], []),
        ({"mixed precision": "bf16"}, ["mixed precision: no .* bf16 now"], []),
        ({"ZeRO stage": 3}, ["ZeRO stage: 2 .* 3 now"], []),
        (changed(lora_r=16), ["lora_r: 8 .* 16 now"], []),
        (changed(beta=0.2), ["beta: its default .* 0.2 now"], []),
        (
            {"model files": FILES_OF_BASE | {"model.safetensors": "9f"}, **changed(model_name_or_path="B")},
            ["model: model.safetensors of B are not .* of Qwen/Qwen2.5-VL-7B"],
            [],
        ),
        ({"model files": {**FILES_OF_BASE, "tokenizer.json": "4d"}}, ["model: tokenizer.json of "], []),
        ({"model files": {"config.json": "2b"}}, ["model: chat_template.jinja, model.safetensors of "], []),
        ({"model files": {}, **changed(model_name_or_path="B")}, [], ["Qwen/Qwen2.5-VL-7B and is B: whether"]),
        (changed(model_name_or_path="/scratch/model", dataset_name="/scratch/b.jsonl"), [], []),  # moved
        (changed(max_steps=16), [], ["max_steps: 8 .* 16 now. The cosine schedule"]),
        (changed(max_length=512), [], ["max_length: its default .* 512 now. It changes no row"]),
        (changed(on_bad_media="skip"), [], ["on_bad_media: its default .* 'skip' now. It changes no row"]),
        (changed(max_pixels=512), ["max_pixels: its default .* 512 now"], []),
        ({"video_budget": "10 to 99"}, ["pixels of videos: None when it was saved, 10 to 99 now"], []),
        ({"video_budget": "10 to 99", **changed(max_pixels=9)}, ["max_pixels: its default .* 9 now"], []),
        (changed(eval_steps=10), [], ["eval_steps: its default .* 10 now"]),
        ({"versions": {"torch": "2.16.0"}}, [], ["torch was 2.15.0 and is 2.16.0"]),
    ],
)
def test_what_may_change_between_two_parts_of_a_run(change, refused, warned):
    for lines, expected in zip(compare_runs(RUN, RUN | change, same_rows=True), (refused, warned)):
        assert len(lines) == len(expected), lines
        for line, pattern in zip(lines, expected):
            assert re.search(pattern, line), line


def test_a_stream_is_known_by_its_files():
    """In any folder; the processes and workers that share several files between them stay as many."""
    stream = {"workers": None, "files": {"a.parquet": [9, "1a"], "b.parquet": [9, "2b"]}}
    saved = RUN | {"stream": stream}
    moved = {"a2.parquet": [9, "1a"], "b2.parquet": [9, "2b"]}
    now = saved | changed(dataset_name="/scratch/a") | {"stream": stream | {"files": moved}}
    assert compare_runs(saved, now, same_rows=False) == ([], [])
    now = saved | {"stream": {"workers": 2, "files": stream["files"] | {"b.parquet": [9, "3c"]}}}
    refused, _ = compare_runs(saved, now, same_rows=False)
    assert refused[0].startswith("dataloader_num_workers: at most 1 when it was saved, 2 now. The rows of a stream")
    assert refused[1:] == ["rows: b.parquet of the stream changed, and which rows did is not known"]
    assert compare_runs(saved, RUN | changed(dataset_streaming=True), same_rows=True)[0][0].startswith("dataset_st")


def test_a_stream_without_files_is_known_by_its_name():
    assert compare_runs(RUN, RUN | changed(dataset_name="b.jsonl"), same_rows=False)[0][0].startswith("dataset_name: ")
