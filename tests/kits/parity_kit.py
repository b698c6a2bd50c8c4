"""Our trainer and `trl.DPOTrainer` on the same rows, with the same weights."""

import trl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trainer_kit import METHODS, QUIET, fresh, image_rows, lora, shake, text_rows


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
