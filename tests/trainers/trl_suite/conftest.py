import pytest
import torch
from families import write_model
from kits.trl_standins import TEXT_MODELS, text_standin
from kits.vlm_standins import VISION_MODELS


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Folder of a stand-in by its name; written when it is first asked for."""
    root = tmp_path_factory.mktemp("hub")

    def path(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            made = text_standin(name) if name in TEXT_MODELS else VISION_MODELS[name]()
            write_model(root / name, *made)
        return str(root / name)

    return path
