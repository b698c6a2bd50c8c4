"""Clean a model's responses: cut off the reasoning, and recognise what is not an answer."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Media placeholders and other tokens of templates, such as `<image>`, `<|vision_start|>` and `<end_of_turn>`.
_CONTROL = re.compile(
    r"<\|[^\s|<>]{1,40}\|>|\[/?(?:INST|IMG(?:_\w+)?)\]"
    r"|</?(?:image|video|img|audio|IMG_CONTEXT|MASK|s|eos|bos|pad|\w+_of_(?:turn|text|image|utterance)"
    r"|(?:image|video)_(?:soft_)?(?:token|pad))>"
)


@dataclass(frozen=True)
class Failure:
    """The reason for a missing answer, in its place."""

    reason: str


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: only white space, zero-width characters or control characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)


def unusable(answer: str) -> Failure | None:
    """Return why an answer cannot become a response to train on: it is empty or holds a template's own tokens."""
    if is_blank(answer):
        return Failure("empty answer")
    token = _CONTROL.search(answer)
    return Failure(f"the answer holds {token[0]!r}, a token of templates") if token else None


def opens_thoughts(prompt: str) -> bool:
    """Return whether a prompt ends in the tag that opens thoughts."""
    return prompt.rstrip().endswith("<think>")


def without_reasoning(response: str, thinking: bool = False) -> str:
    """Return an answer, stripped, without a reasoning model's thoughts in front of it, up to the last `</think>`.

    Reasoning that never ended leaves an empty answer. Chat templates may put the opening tag into the prompt: with
    `thinking`, a response without the closing tag is all thoughts.
    """
    _, closed, text = response.rpartition("</think>")
    text = text.strip()
    return "" if text.startswith("<think>") or (thinking and not closed) else text
