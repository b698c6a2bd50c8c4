"""One run about pictures: train an adapter by a method, and measure it at the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studies.real import model as real_model
from studies.real import runs as text_runs
from studies.real.pictures import model as picture_model
from studies.real.pictures import questions
from studies.real.runs import Cell

CHECKPOINTS = (8, 16)  # optimizer steps
RATE = 1e-3
SEEDS = (0, 1)
TRAINED = {"colour": 88, "shape": 40}  # pairs, each about a picture of its own
HELD_OUT = {"colour": 48, "shape": 24}
FIRST_PICTURE = 1000  # the base was taught on those before
SHOWN = 6  # answers of a result that are kept in full
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> the trainer's name and its options; else its defaults
    "DPO": ("VisualDPO", {}),
    "LeanPO": ("LeanPO", {}),
    "RRPO": ("RRPO", {}),
    "mDPO": ("MDPO", {}),
}


def cells() -> list[Cell]:
    """All runs, so ordered that the first ones compare all methods."""
    return [Cell(method, RATE, seed) for seed in SEEDS for method in METHODS]


def missing(results: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The runs of which not all checkpoints have a result."""
    done = {(row["method"], row["seed"], row["steps"]) for row in results}
    return [cell for cell in cells() if any((cell.method, cell.seed, step) not in done for step in CHECKPOINTS)]


def pairs(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Split -> its pairs: training pictures that the base has not seen, and test pictures.

    `blind` is the answer that the question has most often in training.
    """
    training = questions.rows(data, "train")
    blind = questions.majority(training)
    unseen = [row for row in training if row["picture"] >= FIRST_PICTURE]
    chosen = {
        "train": questions.one_each(unseen, TRAINED),
        "held-out": questions.one_each(questions.rows(data, "test"), HELD_OUT),
    }
    pair = lambda row: {**questions.pair(row), "blind": blind[row["question"]]}  # noqa: E731
    return {split: [pair(row) for row in rows] for split, rows in chosen.items()}


# --- measures -----------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """The held-out pairs and what the base makes of them; every run is compared with it.

    The projector and the tower are frozen, so the pictures' embeddings are the same in all runs.

    Attributes:
        rows: the pairs.
        pictures: side -> embeddings of the picture of each row, None: without. The sides are `chosen` and `rejected`,
            `other` (the chosen response with a picture that has another answer) and `none` (without a picture).
        texts: side -> prompts and responses.
        words: the place of a row's answer in its response, and the tokens of all words of its kind.
        states: the base's hidden states of the chosen responses.
        logps: side -> log-prob of each response.
    """

    rows: list[dict[str, Any]]
    pictures: dict[str, list[Tensor | None]]
    texts: dict[str, list[real_model.Text]]
    words: list[tuple[int, list[int]]]
    states: list[Tensor]
    logps: dict[str, list[float]]


def measure_base(model: Any, processor: Any, held_out: Sequence[dict[str, Any]]) -> Base:
    rows = list(held_out)
    embeddings = picture_model.pictures(model, processor, {row["picture"]: row["file"] for row in rows})
    own = [embeddings[row["picture"]] for row in rows]
    pictures = {
        "chosen": own,
        "rejected": own,
        "other": [embeddings[row["picture"]] for row in questions.others(rows)],
        "none": [None] * len(rows),
    }
    texts = {
        side: [
            picture_model.text(
                processor, row["question"], row[side if side == "rejected" else "chosen"], picture=side != "none"
            )
            for row in rows
        ]
        for side in pictures
    }
    states = real_model.states(model, texts["chosen"], own)
    logps = {side: real_model.logps(model, texts[side], pictures=pictures[side])[0] for side in pictures}
    return Base(rows, pictures, texts, [word_tokens(processor.tokenizer, row) for row in rows], states, logps)


def word_tokens(tokenizer: Any, row: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Where the answers to a question differ, and the token that each word of its kind has there.

    Raises:
        ValueError: the tokenizer gives two words the same token.
    """
    sentences = [questions.sentence(row, word) for word in questions.WORDS[row["kind"]]]
    ids = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    place = next(place for place, tokens in enumerate(zip(*ids)) if len(set(tokens)) > 1)
    tokens = [own[place] for own in ids]
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"Two of the words {questions.WORDS[row['kind']]} begin with the same token.")
    return place, tokens


