"""A result that cannot be saved is not lost."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_kit import shake, trainable, trainer_of

from trl_vpo.errors import SaveError
from trl_vpo.training.failed_saves import explain_failed_save


def test_an_adapter_that_cannot_be_saved_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer = trainer_of("dpo", tmp_path / "out")
    shake(trainer.model)
    folder = trainer.args.output_dir = "/sys/kernel/run"  # as if its disk had become read-only
    with pytest.raises(SaveError) as failed, explain_failed_save(trainer, Path(folder)):
        trainer.save_model(folder)
    text = str(failed.value)
    assert text.startswith("/sys/kernel/run could not be written: ") and "Give user" in text and "disk" not in text
    folder = re.search(rf"The adapter of step 0 is kept in ({tmp_path}/trl-vpo-\w+): move it", text).group(1)
    kept = load_file(f"{folder}/adapter_model.safetensors")
    trained = {name.replace(".default", ""): weight for name, weight in trainable(trainer.model).items()}
    assert kept.keys() == trained.keys() and all(torch.equal(kept[name], trained[name]) for name in kept)
