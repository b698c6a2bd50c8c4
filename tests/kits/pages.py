"""The Markdown pages of the project, and the code blocks in them."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass
class Block:
    """A fenced block; `mark` is the comment in the line before it, by which a page says what a test does with it."""

    page: Path
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.text.splitlines()[0][:40]}"


def blocks(language: str, mark: str = "") -> list[Block]:
    """Return all blocks in a language whose mark begins with `mark`."""
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            block = Block(page, match["language"], match["text"], match["mark"] or "")
            if block.language == language and block.mark.startswith(mark):
                found.append(block)
    return found


def objects(block: Block) -> list[dict]:
    """Return the JSON objects that a block holds, one after the other."""
    decoder, text, found = json.JSONDecoder(), block.text.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Give the words of each `trl-vpo` command in shell text: comments out, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(r"^(?:.*\s)?(?:trl-vpo|-m trl_vpo) (.*)", line.split(" #")[0])
        if match and not line.startswith("docker build"):
            yield shlex.split(match[1])
