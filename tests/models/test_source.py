"""A name that leads to no model is told in one line, before anything is loaded."""

import json
import shutil
import time

import pytest
from adapter_kit import BASE, hub_model, recipe_of, trained
from safetensors.torch import load_file, save_file

from trl_vpo.cli import main
from trl_vpo.data import hub_names
from trl_vpo.errors import SourceError
from trl_vpo.models.source import check_model, find_run_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    weights = list(load_file(folder / WEIGHTS).items())
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(dict(weights[:20]), folder / names[0])
    where = {name: names[i >= 20] for i, (name, _) in enumerate(weights)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / WEIGHTS).unlink()


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


FOLDERS = {
    "no weights": (no_weights, "has no weights"),
    "pickled": (pickled, "has pickled weights alone"),
    "a shard is missing": (missing_shard, "lacks 1 of the 2 files of its weights, such as model-00002-of-00002"),
    "cut short": (cut, "model.safetensors is damaged or cut short"),
    "a pointer": (pointer, "model.safetensors is a pointer of git-lfs: run `git lfs pull`"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a model: it has no config.json"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_whole_model(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # tables are not to break the paths
    spoil, message = FOLDERS[case]
    adapter = trained("lora").folder
    check_model(BASE)
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    spoil(folder)
    recipe, method = recipe_of(tmp_path / "out", model_name_or_path=str(folder))
    assert main(["doctor", str(recipe), "--method", method]) == 1
    assert " ".join(message.split()[:2]) in " ".join(capsys.readouterr().out.replace("│", " ").split())
    commands = {
        "train": ["train", method, "--config", str(recipe)],
        "merge": ["merge", str(adapter), str(tmp_path / "merged"), "--base", str(folder)],
    }
    for command in commands.values():
        assert main(command) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outputs/rrpo/last", "the folder outputs/rrpo/last does not exist"),
        ("~/models/base", "~ is not expanded"),
        ("my model!", r"is neither a folder .* nor a name on the Hub"),
        (None, r"is an adapter, not a model\. Name its base"),
    ],
)
def test_names_that_are_no_model(name, message):
    with pytest.raises(SourceError, match=message):
        check_model(name or str(trained("lora").folder))


@pytest.fixture
def unreachable(monkeypatch):
    """The Hub cannot be reached, and nobody has said so before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub_names._ask_hub.cache_clear()
    yield
    hub_names._ask_hub.cache_clear()


@pytest.mark.parametrize(
    ("key", "option"), [("model_name_or_path", ""), ("dataset_name", " --repo-type dataset")], ids=["model", "dataset"]
)
def test_what_is_nowhere_offline(key, option, unreachable, tmp_path, capsys):
    began = time.monotonic()
    recipe, method = recipe_of(tmp_path / "out", **{key: "me/it"})
    assert main(["train", method, "--config", str(recipe)]) == 1
    errors = capsys.readouterr().err
    assert f"`hf download me/it{option} --local-dir FOLDER`" in errors
    if key == "model_name_or_path":
        assert "the Hub cannot be reached (ConnectError" in errors
        assert len(errors.splitlines()) == 2 and time.monotonic() - began < 5


def test_a_record_of_the_training_offline(unreachable, tmp_path, monkeypatch):
    """The Hub is asked once, not again and again for a file that few models have; the cache may have it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_model(tmp_path / "hub", main=1.0)
    began = time.monotonic()
    assert find_run_json("me/other") is None and find_run_json("me/base") is None
    (snapshot,) = (tmp_path / "hub").glob("models--me--base/snapshots/*")
    (snapshot / "run.json").write_text("{}")
    assert find_run_json("me/base") == snapshot / "run.json"
    assert time.monotonic() - began < 5


def test_a_cached_model_offline(unreachable, tmp_path, capsys, monkeypatch):
    """Said once; then the cache is used, and no file is asked for again and again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_model(tmp_path / "hub", main=1.0)
    began = time.monotonic()
    recipe, method = recipe_of(tmp_path / "out", model_name_or_path="me/base", max_steps=1)
    assert main(["train", method, "--config", str(recipe)]) == 0
    assert time.monotonic() - began < 20
    assert capsys.readouterr().out.count("the Hub cannot be reached") == 1
