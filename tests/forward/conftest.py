import pytest
from helpers import write_image


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Paths of three images of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{i}.png", size, i) for i, size in enumerate([(56, 56), (112, 56), (56, 112)])]
