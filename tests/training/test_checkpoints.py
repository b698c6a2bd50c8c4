"""Checkpoints on disk: which are whole, which is taken, which are deleted; and which runs may go on from them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from trl_vpo.errors import CheckpointError
from trl_vpo.training.checkpoints import (
    delete_older,
    explain_failed_loads,
    find_problems,
    mark_complete,
    newest_complete,
    next_attempt,
    read_marker,
    what_is_left,
)
from trl_vpo.training.run_identity import compare_runs

FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def write_checkpoint(folder, *, marked=True):
    """What transformers writes, and the marker."""
    folder.mkdir(parents=True)
    save_file({"lora": torch.arange(64.0)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": torch.arange(64.0)}, folder / name)
    torch.save({"cpu": torch.arange(64)}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    if marked:
        mark_complete(folder, step=2, run={"method": "rrpo"})
    return folder


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


# --- what is wrong with one -----------------------------------------------------------------------------------------


def test_a_whole_checkpoint_has_no_problems(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    assert find_problems(folder) == []
    (folder / "notes.txt").write_text("of the user")
    assert find_problems(folder) == []


def test_the_marker_says_what_was_saved(tmp_path):
    marker = read_marker(write_checkpoint(tmp_path / "checkpoint-2"))
    assert set(marker["files"]) == set(FILES)
    assert marker["run"] == {"method": "rrpo"}
    assert marker["files"]["adapter_model.safetensors"]["size"] > 256  # 64 floats and a header


@pytest.mark.parametrize("name", FILES)
def test_a_missing_cut_or_changed_file_is_named(tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert find_problems(folder) == [f"{name} is not what was saved"]
    cut(folder / name)
    (problem,) = find_problems(folder)
    assert name in problem and "bytes of" in problem
    (folder / name).unlink()
    assert find_problems(folder)[0] == f"{name} is missing"


def test_no_byte_of_the_marker_may_change(tmp_path):
    """Whatever it says then, of files or of the run; one of an earlier version has no hash of its own."""
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    text = (folder / "complete.json").read_text()
    for old, new in (
        ('"method": "rrpo"', '"method": "lpoi"'),
        ('"step": 2', '"step": 4'),
        ('"format": 2', '"format": 3'),
    ):
        assert old in text
        (folder / "complete.json").write_text(text.replace(old, new))
        assert find_problems(folder) == ["complete.json is not what was saved"]
        said = []
        with pytest.raises(CheckpointError, match=r"complete\.json is not what was saved"):
            newest_complete(tmp_path, said.append)
    first = json.loads(text) | {"format": 1}
    del first["sha256"]
    (folder / "complete.json").write_text(json.dumps(first))
    assert find_problems(folder) == []


def test_without_its_marker_no_checkpoint_is_finished(tmp_path):
    """It was killed just before it wrote the marker, or is of another program. Other ranks may not have saved."""
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    (problem,) = find_problems(folder)
    assert problem.startswith("complete.json, the last file, is missing")


def test_pickled_weights_do_not_count(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    mark_complete(folder)
    (problem,) = find_problems(folder)
    assert problem.startswith("the weights (adapter_model.safetensors or model.safetensors) are missing")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_file_that_cannot_be_loaded_is_named(tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    data = bytearray((folder / name).read_bytes())
    data[2 if name.endswith("s") else len(data) // 2] ^= 255
    (folder / name).write_bytes(data)

    def _load_from_checkpoint():
        raise RuntimeError("PytorchStreamReader failed reading file data/0\nand more")

    message = f"{folder / name} cannot be read: PytorchStreamReader .*data/0. Put"
    with pytest.raises(CheckpointError, match=message), explain_failed_loads(folder):
        _load_from_checkpoint()
    with pytest.raises(RuntimeError, match="of the model"), explain_failed_loads(folder):
        raise RuntimeError("of the model")


def test_weights_alone_are_not_enough(tmp_path):
    """As saved with save_only_model: transformers would go on with a new optimizer and say nothing."""
    folder = write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    mark_complete(folder)
    assert [p.split()[0] for p in find_problems(folder)] == ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    assert find_problems(tmp_path / "checkpoint-9") == ["there is no such folder"]


# --- which is taken -------------------------------------------------------------------------------------------------


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path):
    for step in (2, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    write_checkpoint(tmp_path / "checkpoint-11", marked=False)
    (tmp_path / "checkpoint-best").mkdir()
    cut(tmp_path / "checkpoint-10" / "optimizer.pt")
    said = []
    assert newest_complete(tmp_path, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 2
    assert "checkpoint-11" in said[0] and "complete.json" in said[0]
    assert "checkpoint-10" in said[1] and "optimizer.pt" in said[1] and "checkpoint-9 is taken" in said[1]


def test_nothing_finished_and_nothing_left(tmp_path):
    said = []
    assert newest_complete(tmp_path, said.append) is None
    assert said == []
    write_checkpoint(tmp_path / "checkpoint-2", marked=False)
    assert newest_complete(tmp_path, said.append) is None
    assert "checkpoint-2" in said[0]
    assert "from scratch" in what_is_left(tmp_path)
    write_checkpoint(tmp_path / "checkpoint-4")
    assert "checkpoint-4" in what_is_left(tmp_path)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4: optimizer\.pt is missing"):
        newest_complete(tmp_path, said.append)


def test_a_run_from_scratch_does_not_go_on_from_an_earlier_one(tmp_path):
    """Its numbers begin again at the first step; those of the earlier run are taken when nothing else is whole."""
    assert next_attempt(tmp_path) == 1
    for step, attempt in ((2, 2), (4, 2), (6, 1), (8, 1)):
        mark_complete(write_checkpoint(tmp_path / f"checkpoint-{step}", marked=False), attempt=attempt)
    assert next_attempt(tmp_path) == 3
    write_checkpoint(tmp_path / "checkpoint-5", marked=False)
    said = []
    assert newest_complete(tmp_path, said.append) == tmp_path / "checkpoint-4"
    assert "checkpoint-5 is not complete" in said[0]
    assert said[1].startswith(f"checkpoint-8, checkpoint-6: of an earlier run in {tmp_path}")
    assert "is checkpoint-4" in what_is_left(tmp_path).replace(f"{tmp_path}/", "")
    for step in (2, 4):
        cut(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    assert newest_complete(tmp_path, said.append) == tmp_path / "checkpoint-8"


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
        (changed(eval_steps=10), [], ["eval_steps: its default .* 10 now"]),
        ({"versions": {"torch": "2.16.0"}}, [], ["torch was 2.15.0 and is 2.16.0"]),
    ],
)
def test_what_may_change_between_two_parts_of_a_run(change, refused, warned):
    for lines, expected in zip(compare_runs(RUN, RUN | change, same_rows=True), (refused, warned)):
        assert len(lines) == len(expected), lines
        for line, pattern in zip(lines, expected):
            assert re.search(pattern, line), line


def test_a_stream_is_known_by_its_name():
    assert compare_runs(RUN, RUN | changed(dataset_name="b.jsonl"), same_rows=False)[0][0].startswith("dataset_name: ")


def test_a_checkpoint_of_an_earlier_version_is_taken():
    old = {key: value for key, value in RUN.items() if key != "model files"} | {"weights": "", "data": "", "rows": 100}
    refused, (said,) = compare_runs(old, RUN, same_rows=True)
    assert refused == [] and "saved by an earlier version: whether model, rows and clips are the same is not" in said
