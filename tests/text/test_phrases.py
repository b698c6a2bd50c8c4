"""Phrases from offsets, tags and word diffs, and their tokens on byte-level BPE and SentencePiece tokenizers."""

import io
import json
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trl_vpo.errors import PhraseError
from trl_vpo.text.phrases import (
    check_spans,
    masked_spans,
    phrase_spans,
    spans_to_token_mask,
    split_words,
    strip_mask_tags,
    word_diff,
)

ASTRONAUT = "👩\u200d🚀"  # one grapheme of three code points
TEXTS = [
    "A red car 🚗 turns left, then stops.",
    "一辆红色的汽车向左转，然后停下。",
    f"{ASTRONAUT} waves 👍🏽 at the 🇫🇷🇩🇪 flags",
    "Das Café\u0301 öffnet — naïve, cafe\u0301!",
    "红车 a  dog\nruns 🙂🙃 汽車",
]


def cut(text, spans):
    return [text[start:end] for start, end in spans]


def remove(text, spans):
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + " " + text[end:]
    return text


def test_module_is_light():
    code = "import sys, trl_vpo.text.phrases; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


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
        ("a car turns <MASK> left </MASK>", "a car turns left", ["left"]),
        ("it is <MASK> red </MASK>.", "it is red.", ["red"]),
        ("(<MASK> red </MASK>)", "(red)", ["red"]),
        ("a <MASK>red</MASK> car", "a red car", ["red"]),
        ("a<MASK> red</MASK> car", "a red car", ["red"]),
        ("a<MASK> red </MASK>car", "a red car", ["red"]),
        ("un<MASK>happy</MASK>", "unhappy", ["happy"]),
        ("a <MASK> big red </MASK> car", "a big red car", ["big red"]),
        ("<MASK> a </MASK><MASK> b </MASK> c", "a b c", ["a", "b"]),
        ("<MASK> a </MASK> <MASK> b </MASK>", "a b", ["a", "b"]),
        ("一辆<MASK> 红色 </MASK>的车", "一辆红色的车", ["红色"]),
        ("a <MASK>\nred\n</MASK> car", "a \nred\n car", ["red"]),
        ("a <MASK> </MASK> car", "a car", []),
        ("a <MASK></MASK> car", "a car", []),
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
        ("a red car", "a blue car", ["red"], ["blue"]),
        ("a red car", "a car", ["red"], []),
        ("a car", "a big red car", [], ["big red"]),
        ("the the the dog", "the the dog", ["the"], []),
        ("It is red.", "It is blue!", ["red."], ["blue!"]),
        ("It is red.", "It is red", ["."], []),
        ("Red car", "red car", ["Red"], ["red"]),
        ("it isn't on", "it is on", ["isn't"], ["is"]),
        ("left-hand at 3.5 m", "right-hand at 3.6 m", ["left", "3.5"], ["right", "3.6"]),
        ("a red  \n car", "a blue bus", ["red  \n car"], ["blue bus"]),
        ("红色的车", "蓝色的卡车", ["红"], ["蓝", "卡"]),
        ("コーヒーです", "ミルクです", ["コーヒー"], ["ミルク"]),
        ("빨간 차가 왼쪽", "파란 차가 왼쪽", ["빨간"], ["파란"]),
        (f"{ASTRONAUT} ok", "👨\u200d🚀 ok", [ASTRONAUT], ["👨\u200d🚀"]),
        ("👍🏽👍", "👍🏿👍", ["👍🏽"], ["👍🏿"]),
        ("🇫🇷🇩🇪", "🇫🇷🇫🇮", ["🇩🇪"], ["🇫🇮"]),
        ("see 5️⃣", "see 6️⃣", ["5️⃣"], ["6️⃣"]),
        ("o\u0308l", "ol", ["o\u0308l"], ["ol"]),
        ("cafe\u0301 a", "caf\u00e9 b", ["a"], ["b"]),
        ("नमस्ते दुनिया", "नमस्ते भारत", ["दुनिया"], ["भारत"]),
        ("one two", "drei vier", ["one two"], ["drei vier"]),
        ("", "a b", [], ["a b"]),
        ("same", "same", [], []),
        ("every  day\n", " every day", [], []),
        ("", "", [], []),
    ],
)
def test_word_diff(chosen, rejected, left, right):
    spans = word_diff(chosen, rejected)
    assert (cut(chosen, spans[0]), cut(rejected, spans[1])) == (left, right)


def edited(words, vocabulary, rng):
    """The words with random insertions, deletions, replacements and repetitions."""
    out = []
    for word in words:
        kind = rng.choice(["keep"] * 6 + ["drop", "insert", "replace", "repeat"])
        out += {"keep": [word], "drop": [], "repeat": [word, word]}.get(kind, [rng.choice(vocabulary)])
        out += [word] if kind == "insert" else []
    return out


