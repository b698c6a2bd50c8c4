"""Teach the base of the small world its texts, supervised, from scratch, in the world of habits.

The weights in `trl_vpo/testbed/base/` (1.3 million parameters, 5.2 MB) were trained by

    python -m studies.testbed.pretraining --out trl_vpo/testbed/base --seed 0

in 3300 steps of 16 samples, 21 minutes of CPU time of one thread. Shares of 100 samples each; "habits" are samples as
in training, "balanced" are not ruled by habits, "unseen" also have the combinations of attributes that are held out:

                      true  hallucinated  unparsed  open   yes    no  hinted
    clips, habits     0.91          0.09      0.00  0.65  0.07  0.94    0.99
    clips, balanced   0.67          0.33      0.00  0.62  0.07  0.92    1.00
    clips, unseen     0.64          0.36      0.00  0.62  0.04  0.96    1.00
    scenes, habits    0.87          0.13      0.00  0.58  0.09  0.90    0.92
    scenes, balanced  0.93          0.07      0.00  0.58  0.09  0.90    0.91
    scenes, unseen    0.88          0.12      0.00  0.53  0.15  0.89    0.88

true, hallucinated and unparsed are shares of captions; open, yes, no and hinted are shares of right answers. So it
knows the grammar, sees well, and says what is usual where it is not so. It takes hints. It has not learnt to answer
yes/no questions: it says no to nearly all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

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

from studies.testbed import lessons, truth
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE

WIDTH, LAYERS, VISION_LAYERS, HEADS, PATCH = 128, 3, 2, 4, 14
CELL = 2 * PATCH  # pixels that one vision token sees
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
CLIP_SHARE = 0.6  # of the training samples; the rest are scenes
TEXT_SHARES = {"caption": 0.54, "hinted": 0.14, "questions": 0.32}  # of the batches; a hinted caption is always true
# From here on people look less, hints are about another sample, and of a pair of yes/no questions one is asked.
TOLD_FROM, TOLD_SHARES = 2100, {"caption": 0.35, "hinted": 0.4, "questions": 0.25}
QUESTIONS = 4  # about one sample
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SPECIAL = (*SPECIAL, "<|video_pad|>")


# --- architecture -------------------------------------------------------------------------------------------------


def untrained_processor() -> Qwen2VLProcessor:
    """Return a processor whose tokenizer has a token for each word of the world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    words = lessons.vocabulary()
    tokenizer.train_from_iterator([f"{word} {word}" for word in words], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], padding_side="left",
        model_max_length=2048,
    )  # fmt: skip
    size = {"shortest_edge": 56 * 84, "longest_edge": 56 * 112}
    shape = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    video = Qwen2VLVideoProcessor(**shape, cap_pixels_per_frame=False, do_sample_frames=False)
    template = (BASE / "chat_template.jinja").read_text(encoding="utf-8")
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**shape), fast, video, chat_template=template)


def untrained_model(tokenizer) -> Qwen2VLForConditionalGeneration:
    """Return the base's architecture with random weights."""
    ids = dict(zip(("pad", "bos", "eos", "vision_start", "vision_end", "image", "video"), range(len(SPECIAL))))
    text = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "vocab_size": len(tokenizer),
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 2048,
        # With a theta of 10,000 the last section hardly turns from column to column: things are mixed up.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100, "mrope_section": [2, 2, 12]},
        **{f"{name}_token_id": ids[name] for name in ("pad", "bos", "eos")},
    }  # fmt: skip
    vision = {"depth": VISION_LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": HEADS, "mlp_ratio": 2}
    places = {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end", "image", "video")}
    vision["patch_size"] = PATCH
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **places)
    )
    for module in model.modules():  # transformers' 0.02 suits a width of thousands
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)) and module is not model.lm_head:
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


# --- batches ------------------------------------------------------------------------------------------------------


