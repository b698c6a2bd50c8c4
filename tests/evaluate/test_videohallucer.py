"""VideoHallucer's tasks over a copy made here; what needs lmms-eval is said in test_lmms.py."""

import json
import shutil

import numpy as np
import pytest
from lmms_kit import about, needs_lmms_eval
from local_kit import GREEDY

from trl_vpo.errors import EvaluateError
from trl_vpo.evaluate.lmms.tasks import videohallucer
from trl_vpo.models.local import LocalModel

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
    (answer,) = model.answer([about(f"{question}\nAnswer the question using 'yes' or 'no'.", clip)], GREEDY)
    return {"yes", "no"} & set(answer.strip(".").split())


@needs_lmms_eval
def test_videohallucer_through_lmms_eval(benchmark, copy, plain_base, documents):
    metrics, rows = benchmark("videohallucer", batch_size=4)
    found, accuracies = metrics["videohallucer"], []
    for subset, pairs in PAIRS.items():
        basic = ["yes" in says(plain_base, "Is there a square?", documents[clip]["clip"]) for clip, _ in pairs]
        other = ["no" in says(plain_base, "Is the square red?", documents[clip]["clip"]) for _, clip in pairs]
        accuracies.append(50 * sum(a and b for a, b in zip(basic, other)))
        scores = found[f"videohallucer_{subset}"]
        assert scores["accuracy"] == accuracies[-1]
        assert (scores["basic_accuracy"], scores["hallucinated_accuracy"]) == (50 * sum(basic), 50 * sum(other))
        assert [row["doc"]["side"] for row in rows[f"videohallucer_{subset}"]] == ["basic", "hallucination"] * 2
    assert len(set(accuracies)) > 1
    assert found["videohallucer"]["accuracy"] == pytest.approx(np.mean(accuracies))


@needs_lmms_eval
def test_a_changed_copy_is_noticed(benchmark, copy, tasks, tmp_path, monkeypatch, no_weights):
    own = shutil.copytree(tasks, tmp_path / "tasks")

    def temporal(**settings):
        return benchmark("videohallucer_temporal", out=tmp_path / "out", limit=2, **{"include_path": own} | settings)[
            0
        ]

    first = temporal()
    no_weights()
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


def test_scores():
    """Three pairs by hand: both right; only the basic one, with a yes for a no; an answer that is neither."""
    responses = [("Yes.", "no"), ("yes", "Yes, it is red."), ("a dog", "No, there is not.")]
    records = []
    for pair, texts in enumerate(responses):
        for side, answer, text in zip(videohallucer.SIDES, ("yes", "no"), texts):
            per_metric = videohallucer.process_results({"pair": pair, "side": side, "answer": answer}, [text])
            assert per_metric.keys() == set(videohallucer.METRICS)
            records.append(per_metric["accuracy"])
    # Two wrong answers, one of them a yes.
    expected = dict(zip(videohallucer.METRICS, (100 / 3, 200 / 3, 200 / 3, 3 / 6 - 3 / 6, 1 / 2, 100 / 6)))
    assert {name: getattr(videohallucer, name)(records) for name in videohallucer.METRICS} == pytest.approx(expected)
    with pytest.raises(ValueError, match="pair 2 lacks one of its questions"):
        videohallucer.score(records[:5])


def test_copies_that_cannot_be_used(copy, monkeypatch):
    for subset in PAIRS:
        videohallucer.check(subset, limit=2)
        assert getattr(videohallucer, f"{subset}_file") == str(copy / subset / f"{subset}.json")
    with pytest.raises(AttributeError):
        _ = videohallucer.fact_detect_file
    path = copy / "temporal" / "temporal.json"
    pairs = json.loads(path.read_text())

    def refused(message, limit=None):
        with pytest.raises(EvaluateError, match=message):
            videohallucer.check("temporal", limit=limit)

    refused(r"limit is 3: .* give an even number", limit=3)
    (copy / "temporal" / "videos" / "2.mp4").unlink()
    refused(r"2 videos of temporal are missing.*2\.mp4")
    pairs[1]["basic"]["answer"] = "maybe"
    path.write_text(json.dumps(pairs))
    refused("pair 1: the answer 'maybe'")
    del pairs[0]["hallucination"]
    path.write_text(json.dumps(pairs))
    refused("pair 0 has no `hallucination`")
    path.unlink()
    refused(r"temporal\.json cannot be read")
    monkeypatch.delenv(videohallucer.ROOT)
    refused(f"set {videohallucer.ROOT} to the folder")
