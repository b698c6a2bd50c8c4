"""Training prints a bar on a terminal, a line for each logging step elsewhere, and on rank 0 alone."""

import io
import re
import sys

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as upstream
from transformers.trainer_callback import TrainerControl, TrainerState

from trl_vpo.training import progress
from trl_vpo.training.progress import GIB, TrainingProgress, show_progress

STEP = {
    "loss": 0.69314, "rewards/margins": 0.125, "rewards/accuracies": 0.5, "grad_norm": 0.21, "learning_rate": 5e-6,
    "logps/chosen": -8.0, "epoch": 0.25,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Run:
    """Drives the callback as `Trainer` would, with a clock that the test moves."""

    def __init__(self, monkeypatch, tmp_path, *, out=None, err=None, rank=0, step=0, **args):
        self.out, self.err, self.clock = out or io.StringIO(), err or io.StringIO(), 100.0
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(progress, "peak_memory", lambda device: 3 * GIB // 2)
        self.args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **args)
        self.state = TrainerState(max_steps=20, global_step=step, is_world_process_zero=rank == 0)
        self.callback = TrainingProgress()
        self.tell("train_begin")

    def tell(self, event, **kwargs):
        getattr(self.callback, f"on_{event}")(self.args, self.state, TrainerControl(), **kwargs)

    def steps(self, count, seconds):
        for _ in range(count):
            self.state.global_step += 1
            self.clock += seconds
            self.tell("step_end")

    def lines(self):
        return self.out.getvalue().splitlines()


@pytest.fixture
def start(monkeypatch, tmp_path):
    return lambda **kwargs: Run(monkeypatch, tmp_path, **kwargs)


def test_a_line_for_each_logging_step_without_a_terminal(start):
    run = start()
    run.steps(5, seconds=2.0)
    run.tell("log", logs=STEP | {"num_tokens": 12000.0})
    assert run.lines() == ["step 5/20  loss 0.6931  margin +0.125  acc 0.50  1,200 tok/s  peak 1.5 GiB"]
    assert run.err.getvalue() == ""


def test_tokens_per_second_leave_evaluations_out(start):
    run = start()
    run.steps(2, seconds=5.0)
    run.tell("log", logs=STEP | {"num_tokens": 1000})
    run.clock += 30
    run.tell("log", logs={"eval_loss": 0.5, "eval_rewards/margins": 0.25, "eval_runtime": 29.5})
    run.tell("evaluate")
    run.clock += 7
    run.tell("save")
    run.steps(2, seconds=5.0)
    run.tell("log", logs=STEP | {"num_tokens": 3000})
    rates = [re.search(r"([\d,]+) tok/s", line) for line in run.lines()]
    assert [rate and rate.group(1) for rate in rates] == ["100", None, "200"]
    assert run.lines()[1] == "step 2/20  evaluation:  loss 0.5000  margin +0.250  29.5 s"


def test_tokens_before_a_checkpoint_are_not_counted(start):
    run = start(step=7)
    for tokens in (9000, 9400):
        run.steps(1, seconds=2.0)
        run.tell("log", logs=STEP | {"num_tokens": tokens})
    assert ["tok/s" in line for line in run.lines()] == [False, True]
    assert "200 tok/s" in run.lines()[1]


def test_metrics_that_are_not_logged_are_left_out(start):
    run = start()
    run.steps(1, seconds=1.0)
    run.tell("log", logs={"loss": 1.0})
    run.tell("log", logs={"note": 3})
    assert run.lines() == ["step 1/20  loss 1.0000  peak 1.5 GiB", "step 1/20  note 3"]


def test_steps_after_the_last_window_and_the_end_are_two_lines(start):
    run = start()
    run.steps(3, seconds=2.0)
    run.tell("log", logs=STEP | {"train_runtime": 10.0, "train_loss": 0.6})
    assert [line.split("  ")[0] for line in run.lines()] == [
        "step 3/20",
        "trained to step 3 in 10.0 s, mean loss 0.6000",
    ]


def test_a_terminal_gets_a_bar_and_few_lines(start):
    run = start(out=Terminal(), err=Terminal(), disable_tqdm=False)
    run.steps(5, seconds=2.0)
    run.tell("log", logs=STEP | {"num_tokens": 12000})
    run.tell("log", logs={"eval_b_loss": 0.5, "eval_b_rewards/accuracies": 0.75})
    run.tell("log", logs={"train_runtime": 10.0, "train_loss": 0.6, "train_samples_per_second": 2.5})
    for _ in range(2):
        run.tell("prediction_step", eval_dataloader=[1, 2, 3])
    assert run.callback.prediction_bar.n == 2
    run.tell("evaluate")
    run.tell("train_end")
    assert run.callback.prediction_bar is None
    bar = run.err.getvalue()
    assert "5/20" in bar and "loss 0.6931  margin +0.125  1,200 tok/s" in bar and "peak" not in bar
    assert "logps" not in bar
    assert run.lines() == [
        "step 5/20  evaluation of b:  loss 0.5000  acc 0.75",
        "trained to step 5 in 10.0 s, 2.50 rows/s, mean loss 0.6000",
    ]


@pytest.mark.parametrize("steps", [20, 123456])
def test_lines_fit_80_columns(start, steps):
    """Fields are left out, the least needed first; no number is cut."""
    run = start()
    run.state.max_steps = steps
    run.steps(5, seconds=0.001)
    run.tell("log", logs={**STEP, "loss": 1234.5678, "rewards/margins": -1234.5, "num_tokens": 12345678})
    run.tell("log", logs={f"eval_a_rather_long_name_{key}": -1234.5 for key in ("loss", "rewards/margins", "runtime")})
    step, evaluation = run.lines()
    assert max(len(step), len(evaluation)) <= 80
    assert step.startswith(f"step 5/{steps}  loss 1234.5678  margin -1234.500")
    assert evaluation.startswith(f"step 5/{steps}  evaluation of a_rather_long_name:  loss -1234.5000")


@pytest.mark.parametrize(
    ("options", "bar", "lines"),
    [
        ({"err": Terminal, "disable_tqdm": False}, True, True),  # a log file beside a terminal
        ({"out": Terminal, "err": Terminal, "disable_tqdm": True}, False, True),
        ({"out": Terminal, "err": Terminal, "disable_tqdm": False, "rank": 1}, False, False),
    ],
    ids=["log file", "disable_tqdm", "another rank"],
)
def test_who_gets_a_bar_and_who_gets_lines(start, options, bar, lines):
    run = start(**{key: value() if isinstance(value, type) else value for key, value in options.items()})
    run.steps(1, seconds=1.0)
    run.tell("log", logs=STEP)
    if not bar:
        run.tell("prediction_step", eval_dataloader=[1, 2])
    for event in ("evaluate", "save", "train_end"):
        run.tell(event)
    assert ("1/20" in run.err.getvalue()) == bar and (bar or not run.err.getvalue())
    assert [line[:9] for line in run.lines()] == ["step 1/20"] * lines


def test_peak_memory_on_the_cpu_is_of_the_whole_process():
    before = progress.peak_memory(torch.device("cpu"))
    held = torch.ones(GIB // 16)  # 256 MiB of float32
    after = progress.peak_memory(torch.device("cpu"))
    assert GIB // 16 < before <= after < 256 * GIB
    assert held.sum() > 0
    assert progress.peak_memory(torch.device("meta")) is None


class Chosen(TrainerCallback):
    pass


@pytest.mark.parametrize(("disable_tqdm", "default"), [(True, None), (False, None), (False, Chosen)])
def test_it_takes_the_place_of_transformers_own(tmp_path, monkeypatch, disable_tqdm, default):
    """Not of one that was chosen, as in a notebook."""
    if default:
        monkeypatch.setattr(upstream, "DEFAULT_PROGRESS_CALLBACK", default)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=disable_tqdm)
    trainer = Trainer(torch.nn.Linear(1, 1), args)
    show_progress(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(default or TrainingProgress) == 1
    assert not {ProgressCallback, PrinterCallback} & set(kinds)
