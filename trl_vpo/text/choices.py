"""Multiple choice: the options of a question, the option that a response names, an answer that names another one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np

from trl_vpo.errors import InputError
from trl_vpo.text.answers import AnswerCheck, Reading
from trl_vpo.text.inflection import stem
from trl_vpo.text.normalize import (
    ARTICLES,
    Word,
    content_words,
    hedged,
    negated,
    normalize,
    places,
    same_words,
    statement,
    texts,
    words,
)
from trl_vpo.text.responses import without_reasoning

# --- options ----------------------------------------------------------------------------------------------------

_MARK = r"\(?(?P<letter>[A-Za-z])[.):]"
_LINES = re.compile(rf"^[ \t]*{_MARK}[ \t]*(?=\S)", re.MULTILINE)
_GIVEN = rf"{_MARK}(?:\s+(?=\S)|(?=[^\s(]))"  # not the first of `(a)(b)(c)`
_INLINE = re.compile(r"(?:^|(?<=\s))\(?(?P<letter>[A-Z])[.):]\s+")


def read_options(question: str, given: Sequence[str] | None = None) -> dict[str, str]:
    """Return the options of a question, letter -> text; empty if it has none.

    It lists them as lines (`A. red`, `(B) blue`, `c) green`) or in one line (`Which? A. red B. blue`), in order from A
    on, and the last such list counts, unless they are `given`: the texts in order, with or without their letters.
    Raises InputError for given options that are not 2 to 26 different texts, have their letters in another order, or
    are not those that the question lists.
    """
    listed = _listed(question)
    if given is None:
        options = listed
    else:
        texts = isinstance(given, (list, tuple)) and all(isinstance(text, str) and text.strip() for text in given)
        if not texts or not 2 <= len(given) <= 26:
            raise InputError(f"`options` is {given!r}: give a list of 2 to 26 texts that are not empty.")
        options = dict(zip(ascii_uppercase, (option.strip() for option in given)))
        if not listed or _contents(listed) != _contents(options):  # else they begin as they do in the question
            options = _without_letters(options)
        if listed and _contents(listed) != _contents(options):
            raise InputError(
                f"`options` is {list(options.values())}, but the question lists {list(listed.values())}: make them "
                "the same, leave one of them out, or list the options last."
            )
    seen: dict[tuple[str, ...], str] = {}
    for letter, content in _contents(options).items():
        if seen.setdefault(content, letter) != letter:
            raise InputError(f"the options {seen[content]} and {letter} say the same, {options[letter]!r}: drop one.")
    return options


def _without_letters(options: dict[str, str]) -> dict[str, str]:
    """Return options without their letters, where each begins with one."""
    marks = [re.match(_GIVEN, option) for option in options.values()]
    letters = {mark["letter"].upper(): mark.end() for mark in marks if mark}
    if [*letters] == [*options]:
        return {letter: options[letter][end:] for letter, end in letters.items()}
    if len(letters) == len(options) and letters.keys() <= {*ascii_uppercase[: len(options) + 1]}:  # no initials
        raise InputError(f"the options {[*options.values()]} have other letters than A, B and so on: mend them.")
    return options


def with_options(question: str, options: Mapping[str, str]) -> str:
    """Return the question with its options, one per line, unless it lists them itself."""
    if not options or _listed(question):
        return question
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def _listed(question: str) -> dict[str, str]:
    for pattern in (_LINES, _INLINE):
        lists: list[list[re.Match]] = []
        for mark in pattern.finditer(question):
            letter = mark["letter"].upper()
            if letter == "A":
                lists.append([mark])
            elif going_on := [marks for marks in lists if letter == ascii_uppercase[len(marks) % 26]]:
                going_on[-1].append(mark)
        if several := [marks for marks in lists if len(marks) > 1]:
            marks = several[-1]  # what stands before may be subtitles, or what is to be put in order
            ends = [*(mark.start() for mark in marks[1:]), len(question)]
            listed = (question[mark.end() : end].split("\n")[0].strip(" \t,;") for mark, end in zip(marks, ends))
            return dict(zip(ascii_uppercase, listed))
    return {}


def _contents(options: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the words and signs by which the options differ; for an option without words, its text.

    An `a` without a word behind it is no article: `(a)(b)` is not `(b)(a)`.
    """
    named = {letter: re.sub(r"\b[Aa]\b(?!\s+\w\w)", "__a__", normalize(text)) for letter, text in options.items()}
    return {
        letter: (*content, *_signs(text)) if (content := content_words(named[letter])) else (text.strip(" ."),)
        for letter, text in options.items()
    }


