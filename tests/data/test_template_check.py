"""Templates that leave something out are refused; those that write it in their own way pass."""

import re

import pytest
from chat_templates import trained
from families import FAMILIES, text_model
from helpers import message, row

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.errors import RowError


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
        ({"prompt": message("system", "user") + WHY}, "text of the system message"),  # a word of the template's own
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


ZOOM = {"name": "zoom", "parameters": {"type": "object", "properties": {"to": {"type": "integer"}}}}


@pytest.mark.parametrize(
    ("tool", "call", "what"),
    [
        ("t.name", "c | tojson", "parameters of the tool"),
        ("t | tojson", "c.function.name", "arguments in a tool call of the assistant message"),
        ("t | tojson", "'zoom' ~ c.function.arguments | tojson", "function's name in a tool call"),
        ("t | tojson", "c | tojson", None),
        ("t.name ~ t.parameters.properties | join", "c.function.name ~ c.function.arguments.to", None),
    ],
)
def test_parts_of_tools_and_calls_are_written(tool, call, what):
    tok = text_model()[1]
    calls = f"{{% for c in m.tool_calls or [] %}}{{{{ {call} }}}}{{% endfor %}}{{{{ m.content }}}}"
    written = tok.chat_template.replace("{{ m['content'] }}", calls)
    tok.chat_template = f"{{% for t in tools %}}{{{{ {tool} }}}}{{% endfor %}}" + written
    example = row(None) | {"tools": [ZOOM], "chosen": CALLS}
    if what is None:
        assert "zoom" in trained(tok, example)[1]
        return
    with pytest.raises(RowError, match=f"does not write the {what}"):
        PreferenceCollator(tok).encode(example)


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
