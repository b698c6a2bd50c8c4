"""Which processes may share rows. What they compute together: tests/trainers/test_distributed.py."""

from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from trainer_kit import config

from trl_vpo.trainers.row_groups import sp_size


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"cp_size": 2}, r"cp_size is 2: context parallelism .* Leave cp_size out and set sp_size"),
        ({"sp_size": 2, "tp_size": 2}, "sp_size is 2 and tp_size 2: one of them has to be 1"),
        ({"sp_size": 2}, "num_processes has to be a multiple of 2; it is 1"),
    ],
)
def test_what_is_refused(sizes, problem, tmp_path):
    """By the config, so before anything is loaded."""
    with pytest.raises(ValueError, match=problem):
        config("dpo", tmp_path, parallelism_config=ParallelismConfig(**sizes))


def test_where_the_size_is_read(monkeypatch):
    """In the trainer's arguments, else in what accelerate's launcher sets; both at once are as in accelerate."""
    args = SimpleNamespace(parallelism_config=None, world_size=8)
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "4")
    assert sp_size(args) == 1
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    assert sp_size(args) == 4
    args.parallelism_config = ParallelismConfig(sp_size=2)
    assert sp_size(args) == 2
