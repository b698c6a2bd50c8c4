"""A recipe is read strictly: what its keys cannot take is refused, with the file and the key, before it runs."""

import os

import pytest

from trl_vpo.cli import main
from trl_vpo.evaluate.run import make_parser as evaluate_parser
from trl_vpo.generate.run import make_parser as generate_parser
from trl_vpo.training.run import make_parser as train_parser

BASE = "model_name_or_path: base\ndataset_name: rows.jsonl\n"
PARSERS = {
    "train": lambda: train_parser("leanpo", any_device=True),
    "rrpo": lambda: train_parser("rrpo", any_device=True),
    "generate": lambda: generate_parser("leanpo"),
    "evaluate": evaluate_parser,
}


def parsed(tmp_path, text, command="train", options=()):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else (BASE + text).encode())
    return PARSERS[command]().parse(["--config", str(path), *options])


WRONG = [  # a line, the command, what is expected
    ("learning_rate: true", "train", "learning_rate is true: give a number."),
    ("learning_rate: null", "train", "learning_rate is null: give a number."),
    ("learning_rate: fast", "train", "learning_rate is 'fast': give a number"),
    ("learning_rate: .nan", "train", "learning_rate is nan: give a finite number"),
    ("learning_rate: .inf", "train", "learning_rate is inf: give a finite number"),
    ("learning_rate: 0", "train", "learning_rate is 0.0: give a number above 0"),
    ("gradient_accumulation_steps: -1", "train", "gradient_accumulation_steps is -1: give at least 1"),
    ("gradient_accumulation_steps: 2.0", "train", "gradient_accumulation_steps is 2.0: give a whole number"),
    ("max_steps: 0", "train", "max_steps is 0: give a whole number of at least 1, or -1 for num_train_epochs"),
    ("max_steps: 1e3", "train", "max_steps is '1e3': give a whole number"),
    ("num_train_epochs: -1", "train", "num_train_epochs is -1.0: give a number above 0"),
    ("beta: -1", "train", "beta is -1.0: give a number above 0"),
    ("alpha: -0.1", "rrpo", "alpha is -0.1: give at least 0"),
    ("lora_dropout: 1", "train", "lora_dropout is 1.0: give at least 0 and below 1"),
    ("lora_dropout: -0.1", "train", "lora_dropout is -0.1: give at least 0 and below 1"),
    ("num_frames: -1", "train", "num_frames is -1: give a whole number of at least 1"),
    ("max_length: 0", "train", "max_length is 0: give at least 1"),
    ("use_peft: 1", "train", "use_peft is 1: give true or false"),
    ("run_name: 2024-01-01", "train", r"run_name is .*: give a text \(quote it\) or leave it out"),
    ("eval_strategy: no", "train", 'eval_strategy is false: .* write "no"'),
    ("pad_to_multiple_of: true", "train", "pad_to_multiple_of is true: give a whole number or a text"),
    ("lora_target_modules: '*.q_proj'", "train", "lora_target_modules: .* is not a regular expression"),
    ("lora_target_modules: [q_proj, 5]", "train", "lora_target_modules is .* give a list of texts"),
    ("datasets: [{path: 5}]", "train", r"datasets\[0\]\.path is 5: give a text"),
    ("datasets: [{path: a, colums: [b]}]", "train", r"unknown key `colums` in datasets\[0\]\. Did you mean columns"),
    ("accelerator_config: {splt: 1}", "train", "'splt'"),
    ("hub_token: 5", "train", r"hub_token is '\*\*\*': give a text"),
    ("7: 2", "train", "the key 7 is not a text"),
    ("beta: 1\nbeta: 2", "train", "line 4, .*'beta' is given twice, the first time in line 3"),
    ("model_init_kwargs:\n  a: {b: 1, b: 2}", "train", "'b' is given twice, the first time in line 4"),
    ("beta:\t1", "train", "line 3, column 6"),
    ("seed: 010", "train", "line 3, column 7: a number to base 8: write a plain decimal one"),
    ("seed: -0_10", "train", "line 3, column 7: a number to base 8"),
    ("beta: 1:30", "train", "line 3, column 7: a number to base 60"),
    ("video_end: 10:30.5", "train", "line 3, column 12: a number to base 60"),
    ("lora_modules_to_save: [1:30]", "train", "line 3, .*: a number to base 60"),
    ("env: {A: null}", "train", r"env\.A is null: give a text \(quote it\) or a number"),
    ("env: {A: true}", "train", r"env\.A is true: give a text \(quote it\)"),
    ("env: {A: [secret]}", "train", r"env\.A is a list: give a text"),
    ("env: {on: a}", "train", "env: the name true is not a text"),
    ("env: [A]", "train", "env is list: give a mapping"),
    ("pad_to_multiple_of: -8", "train", "pad_to_multiple_of is -8: give at least 1"),
    ("report_to:", "train", 'report_to is null: write "none"'),
    ("learning_rat: 1", "train", "unknown recipe key `learning_rat`. Did you mean learning_rate"),
    ("dtype: bfloat", "train", "dtype: 'bfloat' is not one of auto, bfloat16.* Did you mean bfloat16"),
    ("loss_type: [ipo]", "train", "does not take loss_type"),
    ("check_media: headers", "train", "headers.* is not one of header, decode, off"),
    ("temperature: true", "generate", "temperature is true: give a number"),
    ("temperature: .nan", "generate", "temperature is nan: give a finite number"),
    ("batch_size: [1]", "generate", r"batch_size is \[1\]: give a whole number"),
    ("batch_size: -1", "generate", "batch_size is -1"),
    ("adapters: 5", "evaluate", "adapters is 5: give a list of texts"),
    ("resamples: 1.5", "evaluate", "resamples is 1.5: give a whole number"),
    ("level: .nan", "evaluate", "level is nan: give a finite number"),
]


