"""Benchmarks through the real lmms-eval, on tasks and clips made here; VideoHallucer's tasks over a copy made here.

Most of it needs the extra `lmms`, in an environment of its own, as lmms-eval wants older versions of av and protobuf
than the locked ones: `pip install -e .[lmms] pytest pytest-timeout`, then `pytest tests/evaluate/test_lmms.py`.
"""

import dataclasses
import functools
import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import yaml
from families import LANGUAGE_MODEL
from held_out_kit import write_adapter
from transformers import AutoProcessor

from trl_vpo.errors import EvaluateError
from trl_vpo.evaluate import command
from trl_vpo.evaluate.lmms import run as lmms
from trl_vpo.evaluate.lmms.tasks import videohallucer
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.media.images import load_image
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.load import load_model
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Request, Sampling, stream_seed
from trl_vpo.testbed import language, world
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.testbed.tiny_vlm import BASE

needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs the extra lmms; see the docstring")
COMMON = {"name": str(BASE), "device": "cpu", "dtype": "float32"}
FRAMES = VideoOptions(num_frames=4)
GREEDY = Sampling(max_new_tokens=16, temperature=0)
COLOUR, CAPTION = "What colour is the shape?", "Describe the video."

CODE = '''
def media(doc):
    return [doc["clip"]]


def messages(doc):
    """Two images, with text before, between and behind them."""
    first, second = ({"type": "image", "url": path} for path in doc["scenes"])
    content = [first, {"type": "text", "text": "and"}, second, {"type": "text", "text": "Which shape is on the left?"}]
    return [{"role": "system", "content": [{"type": "text", "text": "Look."}]}, {"role": "user", "content": content}]


def leave(doc):
    raise SystemExit("video path gone.mp4 does not exist")


def right(doc, results):
    return {"right": float(results[0] == doc["answer"])}
'''


class Function(str):
    """A `!function` of lmms-eval's task files."""


yaml.SafeDumper.add_representer(Function, lambda dumper, text: dumper.represent_scalar("!function", str(text)))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Six clips with their colours and three captions each, of which the true one is at `place`; two scenes."""
    folder = tmp_path_factory.mktemp("documents")
    scenes = world.draw_samples("scene", 2, seed=6, habits=False)
    scenes = [str(world.write_sample(sample, folder / f"{i}.png")) for i, sample in enumerate(scenes)]
    documents = []
    for i, sample in enumerate(world.draw_samples("clip", 6, seed=5, habits=False)):
        captions = [language.wrong_caption(sample.things, np.random.default_rng(seed)) for seed in range(3)]
        captions[i % 3] = language.caption(sample.things)
        clip = str(world.write_sample(sample, folder / f"{i}.mp4"))
        answer = f"{sample.things[0].colour}."
        documents.append({"clip": clip, "scenes": scenes, "answer": answer, "captions": captions, "place": i % 3})
    return documents


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, documents):
    """A folder with tasks of every kind that the bridge serves, and of some that it refuses."""
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(documents, folder / "documents.jsonl")
    (folder / "code.py").write_text(CODE)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
    metric = {"metric": "right", "aggregation": "mean", "higher_is_better": True}
    scored = {"process_results": Function("code.right"), "metric_list": [metric], "doc_to_target": "answer"}
    common = {**data, "test_split": "test", **scored}
    clip = {**common, "doc_to_visual": Function("code.media"), "doc_to_text": COLOUR}
    choice = {**data, "test_split": "test", "output_type": "multiple_choice", "doc_to_visual": Function("code.media")}
    scenes = {"doc_to_messages": Function("code.messages"), "doc_to_text": "not used"}

    def generation(**settings):
        return {"generation_kwargs": settings}

    hot = generation(max_new_tokens=16, temperature=2.5, top_p=0.95, do_sample=True)
    greedy = generation(max_new_tokens=16, temperature=0, until=["\n\n"])
    made = {
        "tiny_colour": clip | greedy,
        "tiny_stop": clip | generation(max_new_tokens=16, until=["e", "l"]),
        "tiny_cut": clip | generation(max_new_tokens=2, temperature=0.7, do_sample=False) | {"doc_to_text": CAPTION},
        "tiny_hot": clip | hot | {"repeats": 2},
        "tiny_scenes": common | greedy | scenes,
        "tiny_choice": choice | {"doc_to_text": CAPTION, "doc_to_choice": "captions", "doc_to_target": "place"},
        "tiny_beams": clip | generation(num_beams=4),
        "tiny_gone": clip | greedy | {"doc_to_visual": Function("code.leave")},
        "tiny_rounds": clip | {"output_type": "generate_until_multi_round"},
        "tiny_broken": clip | greedy | {"doc_to_text": Function("code.not_there")},
    }
    made = {name: {"task": name, **config} for name, config in made.items()}
    made["tiny_all"] = {"group": "tiny_all", "task": ["tiny_stop", {"group": "tiny_inner", "task": ["tiny_cut"]}]}
    for name, config in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def base():
    return load_model(**COMMON)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random LoRA adapter on the language model, large enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter") / "last"
    return write_adapter(folder, scale=0.1, lora_alpha=16, target_modules=LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tasks):
    """Run benchmarks -> their metrics, and the logged rows of each task, in the order of the documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(lmms, "_task_manager", functools.cache(lmms._task_manager))  # it reads 2,000 files

        def run(*names, out=None, **settings):
            out = out or tmp_path_factory.mktemp("out")
            settings = {"include_path": tasks, "device": "cpu", "dtype": "float32", "num_frames": 4} | settings
            metrics = lmms.run_benchmarks(names, model=str(BASE), output_dir=out, **settings)
            paths = {path.stem.removeprefix("samples_"): path for path in out.glob("*/samples_*.jsonl")}
            return metrics, {task: list(map(json.loads, path.open())) for task, path in paths.items()}

        yield run


