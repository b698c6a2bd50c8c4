"""The tasks of input rows: question, ground truth and kind of answer, which decides by what it is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_vpo.data.inputs import given_text
from trl_vpo.errors import InputError
from trl_vpo.text.answers import SHORT_WORDS, AnswerCheck, check_exact, check_short
from trl_vpo.text.choices import check_choice, in_form, read_choice, read_options, with_options
from trl_vpo.text.normalize import normalize, words
from trl_vpo.text.responses import without_reasoning
from trl_vpo.text.yes_no import check_yes_no, yes_or_no

KINDS = ("choice", "yes_no", "short", "open")


@dataclass(frozen=True)
class Task:
    """One question and its ground truth."""

    question: str  # as it is trained on; a multiple-choice question lists its options
    answer: str  # the ground truth
    kind: str  # one of `KINDS`
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text of a multiple-choice question
    short_words: int = SHORT_WORDS  # the most words of a short answer
    fixed: bool = False  # short answers come from a fixed vocabulary: other words are wrong

    def check(self, response: str) -> AnswerCheck:
        """Check a response by the rule of its kind; open-ended ones by `check_exact`."""
        if self.kind == "choice":
            return check_choice(response, self.options, self.answer)
        if self.kind == "yes_no":
            return check_yes_no(response, self.answer, self.question)
        if self.kind == "short":
            return check_short(response, self.answer, self.short_words, self.fixed)
        return check_exact(response, self.answer)

    def rejected(self, response: str, parsed: str) -> str:
        """Return a wrong response as it is trained on.

        Multiple choice and yes/no: the ground truth with the other option or word in it. If the ground truth says
        more than that, and for all other kinds: the model's answer without its thoughts.
        """
        answer = without_reasoning(response)
        if self.kind == "choice":
            right = read_choice(self.answer, self.options).value
            return in_form(self.answer, self.options, right, parsed) or answer
        bare = re.fullmatch(r"(\W*)([^\W\d_]+)(\W*)", self.answer)
        if self.kind == "yes_no" and bare:
            word = parsed.upper() if bare[2].isupper() else parsed.capitalize() if bare[2][0].isupper() else parsed
            return bare[1] + word + bare[3]
        return answer


def read_task(example: Mapping[str, Any], short_words: int, fixed: bool = False) -> Task:
    """Read the task of an input row; `short_words` and `fixed` as of `Task`.

    The kind is the row's `answer_kind`; without one, the first of these that applies. choice: there are options, in
    the column `options` or listed in the question, and the answer names one of them. yes_no: the answer begins with
    yes or no (see `yes_or_no`). short: it has at most `short_words` words. open: all others.
    """
    question, answer = (given_text(example, name, "RRPO") for name in ("question", "answer"))
    kind, column = example.get("answer_kind"), example.get("options") or None
    if kind is not None and kind not in KINDS:
        raise InputError(f"`answer_kind` is {kind!r}: give one of {', '.join(KINDS)}, or leave it out.")
    if kind == "yes_no" and yes_or_no(answer) is None:
        raise InputError(f"`answer_kind` is yes_no, but `answer` is {answer!r}: let it begin with yes or no.")
    options = read_options(question, column) if kind in (None, "choice") else {}
    must_be_choice = kind == "choice" or bool(column and options)
    if must_be_choice and not options:
        raise InputError("`answer_kind` is choice, but there are no options: list them in `options` or the question.")
    letter = read_choice(answer, options).value if options else None
    if must_be_choice and letter is None:
        raise InputError(f"`answer` is {answer!r}: give the letter or the text of one of the options {options}.")
    length = len(words(normalize(answer)))
    if must_be_choice or (letter and length <= short_words + len(words(options[letter]))):
        return Task(with_options(question, options), answer, "choice", options)
    kind = kind or ("yes_no" if yes_or_no(answer) else "short" if length <= short_words else "open")
    return Task(question, answer, kind, short_words=short_words, fixed=fixed)
