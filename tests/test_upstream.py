"""The names inside TRL, transformers, accelerate and peft that this package leans on, and what it expects of them.

Most are not public. When an upgrade moves one, the message says what moved and which file of ours has to follow.
"""

import importlib
import inspect
import re

import pytest
from upstream_names import ATTENTION, BASE, CALLED, COMPAT, KL, LOGS, RESUME, SCORING, SOURCES

import trl_vpo.trainers.base as base


def find(path):
    """The object behind a dotted path."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            target = getattr(target, name)
        return target
    raise AttributeError(path)


def absent(path, *lines):
    """Those that the source of a function or class does not have."""
    source = inspect.getsource(find(path))
    return [line for line in lines if line not in source]


@pytest.mark.parametrize(("path", "parameters", "user"), CALLED, ids=[path for path, *_ in CALLED])
def test_what_is_called_is_there(path, parameters, user):
    try:
        called = find(path)
    except AttributeError:
        pytest.fail(f"{path} is gone or has moved; {user} uses it.")
    if parameters is ...:
        return
    expected = parameters.split()
    got = [name for name, p in inspect.signature(called).parameters.items() if p.kind is not p.VAR_KEYWORD]
    if len(got) < len(expected) or any(name not in names.split("|") for name, names in zip(got, expected)):
        pytest.fail(f"{path} now takes {got}; {user} calls it with {expected}.")


@pytest.mark.parametrize(("path", "lines", "user"), SOURCES, ids=[path for path, *_ in SOURCES])
def test_what_a_source_says(path, lines, user):
    if path.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    missing = absent(path, *lines)
    assert not missing, f"{path} has no {missing} any more; see {user}."


def test_the_trainers_signature_is_dpo_trainers():
    """Changing the class name and the config is all that a user of `trl.DPOTrainer` does."""
    theirs = list(inspect.signature(find("trl.DPOTrainer.__init__")).parameters)
    ours = list(inspect.signature(base.VisualPreferenceTrainer.__init__).parameters)
    assert ours == theirs, f"trl.DPOTrainer.__init__ now takes {theirs}; bring {BASE} in line."


KERNELS = [
    ("ChunkedLogProbFunction", SCORING, 5,
     "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"),
    ("chunked_divergence.ChunkedDivergenceFunction", KL, 2,
     "student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
     "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "user", "outputs", "parameters"), KERNELS, ids=[path for path, *_ in KERNELS])
def test_the_kernels_take_and_give_what_we_think(path, user, outputs, parameters):
    """They take their arguments by position, so an order that changes would be silent. (What they compute is compared
    with plain torch in tests/forward/test_scoring.py.)"""
    forward = find(f"trl.kernels.{path}").forward
    got = list(inspect.signature(forward).parameters)[1:]
    assert got == parameters.split(), f"{path} now takes {got}; {user} passes {parameters.split()} by position."
    given = str(inspect.signature(forward).return_annotation)
    count = given.count("torch.Tensor")
    assert count == outputs, f"{path} now gives {given}; {user} unpacks {outputs} tensors."


def test_where_dpo_trainer_loads_the_reference():
    """LeanPO keeps `DPOTrainer.__init__` from loading a reference: its second call of `create_model_from_path`."""
    source = inspect.getsource(find("trl.DPOTrainer.__init__"))
    calls = re.findall(r"(\S+) = create_model_from_path\(", source)
    assert calls == ["model", "self.ref_model"], (
        f"DPOTrainer.__init__ now loads {calls} through create_model_from_path; `without_reference_model` in {COMPAT} "
        "expects the policy (where it is given by name) and then the reference."
    )
    other = re.findall(r"\b(create_reference_model|from_pretrained|deepcopy)\(", source)
    assert other == ["from_pretrained"], f"{other} in DPOTrainer.__init__: see `without_reference_model` in {COMPAT}."


def test_the_averages_are_ready_when_trainer_logs():
    """`log` merges `_metrics`; every rank passes the two places that fill it, and then one may log alone."""
    calls = {name: inspect.getsource(find(f"transformers.Trainer.{name}")).count("self.log(")
             for name in ("_maybe_log_save_evaluate", "_finalize_training", "_run_epoch")}  # fmt: skip
    assert calls == {"_maybe_log_save_evaluate": 1, "_finalize_training": 1, "_run_epoch": 0}, f"{calls}, see {LOGS}"


def test_the_counters_that_go_on_after_an_interruption():
    """They are set to zero, then `on_train_begin` may put them right, and then training counts on."""
    source = inspect.getsource(find("transformers.Trainer._inner_training_loop"))
    zeroed = (
        "self._initial_global_step = self.state.global_step",
        "self._tr_loss = torch.tensor(0.0",
        "self._total_loss_scalar = 0.0",
        "self._globalstep_last_logged = self.state.global_step",
    )
    begin, epoch = (source.find(f"callback_handler.{name}(") for name in ("on_train_begin", "on_epoch_begin"))
    assert 0 < begin < epoch, f"Trainer no longer calls on_train_begin before on_epoch_begin; see `Guard` in {RESUME}."
    late = [line for line in zeroed if not 0 < source.find(line) < begin]
    assert not late, f"Trainer has no {late} before on_train_begin any more; see `Guard.on_train_begin` in {RESUME}."
    used = ("self._total_loss_scalar += self._tr_loss.item()", "self.state.global_step - self._initial_global_step")
    missing = absent("transformers.Trainer._finalize_training", *used)
    assert not missing, f"Trainer._finalize_training has no {missing} any more; see `_counters` in {RESUME}."


def test_how_an_attention_function_is_found():
    """By the name in the config, in a table whose entries may be replaced; eager attention is the default there."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, eager_attention_forward

    from trl_vpo.forward.attention import _eager

    try:
        ALL_ATTENTION_FUNCTIONS["eager"] = mine = lambda *args: args
        assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager_attention_forward) is mine, ATTENTION
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
    assert _eager(Qwen2Attention) is eager_attention_forward, ATTENTION
