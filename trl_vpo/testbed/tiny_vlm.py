"""A tiny vision-language model of the small world, and the supervised base that is shipped in `base/`.

The architecture is Qwen2-VL's at width 96, with 2 vision and 2 language layers: 587,424 parameters, 2.4 MB in
float32. It sees clips of 8 frames, 56x56 (64 tokens), and scenes of 112x56 (32 tokens). Its tokenizer is a byte-level
BPE trained in the process, in which each word of the world is one token. The base was taught by

    python -m trl_vpo.testbed.pretraining --out DIR --seed 0

in 3000 steps of 16 samples, 48,000 in all, which took 17 minutes on one thread of a machine that
was busy otherwise. Shares of 200 samples each, read back from mp4 and png files; "habits" are samples as in training
(squares mostly red, circles mostly moving left), "balanced" the held-out split:

                      exact  hallucinated  unparsed   open    yes     no  hinted
    clips, habits     0.920         0.080     0.000  0.975  0.965  0.695   1.000
    clips, balanced   0.695         0.305     0.000  0.900  0.910  0.535   0.990
    scenes, habits    0.920         0.080     0.000  0.755  0.990  0.935   0.940
    scenes, balanced  0.605         0.385     0.000  0.610  0.930  0.880   0.835

exact, hallucinated and unparsed are shares of captions. open, yes and no are shares of right answers to questions with
a short answer, and to yes/no questions by the answer that is right; the wrong word in a "no" question is what is usual
for the shape. hinted are captions whose truth was given away in the prompt. So the base describes the world it knows
well, elsewhere says what it usually saw, and can be told. Multiple-choice questions were not taught.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
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
COUNT, SEED = 200, 1  # samples of each measure, and where they are drawn from
CELL = 2 * PATCH  # pixels that one vision token sees, after 2x2 patches are merged
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
    """Train a byte-level BPE on everything the world can say, so that each of its words is one token."""
    rng = np.random.default_rng(0)
    corpus = ["system", "user", "assistant"] * 50
    for kind in ("clip", "scene"):
        for sample in world.draw_samples(kind, 400, seed=0, habits=False):
            items = [language.caption_item(sample.things), language.choice_item(sample.things, rng)]
            items.append(language.hinted_item(sample.things, rng))
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
    model = Qwen2VLForConditionalGeneration(config)
    for module in model.modules():  # transformers' 0.02 suits a width of thousands; at 96 it only costs time
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)) and module is not model.lm_head:
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def encode(processor, samples, items, *, generate: bool = False) -> dict[str, torch.Tensor]:
    """Turn samples and one Item each into model inputs, with labels on the answers only.

    With `generate` the answers are left out, the padding is on the left and there are no labels.
    """
    texts = []
    for sample, item in zip(samples, items):
        media = {"type": "video" if sample.kind == "clip" else "image"}
        messages = [{"role": "user", "content": [media, {"type": "text", "text": item.question}]}]
        if not generate:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": item.answer}]})
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    videos = [sample.frames for sample in samples if sample.kind == "clip"]
    batch = processor(
        text=texts,
        images=[sample.frames[0] for sample in samples if sample.kind == "scene"] or None,
        videos=videos or None,
        padding=True,
        padding_side="left" if generate else "right",
        return_tensors="pt",
        **({"do_sample_frames": False} if videos else {}),
    )
    if not generate:
        batch["labels"] = _answer_labels(processor.tokenizer, batch["input_ids"])
    return batch


def _answer_labels(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """Labels (B, T): everything behind `<|im_start|>assistant\\n` (the template ends on a line feed), else -100."""
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    windows = input_ids.unfold(1, len(head), 1)  # (B, T - len(head) + 1, len(head))
    (_, starts) = (windows == torch.tensor(head)).all(-1).nonzero(as_tuple=True)  # (B,) one answer each
    answered = torch.arange(input_ids.size(1)) >= (starts + len(head)).unsqueeze(1)
    return input_ids.masked_fill(~answered | (input_ids == tokenizer.pad_token_id), -100)


# --- measures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(model, processor, samples, questions: list[str], batch_size: int = 64) -> list[str]:
    """Answer one question per sample, greedily."""
    answers = []
    for start in range(0, len(samples), batch_size):
        chunk = slice(start, start + batch_size)
        items = [language.Item("asked", question, "") for question in questions[chunk]]
        batch = encode(processor, samples[chunk], items, generate=True)
        generated = model.generate(**batch, max_new_tokens=16, do_sample=False)
        new = generated[:, batch["input_ids"].shape[1] :]
        answers += [reply.strip() for reply in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def measure_captions(model, processor, kind: str, *, habits: bool) -> dict[str, float]:
    """Shares of exact, hallucinated and unparsed captions over samples that went through their files (mp4, png)."""
    samples = _from_files(kind, habits)
    texts = answer(model, processor, samples, [language.PROMPTS[kind]] * COUNT)
    checks = [language.check_caption(text, sample.things) for text, sample in zip(texts, samples)]
    return {
        "exact": float(np.mean([check.exact for check in checks])),
        "hallucinated": float(np.mean([check.hallucinated for check in checks])),
        "unparsed": float(np.mean([not check.parsed for check in checks])),
    }


def measure_questions(model, processor, kind: str, *, habits: bool) -> dict[str, float]:
    """Shares of right answers: to open questions, to yes/no questions by the right answer, of captions with a hint."""
    samples = _from_files(kind, habits)
    rng = np.random.default_rng(SEED)
    asked = {"open": [], "yes": [], "no": [], "hinted": []}
    for sample in samples:
        questions = language.open_items(sample.things)
        asked["open"].append(questions[rng.integers(len(questions))])
        for side, item in zip(("yes", "no"), language.yes_no_pair(sample.things, rng)):
            asked[side].append(item)
        asked["hinted"].append(language.hinted_item(sample.things, rng))
    shares = {}
    for name, items in asked.items():
        replies = answer(model, processor, samples, [item.question for item in items])
        shares[name] = float(np.mean([reply == item.answer for reply, item in zip(replies, items)]))
    return shares


def _from_files(kind: str, habits: bool) -> list[world.Sample]:
    """Samples as they are after writing and reading them: h264 changes pixels."""
    samples = world.draw_samples(kind, COUNT, SEED, habits=habits)
    if kind == "scene":
        return samples
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        return [replace(sample, frames=world.read_mp4(world.write_sample(sample, path))) for sample in samples]
