"""Answers of models that think first: thoughts are no answer, also where the chat template opened them."""

import json
import shutil

import pytest
from held_out_kit import write_held_out

from trl_vpo.evaluate.run import run_evaluation
from trl_vpo.testbed import tiny_vlm
from trl_vpo.testbed.rows import write_jsonl


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_held_out(tmp_path_factory.mktemp("held_out"), clips=2, scenes=0)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The testbed's base with a chat template that opens thoughts. The model never closes them."""
    folder = tmp_path_factory.mktemp("thinker") / "base"
    shutil.copytree(tiny_vlm.BASE, folder)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    return folder


def evaluated(model, held_out, out, max_new_tokens):
    """Return the base's measures, and its records of rows that ask a question."""
    data = write_jsonl((row for row in held_out.rows.values() if "task" in row), out / "rows.jsonl")
    options = {"model": model, "data": data, "output_dir": out / "run", "num_frames": 8, "device": "cpu"}
    options |= {"synonyms": held_out.path.parent / "synonyms.txt", "resamples": 10, "max_new_tokens": max_new_tokens}
    results = run_evaluation([str(part) for key, value in options.items() for part in (f"--{key}", value)])
    measures = {name: measure["value"] for name, measure in results["contestants"]["base"]["measures"].items()}
    return measures, list(map(json.loads, (out / "run" / "rows.jsonl").open()))


def test_thoughts_that_were_cut_off_are_no_answer(thinker, held_out, tmp_path):
    measures, records = evaluated(thinker, held_out, tmp_path, 1)
    assert len(records) == 8
    assert {tuple(r[f"response{end}"] for end in ("", "_tokens", "_ended")) for r in records} == {("", 1, False)}
    assert measures["yes_no/unparsed"] == measures["choice/unparsed"] == 1
    assert measures["length/words"] == measures["yes_no/overall"] == 0


def test_an_answer_that_ended_is_one(thinker, held_out, tmp_path):
    """A model may leave its thoughts out where the template opens them."""
    _, records = evaluated(thinker, held_out, tmp_path, 16)
    ended = [record for record in records if record["response_ended"]]
    assert ended and all((record["response"] != "") == record["response_ended"] for record in records)


def test_cut_off_answers_are_counted_for_every_task(held_out, tmp_path):
    short, records = evaluated(tiny_vlm.BASE, held_out, tmp_path, 2)
    assert all(record["response"] for record in records)  # without thoughts, the beginning of an answer is one
    for name, task in (("yes_no", "yes_no"), ("choice", "choice"), ("length", "chair")):
        cut = [not record["response_ended"] for record in records if record["task"] == task]
        assert short[f"{name}/cut_off"] == pytest.approx(sum(cut) / len(cut)), task
    assert short["choice/cut_off"] == short["length/cut_off"] == 1
