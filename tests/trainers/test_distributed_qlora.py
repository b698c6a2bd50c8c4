"""QLoRA in several processes: LoRA on 4-bit weights makes the same step as in one process. See test_distributed.py."""

import distributed_run
import pytest
import torch
from test_distributed import WRAPPERS, assert_same_step, torchrun

pytest.importorskip("bitsandbytes")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3", "fsdp2"))]
)
def test_qlora_in_two_processes_does_the_step_of_one(engine, tmp_path):
    out = tmp_path / "out.pt"
    done, _ = torchrun(engine, str(out), *distributed_run.QUANTIZED)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, got in torch.load(out).items():
        want = distributed_run.run_case(**distributed_run.QUANTIZED[case])
        assert got["wrapper"] == WRAPPERS[engine]
        assert all("lora_" in name for name in want["grads"])
        assert_same_step(got, want)
        assert all(f"rank {rank} of 2: {engine}, {case}\n" in done.stdout for rank in (0, 1))
