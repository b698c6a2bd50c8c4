"""The package's files, and the ranges of its dependencies: allowed, locked, and installed at their ends."""

import os
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import upstream_names
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
APART = {"lmms"}  # lmms-eval pins older versions of av and others: an environment of its own
ENDS = "test-lowest test-newest: test-%"  # the rule of both targets in the Makefile
VERSIONS = os.environ.get("TRL_VPO_VERSIONS")  # lowest or newest: set by make

EXTRAS = {name: [Requirement(r) for r in given] for name, given in PROJECT["optional-dependencies"].items()}
BASE = [Requirement(r) for r in PROJECT["dependencies"]]
INSTALLED = [*BASE, *(r for name, given in EXTRAS.items() if name not in APART for r in given)]
ALL = [*BASE, *(r for given in EXTRAS.values() for r in given)]


def recipe(target: str) -> str:
    return re.search(rf"^{target}: .*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]


def locked(requirement: Requirement) -> list[Version]:
    """One for each platform on which it differs."""
    name = re.escape(canonicalize_name(requirement.name))
    return [Version(v) for v in re.findall(rf"^{name}==([^\s;]+)", LOCK, re.M)]


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_every_dependency_has_one_lower_bound(requirement):
    assert [s.operator for s in requirement.specifier].count(">=") == 1, f"{requirement}: give it a tested `>=`."


@pytest.mark.parametrize("requirement", INSTALLED, ids=str)
def test_the_lock_is_within_the_range(requirement):
    versions = locked(requirement)
    assert versions, f"{requirement.name} is not in requirements.lock: make lock"
    assert all(v in requirement.specifier for v in versions), f"{requirement} against {versions}: make lock"


@pytest.mark.skipif(VERSIONS is None, reason="compares what make test-lowest and test-newest have installed")
@pytest.mark.parametrize("requirement", INSTALLED, ids=str)
def test_the_ends_are_what_the_ranges_say(requirement):
    """Packages that hold others back would make a bound that says less than it seems to, or a test of old versions."""
    installed = Version(version(requirement.name))
    if VERSIONS == "lowest":
        (bound,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert installed == bound, f"{requirement}, but {installed} is the lowest that installs: raise the bound."
    else:
        assert installed in requirement.specifier and installed >= min(locked(requirement))


def test_all_environments_hold_the_same_extras():
    given = re.findall(r"--extra (\S+)", re.search(r"^EXTRAS := (.*)$", MAKEFILE, re.M)[1])
    assert set(given) == set(EXTRAS) - APART
    assert all("$(EXTRAS)" in recipe(target) for target in ("lock", ENDS))


@pytest.mark.parametrize(("end", "resolution"), [("lowest", "lowest-direct"), ("newest", "highest")])
def test_the_ends_are_resolved_and_tested_as_such(end, resolution):
    commands = recipe(ENDS)
    assert f"\ntest-{end}: RESOLUTION := {resolution}\n" in MAKEFILE and "--resolution $(RESOLUTION)" in commands
    assert "TRL_VPO_VERSIONS=$*" in commands
    python = re.search(r"venv .*--python (\S+) \.venv-\$\*", commands)[1]
    assert f">={python}" == PROJECT["requires-python"]
    assert f".venv-{end}/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def private_users():
    """Packages, but Python itself, of which a private name stands in the tables of upstream_names.py."""
    paths = [path for path, *_ in upstream_names.CALLED]
    return sorted({path.split(".")[0] for path in paths if re.search(r"\._[a-zA-Z]", path)} - sys.stdlib_module_names)


@pytest.mark.parametrize("package", private_users())
def test_private_names_come_with_an_upper_bound(package):
    """Private names may go at any time; at the next major version they have to be looked at anew."""
    (requirement,) = (r for r in BASE if canonicalize_name(r.name) == canonicalize_name(package))
    ends = [Version(s.version) for s in requirement.specifier if s.operator == "<"]
    assert len(ends) == 1 and ends[0].release == (ends[0].major,), f"{requirement}: end it at a major version, `<N`."


# --- what stands around the package ---------------------------------------------------------------------------------


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version_and_one_address():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    address = PROJECT["urls"]["Repository"]
    assert citation["repository-code"] == address
    for name in ("README.md", "zensical.toml", ".github/ISSUE_TEMPLATE/config.yml"):
        own = set(re.findall(r"https://github\.com/[\w-]+/trl-vpo\b", text_of(name)))
        assert own <= {address}, name


def test_pre_commit_runs_the_locked_ruff():
    (hooks,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert hooks["rev"] == f"v{locked(Requirement('ruff'))[0]}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]
    assert "ruff check ." in text_of(".ci/run") and "ruff format --check ." in text_of(".ci/run")


def test_workflows_run_the_commands_of_the_checkout():
    steps = {
        name: [step.get("run") or step["uses"].split("@")[0] for job in jobs.values() for step in job["steps"]]
        for name in ("ci", "release")
        for jobs in [yaml.safe_load(text_of(f".github/workflows/{name}.yml"))["jobs"]]
    }
    assert steps["ci"][-1] == ".ci/run"
    assert steps["release"].index("make dist") < steps["release"].index("pypa/gh-action-pypi-publish")
    assert "trl-vpo quickstart" in recipe("quickstart")
    assert recipe("dist").index("build") < recipe("dist").index("twine check --strict")


def test_every_python_that_is_named_is_tested():
    matrix = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]["ci"]["strategy"]["matrix"]["python"]
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named == matrix and f">={matrix[0]}" == PROJECT["requires-python"]


def test_issue_forms_ask_for_the_doctor():
    for name in ("bug", "feature"):
        form = yaml.safe_load(text_of(f".github/ISSUE_TEMPLATE/{name}.yml"))
        assert {"name", "description", "body"} <= set(form)
        assert "doctor" in [field["id"] for field in form["body"]]


def test_dockerfile_installs_what_there_is():
    text = text_of("Dockerfile")
    assert f"uv=={re.search(r'UV_VERSION := (.*)', MAKEFILE)[1]}" in text
    extras = re.search(r"'\.\[(.*)\]'", text)[1].split(",")
    assert set(extras) == set(EXTRAS) - APART - {"docs", "dev"}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()}
    assert copied == {line[1:] for line in text_of(".dockerignore").splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
