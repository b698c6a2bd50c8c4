"""A held-out file with rows of every task, adapters of the testbed's base, and the slow way to score a response."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from local_kit import plain
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoProcessor

from studies.testbed.pretraining import encode
from trl_vpo.evaluate.run import run_evaluation
from trl_vpo.testbed import language, rows, tiny_vlm, world

LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
EVERYWHERE = r".*(q_proj|v_proj|visual.*\.qkv)"


def processor():
    return AutoProcessor.from_pretrained(tiny_vlm.BASE)


def read_mp4(path) -> np.ndarray:
    """Return all frames (T, H, W, 3) uint8 of a clip."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_adapter(folder: Path, *, scale=0.3, seed=0, **lora) -> str:
    """A LoRA adapter of the testbed's base with random weights; with scale 0 it changes nothing."""
    torch.manual_seed(seed)
    model = get_peft_model(plain(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, **lora}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale) if scale else weight.zero_()
    model.save_pretrained(folder)
    return str(folder)


def adapted(path):
    return PeftModel.from_pretrained(plain(), path).eval()


def write_held_out(folder: Path, clips=3, scenes=2) -> SimpleNamespace:
    """For every sample a preference row; for every clip two yes/no questions, a choice and a caption.

    Gives the `path` of the file, its `rows` by id, and the `samples` behind them as they come back from their files.
    """
    held_out = SimpleNamespace(path=folder / "held_out.jsonl", rows={}, samples={})
    rng = np.random.default_rng(5)
    for kind, count in (("clip", clips), ("scene", scenes)):
        samples, preferences = rows.write_preferences(kind, count, seed=31, folder=folder / kind)
        for sample, row in zip(samples, preferences):
            if kind == "clip":
                sample = replace(sample, frames=read_mp4(row["videos"][0]))
            asked = _questions(sample, row, rng) if kind == "clip" else []
            for one in [row, *asked]:
                held_out.rows[one["id"]], held_out.samples[one["id"]] = one, sample
    rows.write_jsonl(held_out.rows.values(), held_out.path)
    (folder / "synonyms.txt").write_text("".join(f"{shape}, {shape}y\n" for shape in world.SHAPES))
    return held_out


def _questions(sample, row, rng) -> list[dict]:
    name, media, shapes = row["id"], {"videos": row["videos"]}, [thing.shape for thing in sample.things]
    made = []
    for side, item in zip(("basic", "hallucinated"), language.yes_no_pair(sample.things, rng)):
        made.append({"id": f"{name}-{side}", "task": "yes_no", "question": item.question, "answer": item.answer})
        made[-1] |= {"pair": name, "role": side} | media
    options = [f"a {shape}." for shape in (next(s for s in world.SHAPES if s not in shapes), *shapes[:1])]
    choice = {"id": f"{name}-choice", "task": "choice", "question": "Which is true?", "options": options}
    caption = {"id": f"{name}-chair", "task": "chair", "question": language.PROMPTS["clip"]}
    return [*made, choice | {"answer": "B"} | media, caption | {"objects": shapes} | media]


@torch.no_grad()
def slow_scores(model, processor, sample, question, text) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V) log-probs of each next token of a response behind a question about a sample, and its tokens (T,)."""
    batch = encode(processor, [sample], [[language.Item("asked", question, text)]])
    labels = batch.pop("labels")[0, 1:]
    logps = model(**batch).logits[0, :-1].float().log_softmax(-1)
    return logps[labels != -100], labels[labels != -100]


def slow_sum(*args) -> float:
    """The summed log-prob of a response; arguments as above."""
    logps, tokens = slow_scores(*args)
    return logps.gather(1, tokens[:, None]).sum().item()


def said(row, side) -> str:
    return row[side][0]["content"][0]["text"]


def evaluate(held_out, out: Path, *adapters, data=None, **options) -> dict:
    """Run `trl-vpo evaluate` on the testbed's base, small and on the CPU."""
    values = {"num_frames": 8, "max_new_tokens": 16, "device": "cpu", "resamples": 200, "num_images": 3, **options}
    values |= {"synonyms": held_out.path.parent / "synonyms.txt", "output_dir": out}
    argv = ["--model", str(tiny_vlm.BASE), "--data", str(data or held_out.path)]
    argv += ["--adapters", *map(str, adapters)] if adapters else []
    return run_evaluation(argv + [str(part) for key, value in values.items() for part in (f"--{key}", value)])


def records(out: Path) -> dict[tuple[str, str], dict]:
    """(row, contestant) -> what `rows.jsonl` says."""
    lines = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    return {(line["id"], line["contestant"]): line for line in lines}


def assert_same_record(record: dict, expected: dict) -> None:
    """Texts and counts alike, log-probs but for the rounding of another batch."""
    assert record.keys() == expected.keys()
    for key, value in expected.items():
        exact = value is None or not (isinstance(value, float) or key.endswith("logps"))
        assert record[key] == (value if exact else pytest.approx(value, abs=1e-4)), key
