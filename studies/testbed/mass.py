"""The exact probability of truth: for each sentence of a caption, behind a true beginning, where the model's mass is.

After a prompt and true sentences, the grammar has finitely many next sentences (`grammar.next_sentences`), each with
its full stop, and after the last one the end of the turn is true. Their probabilities are the model's own, word by
word. With the sum over the true ones T, over the other sentences of the grammar F, and O = 1 - T - F, all the rest,

    T + F + O = 1

for every sentence of every caption: no sampling, no cut-off. O holds salad, other topics, and sentences that the
grammar has elsewhere. The sentences of one position are scored in one model call, as a forest of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from studies.testbed import grammar
from studies.testbed.pretraining import encode
from trl_vpo.testbed import language, world

Edges = list[tuple[np.ndarray, np.ndarray]]  # level by level: the parent of each word (-1: the text), and its token


@dataclass(frozen=True)
class Mass:
    """One entry for each sentence of a caption, the end of the turn last: there, one more sentence is false."""

    true: np.ndarray
    false: np.ndarray

    @property
    def outside(self) -> np.ndarray:
        return 1 - self.true - self.false

    @property
    def log_true(self) -> float:
        """Return the log-prob (nats) of saying nothing but the truth to the end, in any words."""
        return float(np.log(self.true).sum())


class Forest:
    """The words of all sentences that may stand at one position, each word behind the words before it.

    Attributes:
        text: how many tokens stand before the sentences.
        tokens, parents, depths: of each node; a parent of -1 is the text.
        wordings: for each, its edges, and the number of the true sentence among its sentences or None.
    """

    def __init__(self, text: int):
        self.text = text
        self.tokens, self.parents, self.depths = (np.empty(0, dtype=np.int64) for _ in range(3))
        self.wordings: list[tuple[Edges, int | None]] = []

    def add(self, columns: Sequence[Sequence[int]], true: int | None) -> None:
        """Add all rows of the product of columns of tokens. Nothing is predicted behind their last words."""
        edges, level = [], np.array([-1])
        for depth, column in enumerate(columns):
            parents, tokens = level.repeat(len(column)), np.tile(column, len(level))
            edges.append((parents, tokens))
            if depth < len(columns) - 1:
                level = len(self.tokens) + np.arange(len(tokens))
                self.tokens = np.append(self.tokens, tokens)
                self.parents = np.append(self.parents, parents)
                self.depths = np.append(self.depths, np.full(len(tokens), depth))
        self.wordings.append((edges, true))

    def mask(self) -> torch.Tensor:
        """Return (1, 1, T, T) bool over text and nodes: the text is causal, a node sees it and its ancestors."""
        seen = np.tri(self.text + len(self.tokens), dtype=bool)
        seen[self.text :, self.text :] = False
        for row, parent in enumerate(self.parents, start=self.text):
            if parent >= 0:
                seen[row, self.text :] = seen[self.text + parent, self.text :]
            seen[row, row] = True
        return torch.from_numpy(seen)[None, None]

    def masses(self, logps: np.ndarray) -> tuple[float, float]:
        """Return the mass of true and of false sentences; `logps` (1 + nodes, V) is behind the text and each node."""
        true = false = 0.0
        for edges, number in self.wordings:
            path = np.zeros(1)
            for parents, tokens in edges:
                path = path.repeat(len(tokens) // len(path)) + logps[1 + parents, tokens]
            mass = np.exp(path)
            own = 0.0 if number is None else float(mass[number])
            true, false = true + own, false + float(mass.sum()) - own
        return true, false


class TrueCaption:
    """A sample's true caption in one wording: after each of its sentences, a model is asked for the next."""

    def __init__(self, processor, sample: world.Sample, wording: Sequence[int]):
        tokenizer, self._features = processor.tokenizer, None
        prompt, caption = language.PROMPTS[sample.kind], language.caption(sample.things, wording)
        self.inputs = encode(processor, [sample], [[language.Item("caption", prompt, caption)]])
        self.forests, said = [], []
        text = int((self.inputs["labels"][0] != -100).nonzero()[0])
        for sentence in caption.split(". "):
            options = grammar.next_sentences(sample.things, said)
            self.forests.append(_forest(tokenizer, options, text, first=not said))
            said.append(next(option.tag for option in options if option.truth))
            text += len(tokenizer(sentence.rstrip(".") + ".", add_special_tokens=False)["input_ids"])
        self.forests.append(_forest(tokenizer, grammar.next_sentences(sample.things, said), text))
        self.forests[-1].add([[tokenizer.eos_token_id]], 0)

    @torch.no_grad()
    def measure(self, model) -> Mass:
        """Return where the mass of a Qwen2-VL model is; all models asked have the same vision tower."""
        inner, inputs = model.model, self.inputs
        if self._features is None:
            clip = "pixel_values_videos" in inputs
            pixels, grid = ("pixel_values_videos", "video_grid_thw") if clip else ("pixel_values", "image_grid_thw")
            self._features = inner.visual(inputs[pixels], grid_thw=inputs[grid]).pooler_output
        grids = {key: value for key, value in inputs.items() if key.endswith("_thw")}
        positions, _ = inner.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
        found = []
        for forest in self.forests:
            ids = torch.cat([inputs["input_ids"][0, : forest.text], torch.from_numpy(forest.tokens)])[None]
            ahead = positions[:, :, forest.text - 1 : forest.text] + 1 + torch.from_numpy(forest.depths)
            embedded = inner.get_input_embeddings()(ids)
            seen = (ids == model.config.video_token_id) | (ids == model.config.image_token_id)
            embedded[seen] = self._features
            states = inner.language_model(
                inputs_embeds=embedded,
                position_ids=torch.cat([positions[:, :, : forest.text], ahead], dim=2),
                attention_mask=forest.mask(),
            )[0]
            logps = model.lm_head(states[0]).double().log_softmax(-1)[forest.text - 1 :]
            found.append(forest.masses(logps.numpy()))
        return Mass(*(np.array(side) for side in zip(*found)))


def _forest(tokenizer, options: Sequence[grammar.Wording], text: int, *, first: bool = False) -> Forest:
    forest = Forest(text)
    for option in options:
        forest.add(*_columns(tokenizer, option, first=first))
    return forest


def _columns(tokenizer, option: grammar.Wording, *, first: bool) -> tuple[list[list[int]], int | None]:
    """Return the tokens of each position of a wording, and the number of its true sentence in their product."""
    columns, number = [], 0
    for depth, words in enumerate(option.words):
        space = "" if words[0] in ".," or (first and not depth) else " "
        ids = [tokenizer(space + word, add_special_tokens=False)["input_ids"] for word in words]
        columns.append([token for (token,) in ids])  # a word, a token
        if option.truth:
            number = number * len(words) + words.index(option.truth[depth])
    return columns, number if option.truth else None
