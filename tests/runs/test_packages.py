"""An optional package that is missing is named with its install command before anything is loaded."""

import pytest
from adapter_kit import BASE, recipe_of

from trl_vpo.cli import main
from trl_vpo.runs import packages
from trl_vpo.runs.packages import missing_packages


@pytest.fixture
def bare(monkeypatch):
    """As with the required packages alone."""
    optional = {"bitsandbytes", "deepspeed", "tensorboard", "tensorboardX", "kernels", "flash_attn"}
    find = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in optional else find(name))


@pytest.mark.parametrize(
    ("settings", "install"),
    [
        ({"report_to": ["tensorboard"]}, "'trl-vpo[tensorboard]'"),
        ({"report_to": "wandb"}, "wandb"),
        ({"load_in_4bit": True}, "'trl-vpo[quantization]'"),
        ({"optim": "paged_adamw_8bit"}, "'trl-vpo[quantization]'"),
        ({"deepspeed": "zero2.json"}, "'trl-vpo[deepspeed]'"),
        ({"use_liger_kernel": True}, "liger-kernel"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
        ({"attn_implementation": "kernels-community/flash-attn3"}, "kernels"),
    ],
)
def test_a_missing_package_is_named(settings, install, bare):
    (line,) = missing_packages(settings)
    assert line.endswith(f"which is not installed: pip install {install}")


def test_what_needs_nothing(bare):
    plain = {"optim": "adamw_torch_fused", "report_to": ["none"], "attn_implementation": "sdpa", "load_in_4bit": False}
    assert missing_packages(plain) == []


def test_training_and_doctor_say_so(bare, tmp_path, capsys):
    recipe, method = recipe_of(tmp_path / "out", report_to="wandb", load_in_4bit=True)
    assert main(["train", method, "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "pip install wandb" in error and "pip install 'trl-vpo[quantization]'" in error
    zero = ["--accelerate_config", "zero2", "--num_processes", "2"]
    assert main(["train", method, "--config", str(recipe), *zero]) == 2
    assert "accelerate_config: deepspeed needs deepspeed, which is not" in capsys.readouterr().err
    assert main(["doctor", str(recipe), "--method", method]) == 1
    assert "pip install wandb" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    generate = ["generate", "leanpo", "--model_name_or_path", BASE, "--load_in_4bit", "--dataset_name"]
    (tmp_path / "in.jsonl").write_text('{"question": "Why?"}\n')
    assert main([*generate, str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "run")]) == 1
    assert "pip install 'trl-vpo[quantization]'" in capsys.readouterr().err


def test_a_reporter_that_does_not_exist_is_never_installed():
    assert missing_packages({"report_to": ["tensorbord"]}) == [
        "report_to: there is no tensorbord. Did you mean tensorboard?"
    ]