def asked(text: str, clip: str, seed: int = 0) -> Request:
    content = [{"type": "video"}, {"type": "text", "text": text}]
    return Request([{"role": "user", "content": content}], Media(videos=(load_video(clip, FRAMES),)), seed)


def answers(rows: list[dict]) -> list:
    """The responses of a task's rows; a list of them where a question was repeated."""
    found = [row["resps"][0] for row in rows]
    return [one[0] if len(one) == 1 else one for one in found]


# --- answers through lmms-eval --------------------------------------------------------------------------------------


@needs_lmms_eval
def test_base_and_adapter_answer_as_elsewhere(run, adapter, documents):
    found = []
    for path in (None, adapter):
        metrics, rows = run("tiny_colour", adapter=path, batch_size=4)
        model = load_model(adapter=path, **COMMON)
        expected = model.answer([asked(COLOUR, doc["clip"]) for doc in documents], GREEDY)
        assert answers(rows["tiny_colour"]) == expected
        hits = [text == doc["answer"] for text, doc in zip(expected, documents)]
        assert metrics["tiny_colour"]["tiny_colour"]["right"] == pytest.approx(np.mean(hits))
        found.append(expected)
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def everything(run):
    return run("tiny_all", "tiny_hot", "tiny_scenes", "tiny_choice", batch_size=2)


@needs_lmms_eval
def test_answers_end_where_the_task_says(everything, base, documents):
    metrics, rows = everything
    assert metrics["tiny_all"].keys() == {"tiny_stop", "tiny_cut"}
    full = base.answer([asked(COLOUR, doc["clip"]) for doc in documents], GREEDY)
    cut = [text.split("e")[0].split("l")[0] for text in full]
    assert answers(rows["tiny_stop"]) == cut != full
    captions = base.answer([asked(CAPTION, doc["clip"]) for doc in documents], GREEDY)
    beginnings = answers(rows["tiny_cut"])  # cut off after two tokens, which is no failure here
    assert all(text and whole.startswith(text) and text != whole for text, whole in zip(beginnings, captions))