@pytest.mark.parametrize(
    "vocabulary, glue",
    [
        (["the", "a", "red", "blue", "car", "dog", "runs", "left", "right"], [" ", "  ", "\n", "\t"]),
        (
            ["红", "车", "的", "🙂", ASTRONAUT, "👍🏽", "🇫🇷", "é", "e\u0301", "，", "ก็", "red", "3.5", "the"],
            [" ", "  "],
        ),
        (["红", "车", "🙂", ASTRONAUT, "👍🏽", "，", "!"], [""]),
    ],
)
def test_cut_texts_say_the_same(vocabulary, glue):
    rng = random.Random(7)
    for _ in range(300):
        words = [rng.choice(vocabulary) for _ in range(rng.randint(0, 25))]
        pair = [words, edited(words, vocabulary, rng)]
        texts = ["".join(word + rng.choice(glue) for word in side) for side in pair]
        spans = word_diff(*texts)
        rests = [remove(text, side) for text, side in zip(texts, spans)]
        same = [rest.replace("e\u0301", "é") for rest in rests]
        assert same[0].split() == same[1].split() or (
            "" in glue and "".join(same[0].split()) == "".join(same[1].split())
        )
        for text, side in zip(texts, spans):
            assert check_spans(side, text, "chosen") == side
            assert all(phrase == phrase.strip() for phrase in cut(text, side))


def test_a_single_edit_is_found_exactly():
    rng = random.Random(3)
    for _ in range(100):
        words = [f"w{i}" for i in range(rng.randint(2, 30))]
        at = rng.randrange(len(words))
        other = [*words[:at], "new", *words[at + 1 :]]
        spans = word_diff(" ".join(words), " ".join(other))
        assert (cut(" ".join(words), spans[0]), cut(" ".join(other), spans[1])) == ([words[at]], ["new"])


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
    assert given == ("a red car", "a blue car", [(6, 9)], [(0, 1), (7, 10)])
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
        (("a red car", "a blue car", [[2, 5]], [[2, 11]]), r"rejected_phrases\[0\] = \[2, 11\] lies outside"),
    ],
)
def test_unusable_phrases(arguments, message):
    with pytest.raises(PhraseError, match=message):
        phrase_spans(*arguments)


@pytest.mark.parametrize(
    "spans, message",
    [
        ([[0, 11]], r"chosen_phrases\[0\] = \[0, 11\] lies outside the chosen response, which has 10 characters"),
        ([[-1, 2]], "lies outside"),
        ([[3, 3]], "empty or inverted"),
        ([[5, 3]], "empty or inverted"),
        ([[4, 8], [0, 5]], r"overlap: \[0, 5\] and \[4, 8\]"),
        ([[0.0, 2]], "not a pair of integers"),
        ([[False, True]], "not a pair of integers"),
        ([[1, 2, 3]], "not a pair of integers"),
        ([2, 5], r"chosen_phrases\[0\] = 2 is not a pair"),
        (["ab"], "not a pair of integers"),
    ],
)
def test_check_spans_refuses(spans, message):
    with pytest.raises(PhraseError, match=message):
        check_spans(spans, "0123456789", "chosen")


def test_check_spans_sorts_and_keeps_neighbours():
    assert check_spans([[5, 10], (0, 5)], "0123456789", "chosen") == [(0, 5), (5, 10)]
    assert check_spans(None, "text", "chosen") == []


# --- tokens -----------------------------------------------------------------------------------------------------


