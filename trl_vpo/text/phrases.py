"""RRPO's phrases: the spans in which two responses differ, and the tokens that belong to them.

Offsets are [start, end) in characters of the plain response, which carries no `<MASK>` tags. Phrases come from the
first source that a row has: offsets given in the row, `<MASK> ... </MASK>` tags as in RRPO's published dataset (arXiv
2504.12083), a word diff.
"""

import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from numbers import Integral

import regex

from trl_vpo.errors import PhraseError

Span = tuple[int, int]

OPEN, CLOSE = "<MASK>", "</MASK>"

# Scripts that put no spaces between words: every character is a word of its own. U+30FC is the long-vowel mark of
# both kana. Korean is written with spaces and needs no entry.
_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A letter or digit with its combining marks and joiners (which the scripts of India and Persian write inside words).
_LETTER = rf"(?:(?![{_NO_SPACES}])[\p{{L}}\p{{N}}_][\p{{M}}\u200c\u200d]*)"
# `isn't`, `3.5` and `12:30` are one word, `left-hand` is three. All else is split into grapheme clusters (\X), so that
# an emoji with skin tone or joiners, a flag or an accented character is never cut in two.
_WORD = regex.compile(rf"\s+|{_LETTER}+(?:(?:['’]|(?<=\p{{Nd}})[.,:](?=\p{{Nd}})){_LETTER}+)*|\X")
_ENDS_WORD, _STARTS_WORD = regex.compile(rf"{_LETTER}$"), regex.compile(_LETTER)


def phrase_spans(
    chosen: str, rejected: str, chosen_phrases=None, rejected_phrases=None, *, paired: bool = False
) -> tuple[str, str, list[Span], list[Span]]:
    """Return both plain responses, without `<MASK>` tags, and the phrases in which they differ.

    One side may have no phrase: words only added or left out, or offsets given for the other side alone. `paired`:
    phrase i of one side belongs to phrase i of the other; of a word diff only replaced words count. Raises PhraseError
    for bad offsets or tags, no phrase on either side, or phrases that should be paired and are not.
    """
    tagged = any(tag in text for tag in (OPEN, CLOSE) for text in (chosen, rejected))
    chosen, chosen_tagged = strip_mask_tags(chosen)
    rejected, rejected_tagged = strip_mask_tags(rejected)
    if chosen_phrases is not None or rejected_phrases is not None:
        spans = check_spans(chosen_phrases, chosen, "chosen"), check_spans(rejected_phrases, rejected, "rejected")
        reason = "chosen_phrases and rejected_phrases are both empty"
    elif tagged:
        spans = chosen_tagged, rejected_tagged
        reason = f"the {OPEN} tags of both responses are empty"
    else:
        spans = word_diff(chosen, rejected, replaced=paired)
        reason = "the responses are identical" if chosen == rejected else "the responses differ in white space only"
        if paired and chosen != rejected:
            reason = "no words of one response stand in the place of others"
    if not any(spans):
        raise PhraseError(
            f"no phrase on either side: {reason}, so there is nothing to prefer. Drop the row, or mark what differs "
            "with chosen_phrases and rejected_phrases ([start, end) character offsets)."
        )
    if paired and len(spans[0]) != len(spans[1]):
        raise PhraseError(
            f"{len(spans[0])} phrases in the chosen and {len(spans[1])} in the rejected response: they are compared "
            "pair by pair, in their order. Mark as many on both sides."
        )
    return chosen, rejected, *spans


# --- given offsets ----------------------------------------------------------------------------------------------


def check_spans(spans, text: str, side: str) -> list[Span]:
    """Return given phrases as tuples, in their order; None means no phrases. `side`: chosen or rejected, for messages.

    Raises PhraseError: not pairs of integers, empty, inverted, outside the text, or overlapping.
    """
    checked = []
    for i, span in enumerate([] if spans is None else spans):
        name = f"{side}_phrases[{i}] = {span!r}"
        pair = list(span) if isinstance(span, Sequence) and not isinstance(span, str) else []
        if len(pair) != 2 or not all(isinstance(x, Integral) and not isinstance(x, bool) for x in pair):
            raise PhraseError(f"{name} is not a pair of integers. Give [start, end) character offsets.")
        start, end = int(pair[0]), int(pair[1])
        if not 0 <= start < end <= len(text):
            raise PhraseError(
                f"{name} is empty, inverted or outside of the {side} response, which has {len(text)} characters. "
                f"Offsets count characters (not bytes or tokens) of the plain text without {OPEN} tags."
            )
        checked.append((start, end))
    for left, right in pairwise(sorted(checked)):
        if right[0] < left[1]:
            raise PhraseError(f"{side}_phrases overlap: {list(left)} and {list(right)}. Merge or shorten them.")
    return checked


# --- <MASK> tags ------------------------------------------------------------------------------------------------


def strip_mask_tags(text: str) -> tuple[str, list[Span]]:
    """Take the tags out: `a <MASK> red </MASK> car` -> (`a red car`, [(2, 5)]).

    The published data puts one space inside each tag. It goes with the tag, unless two words would run together
    (`a<MASK> red</MASK> car`). Other white space stays where it is, outside the phrases. An empty pair of tags marks
    nothing. Raises PhraseError for unbalanced or nested tags.
    """
    parts = regex.split(rf"({OPEN}|{CLOSE})", text)
    plain, spans, start = parts[0], [], None
    for number, (tag, after) in enumerate(zip(parts[1::2], parts[2::2]), 1):
        if (tag == OPEN) != (start is None):
            reason = "no tag is open" if tag == CLOSE else f"the {OPEN} before it is not closed yet"
            raise PhraseError(f"tag {number} of the response is {tag}, but {reason}. {_TAG_REMEDY}")
        if tag == OPEN:
            if after.startswith(" ") and not _run_together(plain, after[1:]):
                after = after[1:]
            start = len(plain)
        else:
            if plain.endswith(" ") and len(plain) > start and not _run_together(plain[:-1], after):
                plain = plain[:-1]
            phrase = plain[start:].strip()
            at = plain.find(phrase, start)
            spans += [(at, at + len(phrase))] if phrase else []
            if len(plain) == start and after.startswith(" ") and (not plain or plain[-1].isspace()):
                after = after[1:]  # `a <MASK> </MASK> b`: the space that the empty pair brought
            start = None
        plain += after
    if start is not None:
        raise PhraseError(f"the last {OPEN} of the response is never closed. {_TAG_REMEDY}")
    return plain, spans


