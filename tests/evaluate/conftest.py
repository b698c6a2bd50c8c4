"""Fixtures shared by the tests of lmms-eval's bridge and of VideoHallucer."""

import pytest
from lmms_kit import runner, write_documents, write_tasks
from local_kit import load

from trl_vpo.evaluate.lmms import run


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, documents):
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents)


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory, tasks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield runner(tasks, lambda: tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="session")
def plain_base():
    return load()


@pytest.fixture
def no_weights(monkeypatch):
    """Return a function after whose call a test fails if weights are loaded."""
    return lambda: monkeypatch.setattr(run, "load_model", lambda **options: pytest.fail("weights were loaded"))