def test_thoughts_that_were_cut_off_are_no_answer(base, documents):
    """The chat template opened them, so there is no tag in the answer."""
    request, one = asked(COLOUR, documents[0]["clip"]), Sampling(max_new_tokens=1, temperature=0)
    found, processor = [], AutoProcessor.from_pretrained(BASE)
    for opened in ("", "<think>\n"):
        processor.chat_template = base.processor.chat_template.replace("assistant\n", f"assistant\n{opened}")
        (answer,) = LocalModel(base.model, processor).complete([request], one)
        assert answer.tokens == 1
        found.append(answer.text)
    assert found[0] and found[1] == ""


@needs_lmms_eval
def test_a_task_that_samples_is_repeatable(everything, base, documents):
    _, rows = everything
    hot = Sampling(max_new_tokens=16, temperature=2.5, top_p=0.95)
    seeds = [[stream_seed(0, f"tiny_hot/{i}", f"answer {time}") for time in (1, 2)] for i in range(6)]
    pairs = [[asked(COLOUR, doc["clip"], seed) for seed in two] for doc, two in zip(documents, seeds)]
    expected = [base.answer(pair, hot) for pair in pairs]
    assert any(first != second for first, second in expected)
    found = [pair for two in zip(answers(rows["tiny_hot"]), expected) for pair in zip(*two)]
    ended = [pair for pair in found if isinstance(pair[1], str)]  # elsewhere, one that was cut off is a failure
    assert len(ended) > 6 and all(one == text for one, text in ended)


@needs_lmms_eval
def test_messages_of_a_task_reach_the_model(everything, base, documents):
    _, rows = everything
    images = tuple(load_image(path) for path in documents[0]["scenes"])
    text = {"type": "text", "text": "Which shape is on the left?"}
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, text]
    turns = [{"role": "system", "content": [{"type": "text", "text": "Look."}]}, {"role": "user", "content": content}]
    assert answers(rows["tiny_scenes"]) == base.answer([Request(turns, Media(images))], GREEDY) * 6


@needs_lmms_eval
def test_options_are_compared_by_their_log_probs(everything, base, documents):
    metrics, rows = everything
    hits = []
    for doc, row in zip(documents, rows["tiny_choice"]):
        request = asked(CAPTION, doc["clip"])
        averages = base.average_logps([request] * 3, doc["captions"])
        (greedy,) = base.answer([request], GREEDY)
        found = [pair for (pair,) in row["resps"]]
        assert [-loss for loss, _ in found] == pytest.approx(averages, abs=1e-4)
        assert [flag for _, flag in found] == [text == greedy for text in doc["captions"]]
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
def test_benchmarks_that_cannot_be_run_are_refused_before_loading(run, monkeypatch):
    monkeypatch.setattr(lmms, "_load", lambda *args: pytest.fail("weights were loaded"))
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
            run(name)
    for settings, message in (({"limit": 0}, "limit is 0"), ({"include_path": "gone"}, "gone is no folder")):
        with pytest.raises(EvaluateError, match=message):
            run("tiny_colour", **settings)


@needs_lmms_eval
def test_what_goes_wrong_names_task_and_document(run):
    with pytest.raises(EvaluateError, match="tiny_gone, document 0: video path gone"):
        run("tiny_gone")
    with pytest.raises(EvaluateError, match="tiny_beams wants 4 beams"):
        run("tiny_beams")


@needs_lmms_eval
def test_finished_benchmarks_are_read(run, tmp_path, monkeypatch):
    first, rows = run("tiny_colour", out=tmp_path, limit=2)
    assert len(rows["tiny_colour"]) == 2
    monkeypatch.setattr(lmms, "_load", lambda *args: pytest.fail("weights were loaded"))
    assert run("tiny_colour", out=tmp_path, limit=2)[0] == first
    with pytest.raises(EvaluateError, match="results with another limit, num_frames"):
        run("tiny_colour", out=tmp_path, limit=3, num_frames=2)