_TAG_REMEDY = f"Write {OPEN} and {CLOSE} in pairs, not nested, around each phrase."


def masked_spans(plain: str, masked: str) -> list[Span]:
    """Return the phrases of a tagged text, as offsets into its untagged column `plain`.

    Only `plain` tells how white space was around the tags. Raises PhraseError if the texts differ in more than tags
    and white space, or the tags are unbalanced or nested.
    """
    stripped, spans = strip_mask_tags(masked)
    if "".join(plain.split()) != "".join(stripped.split()):
        raise PhraseError(
            f"the tagged text is not the plain text with {OPEN} tags: {stripped[:80]!r} against {plain[:80]!r}. "
            "Make the two columns say the same, or leave the tagged ones out for a word diff."
        )
    visible = [[i for i, character in enumerate(t) if not character.isspace()] for t in (stripped, plain)]
    position = dict(zip(*visible))  # the n-th visible character of one text is the n-th of the other
    return [(position[start], position[end - 1] + 1) for start, end in spans]


def _run_together(left: str, right: str) -> bool:
    """Return whether two texts, put side by side, would make one word of two."""
    return bool(_ENDS_WORD.search(left) and _STARTS_WORD.match(right))


# --- word diff --------------------------------------------------------------------------------------------------


def split_words(text: str) -> list[Span]:
    """Return words, single punctuation marks, single CJK characters and emoji of a text, as character offsets."""
    return [match.span() for match in _WORD.finditer(text) if not match.group().isspace()]


def word_diff(chosen: str, rejected: str, *, replaced: bool = False) -> tuple[list[Span], list[Span]]:
    """Return the spans in which two responses differ, word by word.

    Adjacent differing words make one phrase, with the white space between them. White space by itself is not a
    difference, nor are two encodings of the same character (é composed or not); case is. `replaced`: words that only
    one response has, with nothing in their place in the other, do not count.
    """
    words = split_words(chosen), split_words(rejected)
    keys = [
        [unicodedata.normalize("NFC", text[start:end]) for start, end in spans]
        for text, spans in zip((chosen, rejected), words)
    ]
    phrases: tuple[list[Span], list[Span]] = ([], [])
    kinds = {"replace"} if replaced else {"replace", "insert", "delete"}
    # autojunk would ignore every word that makes up more than 1 % of a long response
    for kind, *cuts in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        for side, (first, last) in enumerate((cuts[:2], cuts[2:])):
            if kind in kinds and first < last:
                phrases[side].append((words[side][first][0], words[side][last - 1][1]))
    return phrases


# --- tokens -----------------------------------------------------------------------------------------------------


def spans_to_token_ids(
    spans: Sequence[Span], offsets: Sequence[Span], *, shift: int = 0, text: str | None = None
) -> list[int]:
    """Return k for every token that overlaps phrase k, from 1, and 0 for the others; of two phrases, the later.

    Raises PhraseError: a phrase without a token.

    `offsets`: [start, end) of each token as the fast tokenizer gives them, in characters of the `text` that it was
    given, where the response begins at `shift`. All byte tokens of a character carry the character's offsets, so they
    are marked together. A token that covers only the space before a phrase is not marked; one that holds the space and
    the word (`▁red`, `Ġred`) is. Special tokens, (0, 0), never are. Three oddities of tokenizers' offsets:

    - ByteLevel with `trim_offsets=True` gives a lone space no width; inside a phrase it is marked all the same.
    - Metaspace's dummy `▁` before the first word claims the first character, and is marked with it.
    - Unigram with byte fallback gives every byte token of a run of unknown characters the offsets of the whole run:
      with `text`, each gets the offsets of its own character. (BPE models, Llama's and Mistral's too, are exact.)
    """
    if text is not None:
        offsets = _split_byte_runs(offsets, text)
    ids = [0] * len(offsets)
    for number, (start, end) in enumerate(spans, 1):
        first, last = start + shift, end + shift
        hits = [i for i, (left, right) in enumerate(offsets) if left < last and first < right]
        if not any(offsets[i][0] < offsets[i][1] for i in hits):
            raise PhraseError(
                f"the phrase at characters [{start}, {end}) has no token. Either the response was cut before it, or "
                "the tokenizer drops these characters: move the phrase to whole words, or leave it out."
            )
        for i in hits:
            ids[i] = number
    return ids


def _split_byte_runs(offsets: Sequence[Span], text: str) -> list[Span]:
    """Give byte tokens that share the offsets of a run of characters the offsets of their own character."""
    fixed: list[Span] = []
    for (start, end), group in groupby(offsets, key=tuple):
        count = len(list(group))
        sizes = [len(character.encode("utf-8", "surrogatepass")) for character in text[start:end]]
        if end - start > 1 and count == sum(sizes):
            fixed += [(i, i + 1) for i, size in enumerate(sizes, start) for _ in range(size)]
        else:
            fixed += [(start, end)] * count
    return fixed
