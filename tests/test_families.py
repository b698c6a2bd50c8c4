"""Every family of the README's table: right log-probs, and steps of every method that move LoRA and nothing else."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, KINDS, LANGUAGE_MODEL, build, text_model
from helpers import row
from peft import LoraConfig
from trainer_kit import METHODS, slow_logits

from trl_vpo.data.rows import response_text


def dataset(kind, media, box=False):
    more = {"critical_box": [4, 8, 30, 40]} if box else {}
    rows = [
        row(kind, [media[kind][0]], **more),
        row(kind, [media[kind][1]], "a square.", "two circles are in the picture.", **more),
    ]
    return Dataset.from_list(rows * 2)


def trainer_of(method, model, processor, data, folder, lora=LANGUAGE_MODEL, **more):
    config, trainer = METHODS[method]
    args = config(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        num_frames=6,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **more,
    )
    peft = LoraConfig(r=4, target_modules=lora) if lora else None
    return trainer(model, args=args, train_dataset=data, processing_class=processor, peft_config=peft)


def slow_logps(model, trainer, example, side):
    """One sequence, one call, full logits: the log-probs of the response's tokens."""
    tree = trainer.data_collator.encode(example)
    branch = tree.branches[("chosen", "rejected").index(side)]
    with torch.no_grad():
        logps = slow_logits(model, tree.trunks[0], branch).log_softmax(-1)
    return logps.gather(-1, torch.tensor(branch.ids)[:, None])[:, 0]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_logps_of_a_ragged_batch_are_those_of_single_full_calls(name, kind, media, tmp_path):
    """Media of different shapes, responses of different lengths and a text-only row in one batch."""
    model, processor = build(name)
    rows = [*dataset(kind, media).to_list()[:2], row(None)]
    trainer = trainer_of("dpo", model, processor, Dataset.from_list(rows), tmp_path, lora=None)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        scores = trainer.concatenated_forward(model, batch)
    for i in range(3):
        for side, branch in (("chosen", batch["chosen"][i]), ("rejected", batch["rejected"][i])):
            want = slow_logps(model, trainer, trainer.train_dataset[i], side)
            got = scores.logps[branch][scores.mask[branch]]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_media_matter(name, kind, media, tmp_path):
    """The same texts about another picture score differently: the media do reach the model."""
    model, processor = build(name)
    same = [row(kind, [path]) for path in media[kind]]
    trainer = trainer_of("dpo", model, processor, Dataset.from_list(same), tmp_path, lora=None)
    with torch.no_grad():
        scores = trainer.concatenated_forward(model, trainer.data_collator(list(trainer.train_dataset)))
    first, second = scores.sums[scores.chosen]
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_move_the_adapter_and_nothing_else(method, name, kind, media, tmp_path):
    if method == "lpoi" and kind == "video":
        pytest.skip("LPOI ranks images")
    model, processor = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = trainer_of(method, model, processor, dataset(kind, media, method == "lpoi"), tmp_path)
    initial = {k: v.clone() for k, v in trainer.model.named_parameters() if v.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
    assert all("lora_" in k for k in initial) and initial
    assert not any("vision" in k or "visual" in k for k in initial)
    moved = [k for k, v in trainer.model.named_parameters() if k in initial and not torch.equal(v, initial[k])]
    assert len(moved) == len(initial), f"not trained: {sorted(set(initial) - set(moved))[:3]}"
    after = trainer.model.unload().state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("method", ["dpo", "leanpo", "rrpo"])
def test_text_only_rows_on_a_text_model(method, tmp_path):
    model, tokenizer = text_model()
    trainer = trainer_of(method, model, tokenizer, Dataset.from_list([row(None)] * 4), tmp_path, lora="all-linear")
    trainer.train()
    first, last = (trainer.state.log_history[i]["rewards/margins"] for i in (0, 1))
    assert last > first


@pytest.mark.parametrize("name", [n for n, (_, video) in FAMILIES.items() if video])
def test_mixed_text_image_and_video_rows(name, media, tmp_path):
    """Rows of all kinds share a dataset (Arrow fills the absent columns with None) and every batch."""
    model, processor = build(name)
    rows = [row("image", [media["image"][1]]), row(None), row("video", [media["video"][0]])]
    data = Dataset.from_list([{"images": None, "videos": None, **r} for r in rows])
    trainer = trainer_of("rrpo", model, processor, data, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, batch)
        want = [slow_logps(trainer.model, trainer, trainer.train_dataset[i], "chosen") for i in range(3)]
    for branch, slow in zip(batch["chosen"], want):
        torch.testing.assert_close(scores.logps[branch][scores.mask[branch]], slow, rtol=1e-4, atol=1e-5)
    trainer.train()
    assert trainer.state.global_step == 2


def test_readme_table_is_this_table():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    cells = re.findall(r"^\| ([\w.\-]+) \| (yes|no) \| (yes|no) \|", readme, re.M)
    table = {name: (image == "yes", video == "yes") for name, image, video in cells}
    assert table == {name: (True, video) for name, (_, video) in FAMILIES.items()}


def test_the_response_text_is_what_is_trained(media, tmp_path):
    model, processor = build("Qwen2-VL")
    trainer = trainer_of("dpo", model, processor, dataset("image", media), tmp_path, lora=None)
    example = trainer.train_dataset[0]
    tree = trainer.data_collator.encode(example)
    assert processor.tokenizer.decode(tree.branches[0].ids) == response_text(example["chosen"]) + "<|im_end|>\n"