@torch.no_grad()
def measure(model: Any, processor: Any, base: Base) -> dict[str, Any]:
    """The numbers of every held-out pair.

    Log-probs of `chosen` and `rejected` are changes, in nats. `picked` is whether of all words of its kind the right
    one is the likeliest in the sentence: with the row's picture, with another one, and without any.
    """
    found: dict[str, Any] = {}
    for side, texts in base.texts.items():
        sums, picked, divergences = [], [], []
        for place, hidden in enumerate(real_model.states(model, texts, base.pictures[side])):
            logs = real_model.log_distributions(model, hidden)  # (T, V)
            sums.append(logs.gather(1, torch.tensor(texts[place][1])[:, None]).sum().item())
            picked.append(_picked(logs, base.rows[place], *base.words[place]))
            if side == "chosen":
                of_base = real_model.log_distributions(model, base.states[place])
                divergences.append(F.kl_div(logs, of_base, reduction="sum", log_target=True).item())
        found[f"logp/{side}"] = _rounded(sums)
        found[side] = _rounded(now - before for now, before in zip(sums, base.logps[side]))
        if side != "rejected":
            found[f"picked/{side}"] = picked
        if divergences:
            found["kl"] = _rounded(divergences)
    return found | spoken(model, processor, base)


def _picked(logs: Tensor, row: Mapping[str, Any], place: int, tokens: list[int]) -> bool:
    words = questions.WORDS[row["kind"]]
    return words[logs[place, tokens].argmax().item()] == row["answer"]


def _rounded(values: Any) -> list[float]:
    return [round(value, 3) for value in values]


def spoken(model: Any, processor: Any, base: Base) -> dict[str, Any]:
    """Whether greedy answers are right, whether they have one word of the kind at all; the first of them."""
    said = picture_model.answers(model, processor, base.rows, base.pictures["chosen"])
    step = max(1, len(said) // SHOWN)
    read = [questions.read_answer(row["kind"], text) for row, text in zip(base.rows, said)]
    return {
        "right": [word == row["answer"] for word, row in zip(read, base.rows)],
        "readable": [word is not None for word in read],
        "said": said[::step][:SHOWN],
    }


def base_result(model: Any, processor: Any, base: Base) -> dict[str, Any]:
    """The base's own line; its changes are 0."""
    return {"method": "base", "rate": 0.0, "seed": 0, "steps": 0, **measure(model, processor, base)}


# --- training -----------------------------------------------------------------------------------------------------


def messages(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as a row of the trainers."""
    prompt = [{"type": "image"}, {"type": "text", "text": pair["question"]}]
    row = {"images": [pair["file"]], "prompt": [{"role": "user", "content": prompt}]}
    sides = {side: [{"type": "text", "text": pair[side]}] for side in ("chosen", "rejected")}
    return row | {side: [{"role": "assistant", "content": content}] for side, content in sides.items()}


def run(cell: Cell, folder: Path, rows: Sequence[Mapping[str, Any]], base: Base, out: Path) -> Iterator[dict]:
    """Train; gives a result for each checkpoint."""
    model, processor = picture_model.load(folder)

    def measured(adapted: Any) -> dict[str, Any]:
        model.eval()  # without dropout
        try:
            return measure(model, processor, base)
        finally:
            model.train()

    method = METHODS[cell.method]
    trainer = text_runs.make_trainer(cell, method, CHECKPOINTS, model, processor, list(map(messages, rows)), out)
    yield from text_runs.train(trainer, cell, CHECKPOINTS, measured)
