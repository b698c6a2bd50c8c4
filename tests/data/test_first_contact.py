"""Chat templates in the form in which the models' own checkpoints carry them: what is prompt, what is trained."""

import json
import re
from pathlib import Path

import pytest
import trl
from families import FAMILIES, text_model, tokenizer
from helpers import message, row, write_clip, write_image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.rows import read_row
from trl_vpo.errors import RowError
from trl_vpo.media.load import VideoOptions, load_image

FOUR = VideoOptions(num_frames=4)
QUESTION, ANSWER = "What is in the picture?", ["a", " red", " square", " moves", " left", "."]
SPACED = [" ", "a", *ANSWER[1:]]

# --- templates ----------------------------------------------------------------------------------------------------

PARTS = "{% for c in m['content'] | selectattr('type', 'equalto', '%s') %}"
LOOP, END = "{% for m in messages %}", "{% endfor %}"
VICUNA = (
    LOOP
    + "{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    + "".join(PARTS.replace("%s", kind) + "{{ '<" + kind + ">\n' }}" + END for kind in ("image", "video"))
    + PARTS.replace("%s", "text")
    + "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION = (
    LOOP
    + "{{ '<|im_start|>' + m['role'] + ' ' }}"
    + "".join(PARTS.replace("%s", kind) + "{{ '<" + kind + ">' }}" + END for kind in ("image", "video"))
    + PARTS.replace("%s", "text")
    + "{{ '\n' + c['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    LOOP + "SYSTEM<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}<|im_end|>\n{% else %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
IDEFICS = (
    LOOP
    + "{{ m['role'].capitalize() }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% elif c['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif c['type'] == 'video' %}{{ '<video>\n' }}{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_THINKING = QWEN.replace("SYSTEM", "").replace(
    "{% for c in m", "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% for c in m"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'user' %}<|user|>\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|begin_of_image|><image><|end_of_image|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] | trim }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = PIXTRAL.replace("'[INST]'", "'[INST] '").replace("'[/INST]'", "' [/INST]'")