def byte_level(trim_offsets, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a red car turns left", "the dog runs", "红色的汽车", "🙂"] * 5, trainer)
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A Llama tokenizer: SentencePiece BPE with byte fallback, trained here and converted by transformers."""
    import sentencepiece as spm
    from transformers import LlamaTokenizerFast

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red car turns left", "the dog runs", "a blue flag waves"] * 30),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return LlamaTokenizerFast.from_pretrained(str(folder)).backend_tokenizer


def unigram():
    """SentencePiece's Unigram model with byte fallback, as the tokenizers library runs it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=340, special_tokens=["<unk>", *bytes_], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["a red car turns left", "the dog runs", "a blue flag waves"] * 5, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = []  # the byte tokens are plain vocabulary, not markers to be found in texts
    return Tokenizer.from_str(json.dumps(state))


def token_bytes(token):
    """The bytes that a token of one of these tokenizers stands for, from its string alone."""
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def byte_level_bytes(token):
    """The same for a byte-level token: GPT-2's printable stand-ins back to bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    table |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    return bytes(table[character] for character in token)


def owned_characters(tokens, text, to_bytes):
    """For each token, the characters of the text that its bytes belong to: an account without any offsets."""
    owner = [i for i, character in enumerate(text) for _ in character.encode()]
    at, owned = 0, []
    for token in tokens:
        size = len(to_bytes(token))
        owned.append(set(owner[at : at + size]))
        at += size
    assert at == len(owner), "the tokens do not spell the text"
    return owned


def check_every_phrase(tokenizer, to_bytes, with_text=False):
    prompt = "USER: a 🙂? ASSISTANT: "
    for response in TEXTS:
        text = prompt + response
        encoding = tokenizer.encode(text, add_special_tokens=False)
        tokens, offsets = encoding.tokens, encoding.offsets
        if tokens[0] == "▁" or tokens[0].startswith("▁"):  # the dummy prefix, far from the response
            tokens = [tokens[0].removeprefix("▁"), *tokens[1:]]
        owned = owned_characters(tokens, text, to_bytes)
        words = split_words(response)
        for i, (start, _) in enumerate(words):
            for j in (i, min(i + 2, len(words) - 1)):  # phrases of one word and of up to three
                end = words[j][1]
                phrase = set(range(len(prompt) + start, len(prompt) + end))
                more = {"text": text} if with_text else {}
                mask = spans_to_token_mask([(start, end)], offsets, shift=len(prompt), **more)
                assert mask == [int(bool(owns & phrase)) for owns in owned], (response[start:end], tokens)


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_tokens_of_byte_level_bpe(trim_offsets):
    tokenizer = byte_level(trim_offsets)
    assert len(tokenizer.encode("車").tokens) > 1  # characters do split
    check_every_phrase(tokenizer, byte_level_bytes)


def test_tokens_of_sentencepiece_bpe(sentencepiece):
    assert sentencepiece.encode("🙂", add_special_tokens=False).tokens[1:] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    check_every_phrase(sentencepiece, token_bytes)
    check_every_phrase(sentencepiece, token_bytes, with_text=True)


def test_tokens_of_sentencepiece_unigram_need_the_text():
    tokenizer = unigram()
    check_every_phrase(tokenizer, token_bytes, with_text=True)
    encoding = tokenizer.encode("🙂🙃")
    assert set(encoding.offsets) == {(0, 2)}  # the reason for `text`: all eight byte tokens claim both characters
    assert sum(spans_to_token_mask([(0, 1)], encoding.offsets)) == 8
    assert spans_to_token_mask([(0, 1)], encoding.offsets, text="🙂🙃") == [1, 1, 1, 1, 0, 0, 0, 0]


def test_space_before_a_phrase(sentencepiece):
    text = "the 汽 red"  # a lone ▁ before the character that is not in the vocabulary
    encoding = sentencepiece.encode(text, add_special_tokens=False)
    assert encoding.tokens == ["▁the", "▁", "<0xE6>", "<0xB1>", "<0xBD>", "▁red"]
    assert spans_to_token_mask([(4, 5)], encoding.offsets) == [0, 0, 1, 1, 1, 0]
    assert spans_to_token_mask([(6, 9)], encoding.offsets) == [0, 0, 0, 0, 0, 1]
    assert spans_to_token_mask([(0, 5)], encoding.offsets) == [1, 1, 1, 1, 1, 0]
    # documented: the dummy prefix claims the first character
    encoding = sentencepiece.encode("汽 red", add_special_tokens=False)
    assert spans_to_token_mask([(0, 1)], encoding.offsets) == [1, 1, 1, 1, 0]


def test_nfc_normalizer_keeps_the_character_together():
    """Qwen's tokenizers compose characters first; the combining mark then has no token of its own."""
    tokenizer = byte_level(False, normalizers.NFC())
    encoding = tokenizer.encode("x e\u0301 y")
    assert spans_to_token_mask([(2, 4)], encoding.offsets) == [0, 0, 1, 1, 0, 0]
    with pytest.raises(PhraseError, match=r"\[3, 4\) has no token"):
        spans_to_token_mask([(3, 4)], encoding.offsets)


def test_special_and_cut_tokens():
    offsets = [(0, 0), (0, 3), (3, 7), (7, 7), (0, 0)]
    assert spans_to_token_mask([(0, 3)], offsets) == [0, 1, 0, 0, 0]
    assert spans_to_token_mask([(0, 1), (5, 6)], offsets) == [0, 1, 1, 0, 0]
    assert spans_to_token_mask([], offsets) == [0] * 5
    with pytest.raises(PhraseError, match=r"characters \[2, 6\) has no token"):
        spans_to_token_mask([(2, 6)], offsets, shift=5)
    with pytest.raises(PhraseError, match="has no token"):
        spans_to_token_mask([(2, 3)], [(0, 0), (1, 2)])
