"""Chat templates of the models' own checkpoints and of TRL: what is prompt, what is trained."""

import json
import re

import pytest
from chat_templates import ENDS, FAMILY, OFFICIAL, QUESTION, TEXT, dress, official, shipped, trained
from families import FAMILIES, text_model, tokenizer
from helpers import message, row, write_clip, write_image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.rows import read_row
from trl_vpo.errors import RowError
from trl_vpo.media.load import VideoOptions, load_image

ASKED = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}


def processor_of(kind):
    return text_model()[1] if kind == "text" else FAMILIES[kind][0]()[1]


def assert_prompt_is_generations(collator, example, tree):
    assert collator.encode_row(read_row(example), sides=()).trunks[0].ids == tree.trunks[0].ids


@pytest.fixture
def picture(tmp_path):
    return write_image(tmp_path / "a.png", (56, 56))


@pytest.mark.parametrize("name", OFFICIAL)
def test_prompt_and_response_of_official_templates(name, picture):
    """The prompt is what generation is given: by us, and by whoever uses the processor as its documentation says."""
    processor, prompt, response = official(name)
    tok, collator = processor.tokenizer, PreferenceCollator(processor)
    example = row("image", [picture])
    tree = collator.encode(example)
    assert tok.decode(tree.branches[0].ids) == response
    assert tok.decode(tree.branches[0].ids, skip_special_tokens=True).strip() == "a red square moves left."
    assert_prompt_is_generations(collator, example, tree)
    text = tok.decode(tree.trunks[0].ids)
    assert re.sub(r"(<image>|<\|image_pad\|>|<IMG_CONTEXT>|<video>)+", r"\1", text) == prompt
    messages = message("user", "<image>", QUESTION)
    messages[0]["content"][0]["image"] = load_image(picture)
    want = processor.apply_chat_template(messages, return_tensors="pt", **ASKED)["input_ids"][0].tolist()
    assert tree.trunks[0].ids == want


@pytest.mark.parametrize("name", [name for name in OFFICIAL if FAMILIES[FAMILY.get(name, name)][1]])
def test_prompt_of_a_video_is_generations(name, tmp_path):
    processor, _, response = official(name)
    collator = PreferenceCollator(processor, video=VideoOptions(num_frames=4))
    example = row("video", [write_clip(tmp_path / "a.mp4")])
    tree = collator.encode(example)
    assert processor.tokenizer.decode(tree.branches[0].ids) == response
    assert_prompt_is_generations(collator, example, tree)


@pytest.mark.parametrize("kind", ["text", "Qwen2-VL"])
@pytest.mark.parametrize("name", TEXT)
def test_templates_that_trl_ships(name, kind):
    processor = processor_of(kind)
    tok = getattr(processor, "tokenizer", processor)
    dress(processor, shipped(name), ["<eos>", *ENDS])
    example, collator = row(None, chosen="A cat.", rejected="A dog."), PreferenceCollator(processor)
    if TEXT[name] is None:
        with pytest.raises(RowError, match=r"writes the prompt differently for generation.*<think>.*A cat"):
            collator.encode(example)
        asked = collator.encode_row(read_row(example), sides=()).trunks[0].ids
        assert tok.decode(asked).endswith("<think>\n")
        return
    tree = collator.encode(example)
    assert tok.decode(tree.branches[0].ids) == TEXT[name]
    assert tok.decode(tree.branches[1].ids) == TEXT[name].replace("cat", "dog")
    if kind == "text":
        messages = message("user", QUESTION)
        if name not in ("idefics3", "llava_next", "smolvlm"):  # those take lists of parts only
            messages[0]["content"] = QUESTION
        assert tree.trunks[0].ids == tok.apply_chat_template(messages, **ASKED)["input_ids"]
    assert_prompt_is_generations(collator, example, tree)


@pytest.mark.parametrize("kind", ["text", "Qwen2-VL"])
def test_header_of_an_answer_behind_an_answer_is_prompt(kind):
    processor = processor_of(kind)
    example = row(None, chosen="a cat.", rejected="a dog.")
    example["prompt"] += message("assistant", "I see:")
    turns = "<|im_start|>user\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\nI see:<|im_end|>\n"
    assert trained(processor, example) == (turns + "<|im_start|>assistant\n", "a cat.<|im_end|>\n")