MISTRAL = MISTRAL.replace("m['content'] + eos", "' ' + m['content'][0]['text'] + eos")
COHERE = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ m['role'] | upper }}{{ m['content'] }}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>ASSISTANT{% endif %}"
)
OFFICIAL = {  # name: family, template, special tokens (the first is EOS), prompt of an image row, response
    "LLaVA-1.5": (
        "LLaVA-1.5",
        VICUNA,
        ["</s>"],
        "USER: <image>\nWhat is in the picture? ASSISTANT:",
        [*SPACED, "</s>"],
    ),
    "LLaVA-NeXT-Video": (
        "LLaVA-NeXT-Video",
        VICUNA,
        ["</s>"],
        "USER: <image>\nWhat is in the picture? ASSISTANT:",
        [*SPACED, "</s>"],
    ),
    "LLaVA-OneVision": (
        "LLaVA-OneVision",
        ONEVISION,
        ["<|im_end|>"],
        "<|im_start|>user <image>\nWhat is in the picture?<|im_end|><|im_start|>assistant\n",
        [*ANSWER, "<|im_end|>"],
    ),
    "Qwen2-VL": (
        "Qwen2-VL",
        QWEN.replace("SYSTEM", SYSTEM),
        ["<|im_end|>"],
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>What is in the picture?<|im_end|>\n<|im_start|>assistant\n",
        [*ANSWER, "<|im_end|>", "\n"],
    ),
    "Qwen3-VL": (
        "Qwen3-VL",
        QWEN.replace("SYSTEM", ""),
        ["<|im_end|>"],
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is in the picture?<|im_end|>\n"
        "<|im_start|>assistant\n",
        [*ANSWER, "<|im_end|>", "\n"],
    ),
    "Idefics2": (
        "Idefics2",
        IDEFICS,
        ["</s>"],
        "User:<fake_token_around_image><image><fake_token_around_image> What is in the picture?<end_of_utterance>\n"
        "Assistant:",
        [*SPACED, "<end_of_utterance>", "\n"],
    ),
    "SmolVLM": (
        "SmolVLM",
        "<|im_start|>" + IDEFICS,
        ["<end_of_utterance>"],
        "<|im_start|>User:<fake_token_around_image><global-img><image><fake_token_around_image>"
        "What is in the picture?<end_of_utterance>\nAssistant:",
        [*SPACED, "<end_of_utterance>", "\n"],
    ),
    "InternVL": (
        "InternVL",
        INTERNVL,
        ["<|im_end|>"],
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\n",
        [*ANSWER, "<|im_end|>", "\n"],
    ),
    "Qwen3-VL-Thinking": (
        "Qwen3-VL",
        QWEN3_THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        ["<|im_end|>"],
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is in the picture?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n",
        ["\n", "</think>", "\n", "\n", *ANSWER, "<|im_end|>", "\n"],
    ),
    "GLM-4.1V": (
        "LLaVA-1.5",
        GLM,
        ["<|endoftext|>", "<|user|>", "<|assistant|>"],
        "[gMASK]<sop><|user|>\n<|begin_of_image|><image><|end_of_image|>What is in the picture?<|assistant|>\n",
        [*ANSWER, "<|endoftext|>"],
    ),
    "Llama-3.2-Vision": (
        "LLaVA-1.5",
        LLAMA,
        ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>What is in the picture?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        [*ANSWER, "<|eot_id|>"],
    ),
    "Gemma 3": (
        "LLaVA-1.5",
        GEMMA,
        ["<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<|begin_of_text|><start_of_turn>user\n<image>What is in the picture?<end_of_turn>\n<start_of_turn>model\n",
        [*ANSWER, "<end_of_turn>", "\n"],
    ),
    "Pixtral": (
        "LLaVA-1.5",
        PIXTRAL,
        ["</s>", "[INST]", "[/INST]"],
        "<|begin_of_text|>[INST]<image>What is in the picture?[/INST]",
        [*ANSWER, "</s>"],
    ),
    "Mistral": (
        "LLaVA-1.5",
        MISTRAL,
        ["</s>", "[INST]", "[/INST]"],
        "<|begin_of_text|>[INST] <image>What is in the picture? [/INST]",
        [*SPACED, "</s>"],
    ),
    "Cohere2, printed contents": (
        "LLaVA-1.5",
        COHERE,
        ["<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"],
        None,  # a template of a text model has no place for an image
        [*ANSWER, "<|END_OF_TURN_TOKEN|>"],
    ),
}
OFFICIAL["Qwen2.5-VL"] = ("Qwen2.5-VL", *OFFICIAL["Qwen2-VL"][1:])


# --- what comes of them -------------------------------------------------------------------------------------------


def official(name):
    """The processor of a family with the template, special tokens, and BOS of a checkpoint."""
    family, template, specials, prompt, response = OFFICIAL[name]
    processor = FAMILIES[family][0]()[1]
    dress(processor, processor.tokenizer, template, specials)
    return processor, prompt, response


def dress(processor, tok, template, specials):
    tok.add_tokens([*specials, "<|begin_of_text|>", "<think>", "</think>"], special_tokens=True)
    tok.eos_token, processor.chat_template = specials[0], template
    if "bos_token" in template:
        tok.bos_token = "<|begin_of_text|>"


def pieces(tok, ids):
    return [tok.decode([i]) for i in ids]


def short(text):
    """The text with one placeholder for each run of them."""
    return re.sub(r"(<image>|<\|image_pad\|>|<IMG_CONTEXT>|<video>)+", r"\1", text)


@pytest.fixture
def picture(tmp_path):
    return write_image(tmp_path / "a.png", (56, 56))


@pytest.mark.parametrize("name", OFFICIAL)
def test_prompt_and_response_of_official_templates(name, picture):
    processor, prompt, response = official(name)
    tok, collator = processor.tokenizer, PreferenceCollator(processor)
    example = row("image", [picture]) if prompt else row(None)
    tree = collator.encode(example)
    assert pieces(tok, tree.branches[0].ids) == response
    # the prompt is what generation is given: by us, and by whoever uses the processor as its documentation says
    assert collator.encode_row(read_row(example), sides=()).trunks[0].ids == tree.trunks[0].ids
    if prompt:
        assert short("".join(pieces(tok, tree.trunks[0].ids))) == prompt
        messages = message("user", "<image>", QUESTION)
        messages[0]["content"][0]["image"] = load_image(picture)
        more = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        want = processor.apply_chat_template(messages, **more)["input_ids"][0].tolist()
        assert tree.trunks[0].ids == want


@pytest.mark.parametrize("name", [name for name in OFFICIAL if FAMILIES[OFFICIAL[name][0]][1]])
def test_prompt_of_a_video_is_generations(name, tmp_path):
    processor, _, response = official(name)
    collator = PreferenceCollator(processor, video=VideoOptions(num_frames=4))
    example = row("video", [write_clip(tmp_path / "a.mp4")])
    tree = collator.encode(example)
    assert pieces(processor.tokenizer, tree.branches[0].ids) == response
    assert collator.encode_row(read_row(example), sides=()).trunks[0].ids == tree.trunks[0].ids


TEXT = {  # templates of text models, as TRL ships them: how a response reads, EOS being <eos>; None: refused
    "cohere": "A cat.<|END_OF_TURN_TOKEN|>",
    "cohere2": "A cat.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseekv3": None,  # opens a thought for generation that the conversation does not have
    "gemma": "A cat.<end_of_turn>\n",
    "gemma3": "A cat.<end_of_turn>\n",
    "gemma4": "A cat.<turn|>\n",
    "glm4moe": "\n<think></think>\nA cat.<eos>",
    "gptoss": "<|channel|>final<|message|>A cat.<|return|>",
    "idefics3": " A cat.<end_of_utterance>\n",
    "lfm2": "A cat.<|im_end|>\n",
    "lfm2_2_5_vl": "A cat.<|im_end|>\n",
    "llama3": "A cat.<|eot_id|>",
    "llama3_2": "A cat.<|eot_id|>",
    "llava_next": " A cat.</s> ",
    "nemotron_3_nano": "</think>A cat.<|im_end|>\n",
    "phi3": "A cat.<|end|>\n<eos>",
    "qwen2_5": "A cat.<|im_end|>\n",
    "qwen3": "<think>\n\n</think>\n\nA cat.<|im_end|>\n",
    "qwen3_5_nothink": "A cat.<|im_end|>\n",
    "qwen3_5_think": "\n</think>\n\nA cat.<|im_end|>\n",
    "qwen3_instruct_2507": "A cat.<|im_end|>\n",
    "qwen3_vl": "A cat.<|im_end|>\n",
    "smolvlm": " A cat.<end_of_utterance>\n",
}
ENDS = sorted(set(re.findall(r"<[^>]+>(?=\s*$)", "\n".join(filter(None, TEXT.values())), re.M)) | {"</s>"})


@pytest.mark.parametrize("kind", ["text", "Qwen2-VL"])
@pytest.mark.parametrize("name", TEXT)
def test_templates_that_trl_ships(name, kind):
    processor = text_model()[1] if kind == "text" else FAMILIES[kind][0]()[1]
    tok = getattr(processor, "tokenizer", processor)
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    dress(processor, tok, template, ["<eos>", *ENDS])
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
    more = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    if kind == "text":
        messages = message("user", QUESTION)
        if name not in ("idefics3", "llava_next", "smolvlm"):  # those take lists of parts only
            messages[0]["content"] = QUESTION
        assert tree.trunks[0].ids == tok.apply_chat_template(messages, **more)["input_ids"]
    assert collator.encode_row(read_row(example), sides=()).trunks[0].ids == tree.trunks[0].ids


# --- rows that come in another form -------------------------------------------------------------------------------


def trained(processor, example):
    """Text of the prompt, and of the chosen response."""
    tree = PreferenceCollator(processor).encode(example)
    tok = getattr(processor, "tokenizer", processor)
    return tok.decode(tree.trunks[0].ids), tok.decode(tree.branches[0].ids)


@pytest.mark.parametrize("kind", ["text", "Qwen2-VL"])
def test_header_of_an_answer_behind_an_answer_is_prompt(kind):
    processor = text_model()[1] if kind == "text" else FAMILIES[kind][0]()[1]
    example = row(None, chosen="a cat.", rejected="a dog.")
    example["prompt"] += message("assistant", "I see:")
    turns = "<|im_start|>user\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\nI see:<|im_end|>\n"
    assert trained(processor, example) == (turns + "<|im_start|>assistant\n", "a cat.<|im_end|>\n")


@pytest.mark.parametrize("said", ["a cat.", "a cat.<|im_end|>", "a cat.<|im_end|>\n", "a cat.<|im_end|>\n\n"])
def test_a_response_ends_once(said):
    processor = FAMILIES["Qwen2-VL"][0]()[1]
    ending = said.removeprefix("a cat.") or "<|im_end|>"
    assert trained(processor, {"prompt": "What? ", "chosen": said, "rejected": "b"})[1].strip(" ") == "a cat." + ending
    assert trained(processor, row(None, chosen=said))[1] == "a cat.<|im_end|>\n"


def test_all_messages_of_a_response_are_trained():
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "zoom", "arguments": {"to": 2}}]}
    answer = [call, {"role": "tool", "content": "done"}, {"role": "assistant", "content": "a cat."}]
    example = row(None) | {"chosen": answer}
    end = "<|im_end|>\n<|im_start|>"
    want = f"Let me look.zoom to 2{end}tool\ndone{end}assistant\na cat.<|im_end|>\n"
    for processor in (text_model()[1], FAMILIES["Qwen2-VL"][0]()[1]):
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
    for processor in (text_model()[1], FAMILIES["Qwen2-VL"][0]()[1]):
        plain = processor.chat_template
        want = trained(processor, row(None))
        processor.chat_template = {"default": plain, "tool_use": "{{ tools[0].name }}#" + plain}
        assert trained(processor, row(None)) == want
        assert trained(processor, row(None, tools=[{"name": "zoom"}]))[0] == "zoom#" + want[0]
        processor.chat_template = {"rag": plain}
        with pytest.raises(RowError, match=r"several chat templates .rag., but none that is named 'default'"):
            PreferenceCollator(processor).encode(row(None))


