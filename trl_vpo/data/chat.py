"""Messages -> text: the prompt exactly as generation is given it, and the responses that a conversation adds to it.

The prompt is the chat template's rendering with `add_generation_prompt=True`. A response is what the rendering of the
whole conversation adds behind it, compared after white space at the seam, as in TRL with the end-of-turn token and the
line feed behind it. Where the template ends no turn, the response ends with EOS, so that the model learns to stop. A
special token in which the text itself ends, such as the closing one of a box, is no end of turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from trl_vpo.data.messages import MARKERS, response_text
from trl_vpo.data.template_check import SHOWN, LeftOutError, check_parts, check_prompt, check_response
from trl_vpo.errors import RowError

if TYPE_CHECKING:  # rows are read where nothing heavy is imported
    from transformers import PreTrainedTokenizerBase

# Tokenizers and processors bring settings along that cut or pad: "truncation" and "padding" in tokenizer.json,
# `max_length` or `text_kwargs` in their configs. A text is tokenized whole, whatever they say.
WHOLE = {"truncation": False, "padding": False, "add_special_tokens": False}
RESERVED = {"chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict"}
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)
WORD = "word"


class SeamError(RowError):
    """A template that writes the prompt in two ways."""


def chat_template(processing_class: Any, tools: Any = None) -> str | None:
    """Return the chat template; of several the one named "tool_use" for rows with tools, otherwise "default"."""
    template = getattr(processing_class, "chat_template", None)
    if not isinstance(template, dict):
        return template
    name = "tool_use" if tools and "tool_use" in template else "default"
    if name not in template:
        raise RowError(
            f"{type(processing_class).__name__} has several chat templates ({', '.join(template)}), but none that is "
            "named 'default'. Set `processing_class.chat_template` to the one to use."
        )
    return template[name]


def render_chat(
    processing_class: Any, prompt: list[dict], responses: list[list[dict]], template_kwargs: dict
) -> tuple[str, list[str]]:
    """Return the text of the prompt and of each response, given as messages with typed contents.

    Templates differ in what they take as a message's content. The forms are tried in turn; the first one that shows
    the model every text is used. Raises RowError if the template refuses the messages, leaves a text out, or renders
    prompt and conversation differently.
    """
    from transformers import ProcessorMixin

    template = chat_template(processing_class, template_kwargs.get("tools"))
    if template is None:
        raise RowError(
            f"has messages, but {type(processing_class).__name__} has no chat template. Put a "
            "chat_template.jinja into the model's folder (in Python: `processing_class.chat_template`), or give "
            "prompt and responses as strings."
        )
    if reserved := RESERVED & set(template_kwargs):
        raise RowError(f"`chat_template_kwargs` sets {', '.join(sorted(reserved))}: training sets that. Take it out.")
    # Passed explicitly: some processors (SmolVLM) swap in a template of their own when the messages hold a video.
    write = partial(processing_class.apply_chat_template, tokenize=False, chat_template=template, **template_kwargs)
    refusals: list[Exception] = []
    # Templates of processors want lists, those of tokenizers strings; some want lists from users alone.
    forms = [lambda message: False, lambda message: message["role"] != "user", lambda message: True]
    for as_text in forms if isinstance(processing_class, ProcessorMixin) else reversed(forms):
        conversation = [_formed(messages, as_text) for messages in (prompt, *(responses or [_message(WORD)]))]
        try:
            start, texts = _write(write, *conversation)
            tails = [_tail(write, conversation[0], response) for response in conversation[1:]]
            return start, [_ended(*pair, _tokenizer(processing_class)) for pair in zip(texts, tails)][: len(responses)]
        except REFUSALS as error:  # "roles must alternate", "no system role"; or contents in another form
            if isinstance(error, SeamError) and not responses:  # a model that is only asked may open a thought
                return write(_formed(prompt, as_text), add_generation_prompt=True), []
            refusals.append(error)
    raise _refusal(refusals)


def ended(text: str, processing_class: Any) -> str:
    """Return a response that is a string with EOS behind it, unless it ends with EOS or as the template ends turns."""
    tokenizer = _tokenizer(processing_class)
    end = end_of_turn(text, tokenizer)
    if end and tokenizer.convert_tokens_to_ids(end) in (tokenizer.eos_token_id, stop_token(processing_class)):
        return text
    return text + (tokenizer.eos_token or "")


def end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token that a text ends with, white space aside; None if it ends with words."""
    last = tokenizer(text.rstrip()[-SHOWN:], **WHOLE)["input_ids"][-1:]
    token = tokenizer.decode(last).strip()
    return token if token and not tokenizer.decode(last, skip_special_tokens=True) else None


