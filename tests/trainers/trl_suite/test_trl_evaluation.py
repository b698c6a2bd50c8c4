"""Evaluation sets in every form that TRL's DPO tests give them, with and without precomputed log-probs."""

import math

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig
from trl_standins import plain
from trl_training import trainer_on


def data():
    return Dataset.from_list(plain()[:2])


def stream():
    return data().to_iterable_dataset()


FORMS = {  # what is given -> the names under which it is logged
    "dataset": (data, [""]),
    "stream": (stream, [""]),
    "DatasetDict": (lambda: DatasetDict({"a": data(), "b": data()}), ["_a", "_b"]),
    "IterableDatasetDict": (lambda: IterableDatasetDict({"a": stream(), "b": stream()}), ["_a", "_b"]),
    "dict": (lambda: {"a": data(), "b": data()}, ["_a", "_b"]),
    "dict of streams": (lambda: {"a": stream(), "b": stream()}, ["_a", "_b"]),
}
STREAMS = [name for name in FORMS if "tream" in name or "Iterable" in name]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def losses(entries, names):
    """The losses of the named sets, which are finite; no other set has one."""
    logged = {k: v for entry in entries for k, v in entry.items() if k.startswith("eval") and k.endswith("_loss")}
    assert set(logged) == {f"eval{name}_loss" for name in names} and all(map(math.isfinite, logged.values()))
    return logged


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precompute"])
@pytest.mark.parametrize("form", FORMS)
def test_given_at_construction(form, precompute, hub, tmp_path):
    make, names = FORMS[form]
    arguments = {"eval_dataset": make(), "precompute_ref_log_probs": precompute, **EVALUATED}
    if precompute and form in STREAMS:
        with pytest.raises(ValueError, match="IterableDataset, which cannot be read up front"):
            trainer_on(hub("Qwen2.5"), plain(), tmp_path, **arguments)
        return
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path, **arguments)
    trainer.train()
    trained = losses(trainer.state.log_history, names)
    assert losses([trainer.evaluate()], names) == pytest.approx(trained, rel=1e-5)
    if "_b" in names:
        assert losses([trainer.evaluate("b")], [""])["eval_loss"] == pytest.approx(trained["eval_b_loss"], rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precompute"])
@pytest.mark.parametrize("form", FORMS)
def test_given_to_evaluate(form, precompute, hub, tmp_path):
    """An adapter is switched off to have its reference again, so that it makes no difference when sets come."""
    make, names = FORMS[form]
    more = {"precompute_ref_log_probs": precompute, "peft_config": LoraConfig()}
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path, **more)
    trainer.train()
    if precompute and form in STREAMS:
        with pytest.raises(ValueError, match="IterableDataset, which cannot be read up front"):
            trainer.evaluate(make())
        return
    losses([trainer.evaluate(make())], names)


def test_no_evaluation_set(hub, tmp_path):
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path)
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, **EVALUATED)
