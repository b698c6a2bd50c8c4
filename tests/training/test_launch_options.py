"""`--accelerate_config` and `--num_processes`: where they come from, and how many GPUs they may ask for."""

import shlex

import pytest
import torch

from trl_vpo import cli
from trl_vpo.errors import RecipeError
from trl_vpo.runs.named_recipes import recipes_folder
from trl_vpo.training.launch import check_gpus, launch_options

NAMED = ["--config", "rrpo/qwen2_5_vl_7b"]


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for variable in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.1\n")
    return ["--config", str(path)]


def test_options_are_taken_out(recipe):
    rest, launch = launch_options([*recipe, "--accelerate_config", "zero2", "--beta", "1", "--num_processes=2"])
    assert rest == [*recipe, "--beta", "1"]
    assert launch == ["--config_file", str(recipes_folder() / "accelerate/zero2.yaml"), "--num_processes", "2"]
    assert launch_options(rest) == (rest, [])


def test_options_of_a_recipe(tmp_path, monkeypatch):
    own, recipe = tmp_path / "own.yaml", tmp_path / "recipe.yaml"
    own.write_text("num_processes: 4\n")
    recipe.write_text(f"accelerate_config: {own}\nnum_processes: 2\n")
    options = ["--config", str(recipe), "--num_processes", "3"]
    assert launch_options(options)[1] == ["--config_file", str(own), "--num_processes", "3"]
    monkeypatch.setenv("LOCAL_RANK", "0")  # a launched process does not launch again
    assert launch_options(options) == (["--config", str(recipe)], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- 1\n", "holds a list"),
        ("a: [\n", "is not valid YAML in line"),
        ("num_processes: many\n", "num_processes is 'many': give a whole number of at least 1"),
        ("deepspeed_config: 3\n", "deepspeed_config is not a mapping"),
    ],
)
def test_accelerate_configs_that_cannot_be_used(text, message, recipe, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"the accelerate config .*own.yaml.*{message}"):
        launch_options([*recipe, "--accelerate_config", str(tmp_path / "own.yaml")])


def test_what_accelerate_refuses_is_one_message(recipe, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\nuse_cpu: true\nprecision: bf16\n")
    words = ["train", "rrpo", *recipe, "--accelerate_config", str(tmp_path / "own.yaml")]
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert "error: accelerate launch: " in err and "precision" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("sp_size: 3", "sp_size is 3, so num_proc"),
        ("cp_size: 2", "cp_size is 2: "),
        ("sp_size: two", "sp_size is 'two'"),
    ],
)
def test_groups_that_cannot_be(section, message, recipe, tmp_path, capsys):
    """The file of the value is named, not the recipe, and nothing is launched."""
    own = tmp_path / "own.yaml"
    own.write_text(f"num_processes: 2\nparallelism_config:\n  parallelism_config_{section}\n")
    assert cli.main(["train", "rrpo", *recipe, "--accelerate_config", str(own)]) == 2
    assert f"error: {own}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "owner"),
    [
        ("train rrpo --config leanpo/qwen2_5_vl_7b", "train leanpo"),
        ("train leanpo --config leanpo/generate", "generate leanpo"),
        ("generate rrpo --config rrpo/qwen2_5_vl_7b", "train rrpo"),
        ("doctor lpoi/generate", "generate lpoi"),
    ],
)
def test_a_recipe_of_another_command(words, owner, capsys):
    assert cli.main(words.split()) == 2
    assert f"is for `trl-vpo {owner}`" in capsys.readouterr().err


def test_an_accelerate_config_is_no_recipe(capsys):
    assert cli.main(["train", "rrpo", "--config", "accelerate/ddp"]) == 2
    assert "--accelerate_config ddp" in capsys.readouterr().err


def test_gpu_engines_on_cpus_are_refused(recipe):
    words = ["train", "rrpo", *recipe, "--accelerate_config", "zero3", "--use_cpu"]
    with pytest.raises(RecipeError, match=r"zero3\.yaml is for GPUs\. On CPUs: --accelerate_config cpu2"):
        check_gpus(words, launch_options(words)[1])


def test_missing_gpus_are_said_before_the_model_is_looked_up(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    rows = ["--dataset_name", "trl_vpo/testbed"]  # a folder; the model is not in the cache
    assert cli.main(["train", "rrpo", *NAMED, *rows]) == 2
    assert "--num_processes 1 --gradient_accumulation_steps 32" in capsys.readouterr().err


def test_the_quickstarts_rows_are_written_by_a_command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "rrpo", "--config", "quickstart/rrpo"]) == 1
    assert "`trl-vpo quickstart`, given here, writes it" in capsys.readouterr().err
    assert cli.main(["train", "rrpo", "--config", "quickstart/rrpo", "--dataset_name", "mine.jsonl"]) == 1
    assert "writes it" not in capsys.readouterr().err


