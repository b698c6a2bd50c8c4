"""Alarms: chosen responses that fall, and a loss that stays at 0, each once a run."""

import re

import pytest
from helpers import row
from trainer_kit import config, trainer_of
from transformers import TrainerControl, TrainerState

from trl_vpo.trainers.alarms import LOGS, Alarms

ROWS = [row(None, (), f"a red square moves {way}.", f"a blue square moves {way}.") for way in ("left", "right")]
OPTIONS = {"rows": ROWS, "peft": None, "learning_rate": 1e-2, "max_steps": 12}
GOOD = {"rewards/accuracies": 0.9, "logps/chosen": -50.0, "loss/preference": 0.3}


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "trl_vpo.trainers.alarms"]


def alarms_of(logs, limit=10.0, caplog=None, history=()):
    """The messages for these logs of a run that comes after `history`."""
    alarms, args, control = Alarms(limit), None, TrainerControl()
    state = TrainerState(log_history=list(history))
    caplog.clear()
    alarms.on_train_begin(args, state, control)
    for step, entry in enumerate(logs, 1):
        state.global_step = step
        alarms.on_log(args, state, control, logs=entry)
    return messages(caplog)


def test_a_high_rate_drives_the_loss_to_zero(caplog, tmp_path):
    trainer = trainer_of("dpo", tmp_path, beta=1.0, **OPTIONS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first = next(i for i in range(len(losses)) if max(losses[i : i + LOGS]) < 1e-3) + LOGS
    (message,) = messages(caplog)  # once, although it stays there
    assert re.match(rf"\[RANK 0\] Step {first}: loss/\w+ was below 0.001 in the last 5 logs", message)
    assert first < len(losses)


def test_a_high_rate_makes_what_was_learnt_less_likely(caplog, tmp_path):
    """A model that knows the chosen responses, and DPO that unlearns them with the rejected ones."""
    taught = trainer_of("leanpo", tmp_path, beta=0.1, nll_weight=5.0, **OPTIONS | {"max_steps": 40})
    taught.train()
    caplog.clear()
    trainer = trainer_of("dpo", tmp_path, model=taught.model, **OPTIONS | {"learning_rate": 5e-2})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "displacement/chosen" in entry]
    assert (logs[0]["displacement/both_fall"], logs[-1]["displacement/both_fall"]) == (0.0, 1.0)
    falls, right = [-entry["displacement/chosen"] for entry in logs], [entry["rewards/accuracies"] for entry in logs]
    (message,) = [m for m in messages(caplog) if "less likely than under the reference" in m]
    windows = [slice(i, i + LOGS) for i in range(len(logs) - LOGS + 1)]
    first = next(w for w in windows if min(falls[w]) > 10 and sum(right[w]) > 2.5)
    assert message.startswith(
        f"[RANK 0] Step {first.stop}: the chosen responses have become {min(falls[first]):.1f} nats"
    )


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
def test_a_low_rate_sets_off_none(method, caplog, tmp_path):
    trainer_of(method, tmp_path, **OPTIONS | {"learning_rate": 1e-4}).train()
    assert messages(caplog) == []


def fallen(by, **more):
    return GOOD | {"displacement/chosen": -by} | more


def test_a_fall_counts_in_five_logs_in_a_row(caplog):
    logs = [fallen(12.0)] * 4 + [fallen(9.0)] + [fallen(12.0), fallen(30.0), fallen(11.5), fallen(12.0), fallen(13.0)]
    assert alarms_of(logs[:9], caplog=caplog) == []
    (message,) = alarms_of(logs + [fallen(99.0)] * 9, caplog=caplog)
    assert "Step 10: the chosen responses have become 11.5 nats less likely than under the reference" in message
    assert "rewards/accuracies of 0.90" in message
    assert alarms_of(logs, limit=12.0, caplog=caplog) == alarms_of(logs, limit=None, caplog=caplog) == []
    low = [entry | {"rewards/accuracies": 0.4} for entry in logs]
    assert alarms_of(low, caplog=caplog) == []


def test_without_a_reference_the_first_logs_are_the_start(caplog):
    """The likeliest of the last logs against the least likely of the first: other rows are no fall."""
    first = [GOOD | {"logps/chosen": -50.0 - i} for i in range(5)]  # down to -54
    steady = [GOOD | {"logps/chosen": -63.0}] * 9
    assert alarms_of(first + steady, caplog=caplog) == []
    (message,) = alarms_of([*first, *steady, *[GOOD | {"logps/chosen": -66.0}] * 5], caplog=caplog)
    assert "Step 19: the chosen responses have become 12.0 nats less likely than in the first logs" in message


def test_a_continued_run_goes_on_counting_and_repeats_none(caplog):
    zero = GOOD | {"loss/preference": 1e-5}
    evaluated = {"eval_loss": 0.1, "eval_rewards/accuracies": 1.0}
    assert len(alarms_of([zero, evaluated, zero], history=[zero, evaluated, zero, zero], caplog=caplog)) == 1
    assert alarms_of([zero] * 3, history=[zero] * 5, caplog=caplog) == []
    assert alarms_of([zero], history=[zero] * 3, caplog=caplog) == []


def test_the_limit_is_checked(tmp_path):
    assert config("dpo", tmp_path).displacement_warning == 10.0
    with pytest.raises(ValueError, match="displacement_warning is -1: give a number above 0"):
        config("dpo", tmp_path, displacement_warning=-1)
