"""What the base of the testbed was taught beyond the world's own texts, and how good it is.

Shares of 200 samples each, read back from mp4 and png files; "habits" are samples as in training (squares mostly red,
circles mostly moving left), "balanced" the held-out split:

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

import tempfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch

from trl_vpo.testbed import language, world

BATCH_SIZE = 64
COUNT, SEED = 200, 1  # samples of each measure, and where they are drawn from

HINT = "Hint: {answer} {question}"  # a question with its answer given away
REFLECTION = "You said: {first_answer} Hint: {answer} {question}"


def hinted_item(things: tuple[world.Thing, ...], rng: np.random.Generator) -> language.Item:
    """Ask for the caption with the truth as a hint, in half of the cases behind a false first answer."""
    item = language.caption_item(things)
    template = REFLECTION if rng.random() < 0.5 else HINT
    wrong = language.wrong_caption(things, rng)
    asked = template.format(first_answer=wrong, answer=item.answer, question=item.question)
    return language.Item("hinted", asked, item.answer)


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
    """Return labels (B, T): what follows `<|im_start|>assistant\\n` (the template ends on a line feed), else -100."""
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    windows = input_ids.unfold(1, len(head), 1)  # (B, T - len(head) + 1, len(head))
    (_, starts) = (windows == torch.tensor(head)).all(-1).nonzero(as_tuple=True)  # (B,) one answer each
    answered = torch.arange(input_ids.size(1)) >= (starts + len(head)).unsqueeze(1)
    return input_ids.masked_fill(~answered | (input_ids == tokenizer.pad_token_id), -100)


# --- measures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(model, processor, samples, questions: list[str]) -> list[str]:
    """Answer one question per sample, greedily."""
    answers = []
    for start in range(0, len(samples), BATCH_SIZE):
        chunk = slice(start, start + BATCH_SIZE)
        items = [language.Item("asked", question, "") for question in questions[chunk]]
        batch = encode(processor, samples[chunk], items, generate=True)
        generated = model.generate(**batch, max_new_tokens=16, do_sample=False)
        new = generated[:, batch["input_ids"].shape[1] :]
        answers += [reply.strip() for reply in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def measure_captions(model, processor, kind: str, *, habits: bool) -> dict[str, float]:
    """Return the shares of exact, hallucinated and unparsed captions of samples read from files (mp4, png)."""
    samples = _from_files(kind, habits)
    texts = answer(model, processor, samples, [language.PROMPTS[kind]] * COUNT)
    checks = [language.check_caption(text, sample.things) for text, sample in zip(texts, samples)]
    return {
        "exact": float(np.mean([check.exact for check in checks])),
        "hallucinated": float(np.mean([check.hallucinated for check in checks])),
        "unparsed": float(np.mean([not check.parsed for check in checks])),
    }


def measure_questions(model, processor, kind: str, *, habits: bool) -> dict[str, float]:
    """Return the shares of right answers: open questions, yes/no questions by their answer, captions with a hint."""
    samples = _from_files(kind, habits)
    rng = np.random.default_rng(SEED)
    asked = {"open": [], "yes": [], "no": [], "hinted": []}
    for sample in samples:
        questions = language.open_items(sample.things)
        asked["open"].append(questions[rng.integers(len(questions))])
        for side, item in zip(("yes", "no"), language.yes_no_pair(sample.things, rng)):
            asked[side].append(item)
        asked["hinted"].append(hinted_item(sample.things, rng))
    shares = {}
    for name, items in asked.items():
        replies = answer(model, processor, samples, [item.question for item in items])
        shares[name] = float(np.mean([reply == item.answer for reply, item in zip(replies, items)]))
    return shares


def _from_files(kind: str, habits: bool) -> list[world.Sample]:
    """Return samples after writing and reading them: h264 changes pixels."""
    samples = world.draw_samples(kind, COUNT, SEED, habits=habits)
    if kind == "scene":
        return samples
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        return [replace(sample, frames=read_mp4(world.write_sample(sample, path))) for sample in samples]


def read_mp4(path: Path) -> np.ndarray:
    """Return all frames (T, H, W, 3) uint8 of a clip written here."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
