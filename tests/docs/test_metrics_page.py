"""Every name that a training logs is explained on the page of metrics."""

import re

import pytest
from datasets import Dataset
from pages import ROOT
from peft import LoraConfig
from trainer_kit import BY_SPEED

import trl_vpo
from trl_vpo.testbed import rows, tiny_vlm
from trl_vpo.training.methods import METHODS

PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
EXPLAINED = set(re.findall(r"`([\w/<>]+)`", PAGE))
DAMAGES = ("shuffled", "masked", "blank")


@pytest.mark.parametrize("method", BY_SPEED)
def test_every_logged_name_is_explained(method, tmp_path):
    kind = "scene" if method in ("lpoi", "mdpo", "symmpo") else "clip"
    _, pairs = rows.write_preferences(kind, 4, 1, tmp_path / "media")
    dataset = Dataset.from_list(pairs)
    args = getattr(trl_vpo, METHODS[method][0])(
        str(tmp_path / "out"), num_frames=8, max_steps=1, logging_steps=1, eval_strategy="steps", eval_steps=1,
        per_device_train_batch_size=2, save_strategy="no", report_to="none", use_cpu=True, learning_rate=1e-4,
    )  # fmt: skip
    trainer = getattr(trl_vpo, METHODS[method][1])(
        str(tiny_vlm.BASE), args=args, train_dataset=dataset, eval_dataset=dataset,
        peft_config=LoraConfig(target_modules="language"),
    )  # fmt: skip
    trainer.add_callback(trl_vpo.EvaluationCallback(trainer, dataset))
    trainer.train()
    logged = set().union(*trainer.state.log_history) - {"step"}
    assert {"grad_norm", "loss", "train_loss", "eval_loss", "eval_heldout/sensitivity/blank"} <= logged
    assert not {name for name in logged if not explained(name)}


def explained(name):
    for damage in DAMAGES:
        name = re.sub(f"sensitivity/{damage}", "sensitivity/<damage>", name)
    name = re.sub(r"rewards/image/\d+", "rewards/image/1", name).removeprefix("eval_heldout/")
    return name in EXPLAINED or name.removeprefix("eval_") in EXPLAINED


def test_a_name_that_is_not_there_is_missed():
    assert not explained("eval_loss/third") and explained("eval_rewards/image/4")
