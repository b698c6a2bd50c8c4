"""Chat templates in the form in which the models' own checkpoints carry them, and processors that have them."""

import re
from pathlib import Path

import trl
from families import FAMILIES

from trl_vpo.data.collator import PreferenceCollator

QUESTION, ANSWER = "What is in the picture?", "a red square moves left."


def shipped(name):
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


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
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
Q, A = QUESTION, ANSWER
IM_END = f"{A}<|im_end|>\n"
QWEN_PROMPT = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{Q}<|im_end|>\n<|im_start|>assistant\n"
QWEN2 = (QWEN.replace("SYSTEM", SYSTEM), "<|im_end|>", "<|im_start|>system\nBe helpful.<|im_end|>\n" + QWEN_PROMPT)
THINKING = QWEN3_THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
IDEFICS_PROMPT = f"User:<fake_token_around_image>%s<image><fake_token_around_image>%s{Q}<end_of_utterance>\nAssistant:"
LLAMA_EOS = "<|eot_id|> <|start_header_id|> <|end_header_id|>"
VICUNA_CASE = (VICUNA, "</s>", f"USER: <image>\n{Q} ASSISTANT:", f" {A}</s>")
FAMILY = {"Qwen3-VL-Thinking": "Qwen3-VL", "Llama-3.2-Vision": "LLaVA-1.5", "LLaVA-NeXT": "LLaVA-1.5"}  # else its name
# name: template, special tokens (the first is EOS), prompt of an image row, response
OFFICIAL = {
    "LLaVA-1.5": VICUNA_CASE,
    "LLaVA-NeXT-Video": VICUNA_CASE,
    "LLaVA-OneVision": (
        ONEVISION,
        "<|im_end|>",
        f"<|im_start|>user <image>\n{Q}<|im_end|><|im_start|>assistant\n",
        f"{A}<|im_end|>",
    ),
    "Qwen2-VL": (*QWEN2, IM_END),
    "Qwen2.5-VL": (*QWEN2, IM_END),
    "Qwen3-VL": (shipped("qwen3_vl"), "<|im_end|>", QWEN_PROMPT, IM_END),
    "Qwen3-VL-Thinking": (THINKING, "<|im_end|>", QWEN_PROMPT + "<think>\n", f"\n</think>\n\n{IM_END}"),
    "Idefics2": (IDEFICS, "</s>", IDEFICS_PROMPT % ("", " "), f" {A}<end_of_utterance>\n"),
    "SmolVLM": (
        "<|im_start|>" + IDEFICS,
        "<end_of_utterance>",
        "<|im_start|>" + IDEFICS_PROMPT % ("<global-img>", ""),
        f" {A}<end_of_utterance>\n",
    ),
    "InternVL": (
        INTERNVL,
        "<|im_end|>",
        f"<|im_start|>user\n<img><IMG_CONTEXT></img>\n{Q}<|im_end|>\n<|im_start|>assistant\n",
        IM_END,
    ),
    "Llama-3.2-Vision": (
        LLAMA,
        LLAMA_EOS,
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>{Q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"{A}<|eot_id|>",
    ),
    "LLaVA-NeXT": (shipped("llava_next"), "</s>", f"[INST] <image>\n{Q} [/INST]", f" {A}</s> "),
}
_BY_RESPONSE = {  # how a response reads, EOS being <eos> -> templates of text models, as TRL ships them
    "A cat.<|END_OF_TURN_TOKEN|>": "cohere",
    "A cat.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>": "cohere2",
    None: "deepseekv3",  # refused: it opens a thought for generation that the conversation does not have
    "A cat.<end_of_turn>\n": "gemma gemma3",
    "A cat.<turn|>\n": "gemma4",
    "\n<think></think>\nA cat.<eos>": "glm4moe",
    "<|channel|>final<|message|>A cat.<|return|>": "gptoss",
    " A cat.<end_of_utterance>\n": "idefics3 smolvlm",
    "A cat.<|im_end|>\n": "lfm2 lfm2_2_5_vl qwen2_5 qwen3_5_nothink qwen3_instruct_2507 qwen3_vl",
    "A cat.<|eot_id|>": "llama3 llama3_2",
    " A cat.</s> ": "llava_next",
    "</think>A cat.<|im_end|>\n": "nemotron_3_nano",
    "A cat.<|end|>\n<eos>": "phi3",
    "<think>\n\n</think>\n\nA cat.<|im_end|>\n": "qwen3",
    "\n</think>\n\nA cat.<|im_end|>\n": "qwen3_5_think",
}
TEXT = {name: response for response, names in _BY_RESPONSE.items() for name in names.split()}
ENDS = sorted(set(re.findall(r"<[^>]+>(?=\s*$)", "\n".join(filter(None, TEXT.values())), re.M)) | {"</s>"})


def official(name):
    """The processor of a family with the template, special tokens, and BOS of a checkpoint."""
    template, specials, prompt, response = OFFICIAL[name]
    processor = FAMILIES[FAMILY.get(name, name)][0]()[1]
    dress(processor, template, specials.split())
    return processor, prompt, response


def dress(processor, template, specials):
    """Give a processor or tokenizer another template, with its special tokens."""
    tok = getattr(processor, "tokenizer", processor)
    tok.add_tokens([*specials, "<|begin_of_text|>", "<think>", "</think>"], special_tokens=True)
    tok.eos_token, processor.chat_template = specials[0], template
    if "bos_token" in template:
        tok.bos_token = "<|begin_of_text|>"


def trained(processor, example):
    """Text of the prompt, and of the chosen response."""
    tree = PreferenceCollator(processor).encode(example)
    tok = getattr(processor, "tokenizer", processor)
    return tok.decode(tree.trunks[0].ids), tok.decode(tree.branches[0].ids)
