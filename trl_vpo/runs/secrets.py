"""Secrets kept out of records, cards, logs and messages: tokens, keys and passwords, however they are written."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, quote_plus

STARS = "***"
SHORTEST = 8  # characters of a secret that is looked for in texts: `none` and `EMPTY` are words

_NAME = r"(?:token|secret|password|passwd|pwd|api[_-]?key|access[_-]?key|private[_-]?key|auth|authorization|cookie)"
_SECRET_KEY = re.compile(rf"(?:^|[_-]){_NAME}$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$", re.IGNORECASE)
_TEXT_TOKEN = r"(?:pad|eos|bos|unk|sep|cls|mask|image|video|audio)_token"
_PATTERNS = [  # what group 1 matches stays
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(\b)(?:hf_[a-z0-9]{16,}|sk-[\w-]{16,})",
        r"(://)[^/\s'\"<>]+(?=@)",  # user and password of an address
        r"(\b[\w.+-]+:)[^\s/:@'\"<>]+(?=@\w)",  # the same without a scheme
        r"(%3A%2F%2F)(?:(?!%2F|%40)[^/\s'\"<>])+(?=%40)",  # the same, percent-encoded
        rf"([?&](?:[\w.]+[_-])*(?:{_NAME}|key|sig|signature|credential)=)[^&#\s'\"<>]+",  # of its query
        r"(\bbearer\s+)[^\s'\",;\\]{8,}",
        r"(\bauthorization['\"]?\s*[:=]\s*(?:b?['\"])?(?:(?:basic|bearer|token)\s+)?)[^\s'\",;}\\]+",
        rf"(['\"](?!{_TEXT_TOKEN})(?:\w+[_-])*{_NAME}['\"]\s*:\s*b?['\"])[^'\"]+",  # entries in JSON and Python
        r"(\b(?:hub_token|hf_token|api_key|password)\s*=\s*['\"]?)[^\s&#'\",;)}]+",
    )
]


def scrub(value: Any, *secrets: str) -> Any:
    """Return a text, or dictionaries and lists of any depth, without secrets.

    Entries whose name says that they are secret are left out, those inside of texts are starred: the ones given, those
    of the environment and of `hf auth login`, and what looks like one.
    """
    from huggingface_hub import get_token  # not at the start of `trl-vpo --help`

    names = [name for name in os.environ if _SECRET_VARIABLE.search(name)]
    known = _pattern({*secrets, get_token() or "", *(os.environ[name].strip() for name in names)})

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: clean(item)
                for key, item in value.items()
                if re.fullmatch(_TEXT_TOKEN, str(key)) or not _SECRET_KEY.search(str(key))
            }
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if isinstance(value, str):
            value = known.sub(STARS, value) if known else value
            for pattern in _PATTERNS:
                value = pattern.sub(rf"\1{STARS}", value)
        return value

    return clean(value)


def _pattern(secrets: Iterable[str]) -> re.Pattern | None:
    """Match all ways to write the secrets: as they are, percent-encoded, escaped as in JSON and Python, in base64."""
    ways: set[str] = set()
    for secret in secrets:
        if len(secret) < SHORTEST:
            continue
        data = secret.encode(errors="surrogateescape")
        ways |= {secret, quote(data), quote(data, safe=""), quote_plus(data)}
        ways |= {repr(secret)[1:-1], repr(data)[2:-1], json.dumps(secret)[1:-1]}
        ways |= {code(data).decode().rstrip("=") for code in (base64.b64encode, base64.urlsafe_b64encode)}
    longest = sorted(ways, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)), re.IGNORECASE) if longest else None
