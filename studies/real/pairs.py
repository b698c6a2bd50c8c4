"""Preference pairs: the model's own greedy answer against the same answer with one word swapped.

Neither is called true: the model errs, and a swap may say the same or mend an error. By turns a pair is near, with a
word that the model ranks next at its place, or far, with one drawn from the tokens that it finds likeliest there. Of
several swaps the one is taken whose answer is the likeliest, so that the model ranks some pairs wrongly.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.real import model as real_model
from studies.real.prompts import questions
from trl_vpo.files import atomic_write

TRAINED, HELD_OUT = 160, 40
NEAR, FAR = 8, 4  # swaps that are scored for each answer
RANKED = 100  # tokens that are looked at for each place
MARK = "Ġ"  # begins a token that begins a word
WORD = re.compile(rf"{MARK}[a-z]{{4,}}")
FUNCTION_WORDS = {
    "about", "after", "also", "always", "another", "around", "because", "been", "before", "being", "between",
    "both", "could", "during", "each", "even", "every", "from", "have", "having", "into", "itself", "just",
    "like", "made", "make", "many", "more", "most", "much", "often", "only", "other", "over", "same", "should",
    "some", "such", "than", "that", "their", "them", "then", "there", "these", "they", "this", "those", "through",
    "under", "until", "upon", "used", "very", "well", "what", "when", "where", "which", "while", "will", "with",
    "within", "without", "would", "your",
}  # fmt: skip


def is_word(token: str) -> bool:
    """Whether a token is the beginning of a word with a meaning of its own."""
    return bool(WORD.fullmatch(token)) and token[1:] not in FUNCTION_WORDS


def places(tokens: Sequence[str]) -> list[int]:
    """The places of an answer's tokens that are one whole word each, the first word left out."""
    goes_on = re.compile(r"(?![ĠĊ])[\w'’-]")  # a token that is not the beginning of a word or line
    return [
        place
        for place in range(1, len(tokens))
        if is_word(tokens[place]) and not any(map(goes_on.match, tokens[place + 1 : place + 2]))
    ]


Ranked = Sequence[Sequence[tuple[str, float]]]  # for each token (token, log-prob) of what might stand there, in order


def swaps(tokens: Sequence[str], ranked: Ranked) -> list[list[tuple[float, int, str]]]:
    """For each place with a swap all of its swaps, (log-prob, place, token), the likeliest first."""
    other = lambda token, place: is_word(token) and token[1:5] != tokens[place][1:5]  # noqa: E731  # no form of it
    found = [
        [(value, place, token) for token, value in ranked[place] if other(token, place)] for place in places(tokens)
    ]
    return [some for some in found if some]


def near_swaps(tokens: Sequence[str], ranked: Ranked) -> list[tuple[int, str]]:
    """The likeliest single swaps of an answer, one for each place."""
    found = sorted((some[0] for some in swaps(tokens, ranked)), reverse=True)
    return [(place, token) for _, place, token in found[:NEAR]]


def far_swaps(tokens: Sequence[str], ranked: Ranked, draw: random.Random) -> list[tuple[int, str]]:
    """Single swaps of an answer, drawn from all."""
    found = [(place, token) for some in swaps(tokens, ranked) for _, place, token in some]
    return draw.sample(found, min(FAR, len(found)))


def make_pairs(model: Any, tokenizer: Any, asked: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A pair for each question whose answer ends by itself and has a word to swap."""
    answers = real_model.answers(model, tokenizer, [question["prompt"] for question in asked])
    pairs = []
    for number, (question, (prompt, ids)) in enumerate(zip(asked, answers)):
        if ids[-1] != tokenizer.eos_token_id:
            continue
        answer = tokenizer.decode(ids[:-1])
        found = _variants(model, tokenizer, prompt, ids, near=number % 2 == 0)
        if not found:
            continue
        others = [(prompt, [*ids[:place], token, *ids[place + 1 :]]) for place, token in found]
        sums, _ = real_model.logps(model, [(prompt, ids), *others])
        best = max(range(len(others)), key=lambda place: sums[1 + place])
        place, token = found[best]
        pair = {"chosen": answer, "rejected": tokenizer.decode(others[best][1][:-1])}
        pair |= {"word": tokenizer.decode(ids[place]).strip(), "swapped": tokenizer.decode(token).strip()}
        pair["swap"] = "far" if number % 2 else "near"
        pairs.append({**question, **pair, "base": [round(sums[0], 3), round(sums[1 + best], 3)]})
        print(f"{len(pairs)} pairs", json.dumps(pairs[-1]), flush=True)
    return pairs


def _variants(model: Any, tokenizer: Any, prompt: list[int], ids: list[int], *, near: bool) -> list[tuple[int, int]]:
    (hidden,) = real_model.states(model, [(prompt, ids)])
    best = real_model.log_distributions(model, hidden).topk(RANKED, dim=-1)  # (T, RANKED) each
    names = [tokenizer.convert_ids_to_tokens(row) for row in best.indices.tolist()]
    ranked = [list(zip(row, values)) for row, values in zip(names, best.values.tolist())]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    found = near_swaps(tokens, ranked) if near else far_swaps(tokens, ranked, random.Random(str(prompt)))
    return [(place, tokenizer.convert_tokens_to_ids(token)) for place, token in found]


def read_pairs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Split -> its pairs."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return {split: [row for row in rows if row["split"] == split] for split in ("train", "held-out")}


def write_pairs(model: Any, tokenizer: Any, path: Path) -> Path:
    """Write the pairs of both splits; a quarter more questions are asked, as not every answer makes a pair."""
    rows = []
    for split, count in (("train", TRAINED), ("held-out", HELD_OUT)):
        asked = _spread([question for question in questions() if question["split"] == split], count * 5 // 4)
        rows += _spread(make_pairs(model, tokenizer, asked), count)
    with atomic_write(path) as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """So many of the rows, evenly over their order.

    Raises:
        ValueError: there are fewer.
    """
    if len(rows) < count:
        raise ValueError(f"{len(rows)} of {count} rows could be made: add topics to studies/real/prompts.py.")
    return [rows[place * len(rows) // count] for place in range(count)]