def encode(processor, samples: Sequence[world.Sample], items: Sequence[Sequence[language.Item]], *, generate=False):
    """Turn samples and their questions, asked in turn, into model inputs with labels on the answers.

    With `generate` the last answer is left out, the padding is on the left and there are no labels.
    """
    texts = []
    for sample, asked in zip(samples, items):
        media, messages = [{"type": "video" if sample.kind == "clip" else "image"}], []
        for item in asked:
            messages.append({"role": "user", "content": [*media, {"type": "text", "text": item.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": item.answer}]})
            media = []
        messages = messages[:-1] if generate else messages
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    videos = [sample.frames for sample in samples if sample.kind == "clip"]
    images = [sample.frames[0] for sample in samples if sample.kind == "scene"]
    batch = processor(
        text=texts, images=images or None, videos=videos or None, padding=True, return_tensors="pt",
        padding_side="left" if generate else "right", **({"do_sample_frames": False} if videos else {}),
    )  # fmt: skip
    if not generate:
        batch["labels"] = _answer_labels(processor.tokenizer, batch["input_ids"])
    return batch


def _answer_labels(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """Return labels (B, T): each answer with its end of turn and the line feed behind it, else -100."""
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    starts = (input_ids.unfold(1, len(head), 1) == torch.tensor(head)).all(-1)  # (B, T - len(head) + 1)
    labels = torch.full_like(input_ids, -100)
    for row, start in starts.nonzero().tolist():
        first = start + len(head)
        length = int((input_ids[row, first:] == tokenizer.eos_token_id).nonzero()[0]) + 2
        labels[row, first : first + length] = input_ids[row, first : first + length]
    return labels


class VisionProbe(torch.nn.Module):
    """A linear reader of the vision tower, thrown away after training.

    It learns the facts of the thing in each vision token's 28x28 pixels, always truthfully: only the language is
    biased. With it the base sees after fewer samples.
    """

    VALUES = (
        world.SIZES,
        world.TEXTURES,
        tuple(world.COLOURS),
        (*world.SHAPES, *world.OBJECTS),
        (*world.MOTIONS, world.STILL),
    )

    def __init__(self, model: Qwen2VLForConditionalGeneration):
        super().__init__()
        self.head = torch.nn.Linear(model.config.text_config.hidden_size, sum(map(len, self.VALUES)))
        self.features: list[torch.Tensor] = []  # (tokens, width) of each call of the vision tower
        model.model.visual.register_forward_hook(lambda _, __, output: self.features.append(output.pooler_output))

    def loss(self, samples: Sequence[world.Sample]) -> torch.Tensor:
        """Return the cross-entropies of the batch that the model has just seen: its images first, then its videos."""
        ordered = sorted(samples, key=lambda sample: sample.kind == "clip")
        labels = torch.from_numpy(np.concatenate([self._labels(sample) for sample in ordered]))  # (tokens, K)
        logits = self.head(torch.cat(self.features).float()).split([len(values) for values in self.VALUES], dim=-1)
        self.features.clear()
        return sum(torch.nn.functional.cross_entropy(part, labels[:, k]) for k, part in enumerate(logits))

    def _labels(self, sample: world.Sample) -> np.ndarray:
        """Return (tokens, K) indices of the facts; -100 where there is no thing, or no such fact."""
        frames = sample.frames if sample.kind == "clip" else sample.frames.repeat(2, axis=0)
        steps, rows, columns = frames.shape[0] // 2, frames.shape[1] // CELL, frames.shape[2] // CELL
        ink = frames.max(-1) > world.BACKGROUND_MAX
        covered = ink.reshape(steps, 2, rows, CELL, columns, CELL).mean((1, 3, 5)) > 0.06  # (T / 2, H / 28, W / 28)
        place = np.arange(columns) // (world.LANE // CELL)  # the lane of a column
        labels = np.full((*covered.shape, len(self.VALUES)), -100)
        for thing in sample.things:
            for step in range(steps):
                event = thing.motion if thing.turn and step // 2 == thing.turn - 1 else thing.motion and world.STILL
                facts = zip((thing.size, thing.texture, thing.colour, thing.shape, event), self.VALUES)
                values = [known.index(value) if value else -100 for value, known in facts]
                labels[step][covered[step] & (place == thing.place)] = values
        return labels.reshape(-1, len(self.VALUES))


def training_items(kind: str, things: world.Things, rng: np.random.Generator, told: bool) -> list[language.Item]:
    """Draw a text of TEXT_SHARES about one sample, by someone who may not have looked."""
    described = lessons.as_described(things, rng, lessons.MORE_CARELESS if told else lessons.CARELESS)
    if kind == "hinted":
        if told:  # about another sample: what is seen does not help
            things = world.draw_things("clip" if things[0].motion else "scene", rng, habits=False)
        return [lessons.hinted_item(things, rng)]
    if kind == "caption":
        prompt = language.PROMPTS["clip" if things[0].motion else "scene"]
        return [language.Item(kind, prompt, language.caption(described, language.draw_wording(rng)))]
    pairs = [language.yes_no_pair(described, rng) for _ in range(3)]
    asked = [pair[rng.integers(2)] for pair in pairs] if told else [item for pair in pairs for item in pair]
    asked += language.open_items(described)
    return [asked[number] for number in rng.permutation(len(asked))[:QUESTIONS]]


# --- training -----------------------------------------------------------------------------------------------------


def train_base(seed: int, steps: int, out: Path):
    """Train from scratch, supervised, in the world of habits: AdamW, 100 warm-up steps, the last quarter decays to 0.

    A checkpoint in `out` is continued; it may be that of a run that was planned longer and has not begun to decay.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    processor = untrained_processor()
    model = untrained_model(processor.tokenizer).train()
    probe = VisionProbe(model)
    weights = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    parts, done, spent, averages = {"model": model, "probe": probe, "optimizer": optimizer}, 0, 0.0, np.zeros(2)
    if (out / "state.pt").is_file():
        state = torch.load(out / "state.pt", weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, spent, averages, rng.bit_generator.state = (state[key] for key in ("done", "spent", "averages", "rng"))
    began = time.process_time() - spent
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100, 4 * (1 - step / steps))
        kinds = ["clip" if rng.random() < CLIP_SHARE else "scene" for _ in range(BATCH_SIZE)]
        samples = [world.draw_sample(kind, rng, habits=True) for kind in kinds]
        told = step >= TOLD_FROM
        shares = TOLD_SHARES if told else TEXT_SHARES
        text = str(rng.choice(list(shares), p=list(shares.values())))  # of one length: little padding
        batch = encode(processor, samples, [training_items(text, sample.things, rng, told) for sample in samples])
        loss = model(**batch).loss
        seen = probe.loss(samples)
        (loss + seen).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fading = 0.97 if step else 0
        averages = fading * averages + (1 - fading) * np.array([loss.item(), seen.item()])
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = time.process_time() - began
            print(
                f"step {step + 1}/{steps}  loss {averages[0]:.3f}  probe {averages[1]:.3f}  {spent:.0f} s", flush=True
            )
            model.save_pretrained(out)
            processor.save_pretrained(out)
            state = {"done": step + 1, "spent": spent, "averages": averages, "rng": rng.bit_generator.state}
            torch.save(state | {name: part.state_dict() for name, part in parts.items()}, out / "state.pt")
    (out / "state.pt").unlink()
    model.model.visual._forward_hooks.clear()
    return model.eval(), processor


# --- measures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(
    model, processor, samples: Sequence[world.Sample], questions: Sequence[str], max_new_tokens: int = 72
) -> list[str]:
    """Answer one question per sample, greedily."""
    batch = encode(processor, samples, [[language.Item("asked", text, "")] for text in questions], generate=True)
    asked = batch["input_ids"].shape[1]
    generated = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)[:, asked:]
    return [text.strip() for text in processor.tokenizer.batch_decode(generated, skip_special_tokens=True)]


def answers_right(
    model, processor, samples: Sequence[world.Sample], items: Sequence[language.Item], max_new_tokens: int = 72
) -> list[bool]:
    """Ask one question per sample, and return which answers are right."""
    said = answer(model, processor, samples, [item.question for item in items], max_new_tokens)
    return [text == item.answer for text, item in zip(said, items)]


def short_questions(samples: Sequence[world.Sample], rng: np.random.Generator) -> dict[str, list[language.Item]]:
    """Return an open question about each sample, one to which the answer is yes, and one to which it is no."""
    pairs = [language.yes_no_pair(sample.things, rng) for sample in samples]
    opens = [language.open_items(sample.things) for sample in samples]
    return {
        "open": [items[rng.integers(len(items))] for items in opens],
        "yes": [yes for yes, _ in pairs],
        "no": [no for _, no in pairs],
    }


def measure_base(model, processor, kind: str, count: int = 100, **options) -> dict[str, float]:
    """Return shares of captions and of right answers, of `count` samples drawn with these options."""
    samples, rng = world.draw_samples(kind, count, seed=1, **options), np.random.default_rng(1)
    said = answer(model, processor, samples, [language.PROMPTS[kind]] * count)
    checks = [truth.check_caption(text, sample.things) for text, sample in zip(said, samples)]
    shares = {
        "true": [check.true for check in checks],
        "hallucinated": [check.hallucinated for check in checks],
        "unparsed": [not check.parsed for check in checks],
    }
    asked = short_questions(samples, rng)
    asked["hinted"] = [lessons.hinted_item(sample.things, rng) for sample in samples]
    for name, items in asked.items():
        shares[name] = answers_right(model, processor, samples, items)
    return {name: float(np.mean(values)) for name, values in shares.items()}


SPLITS = {"habits": {"habits": True}, "balanced": {"habits": False}, "unseen": {"habits": False, "unseen": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the base model of the small world again.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = train_base(args.seed, args.steps, args.out)
    for kind in ("clip", "scene"):
        for split, options in SPLITS.items():
            shares = measure_base(model, processor, kind, **options)
            print(f"{kind}s, {split:9s}", *(f"{name} {share:.2f}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