def test_a_named_recipe_brings_its_own():
    ddp = str(recipes_folder() / "accelerate/ddp.yaml")
    assert launch_options(NAMED) == (NAMED, ["--config_file", ddp, "--num_processes", "4"])


def test_launch_runs_the_module(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    assert cli.main(["train", "rrpo", *recipe, "--use_cpu", "--num_processes", "2"]) == 0
    (args,) = seen
    assert (args.module, args.training_script, args.num_processes) == (True, "trl_vpo", 2)
    assert args.training_script_args == ["train", "rrpo", *recipe, "--use_cpu"]
    assert args.multi_gpu  # accelerate starts one process else, where there is no GPU


# --- GPUs -----------------------------------------------------------------------------------------------------------


def refused(monkeypatch, gpus, words):
    """The message, and the command that it proposes."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    with pytest.raises(RecipeError) as error:
        check_gpus(words, launch_options(words)[1])
    message, command = str(error.value).split("\n")
    return message, shlex.split(command)


@pytest.mark.parametrize(
    ("gpus", "seen", "processes", "steps"),
    [
        (0, "On a machine with one GPU, this keeps the effective batch:", 1, 32),
        (1, "sees 1 GPU here. This keeps the effective batch:", 1, 32),
        (2, "sees 2 GPUs here. This keeps the effective batch:", 2, 16),
        (3, "sees 3 GPUs here. This keeps the effective batch:", 2, 16),  # 32 micro-batches do not divide by 3
    ],
)
def test_fewer_gpus_keep_the_batch(gpus, seen, processes, steps, monkeypatch):
    message, command = refused(monkeypatch, gpus, ["train", "rrpo", *NAMED, "--output_dir", "a b"])
    assert "num_processes is 4" in message and seen in message
    assert ("sees no GPU here. To run on the CPU: --use_cpu." in message) == (gpus == 0)
    numbers = ["--num_processes", str(processes), "--gradient_accumulation_steps", str(steps)]
    assert command == ["trl-vpo", "train", "rrpo", *NAMED, "--output_dir", "a b", *numbers]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: max(gpus, 1))
    check_gpus(command[1:], launch_options(command[1:])[1])  # what it proposes runs there
    if gpus == 0:  # and is not proposed again where there is none
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
        with pytest.raises(RecipeError, match=r"^num_processes is 1, .* on the CPU: --use_cpu\.$"):
            check_gpus(command[1:], launch_options(command[1:])[1])


def test_options_win_and_stay_in_the_command(monkeypatch):
    words = ["train", "rrpo", *NAMED, "--num_processes", "8", "--gradient_accumulation_steps=3"]
    words += ["--accelerate_config", "zero2"]
    _, command = refused(monkeypatch, 4, words)
    options = dict(zip(command[3::2], command[4::2]))
    assert options == {
        "--config": NAMED[1], "--accelerate_config": "zero2", "--num_processes": "4",
        "--gradient_accumulation_steps": "6",
    }  # fmt: skip


def test_the_config_says_how_many_where_nothing_else_does(recipe, monkeypatch):
    message, command = refused(monkeypatch, 1, ["train", "rrpo", *recipe, "--accelerate_config", "ddp"])
    assert "num_processes is 8" in message and command[-2:] == ["--gradient_accumulation_steps", "8"]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    words = ["train", "rrpo", *recipe, "--accelerate_config", "multi_node"]
    check_gpus(words, launch_options(words)[1])  # 16 on two machines


def test_generation_has_no_batch_to_keep(recipe, monkeypatch):
    message, command = refused(monkeypatch, 2, ["generate", "rrpo", *recipe, "--num_processes", "4"])
    assert "effective batch" not in message
    assert command == ["trl-vpo", "generate", "rrpo", *recipe, "--num_processes", "2"]


def test_evaluation_is_launched_too(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    words = ["evaluate", "--model", "trl_vpo/testbed/base", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert cli.main([*words, "--num_processes", "2"]) == 0
    assert seen[0].training_script_args == words and seen[0].num_processes == 2


@pytest.mark.parametrize(
    "options", [["--use_cpu"], ["--use_cpu", "true"], ["--device", "cpu"], ["--accelerate_config", "cpu2"]]
)
def test_a_run_on_cpus_is_not_refused(options, recipe, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    words = ["train", "rrpo", *recipe, *options, "--num_processes", "2"]
    check_gpus(words, launch_options(words)[1])