def test_a_template_that_leaves_text_out_is_refused():
    processor = FAMILIES["Qwen2-VL"][0]()[1]
    template = processor.chat_template
    without_system = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + template
    for broken, role in (
        (without_system, "system"),
        (re.sub(r"{{ ((c|m)\['(text|content)'\]) }}", r"{{ \1.split('</think>')[-1] }}", template), "assistant"),
    ):
        processor.chat_template = broken
        example = row(None, chosen="<think>It purrs.</think>a cat.")
        example["prompt"] = message("system", "Be brief.") + example["prompt"]
        with pytest.raises(RowError, match=f"does not write the text of the {role} message as it is"):
            PreferenceCollator(processor).encode(example)


CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"to": 2}}}
CALLS, TOOLS = [{"role": "assistant", "tool_calls": [CALL]}], {"tools": [CALL]}
RESULT = [{"role": "tool", "content": 'A "cat".\n'}]
WHY, SYSTEM_ROW = message("user", "Why?"), message("system", "Answer") + message("user", "Answer: hi")
LEFT_OUT = {  # what a template does before it writes the messages: a row in which that leaves something out, what
    "{% set messages = messages | selectattr('role', 'in', ['user', 'assistant']) | list %}": [
        ({"prompt": message("human", "Hi.") + WHY}, "text of the human message"),
        ({"prompt": message("User", "Hi.") + WHY}, "text of the User message"),
        ({"prompt": message("developer", "Be brief.") + WHY}, "text of the developer message"),
        ({"prompt": SYSTEM_ROW}, "text of the system message"),
        ({"prompt": WHY + RESULT}, "text of the tool message"),
    ],
    "{% set messages = messages[-2:] %}": [({"prompt": WHY + message("assistant", "So.") + WHY}, "text of the user")],
    "{% set messages = messages | rejectattr('content', 'in', ['So.', [{'type': 'text', 'text': 'So.'}]]) | list %}": [
        ({"prompt": WHY + message("assistant", "So.") + WHY}, "text of the assistant message"),
    ],
    "": [
        (
            {"prompt": WHY + CALLS + message("user", "Go on.")},
            "function's name in a tool call of the assistant message",
        ),
        ({"chosen": CALLS}, "function's name in a tool call of the assistant message"),
        (TOOLS, "name of the tool"),
        (TOOLS | {"prompt": message("user", "May you zoom?")}, "name of the tool"),
        ({"chosen": [{"role": "assistant", "content": "b", "reasoning_content": "Hm."}]}, "`reasoning_content`"),
    ],
}


