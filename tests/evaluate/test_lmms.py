"""Benchmarks through the real lmms-eval, on tasks and clips made here.

Most of it needs the extra `lmms`, in an environment of its own, as lmms-eval wants older versions of av and protobuf
than the locked ones: `pip install -e .[lmms] pytest pytest-timeout`, then `pytest tests/evaluate/test_lmms.py`.
"""

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from families import LANGUAGE_MODEL
from held_out_kit import write_adapter
from lmms_kit import CAPTION, CODE, FIRST, FRAMES, about, answers, needs_lmms_eval
from local_kit import GREEDY, load

from trl_vpo.errors import EvaluateError, RunError, UserError
from trl_vpo.evaluate import command
from trl_vpo.evaluate.lmms import run as lmms
from trl_vpo.evaluate.lmms.tasks import videohallucer
from trl_vpo.media.images import load_image
from trl_vpo.media.load import Media
from trl_vpo.models.config import AnsweringConfig
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Request, Sampling, stream_seed
from trl_vpo.testbed.tiny_vlm import BASE

# --- answers through lmms-eval --------------------------------------------------------------------------------------


@needs_lmms_eval
def test_base_and_adapter_answer_as_elsewhere(benchmark, tmp_path, documents):
    adapter = write_adapter(tmp_path / "last", scale=0.1, lora_alpha=16, target_modules=LANGUAGE_MODEL)
    by_adapter = []
    for path in (None, adapter):
        metrics, rows = benchmark("tiny_first", adapter=path, batch_size=4)
        expected = load(adapter=path).answer([about(FIRST, doc["clip"]) for doc in documents], GREEDY)
        assert answers(rows["tiny_first"]) == expected
        hits = [text == doc["answer"] for text, doc in zip(expected, documents)]
        assert metrics["tiny_first"]["tiny_first"]["right"] == pytest.approx(np.mean(hits))
        by_adapter.append(expected)
    assert by_adapter[0] != by_adapter[1]


@pytest.fixture(scope="module")
def everything(benchmark):
    return benchmark("tiny_all", "tiny_hot", "tiny_scenes", "tiny_choice", batch_size=2)


@needs_lmms_eval
def test_answers_end_where_the_task_says(everything, plain_base, documents):
    metrics, rows = everything
    assert metrics["tiny_all"].keys() == {"tiny_stop", "tiny_cut"}
    full = plain_base.answer([about(FIRST, doc["clip"]) for doc in documents], GREEDY)
    cut = [text.split("e")[0].split("l")[0] for text in full]
    assert answers(rows["tiny_stop"]) == cut != full
    captions = plain_base.answer([about(CAPTION, doc["clip"]) for doc in documents], GREEDY)
    beginnings = answers(rows["tiny_cut"])  # cut off after two tokens, which is no failure here
    assert all(text and whole.startswith(text) and text != whole for text, whole in zip(beginnings, captions))


@needs_lmms_eval
def test_a_task_that_samples_is_repeatable(everything, plain_base, documents):
    _, rows = everything
    hot = Sampling(max_new_tokens=16, temperature=2.5, top_p=0.95)
    seeds = [[stream_seed(0, f"tiny_hot/{i}", f"answer {time}") for time in (1, 2)] for i in range(6)]
    pairs = [[about(FIRST, doc["clip"], seed) for seed in two] for doc, two in zip(documents, seeds)]
    expected = [plain_base.answer(pair, hot) for pair in pairs]
    assert any(first != second for first, second in expected)
    pairs = [pair for two in zip(answers(rows["tiny_hot"]), expected) for pair in zip(*two)]
    ended = [pair for pair in pairs if isinstance(pair[1], str)]  # elsewhere, one that was cut off is a failure
    assert len(ended) > 6 and all(one == text for one, text in ended)


@needs_lmms_eval
def test_messages_of_a_task_reach_the_model(everything, plain_base, documents):
    _, rows = everything
    images = tuple(load_image(path) for path in documents[0]["scenes"])
    text = {"type": "text", "text": "How big is the table?"}
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, text]
    turns = [{"role": "system", "content": [{"type": "text", "text": "Look."}]}, {"role": "user", "content": content}]
    assert answers(rows["tiny_scenes"]) == plain_base.answer([Request(turns, Media(images))], GREEDY) * 6


@needs_lmms_eval
def test_options_are_compared_by_their_log_probs(everything, plain_base, documents):
    metrics, rows = everything
    hits = []
    for doc, row in zip(documents, rows["tiny_choice"]):
        request = about(CAPTION, doc["clip"])
        averages = plain_base.average_logps([request] * 3, doc["captions"])
        (greedy,) = plain_base.answer([request], GREEDY)
        resps = [pair for (pair,) in row["resps"]]
        assert [-loss for loss, _ in resps] == pytest.approx(averages, abs=1e-4)
        assert [flag for _, flag in resps] == [text == greedy for text in doc["captions"]]
        hits.append(int(np.argmax(averages)) == doc["place"])
    assert sum(hits) > 0
    assert metrics["tiny_choice"]["tiny_choice"]["acc"] == pytest.approx(np.mean(hits))


