"""A check of what a chat template writes: every text, tool and call has to be in it. Many templates leave some out."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from trl_vpo.errors import RowError

PRINTED = ("'type': 'text'", '"type": "text"')  # a list of parts in the output of a template that wants text
SHOWN = 300  # characters in a message
TAG = re.compile(r"<[^<>\s]+>")
THOUGHT = re.compile(r"(?i)(?:</(?:think|thinking|reasoning)>|<channel\|>|\[/think\]|◁/think▷)")
REASONING = ("reasoning_content", "reasoning", "thinking")


class LeftOutError(RowError):
    """A template that writes the texts, but not what comes with them: tools, calls, thoughts."""


def check_prompt(prompt: list[dict], tools: list[dict] | None, rendered: str) -> None:
    """Raise a RowError if something of the prompt is not in what the template writes."""
    listed = [("name of the tool", _name(tool)) for tool in tools or ()]
    # Of earlier answers only what follows a thought is needed, for templates take thoughts out.
    _check(prompt, [*_statements(prompt, lambda text: THOUGHT.split(text)[-1]), *listed], rendered)


def check_response(response: list[dict], rendered: str) -> None:
    """Raise a RowError if something of a response is not in what the template writes."""
    thoughts = [(f"`{key}` of the answer", response[-1].get(key)) for key in REASONING]
    _check(response, [*_statements(response), *thoughts], rendered)


def _statements(messages: list[dict], cut: Callable[[str], str] = str) -> Iterator[tuple[str, Any]]:
    """Give the texts of the messages and the names of their calls, each behind what it is.

    A text beside a call is left out: templates take it for a thought. So are tools' results, see `_check`.
    """
    for message in messages:
        role, calls = message["role"], message.get("tool_calls") or ()
        yield from ((f"function's name in a tool call of the {role} message", _name(call)) for call in calls)
        if not calls and role != "tool":
            texts = _texts(message)
            yield from ((f"text of the {role} message", cut(t) if role == "assistant" else t) for t in texts)


def _check(messages: list[dict], statements: list[tuple[str, Any]], rendered: str) -> None:
    """Raise if a text is written less often than the statements hold it: it may be part of another one, too."""
    statements = [(what, text) for what, text in statements if isinstance(text, str) and text.strip()]
    every = [text for message in messages for text in _texts(message)]
    printed = any(p in rendered and not any(p in text for text in every) for p in PRINTED)
    shown, words = _words(rendered), [_words(text) for _, text in statements]
    longest_first = sorted(zip(statements, words), key=lambda pair: -len(pair[1]))  # they may hold others
    for (what, text), own in longest_first:
        if printed or shown.count(own) < sum(other.count(own) for other in words):
            raise _refusal(what, text, rendered)
    results = [text for message in messages if message["role"] == "tool" for text in _texts(message)]
    letters = _letters(rendered) if results else ""
    for text in results:
        forms = (text, json.dumps(text), json.dumps(text, ensure_ascii=False))
        if printed or not any(_letters(form) in letters for form in forms):
            raise _refusal("text of the tool message", text, rendered)


def _refusal(what: str, text: str, rendered: str) -> RowError:
    return (RowError if what.startswith("text") else LeftOutError)(
        f"the chat template does not write the {what} as it is, or not as often as the messages have it: "
        f"{text[:SHOWN]!r}. The template writes: {rendered[-SHOWN:]!r}. Choose a template that keeps it "
        "(`processing_class.chat_template`), take it out, or drop the row."
    )


def _texts(message: dict) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _name(tool: Any) -> Any:
    """Return the name in a tool's description or in a call, with or without a `function` around it."""
    return (tool.get("function") or tool).get("name") if isinstance(tool, dict) else None


def _words(text: str) -> str:
    """Join the words by one space: templates strip texts, and put line feeds around the tags of a thought."""
    return " ".join(TAG.sub(r" \g<0> ", text).split())


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text)
