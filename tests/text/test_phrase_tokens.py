"""Tokens of phrases, on byte-level BPE and SentencePiece tokenizers."""

import io
import json
from itertools import accumulate

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trl_vpo.text.phrases import PhraseError, spans_to_token_ids, split_words

TEXTS = [
    "A red car 🚗 turns left, then stops.",
    "一辆红色的汽车向左转，然后停下。",
    "👩\u200d🚀 waves 👍🏽 at the 🇫🇷🇩🇪 flags",
    "Das Café\u0301 öffnet — naïve, cafe\u0301!",
    "红车 a  dog\nruns 🙂🙃 汽車",
]


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


def token_size(token):
    """The bytes that a token of SentencePiece stands for."""
    return 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())


def owned_characters(tokens, text, size_of):
    """For each token, the characters of the text that its bytes belong to: an account without any offsets."""
    owner = [i for i, character in enumerate(text) for _ in character.encode()]
    ends = list(accumulate(map(size_of, tokens)))
    assert ends[-1] == len(owner), "the tokens do not spell the text"
    return [set(owner[start:end]) for start, end in zip([0, *ends], ends)]


def check_every_phrase(tokenizer, size_of, with_text=False):
    prompt = "USER: a 🙂? ASSISTANT: "
    for response in TEXTS:
        text = prompt + response
        encoding = tokenizer.encode(text, add_special_tokens=False)
        tokens, offsets = encoding.tokens, encoding.offsets
        # without the dummy prefix, far from the response
        owned = owned_characters([tokens[0].removeprefix("▁"), *tokens[1:]], text, size_of)
        words = split_words(response)
        for i, (start, _) in enumerate(words):
            for j in (i, min(i + 2, len(words) - 1)):  # phrases of one word and of up to three
                end = words[j][1]
                phrase = set(range(len(prompt) + start, len(prompt) + end))
                more = {"text": text} if with_text else {}
                mask = spans_to_token_ids([(start, end)], offsets, shift=len(prompt), **more)
                assert mask == [int(bool(owns & phrase)) for owns in owned], (response[start:end], tokens)


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_tokens_of_byte_level_bpe(trim_offsets):
    tokenizer = byte_level(trim_offsets)
    assert len(tokenizer.encode("車").tokens) > 1  # characters do split
    check_every_phrase(tokenizer, len)  # a character for each byte


def test_tokens_of_sentencepiece_bpe(sentencepiece):
    assert sentencepiece.encode("🙂", add_special_tokens=False).tokens[1:] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    check_every_phrase(sentencepiece, token_size)
    check_every_phrase(sentencepiece, token_size, with_text=True)


def test_tokens_of_sentencepiece_unigram_need_the_text():
    tokenizer = unigram()
    check_every_phrase(tokenizer, token_size, with_text=True)
    encoding = tokenizer.encode("🙂🙃")
    assert set(encoding.offsets) == {(0, 2)}  # the reason for `text`: all eight byte tokens claim both characters
    assert sum(spans_to_token_ids([(0, 1)], encoding.offsets)) == 8
    assert spans_to_token_ids([(0, 1)], encoding.offsets, text="🙂🙃") == [1, 1, 1, 1, 0, 0, 0, 0]


def test_space_before_a_phrase(sentencepiece):
    text = "the 汽 red"  # a lone ▁ before the character that is not in the vocabulary
    encoding = sentencepiece.encode(text, add_special_tokens=False)
    assert encoding.tokens == ["▁the", "▁", "<0xE6>", "<0xB1>", "<0xBD>", "▁red"]
    assert spans_to_token_ids([(4, 5)], encoding.offsets) == [0, 0, 1, 1, 1, 0]
    assert spans_to_token_ids([(6, 9)], encoding.offsets) == [0, 0, 0, 0, 0, 1]
    assert spans_to_token_ids([(0, 5)], encoding.offsets) == [1, 1, 1, 1, 1, 0]
    # documented: the dummy prefix claims the first character
    encoding = sentencepiece.encode("汽 red", add_special_tokens=False)
    assert spans_to_token_ids([(0, 1)], encoding.offsets) == [1, 1, 1, 1, 0]


def test_nfc_normalizer_keeps_the_character_together():
    """Qwen's tokenizers compose characters first; the combining mark then has no token of its own."""
    tokenizer = byte_level(False, normalizers.NFC())
    encoding = tokenizer.encode("x e\u0301 y")
    assert spans_to_token_ids([(2, 4)], encoding.offsets) == [0, 0, 1, 1, 0, 0]
    with pytest.raises(PhraseError, match=r"\[3, 4\) has no token"):
        spans_to_token_ids([(3, 4)], encoding.offsets)


def test_special_and_cut_tokens():
    offsets = [(0, 0), (0, 3), (3, 7), (7, 7), (0, 0)]
    assert spans_to_token_ids([(0, 3)], offsets) == [0, 1, 0, 0, 0]
    assert spans_to_token_ids([(0, 1), (5, 6)], offsets) == [0, 1, 2, 0, 0]
    assert spans_to_token_ids([], offsets) == [0] * 5
    with pytest.raises(PhraseError, match=r"characters \[2, 6\) has no token"):
        spans_to_token_ids([(2, 6)], offsets, shift=5)
    with pytest.raises(PhraseError, match="has no token"):
        spans_to_token_ids([(2, 3)], [(0, 0), (1, 2)])
