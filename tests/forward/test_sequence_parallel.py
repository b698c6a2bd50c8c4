"""What sequence parallelism refuses. What it computes: tests/trainers/test_distributed.py."""

import pytest
import torch
from trainer_kit import fresh

from trl_vpo.forward.scorer import Scorer
from trl_vpo.forward.sequence_parallel import SequenceRanks


@pytest.mark.parametrize(
    ("size", "layers", "problem"),
    [
        (3, "full_attention", r"sp_size is 3, but \w+ has 4 attention heads on 2 key heads, .*: 1, 2, 4\."),
        (
            2,
            "linear_attention",
            r"sp_size splits packed rows, and \w+ cannot have them: some of its layers",
        ),
    ],
)
def test_models_that_cannot_be_split(size, layers, problem):
    model, _ = fresh("Qwen2-VL")
    model.config.get_text_config().layer_types = [layers] * 2
    with pytest.raises(ValueError, match=problem):
        Scorer(model, layout="auto", pad_token_id=0, ranks=SequenceRanks(None, size, 0))


def test_an_argument_that_is_not_known():
    """It may have a value for each column; left whole, it would meet the wrong ones."""
    arguments = {"inputs_embeds": torch.zeros(1, 5, 4), "per_layer_inputs": torch.zeros(1, 5, 2)}
    with pytest.raises(ValueError, match=r"cannot cut the argument 'per_layer_inputs'.* Set sp_size to 1"):
        SequenceRanks(None, 2, 0).cut(arguments)