@pytest.mark.parametrize("does", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused(does):
    tok = text_model()[1]
    tok.chat_template = does + tok.chat_template
    for more, what in LEFT_OUT[does]:
        with pytest.raises(RowError, match=f"does not write the {what}"):
            PreferenceCollator(tok).encode(row(None) | more)


def test_white_space_in_a_text_is_the_datas():
    tok = text_model()[1]
    turns = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ SAID | trim }}<|im_end|>{{ '\n' }}{% endfor %}"
    turns += "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    for spoilt in ("m.content | join(' ')", "m.content.replace(' ', '')"):
        tok.chat_template = turns.replace("SAID", spoilt)
        with pytest.raises(RowError, match="does not write the text of the user message"):
            PreferenceCollator(tok).encode(row(None))
    tok.chat_template = turns.replace("SAID", "m.content.replace('</think>', '</think>\n\n')")
    example = row(None, chosen=" <think>It purrs.</think>a cat.\n")
    assert trained(tok, example)[1] == "<think>It purrs.</think>\n\na cat.<|im_end|>\n"
    tok.chat_template = turns.replace("SAID", "(m.content if loop.last else m.content.split('</think>')[-1])")
    example["prompt"] = WHY + message("assistant", "<think>Hm.</think>\nSo.") + WHY
    assert "assistant\nSo.<|im_end|>" in trained(tok, example)[0]


