"""No dropout acts in any family once it is turned off: a policy in training mode scores a row the same each time."""

import copy

import families
import families_newer
import pytest
import torch
from accelerate import PartialState
from families_newer import NEWER, example
from families_parts import Family
from torch import nn
from transformers import PreTrainedConfig

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.forward.scorer import Scorer
from trl_vpo.trainers.compat import turn_off_dropout

ALL = {name: Family(*fields) for name, fields in families.FAMILIES.items()} | NEWER
WITHOUT = {"ERNIE 4.5 VL"}  # has no dropout


def set_dropout(config):
    """Set every dropout of a config and of those inside it, whatever its name."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            set_dropout(value)
        elif "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.3)


def cases():
    for name, family in ALL.items():
        yield pytest.param(name, marks=[pytest.mark.slow] * family.slow)


@pytest.mark.parametrize("name", cases())
def test_two_passes_in_training_mode_agree(name, media):
    PartialState(cpu=True)
    built, processor = (families if name in families.FAMILIES else families_newer).build(name)
    config = copy.deepcopy(built.config)
    set_dropout(config)
    model = type(built)._from_config(config)
    model.load_state_dict(built.state_dict())
    model.train()
    batch = PreferenceCollator(processor)([example(ALL[name], "image", media)])

    @torch.no_grad()
    def agree():
        scorer = Scorer(model, layout="separate", pad_token_id=processor.tokenizer.pad_token_id)
        first, second = (scorer.score(model, batch).logps for _ in range(2))
        return torch.equal(first, second)

    assert agree() == (name in WITHOUT)
    turn_off_dropout(model)
    assert agree()


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_every_module_of_dropout_is_turned_off(kind):
    model = nn.Sequential(kind(0.5)).train()
    turn_off_dropout(model)
    assert torch.equal(model(torch.ones(2, 8, 4, 4)), torch.ones(2, 8, 4, 4))
