"""A check of what a chat template writes: every text, tool and call has to be in it. Many templates leave some out.

Texts are looked for as they are. Since the template's own words may hold a text too, each part is also looked for by a
word of its own that stands in its place.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from trl_vpo.errors import RowError
from trl_vpo.text.responses import behind_thoughts

PRINTED = ("'type': 'text'", '"type": "text"')  # a list of parts in the output of a template that wants text
SHOWN = 300  # characters in a message
TAG = re.compile(r"<[^<>\s]+>")
REASONING = ("reasoning_content", "reasoning", "thinking")


class LeftOutError(RowError):
    """A template that writes the texts, but not what comes with them: tools, calls, thoughts."""


def check_prompt(prompt: list[dict], rendered: str) -> None:
    """Raise a RowError if a text of the prompt is not in what the template writes."""
    # Of earlier answers only what follows a thought is needed, for templates take thoughts out.
    _check(prompt, [*_statements(prompt, behind_thoughts)], rendered)


def check_response(response: list[dict], rendered: str) -> None:
    """Raise a RowError if a text of a response is not in what the template writes."""
    thoughts = [(f"`{key}` of the answer", response[-1].get(key)) for key in REASONING]
    _check(response, [*_statements(response), *thoughts], rendered)


def check_parts(
    prompt: list[dict], response: list[dict], tools: list[dict] | None, write: Callable[..., str], rendered: str
) -> None:
    """Raise a RowError if the template leaves out a text, a tool or its parameters, a call or its arguments.

    `write(messages, tools=tools)` renders the template; `rendered` is what the message shows.
    """
    marks = _Marks()
    messages = [*map(marks.message, [*prompt, *response])]
    messages[-1] |= {k: marks.replace(f"`{k}` of the answer", response[-1][k]) for k in REASONING if k in response[-1]}
    written = write(messages, tools=tools and [_function(tool, marks.tool) for tool in tools])
    for text, times in Counter(text for _, text in marks.parts).items():
        if written.count(marks.words[text]) < times:
            raise _refusal(next(what for what, said in marks.parts if said == text), text, rendered)


class _Marks:
    """Words that stand for parts. Equal parts share one: a template may look for the tool that is called."""

    def __init__(self):
        self.words: dict[str, str] = {}
        self.parts: list[tuple[str, str]] = []  # what it is, and the part

    def replace(self, what: str, value: Any) -> Any:
        """Return a word for a value, or the list or dictionary with a word for each value in it."""
        if isinstance(value, dict):
            return {key: self.replace(what, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.replace(what, item) for item in value]
        if value is None or not str(value).strip():
            return value
        self.parts.append((what, str(value)))
        return self.words.setdefault(str(value), f"zq{len(self.words)}qz")

    def message(self, given: dict) -> dict:
        """Mark texts and calls. A text beside a call stays, see `_statements`."""
        role, content = given["role"], given["content"]
        if calls := given.get("tool_calls"):
            kinds = {"name": "function's name", "arguments": "arguments"}
            whats = {key: f"{kind} in a tool call of the {role} message" for key, kind in kinds.items()}
            mark = lambda call: call | {k: self.replace(what, call[k]) for k, what in whats.items() if k in call}  # noqa: E731
            return given | {"tool_calls": [_function(call, mark) for call in calls]}
        what = f"text of the {role} message"
        if isinstance(content, str):
            return given | {"content": self.replace(what, content)}
        parts = [part | {"text": self.replace(what, part["text"])} if "text" in part else part for part in content]
        return given | {"content": parts}

    def tool(self, given: dict) -> dict:
        """Mark the name, and add a parameter: the others stay, since templates look them up."""
        parameters = given.get("parameters")
        marked = given | {"name": self.replace("name of the tool", given.get("name"))}
        if isinstance(parameters, dict) and (properties := parameters.get("properties")):
            one = self.replace("parameters of the tool", ", ".join(properties))
            marked["parameters"] = parameters | {"properties": properties | {one: {"type": "string"}}}
        return marked


def _function(given: Any, change: Callable[[dict], dict]) -> Any:
    """Change a tool's description or a call, with or without a `function` around it."""
    if not isinstance(given, dict):
        return given
    return given | {"function": change(given["function"])} if given.get("function") else change(given)


def _statements(messages: list[dict], cut: Callable[[str], str] = str) -> Iterator[tuple[str, Any]]:
    """Give the texts of the messages, each behind what it is.

    A text beside a call is left out: templates take it for a thought. So are tools' results, see `_check`.
    """
    for message in messages:
        role = message["role"]
        if not message.get("tool_calls") and role != "tool":
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


def _words(text: str) -> str:
    """Join the words by one space: templates strip texts, and put line feeds around the tags of a thought."""
    return " ".join(TAG.sub(r" \g<0> ", text).split())


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text)
