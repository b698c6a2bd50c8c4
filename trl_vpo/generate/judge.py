"""The judge of open-ended answers, a language model behind an endpoint, in two steps (arXiv 2504.12083, section 3.1).

First it names the key differences between the model's answer and the ground truth, in objects, actions and
attributes; then it rewrites the ground truth with these mistakes, so that both texts stay aligned word for word. It
sees texts only. The prompts are ours. Replies are JSON, with thoughts, prose and code fences around it
allowed; after any other reply the judge is asked once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_vpo.errors import JudgeError
from trl_vpo.generate.pipeline import image_request
from trl_vpo.models.requests import AnsweringModel, Sampling
from trl_vpo.text.normalize import same_words
from trl_vpo.text.phrases import Span, split_words, word_diff
from trl_vpo.text.responses import Failure, without_reasoning

KINDS = ("object", "action", "attribute")
DIFFERENCES_PROMPT = """\
Compare an answer to a question about a video or an image with the ground truth.

Question: {question}
Ground truth: {truth}
Answer: {answer}

A key difference is an object, an action or an attribute (colour, number, place, order, direction, ...) that the \
answer states in contradiction to the ground truth. What the answer leaves out or adds without contradicting the \
ground truth, and another wording, is no key difference.

Reply with one JSON object and nothing else:
{{"correct": true or false, "differences": [{{"kind": "object" or "action" or "attribute", "truth": "words of the \
ground truth", "answer": "words of the answer"}}]}}
An answer is correct if it has no key difference; the list is then empty."""
REWRITE_PROMPT = """\
Put the mistakes of a wrong answer into the ground truth.

Question: {question}
Ground truth: {truth}
Wrong answer: {answer}
Mistakes:
{differences}

Copy the ground truth word for word, and replace only the words that a mistake concerns. Keep length, order, wording \
and style of everything else.

Reply with one JSON object and nothing else:
{{"rewritten": "the ground truth with the mistakes"}}"""
RETRY = "\n\nAn earlier reply could not be used: {why}. Reply with the JSON object only."


@dataclass(frozen=True)
class Difference:
    kind: str  # one of `KINDS`
    truth: str  # words of the ground truth
    answer: str  # words of the answer


@dataclass(frozen=True)
class Judgement:
    """A judge's reply about an answer; without differences, nothing is wrong with it that could be trained on."""

    correct: bool
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Question:
    prompt: str
    seeds: tuple[int, int]  # for the first request, and for a second one if needed
    read: Callable[[str], Any]  # reply -> its content; raises JudgeError


def ask(judge: AnsweringModel, questions: Sequence[Question], sampling: Sampling) -> list[Any]:
    """Return the judge's reply to each question as read, or a `Failure` if neither reply could be used.

    The second request says what was wrong with the first reply, and has another seed.
    """
    results: list[Any] = [Failure("not asked")] * len(questions)
    prompts = [question.prompt for question in questions]
    for attempt in range(2):
        todo = [i for i, result in enumerate(results) if isinstance(result, Failure)]
        if not todo:
            break
        replies = judge.answer([image_request((), prompts[i], questions[i].seeds[attempt]) for i in todo], sampling)
        for i, reply in zip(todo, replies, strict=True):
            try:
                results[i] = reply if isinstance(reply, Failure) else questions[i].read(reply)
            except JudgeError as error:
                results[i] = Failure(str(error))
            if isinstance(results[i], Failure):
                prompts[i] = questions[i].prompt + RETRY.format(why=results[i].reason)
    return results


# --- replies ----------------------------------------------------------------------------------------------------


def read_judgement(reply: str) -> Judgement:
    """Read the reply to `DIFFERENCES_PROMPT`; JudgeError unless it holds one JSON object of the requested form."""

    def read(value: dict) -> Judgement:
        correct, listed = value.get("correct"), value.get("differences")
        if not isinstance(correct, bool) or not isinstance(listed, list):
            raise JudgeError('"correct" has to be true or false and "differences" a list')
        return Judgement(correct, tuple(map(_difference, listed)))

    judgement = _only_object(reply, read)
    if judgement.correct and judgement.differences:
        raise JudgeError("it calls the answer correct and lists differences")
    return judgement


def read_rewrite(reply: str, truth: str, max_changed: float) -> str:
    """Read the reply to `REWRITE_PROMPT`: the ground truth with other words, in a share of `max_changed` at most."""

    def read(value: dict) -> str:
        text = value.get("rewritten")
        if not isinstance(text, str) or not text.strip():
            raise JudgeError('"rewritten" has to be a text that is not empty')
        return text.strip()

    rewritten = _only_object(reply, read)
    if same_words(rewritten, truth):
        raise JudgeError("the rewritten text says the same as the ground truth")
    changed = max(changed_share(text, spans) for text, spans in zip((truth, rewritten), word_diff(truth, rewritten)))
    if changed > max_changed:
        raise JudgeError(
            f"the rewritten text is not aligned with the ground truth: {changed:.0%} of the words differ, and at most "
            f"{max_changed:.0%} may"
        )
    return rewritten


def changed_share(text: str, phrases: Sequence[Span]) -> float:
    """Return the share of a text's words that lie in phrases; words and phrases as in `trl_vpo.text.phrases`."""
    spans = split_words(text)
    inside = [any(start < last and first < end for start, end in phrases) for first, last in spans]
    return sum(inside) / max(1, len(spans))


_DECODER = json.JSONDecoder(strict=False)  # not strict: texts may hold unescaped line breaks


def _only_object(reply: str, read: Callable[[dict], Any]) -> Any:
    """Return what `read` makes of the only JSON object in a reply that it accepts.

    Every brace outside of an object already read may begin one. An object that is repeated word for word counts
    once.
    """
    text, at, accepted, faults = without_reasoning(reply), 0, [], []
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = _DECODER.raw_decode(text, at)
            json.dumps(value, ensure_ascii=False).encode()  # raises at half a surrogate pair
            value = read(value)
        except JudgeError as error:
            faults.append(str(error))
        except (ValueError, RecursionError) as error:
            faults.append(f"the JSON is not valid ({error})")
            at += 1
        else:
            accepted += [value] if value not in accepted else []
    if len(accepted) > 1:
        raise JudgeError(f"there are {len(accepted)} different JSON objects in it")
    if not accepted:
        raise JudgeError([*faults, "there is no JSON object in it"][0])
    return accepted[0]


def _difference(item: Any) -> Difference:
    values = [item.get(key) for key in ("kind", "truth", "answer")] if isinstance(item, dict) else [None]
    if not all(isinstance(value, str) for value in values) or values[0].strip().lower() not in KINDS:
        raise JudgeError(f'a difference has to have "kind" ({", ".join(KINDS)}), "truth" and "answer", all texts')
    return Difference(values[0].strip().lower(), values[1].strip(), values[2].strip())
