"""The command line: quick, with examples, and with errors that a reader can act on."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._utils import ExceptionWrapper

from trl_vpo import cli
from trl_vpo.data.import_formats import format_list
from trl_vpo.errors import RowError, UserError
from trl_vpo.training.methods import METHODS, method_classes
from trl_vpo.training.run import make_parser

RRPO_ROW = {
    "question": "What moves?", "answer": "a red square.", "pred": "a blue square.", "video": "clip.mp4",
    "answer_masked": "a <MASK>red</MASK> square.", "pred_masked": "a <MASK>blue</MASK> square.",
}  # fmt: skip


WRONG_PATHS = [
    ("train dpo", "--config no.yaml",
     "the recipe no.yaml does not exist: no such file from HERE, and no recipe of this name in the package. "
     "`trl-vpo recipes` lists the names."),
    ("train dpo", "--dataset_name no.jsonl", "no.jsonl does not exist (seen from HERE)."),
    ("train dpo", "--model-name-or-path ./no",
     "model_name_or_path: the folder ./no does not exist (seen from HERE)."),
    ("train rrpo", "--model_name_or_path empty", "model_name_or_path: empty is not a model: it has no config.json."),
    ("train rrpo", "--media_root no",
     "media_root no is not a folder: point it at the folder that holds the media."),
    ("train lpoi", "--output_dir file",
     "output_dir: file is a file. Name a folder; it is created if it does not exist."),
    ("quickstart", "--out file/deep",
     "output_dir: file is a file. Name a folder; it is created if it does not exist."),
    ("evaluate", "--model ./no", "model_name_or_path: the folder ./no does not exist (seen from HERE)."),
    ("evaluate", "--adapters empty",
     "empty is not an adapter: its adapter_config.json cannot be read ([Errno 2] No such file or directory: "
     "'empty/adapter_config.json'). Name the output_dir of a LoRA training, or one of its checkpoints."),
    ("merge", "no out",
     "no is not an adapter: its adapter_config.json cannot be read ([Errno 2] No such file or directory: "
     "'no/adapter_config.json'). Name the output_dir of a LoRA training, or one of its checkpoints."),
    ("generate lpoi", "--from_adapter ./no", "from_adapter: the folder ./no does not exist (seen from HERE)."),
]  # fmt: skip


def test_help_and_wrong_paths_import_no_torch(tmp_path):
    """In a process of its own: the tests import it."""
    code = (
        "import sys, trl_vpo, trl_vpo.cli\n"
        "trl_vpo.cli.make_parser().format_help()\n"
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'numpy', 'av', 'PIL'}\n"
        "assert not heavy & set(sys.modules)\n"
        "for words in 'generate rrpo --help', 'generate lpoi --help-all', 'evaluate --help':\n"
        "    assert trl_vpo.cli.main(words.split()) == 0\n"
        "for words in WRONG:\n"
        "    assert trl_vpo.cli.main(words.split()) in (1, 2)\n"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)\n"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    code = code.replace("WRONG", repr([f"{command} {option}" for command, option, _ in WRONG_PATHS]))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if "error:" in line] == [
        f"trl-vpo: error: {message}".replace("HERE", str(tmp_path)) for _, _, message in WRONG_PATHS
    ]


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ([], ["example:\n  trl-vpo train "]),
        (["train"], ["example:\n  trl-vpo train "]),
        (["import"], ["example:\n  trl-vpo import "]),
        (
            ["doctor"],
            ["example:\n  trl-vpo doctor ", "--gpu_memory GIB", "--accelerate_config FILE", "--num_processes N"],
        ),
        (["recipes"], ["list (the default), show or copy"]),
        (["quickstart"], ["of dpo, leanpo,", "(default: dpo leanpo rrpo lpoi)"]),
        (["compare"], ["--held_out FILE", "example:\n  trl-vpo compare "]),
        (["evaluate"], ["--benchmark", "--include_path", "--config", "--visual_prompt BOOL", "\n  trl-vpo evaluate "]),
    ],
)
def test_help_shows_an_example_and_the_options(command, parts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        assert cli.main([*command, "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    text = capsys.readouterr().out
    assert [part for part in parts if part not in text] == [] and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("method", METHODS)
def test_help_of_a_method(method, capsys):
    """Short enough to read, the method's own keys first, nothing that it refuses; `--help-all` has the rest."""
    pages = []
    for option in ("--help", "--help-all"):
        assert cli.main(["train", method, option]) == 0
        pages.append(capsys.readouterr().out)
    short, whole = pages
    assert short.count("\n") <= 120 and max(map(len, short.splitlines())) <= 80
    own = {"dpo": "beta", "leanpo": "nll_weight", "rrpo": "alpha", "lpoi": "list_weight", "simpo": "target_margin"}
    own |= {
        "tdpo": "variant",
        "ddpo": "phrase_weight",
        "mdpo": "conditional_weight",
        "dpa": "alpha",
        "symmpo": "pair_weight",
    }
    titles = [f"\n{name}:\n" for name in (method, "data", "media", "model", "LoRA and quantization", "run")]
    assert sorted(titles, key=short.index) == titles
    assert (
        short.index("--config")
        < short.index(f"--{own[method]} ")
        < short.index("--num_frames")
        < short.index("--lora_r ")
    )
    config, _ = method_classes(method)
    offered = set(re.findall(r"^  --(\w+)", whole, re.M))
    known = {field.name for kind in make_parser(method, any_device=True).dataclass_types for field in fields(kind)}
    useless = {"precompute_cache_dir"} if "precompute_ref_log_probs" in config.refused else set()
    assert known - offered == (config.refused.keys() & known) | {"enable_jit_checkpoint"} | useless
    assert set(re.findall(r"^  --(\w+)", short, re.M)) <= offered


