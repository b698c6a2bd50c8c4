"""HTML pages that are one file: template, style, script and data."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trl_vpo.files import atomic_write


def write_html(out: Path, template: Path, *, styles: list[str], scripts: Iterable[str] = (), **values: Any) -> None:
    """Write a page from a Jinja template, whole or not at all. The same values give the same bytes.

    The template's values are escaped; a generator is written piece by piece. `css` and `js` are the styles and
    scripts, files beside it; `css_hash` and `js_hash` are what the page's security policy admits: nothing else is
    applied or run.
    """
    import jinja2
    from markupsafe import Markup

    folder = template.parent
    for name, files in (("css", styles), ("js", scripts)):
        text = "\n" + "\n".join((folder / file).read_text(encoding="utf-8") for file in files)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        values |= {name: Markup(text), f"{name}_hash": f"sha256-{digest}"}
    loader, undefined = jinja2.FileSystemLoader(folder), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    pieces = environment.get_template(template.name).generate(values)
    # Half of a surrogate pair is valid in JSON but not in UTF-8: backslashreplace writes JSON's own escape for it.
    with atomic_write(out) as part, part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(pieces)