@needs_lmms_eval
def test_messages_become_requests(documents):
    from trl_vpo.evaluate.lmms.model import as_request

    clip, scenes = documents[0]["clip"], documents[0]["scenes"]
    images = [{"type": "image", "url": path} for path in scenes]
    text = {"type": "text", "text": "Is <image> like <image>?"}
    marked = as_request([{"role": "user", "content": [*images, text]}], FRAMES)
    assert marked.messages == [{"role": "user", "content": text["text"]}]  # the markers say where they stand
    unmarked = as_request([{"role": "user", "content": [images[0], text]}], FRAMES)
    assert unmarked.messages[0]["content"] == [{"type": "image"}, text]
    assert (len(marked.media.images), len(unmarked.media.images)) == (2, 1)
    for part in (
        {"type": "video", "url": clip, "start_time": 1.0, "end_time": 1.5},
        {"type": "video", "url": {"type": "video", "url": clip, "video_start": 1.0, "video_end": 1.5}},
    ):
        (video,) = as_request([{"role": "user", "content": [part]}], FRAMES).media.videos
        assert video.timestamps.tolist() == [1.0, 1.25, 1.5]
    with pytest.raises(EvaluateError, match="audio"):
        as_request([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], FRAMES)


# --- what is refused, and what is kept ------------------------------------------------------------------------------


def test_lmms_eval_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(EvaluateError, match=r"pip install trl-vpo\[lmms\]"):
        lmms.run_benchmarks(["mvbench"], model=str(BASE), output_dir=tmp_path)


@needs_lmms_eval
def test_benchmarks_that_cannot_be_run_are_refused(benchmark, monkeypatch, no_weights):
    no_weights()
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY", videohallucer.ROOT):
        monkeypatch.delenv(key, raising=False)
    for name, message in (
        ("mvbnech", "Did you mean mvbench"),
        ("tiny_broken", "tiny_broken cannot be loaded.*not_there"),
        ("tiny_rounds", "generate_until_multi_round, which is not supported"),
        ("hallusion_bench_image", "judges every answer.*Set OPENAI_API_KEY"),
        ("tempcompass", "judges every answer to tempcompass_captioning.*tempcompass_yes_no"),
        ("videohallucer", f"set {videohallucer.ROOT}"),
    ):
        with pytest.raises(EvaluateError, match=message):
            benchmark(name)
    for settings, message in (({"limit": 0}, "limit is 0"), ({"include_path": "gone"}, "gone is not a folder")):
        with pytest.raises(UserError, match=message):
            benchmark("tiny_first", **settings)


@needs_lmms_eval
def test_what_goes_wrong_names_task_and_document(benchmark):
    with pytest.raises(EvaluateError, match="tiny_gone, document 0: video path gone"):
        benchmark("tiny_gone")
    with pytest.raises(EvaluateError, match="tiny_beams wants 4 beams"):
        benchmark("tiny_beams")


@needs_lmms_eval
def test_finished_benchmarks_are_read(benchmark, tmp_path, no_weights):
    first, rows = benchmark("tiny_first", out=tmp_path, limit=2)
    assert len(rows["tiny_first"]) == 2
    no_weights()
    assert benchmark("tiny_first", out=tmp_path, limit=2)[0] == first
    with pytest.raises(EvaluateError, match="results with another num_frames"):
        benchmark("tiny_first", out=tmp_path, limit=3, num_frames=2)


def test_answers_are_kept_as_they_come(tmp_path, monkeypatch):
    """Needs no lmms-eval: a model that is begun has answered."""
    fake = SimpleNamespace(simple_evaluate=lambda **options: None)
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace(evaluator=fake))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", fake)
    known = []

    def run(*answer, rank=0, world_size=1, fps=None):
        def begin(answers, keep):
            known.append(answers)
            if answer:
                keep(*answer)

        model = SimpleNamespace(begin=begin, rank=rank, world_size=world_size)
        assert lmms._run("a", model, None, tmp_path, {"model": "m", "fps": fps, "limit": world_size}) is None
        return known[-1]

    assert run("a/0: answer 1", ("red", 1)) == {}
    assert run("a/1: answer 1", (0.1 + 0.2, True), rank=1, world_size=2) == {"a/0: answer 1": ["red", 1]}
    with (tmp_path / "shards" / "00000-of-00001.jsonl").open("a") as file:
        file.write('{"id": "torn')
    assert run() == {"a/0: answer 1": ["red", 1], "a/1: answer 1": [0.1 + 0.2, True]}
    with pytest.raises(RunError, match="fps: was null, is 2"):
        run(fps=2.0)