@pytest.mark.parametrize("response", ["a cat.", "a cat.<|im_end|>", "a cat.<|im_end|>\n", "a cat.<|im_end|>\n\n"])
def test_a_response_ends_once(response):
    processor = processor_of("Qwen2-VL")
    ending = response.removeprefix("a cat.") or "<|im_end|>"
    example = {"prompt": "What? ", "chosen": response, "rejected": "b"}
    assert trained(processor, example)[1].strip(" ") == "a cat." + ending
    assert trained(processor, row(None, chosen=response))[1] == "a cat.<|im_end|>\n"


@pytest.mark.parametrize("name", [name for name, response in TEXT.items() if response])
def test_special_tokens_of_an_answer_are_no_end(name):
    """A box, say. The end is the template's, which may not be EOS, or EOS; data may bring it."""
    head, _, tail = TEXT[name].partition("A cat.")
    ends = re.findall("<[^<>]+>", tail)
    tok = processor_of("text")
    dress(tok, shipped(name), ["<eos>", *ENDS, *ends, "<|box_end|>"])
    for end in {"", *ends, "".join(ends), "<eos>"}:
        marked = {"chosen_phrases": [[5, 6]], "rejected_phrases": [[2, 5]]}
        example = row(None, chosen=f"Box: 1<|box_end|>{end}", rejected="A cat.", **marked)
        tree = PreferenceCollator(tok, phrases=True).encode(example)
        assert [tok.decode(b.ids) for b in tree.branches] == [f"{head}Box: 1<|box_end|>{tail}", TEXT[name]]
        chosen = tree.branches[0]
        assert [tok.decode(t) for t, phrase in zip(chosen.ids, chosen.phrases) if phrase] == ["1"]
    for end, want in {"": "<eos>", ends[-1]: ends[-1], "<eos>": "<eos>"}.items():
        example = {"prompt": "Where? ", "chosen": f"1<|box_end|>{end}", "rejected": "It."}
        assert trained(tok, example)[1] == f"1<|box_end|>{want}"


def test_answers_behind_a_template_without_ends_stop(picture):
    processor = official("LLaVA-1.5")[0]
    processor.tokenizer.add_tokens(["<|box_end|>", "<|im_end|>"], special_tokens=True)
    for end in ("", "</s>", "</s></s>\n"):
        example = row("image", [picture], chosen=f"1 2<|box_end|>{end}", rejected=f"none.{end}")
        tree = PreferenceCollator(processor).encode(example)
        assert [processor.tokenizer.decode(b.ids) for b in tree.branches] == [" 1 2<|box_end|></s>", " none.</s>"]


def test_a_call_ends_as_its_template_ends_it():
    tok = processor_of("text")
    tok.add_tokens(["</tool_call>", "<|call|>"], special_tokens=True)
    calls = "{% for c in m.tool_calls or () %}{{ c.name }}{{ c.arguments | tojson }}</tool_call>{% endfor %}"
    end = "{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}"
    tok.chat_template = tok.chat_template.replace("{{ '<|im_end|>", f"{calls}{end}{{{{ '")
    for text in ("", "Let me look."):
        call = {"role": "assistant", "content": text, "tool_calls": [{"name": "zoom", "arguments": {"to": "word"}}]}
        assert trained(tok, row(None) | {"chosen": [call]})[1] == f'{text}zoom{{"to": "word"}}</tool_call><|call|>\n'


def test_all_messages_of_a_response_are_trained():
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "zoom", "arguments": {"to": 2}}]}
    answer = [call, {"role": "tool", "content": "done"}, {"role": "assistant", "content": "a cat."}]
    example = row(None) | {"chosen": answer}
    end = "<|im_end|>\n<|im_start|>"
    want = f"Let me look.zoom to 2{end}tool\ndone{end}assistant\na cat.<|im_end|>\n"
    for processor in map(processor_of, ("text", "Qwen2-VL")):
        calls = "{%- for c in m.tool_calls or () -%}{{ c.name }} to {{ c.arguments.to }}{%- endfor -%}"
        processor.chat_template = processor.chat_template.replace("{{ '<|im_end|>", calls + "{{ '<|im_end|>")
        assert trained(processor, example)[1] == want