@pytest.mark.parametrize(("line", "command", "expected"), WRONG, ids=[line.replace("\n", " ") for line, *_ in WRONG])
def test_a_value_that_its_key_does_not_take(line, command, expected, tmp_path):
    with pytest.raises(ValueError, match=rf"recipe\.yaml.*{expected}"):
        parsed(tmp_path, line, command)


FILES = {
    "empty": (b"# nothing\n", "recipe.yaml is empty"),
    "a list": (b"- beta\n", "recipe.yaml holds a list"),
    "latin-1": (b"beta: 1\nrun_name: caf\xe9\n", "recipe.yaml is not UTF-8 text, in line 2"),
    "a zero byte": (b"beta: \x00", "recipe.yaml is not valid YAML: special characters"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_recipe(case, tmp_path):
    content, message = FILES[case]
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, content)


def test_a_folder_is_no_recipe(tmp_path, capsys):
    for command in (["train", "leanpo", "--config", str(tmp_path)], ["doctor", str(tmp_path), "--method", "leanpo"]):
        assert main(command) == 2
        assert f"the recipe {tmp_path} cannot be read (Is a directory)" in capsys.readouterr().err


def test_values_that_stand_for_what_is_meant(tmp_path):
    """YAML 1.1 reads 1e-6 as a text; whole numbers are numbers; one word may stand for a list."""
    text = (
        "learning_rate: 1e-6\nbeta: 1\nmax_steps: '5'\nuse_peft: 'true'\nlora_target_modules: language\n"
        "include_for_metrics: loss\npad_to_multiple_of: 8\ndataset_train_split: train"
    )
    script, training, model, _ = parsed(tmp_path, text)
    assert (training.learning_rate, training.beta, training.max_steps) == (1e-6, 1.0, 5)
    assert (model.use_peft, model.lora_target_modules, script.dataset_train_split) == (True, "language", "train")
    assert (training.include_for_metrics, training.pad_to_multiple_of) == (["loss"], 8)
    config = parsed(tmp_path, "adapters: outputs/rrpo", "evaluate")[0]
    assert config.adapters == ["outputs/rrpo"]
    assert parsed(tmp_path, b"\xef\xbb\xbf" + (BASE + "beta: 3").encode())[1].beta == 3.0


@pytest.mark.parametrize(
    ("line", "expected"), [("true", "true"), ("false", None), ("yes", "true"), ("", None), ("a/checkpoint-4",) * 2]
)
def test_what_a_recipe_resumes_from(line, expected, tmp_path):
    assert parsed(tmp_path, f"resume_from_checkpoint: {line}")[1].resume_from_checkpoint == expected


def test_numbers_that_yaml_reads_as_they_look(tmp_path, monkeypatch):
    monkeypatch.setattr("os.environ", {**os.environ})
    text = "seed: 0\nmax_steps: 1_000\nbeta: 0.10\nlearning_rate: 1.0e-5\nalpha: +05.5\nrun_name: '010'\n"
    text += "env: {SOME_PORT: 8080, SOME_PATH: /a, SOME_FLAG: 'true'}"
    training = parsed(tmp_path, text, "rrpo")[1]
    assert (training.seed, training.max_steps, training.beta, training.learning_rate) == (0, 1000, 0.1, 1e-5)
    assert (training.alpha, training.run_name) == (5.5, "010")
    assert [os.environ[name] for name in ("SOME_PORT", "SOME_PATH", "SOME_FLAG")] == ["8080", "/a", "true"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "nan"], "--learning_rate is nan: give a finite number"),
        (["--max-steps", "0"], "--max_steps is 0: give a whole number of at least 1"),
        (["--lora_dropout=2"], "--lora_dropout is 2.0: give at least 0 and below 1"),
        (["--pad_to_multiple_of", "-8"], "--pad_to_multiple_of is -8: give at least 1"),
        (["--lora_target_modules", "*x"], "--lora_target_modules: .* is not a regular expression"),
        (["--max_steps", "a"], "argument --max_steps.*: invalid int value"),
        (["--config", "b.yaml"], "--config is given twice"),
        (["--learning-rates", "1"], "unknown option --learning-rates. Did you mean --learning_rate"),
        (["--learning_ra", "1"], "unknown option --learning_ra"),  # no abbreviations
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type: .* Did you mean cosine"),
    ],
)
def test_an_option_names_itself(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        parsed(tmp_path, "beta: 1", options=options)


def test_processes_that_cannot_be_started(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(BASE + "num_processes: 0")
    assert main(["train", "leanpo", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "num_processes is '0': give a whole number of at least 1" in capsys.readouterr().err
