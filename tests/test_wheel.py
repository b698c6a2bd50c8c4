"""The wheel, built from the sdist and installed without the source tree, in a folder of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from trl_vpo.testbed.rows import write_jsonl, write_preferences

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
for name in ("PYTHONPATH", "VIRTUAL_ENV", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
    ENV.pop(name, None)


def run(*command, cwd):
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel; its sdist lies beside it."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("trl_vpo", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    run(
        sys.executable,
        "-c",
        BUILD,
        "build_wheel",
        folder,
        cwd=folder / "unpacked" / sdist.name.removesuffix(".tar.gz"),
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of an environment with the wheel, and the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    run(folder / "bin" / "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    return folder / "bin"


def test_wheel_holds_package_and_recipes(wheel):
    files = {path.relative_to(ROOT) for path in (ROOT / "trl_vpo").rglob("*") if path.is_file()}
    files |= {"trl_vpo" / path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*/*.yaml")}
    expected = {str(path) for path in files if path.suffix != ".pyc"}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == expected


def test_metadata_and_links(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = Metadata.from_email(archive.read(path), validate=True)
    assert metadata.project_urls["Repository"].startswith("https://github.com/")
    text = BytesParser().parsebytes(archive.read(path)).get_payload()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and not [link for link in links if not re.match(r"https://|#", link)]


@pytest.mark.slow
def test_quickstart(installed, tmp_path):
    """Its figures are the documented ones, from an empty folder."""
    out = run(installed / "trl-vpo", "quickstart", "--methods", "rrpo", cwd=tmp_path)
    folder = tmp_path / "outputs/quickstart/clips"
    results = json.loads((folder / "evaluation/results.json").read_text())["contestants"]
    names = ("preference/accuracy", "chair/s")
    shares = {model: [own["measures"][name]["value"] for name in names] for model, own in results.items()}
    assert shares["base"] == pytest.approx([0.67, 0.34], abs=1e-3)
    assert shares["rrpo"] == pytest.approx([1, 0.05], abs=0.03)
    assert "trl-vpo doctor rrpo/qwen2_5_vl_7b" in out and (folder / "compare.png").is_file()


def test_training_from_a_named_recipe(installed, tmp_path):
    """In an empty folder but for the rows that the recipe names."""
    assert run(installed / "python", "-m", "trl_vpo", "--version", cwd=tmp_path).startswith("trl-vpo 0")
    where = run(installed / "python", "-c", "import trl_vpo; print(trl_vpo.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    names = run(installed / "trl-vpo", "recipes", cwd=tmp_path)
    assert "rrpo/qwen2_5_vl_7b " in names and "quickstart/dpo " in names
    _, rows = write_preferences("clip", 8, 3, tmp_path / "clips")
    write_jsonl(rows, tmp_path / "outputs/quickstart/data/clips_train.jsonl")
    options = ("--max_steps", 1, "--per_device_train_batch_size", 4)
    out = run(installed / "trl-vpo", "train", "dpo", "--config", "quickstart/dpo", *options, cwd=tmp_path)
    assert "Saved to outputs/quickstart/dpo" in out
    record = json.loads((tmp_path / "outputs/quickstart/dpo/run.json").read_text())
    assert (record["steps"], record["recipe_path"]) == (1, "quickstart/dpo")
    config = json.loads((tmp_path / "outputs/quickstart/dpo/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_relative_to(installed.parent)
