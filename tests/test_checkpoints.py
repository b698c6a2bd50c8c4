"""Checkpoints on disk: which are whole, which is taken, which are deleted; and which runs may go on from them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from trl_vpo.checkpoints import (
    CheckpointError,
    delete_older,
    find_problems,
    mark_complete,
    newest_complete,
    next_attempt,
    read_marker,
    what_is_left,
)

FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def write_checkpoint(folder, *, marked=True, processes=1, by_us=True):
    """What transformers writes, and the marker."""
    folder.mkdir(parents=True)
    save_file({"lora": torch.arange(64.0)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": torch.arange(64.0)}, folder / name)
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in names:
        torch.save({"cpu": torch.arange(64)}, folder / name)
    state = {"global_step": 2, "stateful_callbacks": {"MarkedWhenComplete": {}} if by_us else {}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if marked:
        mark_complete(folder, step=2, run={"method": "rrpo"})
    return folder


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


# --- what is wrong with one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False])
def test_a_whole_checkpoint_has_no_problems(tmp_path, marked):
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=marked, by_us=marked)
    assert find_problems(folder, 1) == []
    (folder / "notes.txt").write_text("of the user")
    assert find_problems(folder, 1) == []


def test_the_marker_says_what_was_saved(tmp_path):
    marker = read_marker(write_checkpoint(tmp_path / "checkpoint-2"))
    assert set(marker["files"]) == set(FILES)
    assert marker["run"] == {"method": "rrpo"}
    assert marker["files"]["adapter_model.safetensors"]["size"] > 256  # 64 floats and a header


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("marked", [True, False])
def test_a_missing_or_cut_file_is_named(tmp_path, name, marked):
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=marked, by_us=marked)
    cut(folder / name)
    problems = find_problems(folder, 1)
    assert len(problems) == 1
    assert name in problems[0]
    assert ("bytes of" if marked else "cut short") in problems[0]
    (folder / name).unlink()
    problems = find_problems(folder, 1)
    assert problems
    assert all(name in problem and "missing" in problem for problem in problems)


def test_a_changed_byte_is_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(data)
    assert find_problems(folder, 1) == ["optimizer.pt is not what was saved"]


def test_without_its_marker_our_own_checkpoint_is_not_finished(tmp_path):
    """It was killed just before it wrote the marker. Other processes may not have saved their files."""
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    assert find_problems(folder, 1) == ["complete.json, the last file, is missing"]
    assert find_problems(folder, 1, signed_without_marker=False) == []  # given by its path
    mark_complete(folder)
    (folder / "complete.json").write_text('{"format": 1, "fi')
    assert find_problems(folder, 1) == ["complete.json, the last file, is missing"]


def test_each_process_must_have_saved_its_random_numbers(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False, by_us=False, processes=2)
    assert find_problems(folder, 2) == []
    (folder / "rng_state_1.pth").unlink()
    assert find_problems(folder, 2) == ["rng_state_1.pth is missing"]


def test_shards_that_are_missing_are_named(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False, by_us=False)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file({"a": torch.zeros(1)}, folder / shards["a"])
    assert find_problems(folder, 1) == [f"{shards['b']} is missing"]


def test_weights_alone_are_not_enough(tmp_path):
    """As saved with save_only_model: transformers would go on with a new optimizer and say nothing."""
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False, by_us=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    mark_complete(folder)
    assert [p.split()[0] for p in find_problems(folder, 1)] == ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    assert find_problems(tmp_path / "checkpoint-9", 1) == ["there is no such folder"]


# --- which is taken -------------------------------------------------------------------------------------------------


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path):
    for step in (2, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    write_checkpoint(tmp_path / "checkpoint-11", marked=False)
    (tmp_path / "checkpoint-best").mkdir()
    cut(tmp_path / "checkpoint-10" / "optimizer.pt")
    said = []
    assert newest_complete(tmp_path, 1, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 2
    assert "checkpoint-11" in said[0] and "complete.json" in said[0]
    assert "checkpoint-10" in said[1] and "optimizer.pt" in said[1] and "checkpoint-9 is taken" in said[1]


def test_nothing_finished_and_nothing_left(tmp_path):
    said = []
    assert newest_complete(tmp_path, 1, said.append) is None
    assert said == []
    write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    assert newest_complete(tmp_path, 1, said.append) is None
    assert "checkpoint-2" in said[0]
    assert "from scratch" in what_is_left(tmp_path)
    write_checkpoint(tmp_path / "checkpoint-4")
    assert "checkpoint-4" in what_is_left(tmp_path)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4: optimizer\.pt is missing"):
        newest_complete(tmp_path, 1, said.append)


def test_a_run_from_scratch_does_not_go_on_from_an_earlier_one(tmp_path):
    """Its numbers begin again at the first step; those of the earlier run are taken when nothing else is whole."""
    assert next_attempt(tmp_path) == 1
    for step, attempt in ((2, 2), (4, 2), (6, 1), (8, 1)):
        mark_complete(write_checkpoint(tmp_path / f"checkpoint-{step}", marked=False), attempt=attempt)
    assert next_attempt(tmp_path) == 3
    write_checkpoint(tmp_path / "checkpoint-5", marked=False)
    said = []
    assert newest_complete(tmp_path, 1, said.append) == tmp_path / "checkpoint-4"
    assert "checkpoint-5 is not complete" in said[0]
    assert said[1].startswith(f"checkpoint-8, checkpoint-6: of an earlier run in {tmp_path}")
    assert "is checkpoint-4" in what_is_left(tmp_path).replace(f"{tmp_path}/", "")
    for step in (2, 4):
        cut(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    assert newest_complete(tmp_path, 1, said.append) == tmp_path / "checkpoint-8"


# --- which are deleted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 20]),
        (1, None, [8, 20]),
        (2, None, [6, 8, 20]),
        (2, 2, [2, 8, 20]),
        (1, 2, [2, 8, 20]),  # the newest one and the best one always stay
        (3, 2, [2, 6, 8, 20]),
    ],
)
def test_older_ones_are_deleted(tmp_path, limit, best, left):
    for step in (2, 4, 6, 8, 20):  # 20 is of an earlier run
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").touch()
    delete_older(tmp_path, limit, tmp_path / "checkpoint-8", best and f"elsewhere/checkpoint-{best}")
    assert sorted(int(f.name.split("-")[1]) for f in tmp_path.iterdir()) == left


def test_half_written_ones_are_deleted_before_whole_ones(tmp_path):
    for step in (2, 4, 6):
        write_checkpoint(tmp_path / f"checkpoint-{step}", marked=step != 4)
    delete_older(tmp_path, 2, tmp_path / "checkpoint-6", None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def test_saving_over_an_older_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    other = write_checkpoint(tmp_path / "other")
    save_file({"lora": torch.ones(64)}, other / "adapter_model.safetensors")
    shutil.copy(other / "adapter_model.safetensors", folder)
    assert find_problems(folder, 1) == ["adapter_model.safetensors is not what was saved"]
    mark_complete(folder)
    assert find_problems(folder, 1) == []


# --- whose it is ----------------------------------------------------------------------------------------------------

RUN = {
    "method": "rrpo",
    "recipe": {"max_steps": 8, "lora_r": 8, "dataset_name": "a.jsonl", "model_name_or_path": "Qwen/Qwen2.5-VL-7B"},
    "processes": 2,
    "rows per step": 8,
    "distributed": "DistributedType.MULTI_GPU",
    "rows": 100,
    "data": "abc",
    "weights": "base",
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
        ({"rows": 99, "data": "xyz"}, ["rows: 100 .* 99 now"], []),
        ({"data": "xyz"}, ["data: .* not the same ones, or in another order"], []),
        (changed(lora_r=16), ["lora_r: 8 .* 16 now"], []),
        (changed(beta=0.2), ["beta: its default .* 0.2 now"], []),
        ({"weights": "other", **changed(model_name_or_path="B")}, ["the weights of B .* of Qwen/Qwen2.5-VL-7B"], []),
        (changed(model_name_or_path="/scratch/model", dataset_name="/scratch/b.jsonl"), [], []),  # moved
        ({"data": None, **changed(dataset_name="b.jsonl")}, ["dataset_name: "], []),  # a stream is known by its name
        (changed(max_steps=16), [], ["max_steps: 8 .* 16 now. The cosine schedule"]),
        (changed(eval_steps=10), [], ["eval_steps: its default .* 10 now"]),
        ({"versions": {"torch": "2.16.0"}}, [], ["torch was 2.15.0 and is 2.16.0"]),
    ],
)
def test_what_may_change_between_two_parts_of_a_run(change, refused, warned):
    from trl_vpo.run_identity import compare_runs

    saved = RUN | ({"data": None} if "data" in change and change["data"] is None else {})
    for lines, expected in zip(compare_runs(saved, RUN | change), (refused, warned)):
        assert len(lines) == len(expected), lines
        for line, pattern in zip(lines, expected):
            assert re.search(pattern, line), line


def test_rows_are_recognised_by_their_texts_and_order():
    from datasets import Dataset
    from helpers import row

    from trl_vpo.run_identity import digest_rows

    rows = [row(None, (), f"chosen {i}.", "rejected.", id=f"r{i}") for i in range(3)]
    digest = digest_rows(Dataset.from_list(rows))
    assert digest == digest_rows(Dataset.from_list(rows + rows).select(range(3)))
    assert digest != digest_rows(Dataset.from_list(rows[::-1]))
    assert digest != digest_rows(Dataset.from_list(rows[:2]))
    moved = [r | {"videos": [f"/elsewhere/{i}.mp4"]} for i, r in enumerate(rows)]
    assert digest_rows(Dataset.from_list(moved)) == digest
