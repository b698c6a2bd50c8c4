"""The exact mass of truth against a slow twin: every sentence of a small grammar scored by itself."""

from itertools import product

import numpy as np
import pytest
import torch

from studies.testbed import grammar
from studies.testbed.mass import Forest, TrueCaption
from studies.testbed.pretraining import encode, untrained_model, untrained_processor
from trl_vpo.testbed import language, world

WORDING = (0, 1, 1, 0, 1)


@pytest.fixture(scope="module")
def base():
    """Random weights, with embeddings large enough for its words to have unlike probabilities."""
    torch.manual_seed(0)
    processor = untrained_processor()
    model = untrained_model(processor.tokenizer).eval()
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
    return model, processor


def small_grammar(monkeypatch, kind):
    """Two values of each attribute; a sample that has them."""
    slots = {name: values[:2] for name, values in grammar.SLOTS.items()}
    if kind == "scene":
        slots["object"] = ("table", "lamp", "car")
        things = tuple(world.Thing("small", None, "green", noun, n) for n, noun in enumerate(slots["object"]))
    else:
        two = (("square", "rises", 2, "red", "plain"), ("circle", "falls", 1, "green", "striped"))
        things = tuple(
            world.Thing("small", texture, colour, shape, n, motion, turn)
            for n, (shape, motion, turn, colour, texture) in enumerate(two)
        )
    monkeypatch.setattr(grammar, "SLOTS", slots)
    return world.Sample(kind, things, world.draw_samples(kind, 1, 0, habits=False)[0].frames)


@torch.no_grad()
def logp_of(model, processor, sample, before, sentence):
    """The log-prob of a sentence behind a text, by an ordinary call of the model."""
    text = f"{before} {sentence}".strip()
    batch = encode(processor, [sample], [[language.Item("caption", language.PROMPTS[sample.kind], text)]])
    labels = batch.pop("labels")[0]
    places = (labels != -100).nonzero().flatten().tolist()
    start, end = (len(processor.tokenizer(part)["input_ids"]) for part in (before, text))
    logps = model(**batch).logits[0].double().log_softmax(-1)
    if not sentence:  # the end of the turn
        return float(logps[places[end] - 1, labels[places[end]]])
    return sum(float(logps[place - 1, labels[place]]) for place in places[start:end])


@pytest.mark.parametrize("kind", ["scene", "clip"])
def test_masses_are_those_of_all_sentences_one_by_one(base, kind, monkeypatch):
    model, processor = base
    sample = small_grammar(monkeypatch, kind)
    mass = TrueCaption(processor, sample, WORDING).measure(model)
    said, before = [], ""
    for number, spoken in enumerate(language.caption(sample.things, WORDING).split(". ")):
        true = false = 0.0
        options = grammar.next_sentences(sample.things, said)
        for option in options:
            for words in product(*option.words):
                probability = np.exp(logp_of(model, processor, sample, before, grammar.sentence(words)))
                true, false = (
                    true + probability * (words == option.truth),
                    false + probability * (words != option.truth),
                )
        assert [mass.true[number], mass.false[number]] == pytest.approx([true, false], rel=1e-3)
        said.append(next(option.tag for option in options if option.truth))
        before = f"{before} {spoken.rstrip('.')}.".strip()
    assert mass.true[-1] == pytest.approx(np.exp(logp_of(model, processor, sample, before, "")), rel=1e-3)
    more = [words for option in grammar.next_sentences(sample.things, said) for words in product(*option.words)]
    false = sum(np.exp(logp_of(model, processor, sample, before, grammar.sentence(words))) for words in more)
    assert mass.false[-1] == pytest.approx(false, rel=1e-3) and len(more) == {"clip": 2, "scene": 0}[kind]
    assert (mass.outside >= 0).all()
    assert mass.log_true == pytest.approx(np.log(mass.true).sum())


def test_a_forest_holds_all_that_a_grammar_of_words_can_say():
    """Behind a uniform model each of V words is as likely: the mass of n sentences of k words is n / V^k."""
    forest = Forest(text=3)
    forest.add([[0, 1], [2, 3, 4], [5]], 4)
    forest.add([[0], [6]], None)
    vocabulary = 8
    logps = np.full((1 + len(forest.tokens), vocabulary), -np.log(vocabulary))
    assert forest.masses(logps) == pytest.approx((1 / 8**3, 5 / 8**3 + 1 / 8**2))
    seen = forest.mask()[0, 0].numpy()
    assert seen.shape == (3 + 9, 3 + 9) and len(forest.tokens) == 2 + 6 + 1
    for row, parent in enumerate(forest.parents, start=3):
        above = {row} | ({3 + parent} if parent >= 0 else set())
        assert set(np.flatnonzero(seen[row])) == {0, 1, 2} | above  # at most two words deep
