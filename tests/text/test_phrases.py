"""Phrases from offsets, tags and word diffs."""

import random

import pytest

from trl_vpo.text.phrases import PhraseError, check_spans, masked_spans, phrase_spans, strip_mask_tags, word_diff

ASTRONAUT = "👩\u200d🚀"  # one grapheme of three code points


def cut(text, spans):
    return [text[start:end] for start, end in spans]


# --- tags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tagged, plain, phrases",
    [
        (  # the published example of the format
            "This is a <MASK> correct </MASK> or <MASK> preferred </MASK> answer.",
            "This is a correct or preferred answer.",
            ["correct", "preferred"],
        ),
        ("<MASK> Red </MASK> car", "Red car", ["Red"]),
        ("it is <MASK> red </MASK>.", "it is red.", ["red"]),
        ("a <MASK>red</MASK> car", "a red car", ["red"]),
        ("a<MASK> red</MASK> car", "a red car", ["red"]),
        ("un<MASK>happy</MASK>", "unhappy", ["happy"]),
        ("a <MASK> big red </MASK> car", "a big red car", ["big red"]),
        ("<MASK> a </MASK><MASK> b </MASK> c", "a b c", ["a", "b"]),
        ("<MASK> a </MASK> <MASK> b </MASK>", "a b", ["a", "b"]),
        ("一辆<MASK> 红色 </MASK>的车", "一辆红色的车", ["红色"]),
        ("a <MASK>\nred\n</MASK> car", "a \nred\n car", ["red"]),
        ("a <MASK> </MASK> car", "a car", []),
        ("a  car\n", "a  car\n", []),
        ("", "", []),
    ],
)
def test_strip_mask_tags(tagged, plain, phrases):
    text, spans = strip_mask_tags(tagged)
    assert text == plain
    assert cut(text, spans) == phrases
    assert masked_spans(plain, tagged) == spans


@pytest.mark.parametrize(
    "text, message",
    [
        ("a <MASK> red car", "never closed"),
        ("a red </MASK> car", "tag 1 .* no tag is open"),
        ("<MASK> a <MASK> red </MASK> car </MASK>", "tag 2 .* not closed yet"),
        ("<MASK> a </MASK> red </MASK>", "tag 3 .* no tag is open"),
    ],
)
def test_bad_tags(text, message):
    with pytest.raises(PhraseError, match=message):
        strip_mask_tags(text)


def test_masked_spans_follow_the_white_space_of_the_plain_text():
    plain = "It is red .\nThen  blue."
    spans = masked_spans(plain, "It is <MASK> red </MASK>. <MASK> Then blue </MASK> .")
    assert cut(plain, spans) == ["red", "Then  blue"]
    with pytest.raises(PhraseError, match="not the plain text"):
        masked_spans("It is red.", "It was <MASK> red </MASK>.")


# --- word diff --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rejected, left, right",
    [
        ("a red car", "a car", ["red"], []),
        ("a car", "a big red car", [], ["big red"]),
        ("the the the dog", "the the dog", ["the"], []),
        ("It is red.", "It is blue!", ["red."], ["blue!"]),
        ("Red car", "red car", ["Red"], ["red"]),
        ("it isn't on", "it is on", ["isn't"], ["is"]),
        ("left-hand at 3.5 m", "right-hand at 3.6 m", ["left", "3.5"], ["right", "3.6"]),
        ("a red  \n car", "a blue bus", ["red  \n car"], ["blue bus"]),
        ("红色的车", "蓝色的卡车", ["红"], ["蓝", "卡"]),
        ("コーヒーです", "ミルクです", ["コーヒー"], ["ミルク"]),
        ("빨간 차가 왼쪽", "파란 차가 왼쪽", ["빨간"], ["파란"]),
        (f"{ASTRONAUT} ok", "👨\u200d🚀 ok", [ASTRONAUT], ["👨\u200d🚀"]),
        ("🇫🇷🇩🇪", "🇫🇷🇫🇮", ["🇩🇪"], ["🇫🇮"]),
        ("cafe\u0301 a", "caf\u00e9 b", ["a"], ["b"]),
        ("नमस्ते दुनिया", "नमस्ते भारत", ["दुनिया"], ["भारत"]),
        ("", "a b", [], ["a b"]),
        ("same", "same", [], []),
        ("", "", [], []),
    ],
)
def test_word_diff(chosen, rejected, left, right):
    spans = word_diff(chosen, rejected)
    assert (cut(chosen, spans[0]), cut(rejected, spans[1])) == (left, right)


def rest(text, spans):
    """The text without its phrases and white space."""
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + text[end:]
    return "".join(text.replace("e\u0301", "é").split())


