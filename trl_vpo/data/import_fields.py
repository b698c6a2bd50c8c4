"""The parts of other projects' records: texts, turns, media, and the rows that they make. No files here.

A function raises ValueError, which names the field and the remedy. Contents are typed lists everywhere, because one
Arrow column cannot hold strings and lists; media are placed as `trl_vpo.data.messages.place_media` does.
"""

from trl_vpo.data.messages import MARKERS, place_media, typed_content

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
EMPTY_SYSTEM = ({"role": "system", "content": ""}, {"from": "system", "value": ""})  # left by other converters


# --- texts ----------------------------------------------------------------------------------------------------------


def text(record: dict, name: str, other: str | None = None) -> str:
    """Return the text of a required field, or of its other name."""
    name = other if other in record and record.get(name) is None else name
    value = record.get(name)
    if not isinstance(value, str):
        has = "is missing" if value is None else f"is {type(value).__name__}, not text"
        hint = f" (or `{other}`)" if other and value is None else ""
        raise ValueError(f"`{name}`{hint} {has}. The record has the fields {', '.join(map(str, record)) or 'none'}.")
    if not value.strip():
        raise ValueError(f"`{name}` is empty. Fill it in or leave the record out.")
    return value


def turns(record: dict, name: str) -> list[tuple[str, str]]:
    """Return (role, text) of each message, under either naming: role and content, from and value."""
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` is missing or not a list of messages.")
    return [turn(m, f"`{name}`[{i}]") for i, m in enumerate(messages) if m not in EMPTY_SYSTEM]


def last_turn(record: dict, name: str) -> tuple[list[tuple[str, str]], str]:
    """Return the turns of the prompt and the text of the response behind them."""
    prompt = turns(record, name)
    role, response = prompt.pop() if prompt else ("nobody", "")
    if role != "assistant":
        raise ValueError(f"`{name}` ends with the {role}'s turn; it must end with the assistant's response.")
    return prompt, response


def turn(message, name: str) -> tuple[str, str]:
    """Return (role, text) of a message; `name` is where it stands."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} is not a message with role and content, or from and value.")
    role, value = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} has no text. Write it as one string, with <image> or <video> where media stand.")
    if role not in ROLES:
        raise ValueError(f"{name} has the role {role!r}. Roles: {', '.join(ROLES)}.")
    return ROLES[role], value


# --- media ----------------------------------------------------------------------------------------------------------


def media(record: dict, name: str) -> list[str]:
    """Return the paths or URLs of a field: one, a list of them, or a list of {"path": ...}."""
    items = record.get(name) or []
    items = [items] if isinstance(items, (str, dict)) else items
    if not isinstance(items, list):
        raise ValueError(f"`{name}` is {type(items).__name__}, not a list of paths.")
    items = [item.get("path") if isinstance(item, dict) and not item.get("bytes") else item for item in items]
    for i, item in enumerate(items):
        if not isinstance(item, str) or not item:
            raise ValueError(f"`{name}`[{i}] is not a path. Write embedded media to files and name those.")
    return items


# --- rows -----------------------------------------------------------------------------------------------------------


def pair(prompt: list[tuple[str, str]], chosen: str, rejected: str, **sources: list) -> dict:
    """Return a row with typed contents. `sources`: the columns that this format can have, with the row's sources."""
    for role, said in [*prompt, ("chosen", chosen), ("rejected", rejected)]:
        if role != "user" and any(marker in said for marker in MARKERS):
            raise ValueError(f"<image> or <video> stands in a text that is not the user's ({role}). Move or drop it.")
    if chosen.strip() == rejected.strip():
        raise ValueError(f"the chosen and rejected responses are identical: {chosen.strip()[:80]!r}.")
    if not prompt or prompt[-1][0] != "user":
        raise ValueError("the prompt does not end with the user's turn, so there is nothing to respond to.")
    messages = [{"role": role, "content": said} for role, said in prompt]
    responses = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": place_media(messages, len(sources.get("images", [])), len(sources.get("videos", []))),
        **{side: [{"role": "assistant", "content": typed_content(said, None)}] for side, said in responses.items()},
        **sources,
    }
