"""No error repeats a token that was given by mistake, or given rightly beside a mistake."""

import json
import subprocess

import pytest

from trl_vpo.errors import RecipeError
from trl_vpo.training import launch
from trl_vpo.training.run import parse

TOKEN = "hf_" + "a" * 30
SHORT = "hf_wrong"  # nothing tells that it is one


def refused(argv):
    with pytest.raises(RecipeError) as error:
        parse("dpo", ["--use_cpu", *argv])
    return str(error.value)


@pytest.mark.parametrize("token", [TOKEN, SHORT])
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--hub_tokn={}"], "unknown option --hub_tokn. Did you mean --hub_token"),
        (["--hub_tokn", "{}"], "unknown option --hub_tokn. Did you mean"),
        (["--hub-tokn={}", "--rate=1"], "unknown option --hub-tokn. Did you mean --hub_token"),
        (["--hub_token=x", "{}"], "a value that belongs to no option stands behind --hub_token."),
        (["--max_steps=1", "{}"], "a value that belongs to no option stands behind --max_steps."),
    ],
)
def test_unknown_options(argv, expected, token):
    message = refused([arg.format(token) for arg in argv])
    assert expected in message
    assert token not in message


@pytest.mark.parametrize("option", ["--hub_strategy", "--hub_private_repo", "--max_steps", "--layout"])
def test_a_token_behind_another_option(option):
    message = refused([option, TOKEN])
    assert option.removeprefix("--") in message and "***" in message
    assert TOKEN not in message


@pytest.mark.parametrize("token", [TOKEN, SHORT])
def test_a_recipe_that_is_no_yaml(token, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"max_steps: 1\nhub_token: {token}: [\n")
    message = refused(["--config", str(tmp_path / "recipe.yaml")])
    assert "not valid YAML in line 2" in message
    assert token not in message


def test_a_command_that_fails_in_a_process_of_its_own(monkeypatch, capfd):
    """accelerate would end with its text, which is the whole command."""

    def launch_command(args):
        raise subprocess.CalledProcessError(3, ["python", *args.training_script_args])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert launch.launch([], ["train", "dpo", "--use_cpu", "--hub_token", TOKEN]) == 3
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize("token", [TOKEN, SHORT])
def test_the_command_for_fewer_gpus(token):
    kwargs = json.dumps({"token": token})
    words = ["train", "dpo", "--hub_token", token, "--model_init_kwargs", kwargs]
    with pytest.raises(RecipeError) as refusal:
        launch.check_gpus(words, ["--num_processes", "64"])
    assert "--hub_token '***'" in str(refusal.value) and token not in str(refusal.value)
