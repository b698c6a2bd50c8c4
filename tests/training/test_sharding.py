"""Sharding read from accelerate configs."""

import json
from pathlib import Path

import pytest

from trl_vpo.errors import UserError
from trl_vpo.training.sharding import Sharding, launched

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


def test_shipped_configs():
    read = {file.stem: launched(["--config_file", str(file)]) for file in CONFIGS.glob("*.yaml")}
    assert read.pop("cpu2").processes == 2
    assert read == {
        "single_gpu": Sharding(),
        "ddp": Sharding("ddp", 8),
        "multi_node": Sharding("ddp", 16),
        "zero2": Sharding("zero2", 8),
        "zero3": Sharding("zero3", 8),
        "zero3_offload": Sharding("zero3", 2, frozenset({"weights", "optimizer"})),
        "fsdp2": Sharding("fsdp", 8),
        "sp2": Sharding("ddp", 8),
    }


def test_launch_options():
    assert launched(["--config_file", str(CONFIGS / "zero2.yaml"), "--num_processes", "4"]) == Sharding("zero2", 4)
    assert launched(["--num_processes", "2"]) == Sharding("ddp", 2)
    assert launched([]) == Sharding()


def test_a_deepspeed_file_that_a_config_names(tmp_path):
    deepspeed, named = tmp_path / "ds.json", tmp_path / "named.yaml"
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}))
    named.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n")
    options = ["--config_file", str(named), "--num_processes", "3"]
    assert launched(options) == Sharding("zero1", 3, frozenset({"optimizer"}))
    deepspeed.write_text("no json")
    with pytest.raises(UserError, match=r"ds\.json cannot be read"):
        launched(options)
