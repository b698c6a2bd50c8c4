"""VideoHallucer (Wang et al. 2024, arXiv 2406.16338) as lmms-eval tasks, over the user's own copy of the benchmark.

`VIDEOHALLUCER_ROOT` names the folder that holds, as the authors publish it (github.com/patrick-tssn/VideoHallucer):

    object_relation/object_relation.json      [{"basic": {"video", "question", "answer"},
    object_relation/videos/*.mp4                "hallucination": {"video", "question", "answer"}, "type"}, ...]
    temporal/... semantic_detail/... external_factual/... external_nonfactual/...

Prompt and scoring are those of the authors' `evaluations/evaluation.py` and of RRPO's evaluation: the expected answer
must stand in the response as a word, and a pair counts when both of its questions are answered rightly. The total is
the plain mean over the five subsets. `max_new_tokens` is ours.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from trl_vpo.errors import EvaluateError
from trl_vpo.files import bytes_digest
from trl_vpo.text.yes_no import read_yes_no

ROOT = "VIDEOHALLUCER_ROOT"
SUBSETS = ("object_relation", "temporal", "semantic_detail", "external_factual", "external_nonfactual")
SIDES = ("basic", "hallucination")
PROMPT = "{question}\nAnswer the question using 'yes' or 'no'."


def __getattr__(name: str) -> Any:
    """What task files name: a metric, or `SUBSET_file`, the subset's json, whose folder is known at run time."""
    if name in METRICS:
        return partial(_metric, name=name)
    subset = name.removesuffix("_file")
    if name == subset or subset not in SUBSETS:
        raise AttributeError(name)
    return str(_file(subset))


def _folder(subset: str) -> Path:
    root = os.environ.get(ROOT)
    if not root:
        raise EvaluateError(
            f"VideoHallucer is not part of lmms-eval: get it from its authors, and set {ROOT} to the folder that "
            f"holds {SUBSETS[0]}/{SUBSETS[0]}.json."
        )
    return Path(root).expanduser().absolute() / subset


def _file(subset: str) -> Path:
    return _folder(subset) / f"{subset}.json"


def subset_of(task: str) -> str | None:
    """Return the subset that a task asks about; None for a task of another benchmark."""
    subset = task.removeprefix("videohallucer_")
    return subset if subset != task and subset in SUBSETS else None


def record(subsets: Iterable[str]) -> dict[str, Any]:
    """Return what tells the user's copies of these subsets from others: the root, and a digest of each json."""
    digests = {subset: bytes_digest(_file(subset).read_bytes(), size=8) for subset in subsets}
    return {"videohallucer_root": str(_folder("")) if digests else None, "videohallucer_files": digests or None}


def check(subset: str, limit: int | None = None) -> None:
    """Refuse a copy of a subset that cannot be used."""
    path, missing = _file(subset), []
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluateError(f"VideoHallucer: {path} cannot be read ({error}). Correct {ROOT}.") from error
    for number, pair in enumerate(pairs):
        for side in SIDES:
            try:
                video, _, answer = (pair[side][key] for key in ("video", "question", "answer"))
            except (KeyError, TypeError) as error:
                keys = "a video, a question and an answer"
                raise EvaluateError(f"VideoHallucer: {path}, pair {number} has no `{side}` with {keys}.") from error
            if _plain(answer) not in ("yes", "no"):
                raise EvaluateError(f"VideoHallucer: {path}, pair {number}: the answer {answer!r} is not yes or no.")
            missing += [] if (path.parent / "videos" / video).is_file() else [path.parent / "videos" / video]
    if missing:
        raise EvaluateError(f"VideoHallucer: {len(missing)} videos of {subset} are missing, such as {missing[0]}.")
    if limit is not None and limit % 2:
        raise EvaluateError(f"limit is {limit}: VideoHallucer's questions come in pairs, give an even number.")


def _plain(answer: str) -> str:
    return answer.strip().lower()


# --- what the task files name ---------------------------------------------------------------------------------------


def questions(pairs: Any) -> Any:
    """Pairs (a `datasets.Dataset`) -> their questions, two for each pair, one after the other."""
    from datasets import Dataset

    rows = []
    for number, pair in enumerate(pairs):
        for side in SIDES:
            texts = {key: pair[side][key] for key in ("video", "question")} | {"answer": _plain(pair[side]["answer"])}
            rows.append({"pair": number, "side": side, "type": pair.get("type"), **texts})
    return Dataset.from_list(rows)


def doc_to_visual(doc: dict, lmms_eval_specific_kwargs: dict) -> list[str]:
    return [str(_folder(lmms_eval_specific_kwargs["subset"]) / "videos" / doc["video"])]


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return PROMPT.format(question=doc["question"])


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """One record of the answer under the name of every metric; each metric is made of all records."""
    record = {"pair": doc["pair"], "side": doc["side"], "expected": doc["answer"]}
    record["said"] = read_yes_no(results[0], rule="videohallucer", expected=doc["answer"]).value
    return dict.fromkeys(METRICS, record)


def score(records: list[dict]) -> dict[str, float]:
    """Return all metrics of a subset, from the records of its questions.

    accuracy, basic_accuracy, hallucinated_accuracy, unparsed: per cent, of the pairs, of the questions of one side, of
    all questions. yes_difference: the share of yes among the answers less that among the right ones. fp_ratio: the
    share of yes among the wrong answers, nan where none is wrong (HallusionBench, arXiv 2310.14566, Eq. 6 and 7;
    VideoHallucer's own bias script computes it differently).
    """
    pairs: dict[int, dict[str, bool]] = defaultdict(dict)
    for record in records:
        pairs[record["pair"]][record["side"]] = record["said"] == record["expected"]
    for number, sides in pairs.items():
        if len(sides) < 2:
            raise ValueError(f"VideoHallucer: pair {number} lacks one of its questions: give an even limit.")
    yes = {key: _mean(record[key] == "yes" for record in records) for key in ("said", "expected")}
    return {
        "accuracy": 100 * _mean(all(sides.values()) for sides in pairs.values()),
        "basic_accuracy": 100 * _mean(sides["basic"] for sides in pairs.values()),
        "hallucinated_accuracy": 100 * _mean(sides["hallucination"] for sides in pairs.values()),
        "yes_difference": yes["said"] - yes["expected"],
        "fp_ratio": _mean(record["said"] == "yes" for record in records if record["said"] != record["expected"]),
        "unparsed": 100 * _mean(record["said"] is None for record in records),
    }


def _mean(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else float("nan")


def _metric(records: list[dict], *, name: str) -> float:
    return score(records)[name]


METRICS = ("accuracy", "basic_accuracy", "hallucinated_accuracy", "yes_difference", "fp_ratio", "unparsed")