@needs_lmms_eval
def test_a_changed_task_file_is_noticed(run, tasks, tmp_path, monkeypatch):
    """Where the benchmark is of that folder; what lmms-eval has itself does not depend on it."""
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    for name in ("tiny_colour", "tiny_all"):
        run(name, out=tmp_path / "out", limit=1, include_path=folder)
    monkeypatch.setattr(lmms, "_load", lambda *args: pytest.fail("weights were loaded"))
    (folder / ".git").mkdir()
    (folder / ".git" / "index").touch()
    run("tiny_colour", "tiny_all", out=tmp_path / "out", limit=1, include_path=folder)  # Python's caches are no change
    code = folder / "code.py"
    code.write_text(code.read_text().replace("results[0] == doc", "results[0] != doc"))
    for name in ("tiny_colour", "tiny_all"):
        with pytest.raises(EvaluateError, match="results with another include_files"):
            run(name, out=tmp_path / "out", limit=1, include_path=folder)
    code.write_text(CODE)
    run("tiny_colour", out=tmp_path / "out", limit=1, include_path=folder)
    with pytest.raises(EvaluateError, match=r"results with another include_path\."):
        run("tiny_colour", out=tmp_path / "out", limit=1)


# --- VideoHallucer --------------------------------------------------------------------------------------------------

PAIRS = {  # which clips the basic and the hallucinated question of each pair are about
    "object_relation": [(0, 2), (1, 3)],
    "temporal": [(0, 2), (3, 2)],
    "semantic_detail": [(2, 0), (1, 5)],
    "external_factual": [(0, 0), (3, 2)],
    "external_nonfactual": [(2, 2), (0, 0)],
}


@pytest.fixture
def copy(tmp_path, documents, monkeypatch):
    """A small VideoHallucer, laid out as its authors publish it."""
    root = tmp_path / "videohallucer_datasets"
    for subset, numbers in PAIRS.items():
        (root / subset / "videos").mkdir(parents=True)
        for i, doc in enumerate(documents):
            (root / subset / "videos" / f"{i}.mp4").symlink_to(doc["clip"])
        pairs = [
            {
                "basic": {"video": f"{basic}.mp4", "question": "Is there a square?", "answer": "Yes"},
                "hallucination": {"video": f"{other}.mp4", "question": "Is the square red?", "answer": "no"},
                "type": "subject",
            }
            for basic, other in numbers
        ]
        pairs[0]["hallucination"]["explanation"] = "only some have one"
        (root / subset / f"{subset}.json").write_text(json.dumps(pairs, indent=4))
    monkeypatch.setenv(videohallucer.ROOT, str(root))
    return root


def says(model: LocalModel, question: str, clip: str) -> set[str]:
    """Which of the words yes and no are in the answer to a question asked as the benchmark asks it."""
    (answer,) = model.answer([asked(f"{question}\nAnswer the question using 'yes' or 'no'.", clip)], GREEDY)
    return {"yes", "no"} & set(answer.strip(".").split())


@needs_lmms_eval
def test_videohallucer_through_lmms_eval(run, copy, base, documents):
    metrics, rows = run("videohallucer", batch_size=4)
    found, accuracies = metrics["videohallucer"], []
    for subset, pairs in PAIRS.items():
        basic = ["yes" in says(base, "Is there a square?", documents[clip]["clip"]) for clip, _ in pairs]
        other = ["no" in says(base, "Is the square red?", documents[clip]["clip"]) for _, clip in pairs]
        accuracies.append(50 * sum(a and b for a, b in zip(basic, other)))
        scores = found[f"videohallucer_{subset}"]
        assert scores["accuracy"] == accuracies[-1]
        assert (scores["basic_accuracy"], scores["hallucinated_accuracy"]) == (50 * sum(basic), 50 * sum(other))
        assert [row["doc"]["side"] for row in rows[f"videohallucer_{subset}"]] == ["basic", "hallucination"] * 2
    assert len(set(accuracies)) > 1
    assert found["videohallucer"]["accuracy"] == pytest.approx(np.mean(accuracies))


