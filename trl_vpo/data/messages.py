"""Messages of prompts and responses: typed contents, placeholders of media, plain text."""

import re
from typing import Any

from trl_vpo.errors import RowError
from trl_vpo.text.phrases import CLOSE, OPEN, strip_mask_tags

MARKERS = {"<image>": "image", "<video>": "video"}
KINDS = tuple(MARKERS.values())
REJECTED, OTHER = (tuple(f"{prefix}_{kind}s" for kind in KINDS) for prefix in ("rejected", "other"))  # columns


def drop_none(value: Any, keep: dict[str, set[str]] | None = None) -> Any:
    """Return JSON without the `None` entries that Arrow adds to dictionaries of different shapes.

    `keep`: of a call of the tool with this name, the arguments that may be null.
    """
    if isinstance(value, list):
        return [drop_none(v, keep) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: drop_none(v, keep) for k, v in value.items() if v is not None}
    arguments = value.get("arguments")
    if isinstance(arguments, dict):
        nullable = (keep or {}).get(value.get("name"), ())
        kept["arguments"] |= {k: None for k, v in arguments.items() if v is None and k in nullable}
    return kept


def null_arguments(tools: list | None) -> dict[str, set[str]]:
    """Return by name of the tool the arguments that a call may give as null: required ones, and nullable types.

    Arrow stores an argument that a call leaves out as null, too; only the tool's description tells the two apart.
    """
    allowed = {}
    for tool in tools or []:
        function = tool.get("function") or tool if isinstance(tool, dict) else {}
        parameters = function.get("parameters") or {}
        nullable = {
            name
            for name, about in (parameters.get("properties") or {}).items()
            if isinstance(about, dict) and (about.get("nullable") or "null" in (about.get("type") or ()))
        }
        allowed[function.get("name")] = nullable | set(parameters.get("required") or ())
    return allowed


def place_media(prompt: list[dict] | str, images: int, videos: int, *, words: bool = False) -> list[dict] | str:
    """Return messages with typed contents, one placeholder for every image and video.

    `<image>` and `<video>` in plain-string contents become placeholders where they stand. If every content is a
    plain string without a marker, the media go in front of the first user message, as in TRL. With `words`, markers
    in a prompt without any media are the user's words. A string stays as it is: `trl_vpo.data.chat` places its media.
    """
    if isinstance(prompt, str):
        return prompt
    markers = images or videos or not words
    typed = [{**m, "content": typed_content(m.get("content"), m["role"] if markers else None)} for m in prompt]
    kinds = [part["type"] for m in typed for part in m["content"]]
    plain = all(isinstance(m.get("content") or "", str) for m in prompt)
    if plain and not {"image", "video"} & set(kinds) and (images or videos):
        first = next((m for m in typed if m["role"] == "user"), None)
        if first is None:
            raise RowError("has media but no user message to put them into.")
        first["content"] = [{"type": "image"}] * images + [{"type": "video"}] * videos + first["content"]
        return typed
    for kind, count in (("image", images), ("video", videos)):
        if kinds.count(kind) != count:
            raise RowError(
                f"the prompt has {kinds.count(kind)} {kind} placeholder(s), but the row has {count} {kind}(s). Put "
                f'one {{"type": "{kind}"}} (or a `<{kind}>` marker) into the prompt for each item of `{kind}s`. Plain '
                "texts may do without markers: the media then come first."
            )
    return typed


def forgotten_media(prompt: list[dict] | str) -> str | None:
    """Return the first `<image>` or `<video>` in a user's plain string."""
    texts = [m.get("content") for m in prompt if m["role"] == "user"] if not isinstance(prompt, str) else []
    return next((marker for text in texts if isinstance(text, str) for marker in MARKERS if marker in text), None)


def typed_content(content: Any, role: str | None) -> list[dict]:
    """Return a content as parts of the types text, image and video; `<image>` of a user's string is one of them."""
    if content is None:
        return []
    if isinstance(content, str):
        parts = _split(content) if role == "user" else [content]
        return [{"type": MARKERS[p]} if p in MARKERS else {"type": "text", "text": p} for p in parts]
    for part in content:  # templates leave out what they do not know, without a word
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", *MARKERS.values()):
            raise RowError(
                f"a message part is {repr(part)[:200]}; it needs a `type` of text, image or video. Words go into "
                "`text`, sources of media into the columns `images` and `videos`."
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise RowError(
                f"a text part of a message has no `text`: {repr(part)[:200]}. The model would not see what it says; "
                'write {"type": "text", "text": "..."}.'
            )
        if kind != "text" and set(part) - {"type"}:
            raise RowError(
                f"the prompt carries media inside its message ({kind}). Put the source into the `{kind}s` column and "
                f'leave {{"type": "{kind}"}} in the prompt.'
            )
    return [dict(part) for part in content]


def _split(content: str) -> list[str]:
    """Split a text at its markers: `look at <image> and say` has three parts.

    Placeholders at the very start or end lose the line break that LLaVA's data set between them and the text.
    """
    marker = "(?:<image>|<video>)"
    for edge in (rf"\A(?:\s*{marker})+(?:\s*\Z|\n?)", rf"\n?(?:{marker}\s*)+\Z"):
        content = re.sub(edge, lambda run: "".join(re.findall(marker, run[0])), content)
    return [part for part in re.split(f"({marker})", content) if part] or [content]


def response_text(response: list[dict] | str) -> str:
    """Return the plain text of a response: all its text parts, in order."""
    if isinstance(response, str):
        return response
    parts = []
    for message in response:
        content = message.get("content") or ""
        parts += [content] if isinstance(content, str) else [p.get("text", "") for p in content if p["type"] == "text"]
    return "".join(parts)


def without_tags(response: list[dict] | str) -> list[dict] | str:
    """Return a typed response without `<MASK>` tags; raise PhraseError if they do not pair."""
    if isinstance(response, str):
        return strip_mask_tags(response)[0]
    texts = [response_text([message]) for message in response]
    return [
        with_text([m], strip_mask_tags(t)[0])[0] if OPEN in t or CLOSE in t else m for m, t in zip(response, texts)
    ]


def with_text(response: list[dict] | str, text: str) -> list[dict] | str:
    """Return the same response with another text (one message only)."""
    return text if isinstance(response, str) else [{**response[0], "content": [{"type": "text", "text": text}]}]
