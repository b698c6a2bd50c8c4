"""A tiny vision-language model that learns the small world on a CPU.

TODO numbers
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from trl_vpo.testbed import language, world

BASE = Path(__file__).parent / "base"

WIDTH = 96
PATCH = 7
STEPS = 1600
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
CLIP_SHARE = 0.65  # of the training samples; the rest are scenes
CAPTION_SHARE = 0.6  # of the conversations begin with a caption
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on everything the world can say, so that each of its words is one token."""
    rng = np.random.default_rng(0)
    corpus = ["system", "user", "assistant"] * 50
    for kind in ("clip", "scene"):
        for sample in world.draw_samples(kind, 400, seed=0, habits=False):
            items = [language.caption_item(sample.things), language.choice_item(sample.things, rng)]
            items += [*language.open_items(sample.things), *language.yes_no_pair(sample.things, rng)]
            corpus += [text for item in items for text in (item.question, item.answer)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[*SPECIAL, *VISION], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=2048,
    )


def build_processor() -> Qwen2VLProcessor:
    """Clips stay 56x56 and scenes 112x56: 16 tokens for two frames of a clip, 32 for a scene."""
    budget = {"shortest_edge": world.SIZE**2, "longest_edge": 2 * world.SIZE**2}
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": budget}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        build_tokenizer(),
        Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False, do_sample_frames=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """An untrained Qwen2-VL of about half a million parameters: 2 vision and 2 language layers, width 96."""
    tokenizer = processor.tokenizer
    vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    sixth = WIDTH // 4 // 2 // 3
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [sixth] * 3},
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        },
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        tie_word_embeddings=True,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
    )
    return Qwen2VLForConditionalGeneration(config)


def encode(processor, samples, conversations, *, generate: bool = False) -> dict[str, torch.Tensor]:
    """Samples and one conversation (list of Items) each -> model inputs, with labels on the answers only.

    With `generate` only the questions before the last answer are encoded, padded left, without labels.
    """
    texts = [_render(processor, s.kind, items, generate) for s, items in zip(samples, conversations)]
    images = [s.frames[0] for s in samples if s.kind == "scene"]
    videos = [s.frames for s in samples if s.kind == "clip"]
    side = "left" if generate else "right"
    batch = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        **({"do_sample_frames": False} if videos else {}),
    )
    if not generate:
        batch["labels"] = _answer_labels(processor.tokenizer, batch["input_ids"])
    return batch


def _render(processor, kind: str, items, generate: bool) -> str:
    media = {"type": "video" if kind == "clip" else "image"}
    messages = []
    for turn, item in enumerate(items):
        question = {"type": "text", "text": item.question}
        messages.append({"role": "user", "content": [media, question] if turn == 0 else [question]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": item.answer}]})
    if generate:
        messages.pop()
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


def _answer_labels(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """Labels (B, T): the tokens from after `<|im_start|>assistant\\n` to `<|im_end|>`, -100 elsewhere."""
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    windows = input_ids.unfold(1, len(head), 1)  # (B, T - len(head) + 1, len(head))
    starts = (windows == torch.tensor(head)).all(-1)
    labels = torch.full_like(input_ids, -100)
    for row, start in starts.nonzero().tolist():
        first = start + len(head)
        last = first + int((input_ids[row, first:] == tokenizer.eos_token_id).nonzero()[0])
        labels[row, first : last + 1] = input_ids[row, first : last + 1]
    return labels


def training_conversation(things: tuple[world.Thing, ...], rng: np.random.Generator) -> list[language.Item]:
    """Two turns about one sample, both written by the same (careless) person: often a caption, then a question."""
    things = world.as_described(things, rng)
    described = language.caption_item(things)
    questions = [*language.open_items(things), *language.yes_no_pair(things, rng), *language.yes_no_pair(things, rng)]
    first, second = (questions[i] for i in rng.choice(len(questions), 2, replace=False))
    return [described, second] if rng.random() < CAPTION_SHARE else [first, second]


def training_batch(processor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A fresh batch of BATCH_SIZE samples from the world of habits."""
    kinds = ["clip" if rng.random() < CLIP_SHARE else "scene" for _ in range(BATCH_SIZE)]
    samples = [world.draw_sample(kind, rng, habits=True) for kind in kinds]
    return encode(processor, samples, [training_conversation(sample.things, rng) for sample in samples])


def train_base(seed: int, steps: int, every: int = 100):
    """Supervised training from scratch: AdamW, 50 warm-up steps, cosine to 5 %, gradients clipped at 1."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    processor = build_processor()
    model = build_model(processor).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began, average = time.perf_counter(), None
    for step in range(1, steps + 1):
        loss = model(**training_batch(processor, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % every == 0 or step == steps:
            print(f"step {step}/{steps}  loss {average:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    return model.eval(), processor


@torch.no_grad()
def answer(model, processor, samples, questions: list[str], batch_size: int = 64) -> list[str]:
    """Greedy answers to one question per sample."""
    answers = []
    for start in range(0, len(samples), batch_size):
        chunk = slice(start, start + batch_size)
        items = [[language.Item("asked", question, "")] for question in questions[chunk]]
        batch = encode(processor, samples[chunk], items, generate=True)
        generated = model.generate(**batch, max_new_tokens=16, do_sample=False)
        new = generated[:, batch["input_ids"].shape[1] :]
        replies = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [reply.strip() for reply in replies]
    return answers


def measure_base(model, processor, count: int = 200, seed: int = 1) -> dict[str, dict[str, float]]:
    """Shares of exact and of hallucinated captions and of right answers, per kind, with and without the habits."""
    results = {}
    for kind in ("clip", "scene"):
        for habits in (True, False):
            samples = world.draw_samples(kind, count, seed, habits=habits)
            rng = np.random.default_rng(seed)
            texts = answer(model, processor, samples, [language.PROMPTS[kind]] * count)
            verdicts = [language.judge_caption(text, s.things) for text, s in zip(texts, samples)]
            shares = {
                "exact": np.mean([v.exact for v in verdicts]),
                "hallucinated": np.mean([v.hallucinated for v in verdicts]),
                "unparsed": np.mean([not v.parsed for v in verdicts]),
            }
            items = [language.yes_no_pair(s.things, rng) for s in samples]
            for name, side in (("yes", 0), ("no", 1)):
                replies = answer(model, processor, samples, [pair[side].question for pair in items])
                shares[name] = np.mean([r == pair[side].answer for r, pair in zip(replies, items)])
            opens = [language.open_items(s.things) for s in samples]
            opens = [choices[rng.integers(len(choices))] for choices in opens]
            replies = answer(model, processor, samples, [item.question for item in opens])
            shares["open"] = np.mean([r == item.answer for r, item in zip(replies, opens)])
            results[f"{kind}, {'habits' if habits else 'balanced'}"] = {k: float(v) for k, v in shares.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the supervised base model of the testbed.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = train_base(args.seed, args.steps)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    for split, shares in measure_base(model, processor).items():
        print(f"{split:16s} " + "  ".join(f"{name} {share:.3f}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
