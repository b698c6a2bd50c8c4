"""Training: checkpointing, precision, data loading, resuming, and the end when the loss is not a number."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import write_image
from peft import get_peft_model
from step_kit import history, losses_of
from torch.utils.data import DataLoader
from trainer_kit import METHODS, collated, fresh, image_rows, lora, shake, text_rows, trainable, trainer_of
from transformers import TrainerCallback

from trl_vpo.errors import NonFiniteLossError

VISUAL = {"critical_box": [4, 4, 40, 30]}


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast(method, images, tmp_path):
    """Log-probs, KL and loss stay in float32 and near the exact ones."""
    rows, out = image_rows(images, 4, **VISUAL), {}
    for bf16 in (False, True):
        trainer = trainer_of(method, tmp_path, rows, name="Qwen2-VL", bf16=bf16, max_steps=1)
        shake(trainer.model, scale=0.1)
        scores, formula = [], trainer.preference_loss
        trainer.preference_loss = lambda s, *rest, into=scores, formula=formula: into.append(s) or formula(s, *rest)
        trainer.train()
        out[bf16] = scores[0], losses_of(trainer)[0], trainer.state.log_history[0]["grad_norm"]
    (got, loss, norm), (want, exact, exact_norm) = out[True], out[False]
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    torch.testing.assert_close(got.logps, want.logps, rtol=2e-2, atol=5e-2)
    assert not torch.equal(got.logps, want.logps)  # it did run in bfloat16
    assert loss == pytest.approx(exact, rel=2e-2)
    assert norm == pytest.approx(exact_norm, rel=0.2)
    if method == "rrpo":
        assert got.kl.dtype == torch.float32 and want.kl.sum() > 0.1
        torch.testing.assert_close(got.kl.sum(-1), want.kl.sum(-1), rtol=0.1, atol=1e-2)


@pytest.mark.parametrize(("start", "workers"), [pytest.param("spawn", 1, marks=pytest.mark.slow), ("fork", 2)])
def test_loader_workers_give_the_same_batches(start, workers, images, tmp_path, monkeypatch):
    """Images are read and masked in worker processes, started either way (a spawned one imports for seconds)."""
    rows, runs = image_rows(images, 4, **VISUAL), []
    init = DataLoader.__init__
    started = lambda self, *args, **kw: init(self, *args, **{**kw, "multiprocessing_context": start})  # noqa: E731
    for n in (0, workers):
        if n:
            monkeypatch.setattr(DataLoader, "__init__", started)
        trainer = trainer_of("lpoi", tmp_path, rows, name="LLaVA-1.5", dataloader_num_workers=n)
        trainer.train()
        runs.append(history(trainer))
    assert runs[0] == runs[1]


def test_an_error_in_a_worker_names_the_row(tmp_path):
    """A file that vanishes after the check."""
    paths = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    trainer = trainer_of("dpo", tmp_path / "out", image_rows(paths), name="LLaVA-1.5", dataloader_num_workers=1)
    Path(paths[2]).unlink()
    with pytest.raises(ValueError, match=r"row 2 \(id 'i2'\).*2\.png"):
        trainer.train()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("kind", ["lora", "given adapter", "full"])
@pytest.mark.parametrize("method", ["rrpo", "leanpo"])
def test_resuming_is_as_if_nothing_had_happened(method, kind, tmp_path):
    """Six steps, or three, a checkpoint, and three more from it: the same bits, the same logs, the same data order."""
    names = []

    def start(folder, **more):
        model, tokenizer = fresh()
        if kind == "given adapter":
            model = get_peft_model(model, lora(text=True))
            shake(model, 4)
        more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", **more}
        more |= {"learning_rate": 3e-3, "peft": "new" if kind == "lora" else None}
        trainer = trainer_of(method, folder, model=model, processor=tokenizer, **more)
        loss = trainer.compute_loss
        trainer.compute_loss = lambda m, inputs, **kw: names.append(inputs["names"]) or loss(m, inputs, **kw)
        return trainer

    straight = start(tmp_path / "straight")
    straight.train()
    order, names[:] = list(names), []
    broken = start(tmp_path / "broken", callbacks=[StopAt(3)])
    broken.train()
    assert broken.state.global_step == 3
    resumed = start(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert names == order and len(order) == 6
    assert losses_of(resumed) == losses_of(straight) and len(losses_of(straight)) == 6
    skipped = {"num_tokens", "train_loss"}  # counted from the restart on, as TRL and transformers do
    for got, want in zip(history(resumed), history(straight)):
        assert got | dict.fromkeys(skipped) == want | dict.fromkeys(skipped)
    want = trainable(straight.model)
    assert all(torch.equal(p, want[k]) for k, p in trainable(resumed.model).items())
    batch = collated(straight)
    if method == "rrpo":
        assert torch.equal(resumed.reference_scores(batch).logps, straight.reference_scores(batch).logps)


class Poison(TrainerCallback):
    """Ruins the weights before or after a step."""

    def __init__(self, step, when):
        self.step = step
        setattr(self, f"on_step_{when}", self.ruin)

    def ruin(self, args, state, control, model, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                for p in trainable(model).values():
                    p.fill_(float("nan"))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_a_number_stops_and_names_its_rows(method, images, tmp_path):
    rows = image_rows(images, 4, **VISUAL)
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "callbacks": [Poison(2, "begin")]}
    trainer = trainer_of(method, tmp_path, rows, name="LLaVA-1.5", **more)
    with pytest.raises(NonFiniteLossError, match=r"step 2 for: row \d \(id 'i\d'\); row \d \(id 'i\d'\)\. Nothing"):
        trainer.train()
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-3").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    """The step that ruins the weights has a finite loss; its checkpoint would replace a good one."""
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = trainer_of("dpo", tmp_path, callbacks=[Poison(2, "end")], **more)
    with pytest.raises(NonFiniteLossError, match="not saved"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()


def test_only_the_rows_at_fault_are_named(tmp_path):
    """One token whose embedding is ruined: the rows without it are innocent."""
    model, tokenizer = fresh()
    rows = text_rows(8)
    culprit = tokenizer("nothing", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[culprit] = float("nan")
    trainer = trainer_of("rrpo", tmp_path, rows, model=model, processor=tokenizer)
    guilty = [
        f"row {i} (id 't{i}')"
        for i, tree in enumerate(trainer.data_collator.encode(x) for x in trainer.train_dataset)
        if culprit in [*tree.trunks[0].ids, *tree.branches[0].ids[:-1], *tree.branches[1].ids[:-1]]
    ]
    assert 0 < len(guilty) < 8
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.compute_loss(trainer.model, collated(trainer))
    assert [name for name in (f"row {i} (id 't{i}')" for i in range(8)) if name in str(raised.value)] == guilty


def test_a_bad_row_stops_evaluation_too(tmp_path):
    trainer = trainer_of("leanpo", tmp_path, eval_dataset=Dataset.from_list(text_rows(3)))
    with torch.no_grad():
        for p in trainable(trainer.model).values():
            p.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match="row 0"):
        trainer.evaluate()
