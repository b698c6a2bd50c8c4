"""Recipes by name: from any folder, a file of one's own first, and the nearest names where there is none."""

import json
from pathlib import Path

import pytest

from trl_vpo.errors import RecipeError
from trl_vpo.runs.named_recipes import (
    PACKAGE,
    find_accelerate_config,
    find_recipe,
    recipe_names,
    recipes_folder,
    shipped_model,
)
from trl_vpo.runs.recipe_file import read_recipe
from trl_vpo.runs.recipe_list import recipe_facts, run_recipes

NAME = "rrpo/qwen2_5_vl_7b"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml"])
def test_a_name_works_from_any_folder(name):
    assert find_recipe(name) == recipes_folder() / f"{NAME}.yaml"
    assert read_recipe(name)["model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_a_file_of_ones_own_wins(tmp_path):
    own = tmp_path / "rrpo" / "qwen2_5_vl_7b"
    own.mkdir(parents=True)
    assert find_recipe(NAME) == recipes_folder() / f"{NAME}.yaml"  # a folder is no recipe
    (tmp_path / f"{NAME}.yaml").write_text("beta: 2\n")
    assert read_recipe(NAME) == read_recipe(f"{NAME}.yaml") == {"beta": 2}
    own.rmdir()
    own.write_text("beta: 1\n")
    assert read_recipe(NAME) == {"beta": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"recipes/{NAME}.yaml", rf"does not exist in .*\. The package has it under the name {NAME}\.$"),
        ("rrpo/qwen2_5_vl_8b", rf"Did you mean {NAME}.* There are rrpo/generate, .*, {NAME}, .*\.$"),
        ("qwen2_vl_7b", r"Did you mean leanpo/qwen2_vl_7b\? `trl-vpo recipes` lists"),
        ("zero2", r"Did you mean accelerate/zero2\?"),
        ("mine.yaml", r"no such file from .* `trl-vpo recipes` lists the names\.$"),
        ("/nowhere/mine.yaml", r"no such file .*lists the names\.$"),
    ],
)
def test_a_miss_names_what_there_is(name, message):
    with pytest.raises(RecipeError, match=message):
        find_recipe(name)


def test_accelerate_configs_are_ours_first(tmp_path):
    for name in ("zero2", "zero3", "fsdp2", "single_gpu"):  # TRL has files of these names, too
        assert find_accelerate_config(name) == recipes_folder() / "accelerate" / f"{name}.yaml"
    assert find_accelerate_config("accelerate/ddp.yaml").name == "ddp.yaml"
    assert find_accelerate_config("zero1").parent.name == "accelerate_configs"
    (tmp_path / "zero2").write_text("num_processes: 3\n")
    assert find_accelerate_config("zero2") == Path("zero2")
    with pytest.raises(RecipeError, match=r"one of cpu2, ddp, .*Did you mean zero"):
        find_accelerate_config("zero4")


def test_the_shipped_model_is_found(tmp_path):
    assert shipped_model("trl_vpo/testbed/base") == str(PACKAGE / "testbed" / "base")
    assert shipped_model("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    (tmp_path / "trl_vpo/testbed/base").mkdir(parents=True)
    assert shipped_model("trl_vpo/testbed/base") == "trl_vpo/testbed/base"


# --- trl-vpo recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_header_states_the_facts(name):
    facts = recipe_facts(name)
    folder, stem = name.split("/")
    assert facts.title.endswith(".") and facts.hardware
    assert facts.run == ("not run",) or len(facts.run) == (2 if folder == "accelerate" else 4)
    if folder == "accelerate":
        assert (facts.command, facts.method, facts.model) == ("", "", "")
    elif facts.command == "compare":
        assert facts.method == "" and "compare" in name
    else:
        assert facts.command == ("generate" if "generate" in stem else "train") and facts.model
        assert facts.method == (stem.split("-")[0] if folder == "quickstart" else folder)


def test_list_show_and_copy(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run_recipes("list", None, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    (line,) = (line for line in lines if line.startswith(NAME + " "))
    assert line.split() == f"{NAME} Qwen2.5-VL-7B-Instruct 4 GPUs of 80 GB not run".split()
    run_recipes("list", None, tmp_path, as_json=True)
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} == set(recipe_names())
    run_recipes("show", NAME, tmp_path)
    text = capsys.readouterr().out
    assert text == find_recipe(NAME).read_text()
    run_recipes("copy", NAME, tmp_path / "mine")
    copied = tmp_path / "mine" / "qwen2_5_vl_7b.yaml"
    assert copied.read_text() == text
    assert f"trl-vpo train rrpo --config {copied}" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="is there already"):
        run_recipes("copy", NAME, tmp_path / "mine")
    run_recipes("copy", NAME, tmp_path / "other" / "my.yaml")
    assert (tmp_path / "other" / "my.yaml").read_text() == text
    with pytest.raises(RecipeError, match="needs a name"):
        run_recipes("show", None, tmp_path)
