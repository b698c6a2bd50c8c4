"""The study on real weights, on a tiny text model: pairs, measures, and a run that leaves a result."""

import json
import random
import runpy
from importlib import import_module
from unittest import mock

import families
import pytest
import torch

from studies.real import model as real_model
from studies.real import pairs as real_pairs
from studies.real import runs, study
from studies.real.prompts import SHORT, questions, rule_rows
from studies.results import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model, tokenizer = families.text_model()
    for weight in model.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)  # or all next tokens are about equally likely
    return families.write_model(tmp_path_factory.mktemp("tiny"), model, tokenizer)


@pytest.fixture(scope="module")
def tiny(folder):
    model, tokenizer = real_model.load(folder)
    return model.float(), tokenizer


def some_texts(tokenizer, count=5):
    said = "a red square moves left. a blue circle moves right."
    return [real_model.text(tokenizer, f"Describe {place}", said[: 8 * place + 5]) for place in range(count)]


def distributions(model, prompt, response):
    """The log-probs over the vocabulary at each token of a response, one text and one call."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_topics_that_are_held_out_are_not_trained_on():
    asked = questions()
    topics = [{row["topic"] for row in asked if row["split"] == split} for split in ("train", "held-out")]
    assert not topics[0] & topics[1] and len(topics[0]) == 4 * len(topics[1])
    assert f"Where does an owl live? {SHORT}" in [row["prompt"] for row in asked]
    assert len({row["prompt"] for row in asked}) == len(asked)


def test_rule_rows_differ_in_the_last_word():
    for row in rule_rows():
        right, wrong = row["right"].split(), row["wrong"].split()
        assert right[:-1] == wrong[:-1] and right[-1] != wrong[-1] and row["prompt"].split()[-1][:-1] == right[3]


def test_swaps_are_whole_words():
    tokens = ["The", "Ġtiger", "Ġeats", "Ġwith", "Ġgrass", "land", "Ġdeer", "."]
    ranked = [[] for _ in tokens]
    ranked[1] = [("Ġtiger", -0.1), ("Ġtigers", -1.0), ("Ġlion", -3.0)]  # a form of the word itself is no swap
    ranked[2] = [("Ġeats", -0.1), ("Ġcan", -0.6), ("Ġmust", -0.7), ("Ġhunts", -2.0)]
    ranked[6] = [("Ġdeer", -0.1), (",", -0.2), ("Ġwith", -0.3), ("fish", -0.4), ("ĠFish", -0.5)]
    assert real_pairs.places(tokens) == [1, 2, 6]  # neither the first word, nor function words, nor parts of words
    assert real_pairs.near_swaps(tokens, ranked) == [(2, "Ġmust"), (1, "Ġlion")]
    everything = {(1, "Ġlion"), (2, "Ġmust"), (2, "Ġhunts")}
    assert set(real_pairs.far_swaps(tokens, ranked, random.Random(0))) == everything
    ranked[6] += [("Ġfish", -4.0), ("Ġroot", -4.5), ("Ġleaf", -5.0)]
    drawn = real_pairs.far_swaps(tokens, ranked, random.Random(0))
    assert len(set(drawn)) == real_pairs.FAR and drawn == real_pairs.far_swaps(tokens, ranked, random.Random(0))


def test_few_pairs_are_an_error():
    assert real_pairs._spread([{"place": place} for place in range(6)], 3) == [{"place": p} for p in (0, 2, 4)]
    with pytest.raises(ValueError, match="1 of 2 rows"):
        real_pairs._spread([{}], 2)


def test_log_probs_and_kl_are_those_of_single_calls(tiny, folder):
    base, tokenizer = tiny
    other, _ = real_model.load(folder)
    other.float().get_decoder().layers[0].mlp.up_proj.weight.data.mul_(3)
    texts = some_texts(tokenizer)
    sums, kl = real_model.logps(other, texts, real_model.states(base, texts))
    for place, (prompt, response) in enumerate(texts):
        ours, of_base = distributions(other, prompt, response), distributions(base, prompt, response)
        assert sums[place] == pytest.approx(sum(ours[i, token].item() for i, token in enumerate(response)), abs=1e-3)
        assert kl[place] == pytest.approx((of_base.exp() * (of_base - ours)).sum().item(), abs=1e-3)
    assert min(kl) > 0.003
    assert real_model.logps(base, texts, real_model.states(base, texts))[1] == pytest.approx([0] * 5, abs=1e-4)


def test_greedy_answers_do_not_depend_on_the_others(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(real_model, "ANSWER_TOKENS", 6)
    prompts = ["Describe the video.", "What is in the picture?", "a"]
    together = real_model.answers(model, tokenizer, prompts)
    assert together == real_model.answers(model, tokenizer, prompts, at_once=1)
    for prompt, response in together:
        logs = distributions(model, prompt, response)
        assert logs.argmax(-1).tolist() == response and len(response) <= 6


@pytest.mark.parametrize("name", ["__main__", "study", "pictures.study", "pictures.base"])
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("lok", 2)])
def test_a_wrong_word_starts_no_training(name, word, code):
    with pytest.raises(SystemExit) as end, mock.patch("sys.argv", [name, word]):
        runpy.run_path(import_module(f"studies.real.{name}").__file__, run_name="__main__")
    assert end.value.code == code


def test_a_package_that_is_missing_is_named():
    with pytest.raises(SystemExit, match="no_such_weights is not installed: `make study-real`"):
        real_model.package_folder("no_such_weights")


def test_missing_runs_lack_a_checkpoint():
    first, second, *_ = runs.cells()
    assert {cell.rate for cell in runs.cells()[:5]} == {1e-3} and len(set(runs.cells())) == 30
    done = [{**vars(first), "steps": steps} for steps in (15, 30)] + [{**vars(second), "steps": 15}]
    left = runs.missing(done)
    assert first not in left and second in left and len(left) == 29


@pytest.mark.parametrize("method", ["DPO", "RRPO, alpha 0"])
def test_a_run_leaves_a_result_for_each_checkpoint(method, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINTS", (1, 3))
    monkeypatch.setattr(real_model, "ANSWER_TOKENS", 4)
    pair = lambda place: {  # noqa: E731
        "prompt": f"Describe {place}", "chosen": "a red square moves left.", "rejected": "a red circle moves left."
    }  # fmt: skip
    pairs, held_out = [pair(place) for place in range(8)], [pair(place) for place in (20, 30)]
    model, tokenizer = real_model.load(folder)
    base = runs.measure_base(model, tokenizer, held_out)
    cell = runs.Cell(method, 1e-2, 0)
    first, last = runs.run(cell, folder, pairs, base, tmp_path)
    assert (first["steps"], last["steps"]) == (1, 3) and len(last["log"]["loss"]) == 3
    margin = [sum(one["chosen"]) - sum(one["rejected"]) for one in (first, last)]
    assert margin[1] > margin[0] > 0 and margin[1] > 1
    assert len(last["kl/chosen"]) == 2 and min(last["kl/chosen"]) > min(first["kl/chosen"]) > 0
    assert len(last["kl/neutral"]) == 2 and len(last["right"]) == len(rule_rows())
    own = runs.base_result(model, tokenizer, base)
    assert len(own["base_logp"]) == len(last["base_logp"]) == 4
    assert all(value < 0 for value in own["base_logp"]) and list(own["said"]) == list(last["said"])


def test_a_worker_does_its_part_and_no_more(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINTS", (1,))
    monkeypatch.setattr(real_model, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(runs, "cells", lambda: [runs.Cell("SimPO", 1e-3, seed) for seed in (0, 1, 2)])
    for name in ("PAIRS", "RESULTS", "OUT"):
        monkeypatch.setattr(study, name, tmp_path / name)
    pair = {"prompt": "Describe 1", "chosen": "a red square.", "rejected": "a red circle."}
    rows = [pair | {"split": split} for split in ("train", "held-out") for _ in range(4)]
    study.PAIRS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study.work(folder, 0)
    done = read_rows(study.RESULTS)
    assert [(row["method"], row["seed"]) for row in done] == [("base", 0), ("SimPO", 0), ("SimPO", 2)]
    assert [cell.seed for cell in runs.missing(done)] == [1]
    study.work(folder, 0)  # goes on with what is left
    assert len(read_rows(study.RESULTS)) == 4 and not runs.missing(read_rows(study.RESULTS))


def test_one_command_runs_both_halves(monkeypatch):
    done = []
    for half in ("studies.real.study", "studies.real.pictures.study"):
        monkeypatch.setattr(f"{half}.main", lambda half=half: done.append(half))
    monkeypatch.setattr("sys.argv", ["studies.real"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runpy.run_module("studies.real", run_name="__main__")
    assert done == ["studies.real.study", "studies.real.pictures.study"]
