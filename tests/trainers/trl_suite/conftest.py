import pytest
import torch
from families import write_model
from trl_standins import TEXT_MODELS, text_standin
from vlm_standins import VISION_MODELS


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Folder of a stand-in by its name; written when it is first asked for."""
    root = tmp_path_factory.mktemp("hub")

    def path(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            model, processor = text_standin(name) if name in TEXT_MODELS else VISION_MODELS[name]()
            enlarge(model)
            write_model(root / name, model, processor)
        return str(root / name)

    return path


@torch.no_grad()
def enlarge(model):
    """Fresh weights are so small that a picture hardly moves what comes out; Gemma 3's projector begins at zero."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(4) if weight.any() else weight.normal_(std=0.1)