@needs_lmms_eval
def test_a_changed_copy_of_videohallucer_is_noticed(run, copy, tasks, tmp_path, monkeypatch):
    own = shutil.copytree(tasks, tmp_path / "tasks")

    def temporal(**settings):
        return run("videohallucer_temporal", out=tmp_path / "out", limit=2, **{"include_path": own} | settings)[0]

    first = temporal()
    monkeypatch.setattr(lmms, "_load", lambda *args: pytest.fail("weights were loaded"))
    (own / "code.py").write_text("")  # this task is not of that folder
    other = copy / "semantic_detail" / "semantic_detail.json"  # nor does it read this subset
    other.write_text(other.read_text().replace("square", "circle"))
    assert temporal() == temporal(include_path=None) == first
    path = copy / "temporal" / "temporal.json"
    questions = path.read_text()
    path.write_text(questions.replace("square", "circle"))
    with pytest.raises(EvaluateError, match=r"results with another videohallucer_files\."):
        temporal()
    path.write_text(questions)
    monkeypatch.setenv(videohallucer.ROOT, str(shutil.copytree(copy, tmp_path / "moved")))
    with pytest.raises(EvaluateError, match=r"results with another videohallucer_root\."):
        temporal()


def test_videohallucer_scores():
    """Three pairs by hand: both right; only the basic one, with a yes for a no; an answer that is neither."""
    said = [("Yes.", "no"), ("yes", "Yes, it is red."), ("a dog", "No, there is not.")]
    records = []
    for pair, responses in enumerate(said):
        for side, answer, response in zip(videohallucer.SIDES, ("yes", "no"), responses):
            document = {"pair": pair, "side": side, "answer": answer}
            per_metric = videohallucer.process_results(document, [response])
            assert per_metric.keys() == set(videohallucer.METRICS)
            records.append(per_metric["accuracy"])
    expected = {
        "accuracy": 100 / 3,
        "basic_accuracy": 200 / 3,
        "hallucinated_accuracy": 200 / 3,
        "yes_difference": 3 / 6 - 3 / 6,
        "fp_ratio": 1 / 2,  # two wrong answers, one of them a yes
        "unparsed": 100 / 6,
    }
    assert videohallucer.score(records) == pytest.approx(expected)
    assert {name: getattr(videohallucer, name)(records) for name in videohallucer.METRICS} == pytest.approx(expected)
    with pytest.raises(ValueError, match="pair 2 lacks one of its questions"):
        videohallucer.score(records[:5])


def test_videohallucer_copies_that_cannot_be_used(copy, monkeypatch):
    for subset in PAIRS:
        videohallucer.check(subset, limit=2)
        assert getattr(videohallucer, f"{subset}_file") == str(copy / subset / f"{subset}.json")
    with pytest.raises(AttributeError):
        _ = videohallucer.fact_detect_file
    with pytest.raises(EvaluateError, match=r"limit is 3: .* give an even number"):
        videohallucer.check("temporal", limit=3)
    (copy / "temporal" / "videos" / "2.mp4").unlink()
    with pytest.raises(EvaluateError, match=r"2 videos of temporal are missing.*2\.mp4"):
        videohallucer.check("temporal")
    path = copy / "temporal" / "temporal.json"
    pairs = json.loads(path.read_text())
    pairs[1]["basic"]["answer"] = "maybe"
    path.write_text(json.dumps(pairs))
    with pytest.raises(EvaluateError, match="pair 1: the answer 'maybe'"):
        videohallucer.check("temporal")
    del pairs[0]["hallucination"]
    path.write_text(json.dumps(pairs))
    with pytest.raises(EvaluateError, match="pair 0 has no `hallucination`"):
        videohallucer.check("temporal")
    path.unlink()
    with pytest.raises(EvaluateError, match=r"temporal\.json cannot be read"):
        videohallucer.check("temporal")
    monkeypatch.delenv(videohallucer.ROOT)
    with pytest.raises(EvaluateError, match=f"set {videohallucer.ROOT} to the folder"):
        videohallucer.check("temporal")


def test_the_command_line_gives_every_adapter_a_folder_and_its_own_options(monkeypatch):
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
    assert set(command.MODEL_OPTIONS) <= {field.name for field in dataclasses.fields(GenerateConfig)}