@pytest.mark.parametrize("method", ["leanpo", "rrpo", "lpoi"])
def test_help_of_generation(method, capsys):
    assert cli.main(["generate", method, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and text.index(f"\n{method}:\n") < text.index("\nmedia:\n")
    assert {"--config RECIPE", "--num_processes N", "--judge_url TEXT"} <= set(re.findall(r"--\S+ [A-Z]+", text))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train", "rpo"],
            "'rpo' is not one of dpo, leanpo, rrpo, lpoi, simpo, tdpo, ddpo, mdpo, dpa, symmpo. Did",
        ),
        (["import", "lpo", "a", "b"], "'lpo' is not one of rrpo, lpoi, ms-swift, llamafactory, llava-hound, "),
        (["trian"], "import, doctor, recipes, quickstart. Did you mean train?"),
        (["doctor", "r.yaml", "--method", "leanp"], "Did you mean leanpo?"),
        (["import", "rrpo", "a", "b", "--on_bat", "skip"], "unknown option --on_bat"),
        (["import", "rrpo", "a"], "OUT"),
    ],
)
def test_wrong_words_name_the_right_ones(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert cli.main([]) == 2 and "commands:" in capsys.readouterr().out


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["train", "dpo", "--config", "nowhere.yaml"], 2, "the recipe nowhere.yaml does not exist"),
        (["train", "dpo", "--use_cpu", "--betta", "1"], 2, "unknown option --betta. Did you mean --beta"),
        (["train", "leanpo", "--use_cpu", "--loss_type", "ipo"], 1, "does not take loss_type"),
        (["train", "dpo", "--accelerate_config", "zero4"], 2, "Did you mean zero"),
        (["doctor", "nowhere.yaml"], 2, "the recipe nowhere.yaml does not exist"),
        (["import", "rrpo", "nowhere.json", "out.jsonl"], 1, "nowhere.json: no such file"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(argv, code, message, capsys, monkeypatch):
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert "trl-vpo: error" in err and message in err and "Traceback" not in err
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(UserError):  # a traceback, which was asked for
        cli.main(argv)


def from_a_worker(*_):
    """A data loader's worker; torch puts its traceback into the message."""
    try:
        raise RowError("row 3: damaged")
    except RowError:
        ExceptionWrapper(where="in DataLoader worker process 0").reraise()


def interrupted(*_):
    raise KeyboardInterrupt


def full_disk(*_):
    raise OSError(28, "No space left on device")


def another_pipe(*_):
    raise BrokenPipeError(32, "Broken pipe")


def full_disk_at_a_tokenizer(*_):
    Tokenizer(WordLevel()).save("/dev/full")  # raises no `OSError`


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (from_a_worker, 1, "trl-vpo: error: row 3: damaged"),
        (full_disk, 1, "trl-vpo: error: [Errno 28] No space left on device"),
        (another_pipe, 1, "trl-vpo: error: [Errno 32] Broken pipe"),
        (full_disk_at_a_tokenizer, 1, "trl-vpo: error: No space left on device (os error 28)"),
        (interrupted, 130, ""),
    ],
)
def test_what_a_command_raises(command, code, message, monkeypatch, capsys):
    monkeypatch.setattr("trl_vpo.cli.doctor", command)
    assert cli.main(["doctor", "recipe.yaml"]) == code
    assert capsys.readouterr().err.split("\n")[0] == message


@pytest.mark.parametrize("words", [["import", "--list"], ["recipes", "--json"], ["recipes"]])
def test_a_closed_pipe_ends_a_command_quietly(words, monkeypatch, capfd):
    """Whether it breaks while something is printed, or when the rest is."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        try:
            code = cli.main(words)
        except SystemExit as end:  # raised by rich
            code = end.code
    assert (code, capfd.readouterr().err) == (1, "")


def test_as_a_program(tmp_path):
    """Through scripts/train.py, with a wrong key."""
    (tmp_path / "recipe.yaml").write_text("use_cpu: true\nlearning_rats: 1\n")
    script = Path(__file__).parent.parent / "scripts" / "train.py"
    run = subprocess.run(
        [sys.executable, str(script), "leanpo", "--config", str(tmp_path / "recipe.yaml")],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 2
    assert "unknown recipe key `learning_rats`. Did you mean learning_rate" in run.stderr
    assert "Traceback" not in run.stderr and "Failed to load" not in run.stderr


def test_import(tmp_path, capsys):
    source, target = tmp_path / "rrpo.json", tmp_path / "data" / "train.jsonl"
    source.write_text(json.dumps([RRPO_ROW, {"question": "What?"}]))
    assert cli.main(["import", "rrpo", str(source), str(target)]) == 1
    assert not target.exists()
    assert cli.main(["import", "rrpo", str(source), str(target), "--media_root", "/data", "--on_bad", "skip"]) == 0
    out = capsys.readouterr().out
    assert "1 rows of 2 records" in out and "Left out: 1" in out
    assert "Missing media, for example /data/clip.mp4." in out
    (row,) = [json.loads(line) for line in target.read_text().splitlines()]
    assert row["videos"] == ["/data/clip.mp4"] and row["chosen_phrases"] == [[2, 5]]


def test_import_list(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["import", "--list"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out == format_list() + "\n"
    assert "videochat2: RRPO's data for VideoChat2" in out and "QA QA_NEG video|image" in out
