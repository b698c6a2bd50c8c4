"""Read yes/no answers, by one of three rules.

- "careful", for training data: what cannot be read with certainty is undecided; see `read_yes_no`.
- "videohallucer": the response has the expected answer anywhere, as a word in any case. It is the rule of
  VideoHallucer (Wang et al. 2024, arXiv 2406.16338; github.com/patrick-tssn/VideoHallucer, evaluations/) and of RRPO's
  evaluation on it (github.com/pritamqu/RRPO, eval/videohallucer/evaluation_utils.py). "Yes, there is no dog" is right
  whichever answer is expected.
- "strict": the response holds exactly one of the two words, in whatever place, case and punctuation. With both of them
  it is undecided: "Yes and no", "Yes, there is no dog".

Under all of them, the "no" in "snowboard" or "know" is not an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from trl_vpo.text.answers import AnswerCheck, Reading
from trl_vpo.text.inflection import stem
from trl_vpo.text.normalize import ARTICLES, AUXILIARIES, NEGATORS, Word, hedged, normalize, statement, texts, words

Answer = Literal["yes", "no"]
Rule = Literal["careful", "videohallucer", "strict"]

_EVALUATION_WORDS = {
    "videohallucer": re.compile(r"\b(?:yes|no)\b"),
    # Unlike \b: `no-one` is one word, and Markdown's `_` is not part of a word.
    "strict": re.compile(r"[^\W_]+(?:[-'’‐‑][^\W_]+)*"),
}
_POLAR = {"yes": "yes", "yeah": "yes", "yep": "yes", "yup": "yes", "no": "no", "nope": "no", "nah": "no"}
_LEAD = re.compile(
    r"(?:(?:well|so|ok|okay|actually|oh|hmm) )*(?:(?:based on|according to|in|from) the \S+ )?"
    r"(?:(?:the |my |your )?(?:final |correct |short )?answer (?:to (?:the|your|this) question )?(?:(?:is|would be) )?"
    r"|i (?:think|believe|would say|would answer) (?:that )?)?"
)
_NO_5 = re.compile(r"\bno\.\s*(?=\d)", re.IGNORECASE)
_PRONOUNS = {"it", "he", "she", "they", "this", "that", "these", "those"}
# Words that cannot belong to a `no` before them, as `cars` does in `No cars are visible`.
_SUBJECTS = _PRONOUNS | ARTICLES | {"there", "i", "we", "you", "and", "or"}
_SCENE = re.compile(r"\b(?:in|on|from) (?:the|this) (?:video|image|picture|clip|scene|frame|photo|footage)\b")
_SMALL = ARTICLES | AUXILIARIES | _PRONOUNS | {"not", "no", "there", "any", "some"}


def read_yes_no(
    response: str, question: str = "", *, rule: Rule = "careful", expected: Answer | None = None
) -> Reading:
    """Read whether a response says "yes" or "no".

    The rule "careful":

    1. Hedges (`not sure`, `cannot tell`, `maybe`) leave it undecided.
    2. The first word decides: yes, yeah, yep, yup; no, nope, nah; `The answer is`, `I think`, `Well,` and the like may
       come before it. It is alone, before punctuation, or before a word that cannot belong to it (`No it is`),
       unlike `No cars are visible`. Undecided if the other one comes anywhere (`Yes and no`), if a statement as in
       rule 3 says the other (`No, it is`), or if a verb is denied behind a yes (`Yes, it does not`).
    3. Without such a word, one sentence may repeat the question, as a statement (`There is no dog`, `The square is
       red`), with a pronoun for a subject of one word (`It moves left`), or as a verb alone (`It does not`): no if it
       holds `not` or `no`, else yes. The words must be the question's, in its order.

    `expected`, the right answer: "videohallucer" needs it to read a response with both words, which counts as right
    either way. Raises TypeError for a response that is not a string, ValueError for an unknown rule.
    """
    if not isinstance(response, str):
        raise TypeError(f"the response {response!r} is not text. A missing response is an empty string.")
    if rule == "careful":
        return _careful(words(_NO_5.sub("number ", statement(response))), words(normalize(question)))
    if rule not in _EVALUATION_WORDS:
        raise ValueError(f"rule is {rule!r}: give one of careful, {', '.join(_EVALUATION_WORDS)}.")
    answers = {"yes", "no"}.intersection(_EVALUATION_WORDS[rule].findall(response.lower()))
    if rule == "videohallucer" and expected in answers:
        return Reading(expected)
    return Reading(answers.pop()) if len(answers) == 1 else Reading(why="says both or neither")


def yes_or_no(answer: str) -> str | None:
    """Return the "yes" or "no" that a ground truth begins with; None if it is not an answer to a yes/no question."""
    return _polar(words(_NO_5.sub("number ", normalize(answer))), 0)


def check_yes_no(response: str, answer: str, question: str = "") -> AnswerCheck:
    """Check a yes or a no; raise ValueError unless the ground truth begins with the word `yes` or `no`."""
    truth = yes_or_no(answer)
    if truth is None:
        raise ValueError(f"the answer {answer!r} says neither yes nor no: let it begin with one of them.")
    return read_yes_no(response, question).check(truth)


def _polar(tokens: Sequence[Word], at: int) -> str | None:
    """Return the yes or no that a word is, unlike the `no` of `No cars are visible`, `No parking` or `No. 5`."""
    if at >= len(tokens) or tokens[at].text not in _POLAR:
        return None
    alone = at + 1 == len(tokens) or tokens[at + 1].clause > tokens[at].clause or tokens[at + 1].text in _SUBJECTS
    return _POLAR[tokens[at].text] if alone else None


def _careful(tokens: list[Word], question: list[Word]) -> Reading:
    if hedged(texts(tokens)):
        return Reading(why="leaves it open")
    spoken = {_POLAR[word.text] for word in tokens if word.text in _POLAR}
    at = _LEAD.match(" ".join(texts(tokens)))[0].count(" ")
    value = _polar(tokens, at)
    if value is None and "yes" in spoken:
        return Reading(why="mentions yes, but does not begin with it")
    if value is None:
        return _repeated(tokens, question)
    parts = [list(part) for _, part in groupby(tokens[at + 1 :], key=lambda word: word.clause)]
    stated = {_repeated(part, question).value for part in parts}
    if len(spoken | stated - {None}) > 1:
        return Reading(why="says both yes and no")
    verbs = {word.clause for word in tokens if word.text in AUXILIARIES}
    if value == "yes" and any(word.text == "not" and word.clause in verbs for word in tokens):
        return Reading(why="says yes and denies something")
    return Reading(value)


def _repeated(tokens: list[Word], question: list[Word]) -> Reading:
    """Read one sentence that repeats the question, rule 3 of `read_yes_no`."""
    unread = Reading(why="says neither yes nor no")
    answer, question_words = texts(tokens), texts(question)
    denials = sum(word in ("not", "no") for word in answer)
    if not tokens or tokens[0].sentence != tokens[-1].sentence or denials > 1 or NEGATORS.intersection(question_words):
        return unread
    if answer[0] in AUXILIARIES:
        return unread  # the question again
    pronoun = answer[0] in _PRONOUNS
    verb = len(answer) == 2 + denials and (pronoun or answer[0] == "there") and answer[1] in AUXILIARIES
    content, expected = _content(answer), _content(question_words)
    same = content == expected or (pronoun and not _PRONOUNS.intersection(question_words) and content == expected[1:])
    return Reading("no" if denials else "yes") if verb or (content and same) else unread


def _content(tokens: Sequence[str]) -> list[str]:
    return [stem(word) for word in _SCENE.sub(" ", " ".join(tokens)).split() if word not in _SMALL]
