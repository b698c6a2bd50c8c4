"""Surroundings of every test: no Hub, few threads, and a few media files."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers import write_clip, write_image


def pytest_collection_finish():
    """Leave the objects of imported packages out of garbage collections: each `Trainer.train` begins with one."""
    gc.freeze()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Paths of three images of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{i}.png", size, i) for i, size in enumerate([(56, 56), (112, 56), (56, 112)])]


@pytest.fixture(scope="session")
def media(images, tmp_path_factory):
    """Paths of images of two shapes and of clips of two lengths (12 and 5 frames)."""
    folder = tmp_path_factory.mktemp("media")
    return {
        "image": images[:2],
        "video": [write_clip(folder / f"{i}.mp4", frames, seed=i) for i, frames in enumerate([12, 5])],
    }