def test_results_are_compared_by_what_answers_depend_on(tmp_path, monkeypatch):
    """Needs no lmms-eval: neither on the limit, nor on how a folder is written."""
    monkeypatch.setattr(lmms, "version", lambda name: "0.7")
    adapter, path = write_adapter(tmp_path / "last"), tmp_path / lmms.RESULTS

    def finished(base=str(BASE), adapter=adapter, **options):
        record = lmms._record(AnsweringConfig(model_name_or_path=base, **options), adapter)
        if not path.exists():
            path.write_text(json.dumps({"settings": record, "metrics": {"a": {"right": 0.5}}}))
        return lmms._finished(tmp_path, record)

    assert finished() == finished(f"{BASE}/", f"{adapter}/") == {"a": {"right": 0.5}}
    assert finished(limit=3) is None
    for options, named in (
        ({"adapter": None}, "adapter_files"),
        ({"base": "hub/model"}, "model_name_or_path, weights"),
    ):
        with pytest.raises(EvaluateError, match=f"results with another {named}"):
            finished(**options)
    for text in ("{", "{}", "[]", '{"settings": {}}'):
        path.write_text(text)
        with pytest.raises(EvaluateError, match=r"results\.json: it.*Delete the file: the answers are stored"):
            finished()


@needs_lmms_eval
@pytest.mark.parametrize("task", ["tiny_hot", "tiny_choice"])
def test_a_killed_benchmark_continues(benchmark, tmp_path, monkeypatch, task):
    whole, rows = benchmark(task, batch_size=2)
    complete, asked = LocalModel.complete, []

    def until_killed(self, requests, sampling):
        if len(asked) == 4:
            raise RuntimeError("killed")
        asked.extend(requests)
        return complete(self, requests, sampling)

    monkeypatch.setattr(LocalModel, "complete", until_killed)
    with pytest.raises(RuntimeError, match="killed"):
        benchmark(task, batch_size=2, out=tmp_path)
    assert not (tmp_path / task / "results.json").exists()
    monkeypatch.setattr(LocalModel, "complete", lambda *args: asked.extend(args[1]) or complete(*args))
    again, rows_again = benchmark(task, batch_size=2, out=tmp_path)
    requests = {"tiny_hot": 6 * 2, "tiny_choice": 6 * 3}[task]
    assert again == whole and len(asked) == requests
    assert [row["resps"] for row in rows_again[task]] == [row["resps"] for row in rows[task]]
    settings = json.loads((tmp_path / task / "results.json").read_text())["settings"]
    assert "video_budget" in settings and settings["num_frames"] == 4


@needs_lmms_eval
def test_a_changed_task_file_is_noticed(benchmark, tasks, tmp_path, no_weights):
    """Where the benchmark is of that folder; what lmms-eval has itself does not depend on it."""
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    for name in ("tiny_first", "tiny_all"):
        benchmark(name, out=tmp_path / "out", limit=1, include_path=folder)
    no_weights()
    (folder / ".git").mkdir()
    (folder / ".git" / "index").touch()
    benchmark(
        "tiny_first", "tiny_all", out=tmp_path / "out", limit=1, include_path=folder
    )  # Python's caches are no change
    code = folder / "code.py"
    code.write_text(code.read_text().replace("results[0] == doc", "results[0] != doc"))
    for name in ("tiny_first", "tiny_all"):
        with pytest.raises(EvaluateError, match="results with another include_files"):
            benchmark(name, out=tmp_path / "out", limit=1, include_path=folder)
    code.write_text(CODE)
    benchmark("tiny_first", out=tmp_path / "out", limit=1, include_path=folder)
    with pytest.raises(EvaluateError, match=r"results with another include_path\."):
        benchmark("tiny_first", out=tmp_path / "out", limit=1)


def test_every_adapter_gets_a_folder_and_the_options(monkeypatch):
    """Needs no lmms-eval: what it would be asked is looked at, not run."""
    calls = []
    monkeypatch.setattr(lmms, "run_benchmarks", lambda names, **options: calls.append((names, options)) or {})
    common = ["--benchmark", "pope,mvbench", "--model", "m", "--output_dir", "out"]
    command.evaluate([*common, "--adapters", "a/rrpo", "a/dpo", "--fps", "2", "--max_frames", "8", "--load_in_4bit"])
    command.evaluate(common)
    given = {"fps": 2.0, "max_frames": 8, "load_in_4bit": True}
    fixed = {"model": "m", "limit": None, "batch_size": 1, "include_path": None}
    assert calls == [
        (["pope", "mvbench"], {**fixed, "adapter": "a/rrpo", "output_dir": "out/rrpo", **given}),
        (["pope", "mvbench"], {**fixed, "adapter": "a/dpo", "output_dir": "out/dpo", **given}),
        (["pope", "mvbench"], {**fixed, "adapter": None, "output_dir": "out"}),
    ]
    assert set(command.MODEL_OPTIONS) <= {field.name for field in dataclasses.fields(AnsweringConfig)}
