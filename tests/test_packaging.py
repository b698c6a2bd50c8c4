"""The package's files, and the ranges of its dependencies: allowed, locked, and installed at their ends."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import upstream_names
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


def test_the_wheel_has_every_file_of_the_package():
    package = ROOT / "trl_vpo"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["trl_vpo"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert not files - packaged
    assert {path.suffix for path in packaged} >= {".j2", ".css", ".js", ".mplstyle", ".safetensors", ".yaml"}


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
    """Packages of which a private name stands in the tables of upstream_names.py."""
    paths = [path for path, *_ in upstream_names.CALLED]
    return sorted({path.split(".")[0] for path in paths if re.search(r"\._[a-zA-Z]", path)})


@pytest.mark.parametrize("package", private_users())
def test_private_names_come_with_an_upper_bound(package):
    """Private names may go at any time; at the next major version they have to be looked at anew."""
    (requirement,) = (r for r in BASE if canonicalize_name(r.name) == canonicalize_name(package))
    ends = [Version(s.version) for s in requirement.specifier if s.operator == "<"]
    assert len(ends) == 1 and ends[0].release == (ends[0].major,), f"{requirement}: end it at a major version, `<N`."
