"""Evaluation sets in every form that TRL's DPO tests give them, with and without precomputed log-probs."""

import math

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig
from trl_standins import conversations, plain
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
    found = {
        key: v for entry in entries for key, v in entry.items() if key.startswith("eval") and key.endswith("_loss")
    }
    assert set(found) == {f"eval{name}_loss" for name in names} and all(map(math.isfinite, found.values()))
    return found


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


def test_a_stream_of_training_rows_cannot_be_precomputed(hub, tmp_path):
    with pytest.raises(ValueError, match="IterableDataset, which cannot be read up front"):
        trainer_on(hub("Qwen2.5"), stream(), tmp_path, precompute_ref_log_probs=True)


def test_full_fine_tuning_has_no_reference_when_it_is_over(hub, tmp_path):
    """Sets that came before it began can be evaluated again."""
    more = {"eval_dataset": data(), "precompute_ref_log_probs": True}
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path, **more)
    other = Dataset.from_list(conversations())
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(ValueError, match=r"Cannot compute reference log-probs.*after training has started"):
        trainer.evaluate(Dataset.from_list(conversations()[:1]))


def test_no_evaluation_set(hub, tmp_path):
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path)
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, **EVALUATED)


def test_compute_metrics(hub, tmp_path):
    def compute_metrics(prediction):
        chosen, rejected = prediction.predictions
        return {"margin": float((chosen - rejected).mean()), "rows": len(chosen)}

    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path, eval_dataset=data(), compute_metrics=compute_metrics)
    got = trainer.evaluate()
    assert got["eval_rows"] == 2 and got["eval_margin"] == pytest.approx(
        got["eval_logps/chosen"] - got["eval_logps/rejected"], rel=1e-4
    )