def without_ends(text: str, tail: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text without EOS and the template's ends of turn, those in `tail`: data may bring what is added."""
    while (end := end_of_turn(text, tokenizer)) and (end in tail or end == tokenizer.eos_token):
        shorter = text.rstrip().removesuffix(end)
        if shorter == text:  # the tokenizer writes the token in another way
            break
        text = shorter
    return text


def stop_token(processing_class: Any) -> int | None:
    """Return the id of the token with which the chat template ends an answer; None if it does not say."""
    try:
        _, (text,) = render_chat(processing_class, _message(WORD, "user"), [_message(WORD)], {})
    except RowError:
        return None
    tokenizer = _tokenizer(processing_class)
    end = end_of_turn(text, tokenizer)
    return None if end is None else tokenizer.convert_tokens_to_ids(end)


def same_start(a: Sequence, b: Sequence) -> int:
    """Return how many items two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    return getattr(processing_class, "tokenizer", processing_class)


def _message(text: str, role: str = "assistant") -> list[dict]:
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def _write(write: partial, prompt: list[dict], *responses: list[dict]) -> tuple[str, list[str]]:
    """Return the prompt of generation and what each response adds to it, each checked for its texts."""
    start = write(prompt, add_generation_prompt=True)
    check_prompt(prompt, start)
    conversations = [write(prompt + response) for response in responses]
    for response, rendered in zip(responses, conversations):
        check_parts(prompt, response, write.keywords.get("tools"), write, rendered)
    texts = [_added(start, rendered) for rendered in conversations]
    for messages, text in zip(responses, texts):
        check_response(messages, text)
    return start, texts


def _refusal(refusals: list[Exception]) -> RowError:
    order = (SeamError, TemplateError, LeftOutError, RowError)  # what says most first; jinja's own are of another form
    error = min(refusals, key=lambda error: order.index(type(error)) if type(error) in order else len(order))
    if isinstance(error, RowError):
        return error
    return RowError(
        f"the chat template refuses its messages: {str(error).rstrip('.')}. Rewrite them, or drop the row."
    )


def _formed(messages: list[dict], as_text: Callable[[dict], bool]) -> list[dict]:
    texts = [as_text(m) and all(part["type"] == "text" for part in m["content"]) for m in messages]
    return [{**m, "content": response_text([m])} if text else m for m, text in zip(messages, texts)]


def _added(prompt: str, whole: str) -> str:
    """Return what a conversation adds to the prompt; where only white space at the seam differs, the prompt wins."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    head = prompt.rstrip()
    if whole.startswith(head):
        return whole[len(head) :].lstrip()
    at = max(0, same_start(prompt, whole) - SHOWN // 2)
    shown = [repr(text[at : at + SHOWN]) for text in (prompt, whole)]
    raise SeamError(
        "the chat template writes the prompt differently for generation than in a conversation, so that a response "
        f"would be trained after another prompt than it is generated after. For generation: {shown[0]}; in the "
        f"conversation: {shown[1]}. Choose another template (`processing_class.chat_template`), other "
        "`chat_template_kwargs`, or give prompt and responses as strings."
    )


def _tail(write: partial, prompt: list[dict], response: list[dict]) -> str:
    """Return what the template writes behind the text of a response: its end of turn, if it has one."""
    *before, last = response
    if response_text([last]):
        content = WORD if isinstance(last["content"], str) else _message(WORD)[0]["content"]
        last = last | {"content": content}
    return write([*prompt, *before, last]).rpartition(WORD)[2]


def _ended(text: str, tail: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the response with one end: the template's, which is in `tail`, or EOS."""
    end, own = end_of_turn(text, tokenizer), end_of_turn(tail, tokenizer)
    if own is None or end not in (own, tokenizer.eos_token):
        return without_ends(text, "", tokenizer).rstrip() + (tokenizer.eos_token or "")
    body, tail = text.rstrip(), tail.strip()
    last = tail if body.endswith(tail) else end
    return without_ends(body.removesuffix(last), last, tokenizer) + last + text[len(body) :]


def placeholder_token(processing_class: Any, kind: str) -> str | None:
    """Return the text of a processor's token of images or videos; BLIP's have it as an `AddedToken`."""
    token = getattr(processing_class, f"{kind}_token", None)
    return token and str(token)


def place_in_string(processing_class: Any, prompt: str, counts: dict[str, int]) -> str:
    """Return a string prompt with the model's own placeholder for every image and video (`counts` by kind).

    Placeholders that it carries stay. `<image>` and `<video>` become the model's own where they stand; without any,
    the media go in front. Raises RowError if placeholders and media do not agree in number.
    """
    front = ""
    for marker, kind in MARKERS.items():
        count = counts[kind]
        own = [text for text in (placeholder_token(processing_class, kind),) if text]
        if count:
            own.append(_placeholder(processing_class, kind))
        placed = max((prompt.count(text) for text in own), default=0)
        if placed == 0 and count and prompt.count(marker) in (0, count):
            if marker in prompt:
                prompt = prompt.replace(marker, own[-1])
            else:
                front += own[-1] * count
        elif placed != count:
            raise RowError(
                f"the prompt has {placed or prompt.count(marker)} {kind} placeholder(s) ({own[-1]!r}), but the row "
                f"has {count} {kind}(s). Put one `{marker}` into the prompt for each, or none: then they go in front."
            )
    return front + prompt


def _placeholder(processing_class: Any, kind: str) -> str:
    """Return the text of one image or video in a prompt, as the chat template writes it; without one, its token."""
    token = placeholder_token(processing_class, kind)
    template = chat_template(processing_class)
    if template is None and token:
        return token
    if template is None:
        raise RowError(
            f"has {kind}s, and nothing says what stands for one in its prompt: {type(processing_class).__name__} has "
            f"neither a chat template nor a token of {kind}s."
        )
    (plain,) = _message(WORD, "user")
    media = plain | {"content": [{"type": kind}, *plain["content"]]}
    write = partial(processing_class.apply_chat_template, tokenize=False, chat_template=template)
    with_it, without = write([media]), write([plain])
    start = same_start(with_it, without)
    end = same_start(with_it[start:][::-1], without[start:][::-1])
    return with_it[start : len(with_it) - end]