def _signs(text: str) -> list[str]:
    """Return the signs of a text: no punctuation of prose or markup, and of dashes a minus."""
    text = unicodedata.normalize("NFKC", text)
    signs = [sign for sign in text if sign in "#&@" or (unicodedata.category(sign)[0] == "S" and sign not in "$^`|~")]
    return signs + re.findall(r"(?<=[\s\d=<>(])-(?=[\s\d])|(?<=\w)/(?=\w)", text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


# --- answers ----------------------------------------------------------------------------------------------------


def check_choice(response: str, options: Mapping[str, str], answer: str) -> AnswerCheck:
    """Check which option a response names; raise ValueError unless `answer`, the ground truth, names one."""
    truth = read_choice(answer, options)
    if truth.value is None:
        raise ValueError(f"the answer {answer!r} {truth.why}: give the letter or the text of one option.")
    return read_choice(response, options).check(truth.value)


def by_letter(response: str, options: Sequence[str], answer_index: int) -> bool | None:
    """Return whether a response names the right option; None if it names none or several, or hedges.

    The question called the options' texts A, B, C, ... in this order; `answer_index` counts from 0.
    """
    named = read_choice(response, dict(zip(ascii_uppercase, options))).value
    return None if named is None else named == ascii_uppercase[answer_index]


def by_logprob(option_logps: Sequence[float], answer_index: int, lengths: Sequence[int] | None = None) -> float:
    """Return whether the right option is the likeliest: 1 or 0; a tie at the top shares the point (1/3 of three).

    `option_logps`: (K,) summed log-prob of each option as the response, nats; -inf is an impossible one. With
    `lengths`, (K,) tokens, they are compared per token, so that short options have no head start. Raises ValueError
    if no option is possible, or a log-prob is nan.
    """
    scores = np.asarray(option_logps, dtype=np.float64)
    if np.isnan(scores).any() or not np.isfinite(scores).any():
        raise ValueError(f"option log-probs {scores.tolist()}: give one number for each option.")
    if lengths is not None:
        scores = scores / np.asarray(lengths)
    best = scores == scores.max()
    return float(best[answer_index] / best.sum())


def read_letters(response: str, letters: str, ordered: bool = False) -> str | None:
    """Return those `letters` of options that a response names, in alphabetical order or as they stand; None if none.

    Capitals that are a word count, `B, D` and `BD` alike, but not the article of `A dog` or the pronoun of `I see`. A
    response that also names a letter without an option is not read. Where the order matters, neither is one with the
    word `after`: it names the later one first.
    """
    words = re.findall(rf"\b(?![AI](?:['’]| (?!(?:and|or|then|before)\b)[a-z]))[{letters}]+\b", response)
    others = re.findall(r"(?<![\w'’.-])[B-HJ-Z](?![\w'’-]|\.\w)", response)
    named = "".join(dict.fromkeys("".join(words)))
    if not set(others) <= set(letters) or (ordered and re.search(r"\bafter\b", response, re.IGNORECASE)):
        return None
    return (named if ordered else "".join(sorted(named))) or None


def right_letters(answer: Any, options: Mapping[str, str]) -> str:
    """Return an answer that is letters of these options, each once. Raises InputError."""
    letters = "".join(options)
    if not letters or not isinstance(answer, str) or read_letters(answer, letters, ordered=True) != answer:
        listed = ", ".join(letters) or "none: the question lists no options"
        raise InputError(f"`answer` is {answer!r}: give all right letters, each once, such as BD, of {listed}.")
    return answer


def read_choice(response: str, options: Mapping[str, str]) -> Reading:
    """Read the letter of the option that a response names.

    `options` are letter -> text, no two texts alike; letters are upper-case and begin with A.

    0. A text that is exactly an option's, and no letter, names it; only case, white space and a full stop may differ.
    1. Letters count as options if they are used as labels: `B`, `b`, `(b)`, `B.`, `b) ...`, `**B**`, `option b`,
       `Answer: B`, `B is ...`. The article in `A red square` and the pronoun `I` do not. A capital A inside a sentence
       is a label, unless a name in capitals or the first word of an option that has an article follows.
    2. Options' texts count as whole words, whatever their case, articles, number words or plurals; of texts that
       contain each other, the longest.
    3. Denied letters and texts do not count (`not B`, `neither A nor B`, `B is wrong`), nor do questions, nor what
       follows `because` or `since` up to the next comma or full stop.
    4. Hedges outside of options' texts (`not sure`, `cannot tell`, `maybe`, `either`) leave the answer undecided.
    5. Letters in a sentence after the word `answer` decide; without these, all other letters; without any letter, the
       texts. Two different ones (`A or B`) leave the answer undecided, and so does a letter with only
       another option's text (`B. a blue circle` if that is C).
    """
    said = _plain(without_reasoning(response))
    exact = [letter for letter, text in options.items() if said and said == _plain(text)]
    if len(exact) == 1 and not re.fullmatch(rf"[(\[]?[{''.join(options)}][.):\]]?", said, re.IGNORECASE):
        return Reading(exact[0])
    tokens, labels, mentions = _mentions(response, options)
    inside = {i for start, end, _ in mentions for i in range(start, end)}
    if hedged([word.text for i, word in enumerate(tokens) if i not in inside]):
        return Reading(why="leaves it open")
    stated = [
        i for i in labels if any(word.text == "answer" and word.sentence == tokens[i].sentence for word in tokens[:i])
    ]
    letters = _affirmed(tokens, stated) or _affirmed(tokens, labels)
    quoted = {letter for start, end, letter in mentions if not negated(tokens, start, end)}
    if len(letters) == 1 and quoted and not letters & quoted:
        return Reading(why=f"names {letters.pop()} with the text of {' and '.join(sorted(quoted))}")
    named = sorted(letters or quoted)
    if len(named) != 1:
        return Reading(why=f"names {' and '.join(named)}" if named else "names none of the options")
    return Reading(named[0])


def _affirmed(tokens: Sequence[Word], labels: Sequence[int]) -> set[str]:
    return {tokens[i].text[2].upper() for i in labels if not negated(tokens, i, i + 1)}


def _mentions(response: str, options: Mapping[str, str]) -> tuple[list[Word], list[int], list[tuple[int, int, str]]]:
    """Return a response's words, the positions of labels among them, and [start, end) of each option's text."""
    text, letters = statement(_CAPITAL_ARTICLE.sub("a", response)), "".join(options)
    if not any(re.search(r"\b(?:because|since)\b", option, re.IGNORECASE) for option in options.values()):
        text = re.sub(r"\b(?:because|since)\b[^.,;!?]*", " ", text, flags=re.IGNORECASE)
    articles = (re.match(r"a (\w+)", normalize(option), re.IGNORECASE) for option in options.values())
    marked = _marked(text, letters, {match[1] for match in articles if match})
    tokens = [word for word in words(marked) if word.text not in ARTICLES]
    keys = [stem(word.text) for word in tokens]
    contents = {
        letter: [stem(word) for word in content_words(_marked(normalize(option), letters))]
        for letter, option in options.items()
    }
    mentions: list[tuple[int, int, str]] = []
    covered_by: dict[int, list[str]] = {}  # position of a word -> the option's text (the longest) that covers it
    for letter, content in sorted(contents.items(), key=lambda item: -len(item[1])):
        if all(_LABEL.fullmatch(word) for word in content):
            continue  # the text is a label itself
        for start in places(keys, content):
            span = range(start, start + len(content))
            if content == ["right"] and texts(tokens[start + 1 : start + 2]) in (["answer"], ["option"], ["choice"]):
                continue  # `the right answer` is not the one on the right
            if all(covered_by.get(i, content) == content for i in span):
                covered_by |= dict.fromkeys(span, content)
                mentions.append((start, start + len(content), letter))
    labels = [i for i, word in enumerate(tokens) if _LABEL.fullmatch(word.text) and i not in covered_by]
    return tokens, labels, mentions


_LABEL = re.compile(r"__[a-z]__")
# words behind a letter that could also be an article or a pronoun, if it is a label
_AFTER = r"(?i:and|or|nor|but|is|are|was|because|since|seems|looks|matches|shows)\b"
# the same behind an A: no noun phrase begins with them
_AFTER_A = r"(?i:the|this|these|it|in|on|as|for|from|by|due|where|which|has|does|would|based on|given th\w+)(?![\w'-])"
# an article that a line or a quotation begins with
_CAPITAL_ARTICLE = re.compile(rf"(?:(?<=[\n\"“„«*_`])|(?<=(?<!\w)'))A(?=\s+[a-z])(?!\s+(?:{_AFTER}|{_AFTER_A}))")


def _marked(text: str, letters: str, nouns: Collection[str] = ()) -> str:
    """Return the text with `__b__` in the place of every label of option B; before `nouns`, `A` is an article."""
    upper, either = (f"[{of}](?!\\+\\+|#)" for of in (letters, letters + letters.lower()))  # C++, C# are no labels
    alone, apart = r"(?<![A-Za-z0-9_'.-])", r"(?![A-Za-z0-9_'-])"
    follows = rf"(?=<|\s*$|\s*[).:,;!?\]}}/&+|]|\s*<[/|]|\s+[-–—]|\s+{upper}{apart}|\s+{_AFTER})"
    article = "|".join([r"[A-Z][a-z]", *(rf"(?i:{re.escape(noun)})\b" for noun in nouns)])
    cue = r"\b(?i:(?:option|choice|answer|letter)s?(?:\s+(?:is|are|would be|should be))?)\W{0,3}"
    for pattern in (
        rf"(?P<cue>)[(\[]\s*(?P<label>{either})\s*[)\]]",
        rf"(?P<cue>^\W*)(?P<label>{either})(?=[).:](?:\s|$)|\s*$)",
        rf"(?P<cue>{cue})(?P<label>{either}){follows}",
        rf"(?P<cue>){alone}(?P<label>{upper}){follows}",
        rf"(?P<cue>){alone}(?P<label>A)(?=\s+{_AFTER_A}|\s+\([^()]*\)\s*(?:$|[.,;:!]))",
        rf"(?P<cue>(?<=[a-z,] ))(?P<label>A){apart}(?!\s+(?:{article}))",
        rf"(?P<cue>){alone}(?P<label>(?![AI]){upper}){apart}",
    ):
        text = re.sub(pattern, lambda match: f"{match['cue']} __{match['label'].lower()}__ ", text)
    return text


# --- the form of an answer --------------------------------------------------------------------------------------


_LEAD = (
    r"(?i:(?:(?:so|thus|therefore|the|my|best|correct|right|final)\W+)*(?:answer|option|choice)\b\W*(?:(?:is|:)\W*)?"
    r"(?:(?:option|choice|letter)\b\W*)?)*\W*"
)


def in_form(answer: str, options: Mapping[str, str], right: str, wrong: str) -> str | None:
    """Return the answer with another option in the place of the one it names: letter for letter, text for text.

    `(B)`, `Best option: b) a red square`, `A red square.` keep their form, so that two answers differ in what they
    say. None for an answer that says more than its option: its reasons would not fit the other.
    """
    old, new = options[right], options[wrong]
    if answer == old:
        return new
    label = rf"(?:([{right}{right.lower()}])([).:\]]+\s*|\s+[-–—]\s+|\W*$))?"
    lead, letter, after, text = re.fullmatch(rf"({_LEAD}){label}(.*)", answer, re.DOTALL).groups("")
    if letter:
        letter = wrong if letter.isupper() else wrong.lower()
    if text == old:
        text = new
    elif text:
        if not same_words(text, old):
            return None
        if text[0].isupper() and not old[:1].isupper():
            new = new[:1].upper() + new[1:]
        text = new.rstrip(".!?") + re.search(r"[.!?]*$", text.rstrip())[0]
    return lead + letter + after + text if letter or text else None