def test_a_token_across_the_seam_leaves_the_prompt_whole():
    """Behind `assistant\\n` a response that begins with a line feed would make one token of both."""
    tok = tokenizer(corpus=["a\n\n b"] * 50, vocab_size=280)
    tok.chat_template = text_model()[1].chat_template
    assert len(tok("\n\n")["input_ids"]) == 1
    example = row(None, chosen="\n a cat.", rejected="\nb")
    tree = PreferenceCollator(tok).encode(example)
    want = tok("<|im_start|>user\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert tree.trunks[0].ids == want
    assert [tok.decode(b.ids) for b in tree.branches] == ["\n a cat.<|im_end|>\n", "\nb<|im_end|>\n"]


def test_one_of_several_templates():
    for processor in map(processor_of, ("text", "Qwen2-VL")):
        plain = processor.chat_template
        want = trained(processor, row(None))
        processor.chat_template = {"default": plain, "tool_use": "{{ tools[0].name }}#" + plain}
        assert trained(processor, row(None)) == want
        assert trained(processor, row(None, tools=[{"name": "zoom"}]))[0] == "zoom#" + want[0]
        processor.chat_template = {"rag": plain}
        with pytest.raises(RowError, match=r"several chat templates .rag., but none that is named 'default'"):
            PreferenceCollator(processor).encode(row(None))


def test_what_training_decides_is_no_template_argument():
    example = row(None, chat_template_kwargs={"add_generation_prompt": False})
    with pytest.raises(RowError, match="`chat_template_kwargs` sets add_generation_prompt"):
        PreferenceCollator(text_model()[1]).encode(example)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "SmolVLM", "text"])
def test_no_setting_of_a_tokenizer_cuts_or_pads(name, picture, tmp_path):
    processor = processor_of(name)
    example = row(None) if name == "text" else row("image", [picture])
    want = PreferenceCollator(processor).encode(example)
    processor.save_pretrained(tmp_path)
    cut = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 90}, "direction": "Left", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "#"}
    sides = {"truncation_side": "left", "padding_side": "left", "model_max_length": 16, "add_eos_token": True}
    kwargs = {"truncation": True, "max_length": 12, "padding": "max_length"}
    changes = {"tokenizer": {"truncation": cut, "padding": pad}, "tokenizer_config": kwargs | sides}
    changes |= {} if name == "text" else {"processor_config": {"text_kwargs": kwargs}}
    for stem, change in changes.items():
        path = tmp_path / f"{stem}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    loaded = (AutoTokenizer if name == "text" else AutoProcessor).from_pretrained(tmp_path)
    got = PreferenceCollator(loaded).encode(example)
    assert [t.ids for t in got.trunks] == [t.ids for t in want.trunks]
    assert [b.ids for b in got.branches] == [b.ids for b in want.branches]


def test_an_eos_that_the_tokenizer_adds_ends_no_prompt(picture):
    processor = official("LLaVA-1.5")[0]
    want = PreferenceCollator(processor).encode(row("image", [picture]))
    tok = processor.tokenizer
    specials = [(token, tok.convert_tokens_to_ids(token)) for token in ("<|begin_of_text|>", "</s>")]
    both = TemplateProcessing(single="<|begin_of_text|> $A </s>", special_tokens=specials)
    tok.backend_tokenizer.post_processor = both
    got = PreferenceCollator(processor).encode(row("image", [picture]))
    assert got.trunks[0].ids == [specials[0][1], *want.trunks[0].ids] and got.branches == want.branches


def test_what_a_processor_raises_names_the_row(picture, monkeypatch):
    processor = processor_of("Qwen2-VL")
    monkeypatch.setattr(processor.image_processor, "preprocess", lambda *args, **kwargs: {}["pixels"])
    with pytest.raises(RowError, match=r"row 3 \(id 'x'\): Qwen2VLProcessor refuses its prompt and media: KeyError"):
        PreferenceCollator(processor).encode(row("image", [picture], id="x") | {"_row_index": 3})
