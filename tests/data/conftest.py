"""A processor, a clip, and a cache of `datasets` for each test."""

import pytest
from families import build
from helpers import write_clip


@pytest.fixture(scope="module")
def processor():
    return build("Qwen2-VL")[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("good") / "good.mp4", frames=40)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
