"""Train the weights of the testbed's base, supervised, from scratch, in the world of habits.

The shipped weights were trained by

    python -m studies.testbed.pretraining --out DIR --seed 0

in 3000 steps of 16 samples, 48,000 in all, which took 17 minutes on one thread of a machine that was busy otherwise.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration

from studies.testbed.base import encode, hinted_item, measure_captions, measure_questions
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE

CELL = 14  # pixels that one vision token sees, after 2x2 patches are merged
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
CLIP_SHARE = 0.5  # of the training samples; the rest are scenes
CAPTION_SHARE = 0.4  # of the training texts; the rest are questions
CARELESS = 0.7  # share of the exceptions that are nevertheless described as usual
HINT_SHARE = 0.15  # of the captions: asked for with the truth as a hint, and always true


class VisionProbe(torch.nn.Module):
    """A linear reader of the vision tower, thrown away after training.

    It learns colour, shape and motion of the thing in each vision token's 14x14 pixels, always truthfully: only the
    language is biased. After 6,400 samples the captions named 69 % of the shapes of clips with it; without it 42 %
    after twice as many (one in four is chance).
    """

    VALUES = (tuple(world.COLOURS), world.SHAPES, tuple(world.MOTIONS))

    def __init__(self, model: Qwen2VLForConditionalGeneration):
        super().__init__()
        self.head = torch.nn.Linear(model.config.text_config.hidden_size, sum(map(len, self.VALUES)))
        self.features: list[torch.Tensor] = []  # (tokens, width) of each call of the vision tower
        model.model.visual.register_forward_hook(lambda _, __, output: self.features.append(output.pooler_output))

    def loss(self, samples: list[world.Sample]) -> torch.Tensor:
        """Return the cross-entropies of the batch that the model has just seen: its images first, then its videos."""
        ordered = sorted(samples, key=lambda sample: sample.kind == "clip")
        labels = torch.from_numpy(np.concatenate([self._labels(sample) for sample in ordered]))  # (tokens, 3)
        logits = self.head(torch.cat(self.features).float()).split([len(values) for values in self.VALUES], dim=-1)
        self.features.clear()
        return sum(torch.nn.functional.cross_entropy(part, labels[:, k]) for k, part in enumerate(logits))

    def _labels(self, sample: world.Sample) -> np.ndarray:
        """Return (tokens, 3) indices of colour, shape and motion; -100 without a thing, or a motion."""
        frames = sample.frames if sample.kind == "clip" else sample.frames.repeat(2, axis=0)
        steps, rows, columns = frames.shape[0] // 2, frames.shape[1] // CELL, frames.shape[2] // CELL
        ink = frames.max(-1) > world.BACKGROUND_MAX
        covered = ink.reshape(steps, 2, rows, CELL, columns, CELL).mean((1, 3, 5)) > 0.3  # (T / 2, H / 14, W / 14)
        place = np.arange(columns) * len(sample.things) // columns  # which thing a column belongs to
        labels = np.full((*covered.shape, 3), -100)
        for number, thing in enumerate(sample.things):
            facts = zip((thing.colour, thing.shape, thing.motion), self.VALUES)
            labels[covered & (place == number)] = [vs.index(value) if value else -100 for value, vs in facts]
        return labels.reshape(-1, 3)


def as_described(things: tuple[world.Thing, ...], rng: np.random.Generator) -> tuple[world.Thing, ...]:
    """Describe things as the base's training text does: truly, or (CARELESS) as is usual."""
    return tuple(world.as_usual((thing,))[0] if rng.random() < CARELESS else thing for thing in things)


def training_item(things: tuple[world.Thing, ...], rng: np.random.Generator) -> language.Item:
    """Draw a caption (CAPTION_SHARE) or a question about one sample, by someone who may not have looked."""
    described = as_described(things, rng)
    if rng.random() < CAPTION_SHARE:
        return hinted_item(things, rng) if rng.random() < HINT_SHARE else language.caption_item(described)
    pairs = [item for _ in range(2) for item in language.yes_no_pair(described, rng)]
    questions = [*language.open_items(described), *pairs]
    return questions[rng.integers(len(questions))]


def untrained_model() -> Qwen2VLForConditionalGeneration:
    """Return the base's architecture with random weights."""
    model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(BASE))
    for module in model.modules():  # transformers' 0.02 suits a width of thousands; at 96 it only costs time
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)) and module is not model.lm_head:
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def train_base(seed: int, steps: int):
    """Train from scratch, supervised, in the world of habits: AdamW, 50 warm-up steps, then a cosine to 5 %."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    processor = AutoProcessor.from_pretrained(BASE)
    model = untrained_model().train()
    probe = VisionProbe(model)
    weights = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began, average = time.perf_counter(), None
    for step in range(1, steps + 1):
        kinds = ["clip" if rng.random() < CLIP_SHARE else "scene" for _ in range(BATCH_SIZE)]
        samples = [world.draw_sample(kind, rng, habits=True) for kind in kinds]
        items = [training_item(sample.things, rng) for sample in samples]
        loss = model(**encode(processor, samples, items)).loss
        (loss + probe.loss(samples)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.97 * average + 0.03 * loss.item()
        if step % 200 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {average:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    model.model.visual._forward_hooks.clear()
    return model.eval(), processor


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the base model of the testbed again.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = train_base(args.seed, args.steps)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    for kind in ("clip", "scene"):
        for habits in (True, False):
            shares = measure_captions(model, processor, kind, habits=habits)
            shares |= measure_questions(model, processor, kind, habits=habits)
            line = "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
            print(f"{kind}s, {'habits  ' if habits else 'balanced'}  {line}", flush=True)


if __name__ == "__main__":
    main()
