"""Rows that a judge rates, with a real server on loopback; sets that lack a row."""

import json

import pytest
from chat_server import chat_servers, refused, said
from held_out_kit import evaluate, records, write_held_out

from trl_vpo.errors import EvaluateError
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.judge import PROMPT, read_prompt
from trl_vpo.evaluate.results import Report
from trl_vpo.runs.outcome import Outcome
from trl_vpo.testbed.rows import write_jsonl


@pytest.fixture(scope="module")
def serve():
    with chat_servers() as start:
        yield start


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_held_out(tmp_path_factory.mktemp("evaluate"), clips=1, scenes=2)


def rated_rows(held_out, folder):
    images = [row["images"] for row in held_out.rows.values() if row.get("images")]
    about = {
        "task": "rated",
        "question": "What {colour} is it?",
        "answer": "It is red.",
        "contents": ["square", "{x}"],
    }
    return write_jsonl(
        [{"id": f"r{i}", "images": one, **about} for i, one in enumerate(images)], folder / "rows.jsonl"
    )


def test_the_judge_rates_each_answer(held_out, serve, tmp_path):
    server = serve(behave=lambda number, request: said(f"It is so. Rating: {(6, 2)[number % 2]}"))
    options = {"data": rated_rows(held_out, tmp_path), "judge_url": server.url, "judge_model": "j", "batch_size": 1}
    results = evaluate(held_out, tmp_path / "run", **options)
    rows = records(tmp_path / "run")
    prompts = [body["messages"][0]["content"] for _, _, _, body in server.seen]
    texts = [prompt if isinstance(prompt, str) else prompt[0]["text"] for prompt in prompts]
    values = {"contents": "square, {x}", "question": "What {colour} is it?", "reference": "It is red."}
    assert texts == [PROMPT.format(**values, response=rows[f"r{i}", "base"]["response"]) for i in range(2)]
    assert [rows[f"r{i}", "base"]["rating"] for i in range(2)] == [6, 2]
    measures = results["contestants"]["base"]["measures"]
    assert (measures["rated/score"]["value"], measures["rated/hallucination"]["value"]) == (4, 0.5)
    assert (
        evaluate(held_out, tmp_path / "run", **options) == results and len(server.seen) == 2
    )  # nobody is asked again
    with pytest.raises(EvaluateError, match=r"r0.* and 1 more need a judge: set judge_url and judge_model"):
        evaluate(held_out, tmp_path / "other", data=options["data"])


def test_single_questions_and_letters_of_a_run(held_out, tmp_path):
    images = next(row["images"] for row in held_out.rows.values() if row.get("images"))
    asked = {"yes": "Is there a square?", "no": "Is there no shape?"}
    rows = [
        {"id": f"{side}{i}", "task": "yes_no", "question": question, "answer": side, "images": images, "group": side,
         "sets": {"figure": str(i)}}
        for i in range(2)
        for side, question in asked.items()
    ]  # fmt: skip
    rows.append(
        {"id": "l", "task": "letters", "question": "Which?\nA. red\nB. blue", "answer": "BA", "images": images}
    )
    results = evaluate(held_out, tmp_path / "run", data=write_jsonl(rows, tmp_path / "rows.jsonl"))
    made = records(tmp_path / "run")
    right = {side: made[f"{side}0", "base"]["said"] == side for side in asked}
    figures = {name: one["value"] for name, one in results["contestants"]["base"]["measures"].items()}
    assert figures["binary/accuracy"] == sum(right.values()) / 2
    assert [figures[f"binary[{side}]/accuracy"] for side in asked] == [*right.values()]
    assert figures["sets/figure"] == all(right.values()) and results["data"]["clusters"] == 1
    assert figures["letters/accuracy"] == (made["l", "base"]["said"] == "AB")


def test_a_judge_that_refuses(held_out, serve, tmp_path):
    server = serve(behave=lambda number, request: refused(400, "too long") if number == 1 else said("Rating: 3"))
    options = {"data": rated_rows(held_out, tmp_path), "judge_url": server.url, "judge_model": "j", "batch_size": 1}
    with pytest.raises(EvaluateError, match=r"r1: the judge gives no reply: .*too long\nThe same command asks again"):
        evaluate(held_out, tmp_path / "run", **options)
    results = evaluate(held_out, tmp_path / "run", **options)  # the same command asks about it again
    assert results["contestants"]["base"]["measures"]["rated/score"]["value"] == 3 and len(server.seen) == 3


def test_another_prompt_is_a_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("{contents} {question} {reference} {response} {}")
    assert read_prompt(str(path)) == path.read_text()
    path.write_text("{contents} {question}")
    with pytest.raises(EvaluateError, match=r"lacks \{reference\}, \{response\}"):
        read_prompt(str(path))


def test_a_set_that_lacks_a_row_is_left_out():
    """Row 2 was skipped: figure 1 is not measured, although its other row is right."""
    sets = {"0": {"figure": "0"}, "1": {"figure": "1"}, "2": {"figure": "1"}}
    record = {"task": "yes_no", "contestant": "base", "expected": "yes", "response": "yes", "response_ended": True}
    made = [Outcome(i, [record | {"id": i, "cluster": i, "sets": sets[i]}]) for i in "01"]
    report = Report(EvaluateConfig(resamples=10), {"base": {}}, None, sets)
    counts = report.summarize(report.select([*made, Outcome("2", reason="no file", kind="unreadable media")]))
    measures = report.results["contestants"]["base"]["measures"]
    assert (measures["sets/figure"]["n"], measures["binary/accuracy"]["n"], counts["incomplete_sets"]) == (1, 2, 1)
    assert json.dumps(made[1].rows[0]["sets"]) == '{"figure": "1"}'  # rows.jsonl keeps it
