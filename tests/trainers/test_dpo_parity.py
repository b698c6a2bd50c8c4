"""`VisualDPOTrainer` against `trl.DPOTrainer` on the same rows: same loss, gradients, metrics and weights."""

import pytest
import torch
import trl
from datasets import Dataset
from step_kit import assert_same_gradients, gradients
from tokenizers.processors import TemplateProcessing
from trainer_kit import METHODS, QUIET, fresh, image_rows, lora, shake, text_rows, trainable

NOT_COMPARED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
OURS = {"loss/preference", "displacement/chosen", "displacement/rejected"}
NOT_COMPARED |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def with_bos(tokenizer):
    """The tokenizer puts a BOS in front of every text, as Llama's does."""
    tokenizer.bos_token = "<|im_start|>"
    bos = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def strings(rows):
    """The rows without messages."""
    return [
        {"prompt": "What moves? "} | {side: r[side][0]["content"][0]["text"] for side in ("chosen", "rejected")}
        for r in rows
    ]


def plain(rows):
    """Messages with plain-string contents, as TRL's text models know them."""
    plain_contents = lambda messages: [{**m, "content": m["content"][0]["text"]} for m in messages]  # noqa: E731
    return [{side: plain_contents(r[side]) for side in ("prompt", "chosen", "rejected")} for r in rows]


def implicit(rows):
    return [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in rows]


def case(kind, images):
    """(name of the model, processor, rows for both trainers)."""
    if kind in ("Qwen2-VL", "LLaVA-1.5"):
        return kind, fresh(kind)[1], image_rows(images)
    if kind == "one image":
        rows = [{"image": r.pop("images")[0], **r} for r in image_rows(images)]
        return "LLaVA-1.5", fresh("LLaVA-1.5")[1], rows
    processor = fresh()[1]
    if "BOS" in kind:
        processor = with_bos(processor)
    shape = strings if "strings" in kind else lambda rows: implicit(plain(rows)) if "implicit" in kind else plain(rows)
    return "text", processor, shape(text_rows())


KINDS = ["Qwen2-VL", "LLaVA-1.5", "one image", "messages", "messages, BOS", "strings", "strings, BOS", "implicit"]


def pair(kind, images, tmp_path, full=False, layout="auto", **more):
    """Our trainer and TRL's with the same weights. The adapters are moved: a new one is the identity."""
    name, processor, rows = case(kind, images)
    data = Dataset.from_list(rows)
    init = {"train_dataset": data, "eval_dataset": data.select(range(2)), "processing_class": processor}

    def kind_of_reference():
        return {"ref_model": fresh(name)[0]} if full else {"peft_config": lora(text=name == "text")}

    args = METHODS["dpo"][0](str(tmp_path / "ours"), layout=layout, **QUIET | more)
    ours = METHODS["dpo"][1](fresh(name)[0], args=args, **init, **kind_of_reference())
    args = trl.DPOConfig(str(tmp_path / "theirs"), **{**QUIET, "max_length": None, **more})
    theirs = trl.DPOTrainer(fresh(name)[0], args=args, **init, **kind_of_reference())
    for trainer in (ours, theirs):
        shake(trainer.model, scale=0.02 if full else 0.05)
    return ours, theirs


def batch(trainer, n=4):
    return trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader(trainer.train_dataset.select(range(n))))))


@pytest.mark.parametrize("layout", ["separate", "shared"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_loss_and_gradients(kind, full, layout, images, tmp_path):
    ours, theirs = pair(kind, images, tmp_path, full, layout, per_device_eval_batch_size=4)
    got, want = (t.compute_loss(t.model, batch(t)) for t in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert abs(want - 0.6931) > 1e-4  # the policy is not the reference
    got, want = gradients(ours, got), gradients(theirs, want)
    if full:  # tensors without influence: TRL's graph gives zeros where ours gives nothing
        want = {k: g for k, g in want.items() if k in got or g.abs().max() > 0}
    assert_same_gradients(got, want)


@pytest.mark.parametrize("kind", ["Qwen2-VL", "LLaVA-1.5", "messages", "strings, BOS"])
def test_same_training(kind, images, tmp_path):
    """Three steps: every number that TRL logs, in training and evaluation, and the weights at the end."""
    more = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.5, "warmup_steps": 1}
    more |= {"optim": "sgd", "learning_rate": 1.0}  # Adam makes whole steps of gradients that are rounding alone
    ours, theirs = pair(kind, images, tmp_path, **more)
    for trainer in (ours, theirs):
        trainer.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for got, want in zip(ours.state.log_history, theirs.state.log_history):
        assert set(want) <= set(got) <= set(want) | OURS | {f"eval_{key}" for key in OURS}
        for key in set(want) - NOT_COMPARED:
            assert got[key] == pytest.approx(want[key], rel=2e-4, abs=2e-5), key
    got, want = (torch.cat([p.flatten() for p in trainable(t.model).values()]) for t in (ours, theirs))
    assert (got - want).norm() <= 1e-6 * want.norm()
