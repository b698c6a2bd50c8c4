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

_NAME = r"(?:\w+[:_])?(?:think|thinking|thoughts?|reasoning)"  # `<seed:think>`, `<longcat_think>`
_THOUGHTS = (  # how thoughts begin, and how they end
    (rf"<{_NAME}>", rf"</{_NAME}>"),
    (r"\[think\]", r"\[/think\]"),  # Mistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    (r"<\|channel>(?:thought)?", r"<channel\|>"),  # Gemma 4
    ("<unused94>(?:thought)?", "<unused95>"),  # MedGemma
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|start_thinking\|>", r"<\|end_thinking\|>"),  # Command A
)
_BEGIN, _END = (re.compile(f"(?i:{'|'.join(tags)})") for tags in zip(*_THOUGHTS))
_OPENS = re.compile(rf"{_BEGIN.pattern}\s*\Z")


@dataclass(frozen=True)
class Failure:
    """The reason for a missing answer, in its place."""

    reason: str


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: only white space, zero-width characters or control characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)


def unusable(answer: str) -> Failure | None:
    """Return why an answer cannot be trained on: it is empty, or holds tokens of templates or thoughts."""
    if is_blank(answer):
        return Failure("empty answer")
    token = _CONTROL.search(answer) or _BEGIN.search(answer)
    return Failure(f"the answer holds {token[0]!r}, a token of templates") if token else None


def opens_thoughts(prompt: str) -> bool:
    """Return whether a prompt ends in a tag that opens thoughts."""
    return _OPENS.search(prompt) is not None


def is_thought_tag(text: str) -> bool:
    """Return whether a text is a tag around thoughts."""
    return any(tag.fullmatch(text) for tag in (_BEGIN, _END))


def behind_thoughts(text: str) -> str:
    """Return what follows the last tag that closes thoughts; without one, the text."""
    return _END.split(text)[-1]


def without_reasoning(response: str, thinking: bool = False) -> str:
    """Return an answer, stripped, without a reasoning model's thoughts: what is behind their last closing tag.

    Reasoning that never ended leaves an empty answer. Chat templates may put the opening tag into the prompt: with
    `thinking`, a response without a closing tag is all thoughts.
    """
    text = behind_thoughts(response).strip()
    return "" if _BEGIN.match(text) or (thinking and not _END.search(response)) else text