def test_tools_calls_and_results_that_are_written_pass():
    tok = text_model()[1]
    written = "{{ m.tool_calls | tojson if m.tool_calls else m.content | tojson if m.role == 'tool' else m.content }}"
    tok.chat_template = "{{ tools | tojson }}" + tok.chat_template.replace("{{ m['content'] }}", written)
    prompt, response = trained(tok, row(None, **TOOLS) | {"prompt": WHY + CALLS + RESULT, "chosen": CALLS})
    assert prompt.count('"zoom"') == 2 and 'A \\"cat\\".\\n' in prompt and response.startswith('[{"')


def test_what_training_decides_is_no_template_argument():
    example = row(None, chat_template_kwargs={"add_generation_prompt": False})
    with pytest.raises(RowError, match="`chat_template_kwargs` sets add_generation_prompt"):
        PreferenceCollator(text_model()[1]).encode(example)


# --- settings that cut and pad ------------------------------------------------------------------------------------


def edit(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "SmolVLM", "text"])
def test_no_setting_of_a_tokenizer_cuts_or_pads(name, picture, tmp_path):
    processor = text_model()[1] if name == "text" else FAMILIES[name][0]()[1]
    example = row(None) if name == "text" else row("image", [picture])
    want = PreferenceCollator(processor).encode(example)
    processor.save_pretrained(tmp_path)
    cut = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 90}, "direction": "Left", "pad_to_multiple_of": None}
    edit(tmp_path / "tokenizer.json", truncation=cut, padding=pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "#"})
    sides = {"truncation_side": "left", "padding_side": "left", "model_max_length": 16}
    kwargs = {"truncation": True, "max_length": 12, "padding": "max_length"}
    edit(tmp_path / "tokenizer_config.json", **kwargs, **sides, add_eos_token=True)
    if name != "text":
        edit(tmp_path / "processor_config.json", text_kwargs=kwargs)
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
    processor = FAMILIES["Qwen2-VL"][0]()[1]
    monkeypatch.setattr(processor.image_processor, "preprocess", lambda *args, **kwargs: {}["pixels"])
    with pytest.raises(RowError, match=r"row 3 \(id 'x'\): Qwen2VLProcessor refuses its prompt and media: KeyError"):
        PreferenceCollator(processor).encode(row("image", [picture], id="x") | {"_row_index": 3})