@pytest.mark.parametrize(
    "vocabulary, glue",
    [
        (["the", "a", "red", "blue", "car", "dog", "runs", "left", "right"], [" ", "  ", "\n", "\t"]),
        (["红", "车", "的", "🙂", ASTRONAUT, "👍🏽", "🇫🇷", "é", "e\u0301", "，", "ก็", "red", "3.5"], [" ", "  "]),
        (["红", "车", "🙂", ASTRONAUT, "👍🏽", "，", "!"], [""]),
    ],
)
def test_cut_texts_say_the_same(vocabulary, glue):
    rng = random.Random(7)
    for _ in range(300):
        words = [rng.choice(vocabulary) for _ in range(rng.randint(0, 25))]
        others = [
            w for word in words for w in rng.choice([[word]] * 6 + [[], [word] * 2, rng.choices(vocabulary, k=2)])
        ]
        texts = ["".join(word + rng.choice(glue) for word in side) for side in (words, others)]
        spans = word_diff(*texts)
        assert rest(texts[0], spans[0]) == rest(texts[1], spans[1])
        for text, side in zip(texts, spans):
            assert check_spans(side, text, "chosen") == side
            assert all(phrase == phrase.strip() for phrase in cut(text, side))


def test_long_repetitive_responses_are_not_junk():
    words = ["the"] * 300 + ["red"] + ["the"] * 300  # difflib's autojunk would drop "the"
    chosen, rejected = " ".join(words), " ".join(words).replace("red", "blue")
    assert [cut(t, s) for t, s in zip((chosen, rejected), word_diff(chosen, rejected))] == [["red"], ["blue"]]


# --- the three sources ------------------------------------------------------------------------------------------


def test_offsets_come_before_tags_before_the_diff():
    assert phrase_spans("a red car", "a blue car") == ("a red car", "a blue car", [(2, 5)], [(2, 6)])
    tagged = phrase_spans("a <MASK> red car </MASK>", "a blue car")
    assert tagged == ("a red car", "a blue car", [(2, 9)], [])
    given = phrase_spans("a <MASK> red </MASK> car", "a blue car", [[6, 9]], [[7, 10], [0, 1]])
    assert given == ("a red car", "a blue car", [(6, 9)], [(7, 10), (0, 1)])
    assert phrase_spans("a red car", "a blue car", [(2, 5)])[2:] == ([(2, 5)], [])
    assert phrase_spans("a car", "a red car")[2:] == ([], [(2, 5)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("same", "same"), "no phrase on either side: the responses are identical"),
        (("same  text", "same text"), "differ in white space only"),
        (("a red car", "a blue car", [], []), "both empty"),
        (("a red car", "a blue car", [], None), "both empty"),
        (("a <MASK> </MASK> car", "a red car"), "tags of both responses are empty"),
        (("a car", "a bus", [], [[2, 11]]), r"rejected_phrases\[0\] = .* outside of the rejected response, .* 5"),
        *[(("a car", "a bus", spans), "empty, inverted or") for spans in ([[3, 3]], [[5, 3]])],
        (("a red car", "a bus", [[4, 8], [0, 5]]), r"overlap: \[0, 5\] and \[4, 8\]"),
        *[(("a car", "a bus", [span]), "not a pair of integers") for span in ([False, True], [1, 2, 3], "ab")],
    ],
)
def test_unusable_phrases(arguments, message):
    with pytest.raises(PhraseError, match=message):
        phrase_spans(*arguments)


def test_check_spans_keeps_order_and_neighbours():
    assert check_spans([[5, 10], (0, 5)], "0123456789", "chosen") == [(5, 10), (0, 5)]
    assert check_spans(None, "text", "chosen") == []


def test_paired_phrases():
    """DPA: of a word diff what was replaced; of what is given as many on both sides, in the given order."""
    texts = ("a big red car stops", "a blue car stops now")
    assert phrase_spans(*texts)[2:] == ([(2, 9)], [(2, 6), (17, 20)])
    assert phrase_spans(*texts, paired=True)[2:] == ([(2, 9)], [(2, 6)])
    given = phrase_spans(*texts, [[10, 13], [2, 9]], [[2, 6], [7, 10]], paired=True)
    assert given[2:] == ([(10, 13), (2, 9)], [(2, 6), (7, 10)])
    with pytest.raises(PhraseError, match="1 phrases in the chosen and 2 in the rejected response"):
        phrase_spans(*texts, [[2, 9]], [[2, 6], [7, 10]], paired=True)
    with pytest.raises(PhraseError, match="no phrase on either side: no words of one response stand in the place of"):
        phrase_spans("a car", "a red car", paired=True)
