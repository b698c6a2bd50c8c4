"""One browser for all tests of the page, and a page with a little of everything."""

import json

import pytest
from headless_chromium import Browser
from helpers import row

from trl_vpo.report.view.page import write_page
from trl_vpo.testbed.rows import write_jsonl, write_preferences


@pytest.fixture(scope="session")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def run_page(tmp_path_factory):
    """A run's folder: 8 clips, 4 scenes, a row without media, a broken mp4 (row 2) and a line that is no JSON (13)."""
    folder = tmp_path_factory.mktemp("run")
    rows = [r for kind, n in (("clip", 8), ("scene", 4)) for r in write_preferences(kind, n, 3, folder / kind)[1]]
    for n, example in enumerate(rows):
        if n != 5:
            example["chosen_reward"] = round(-0.1 * (n * 7 % 12), 1)
        example |= {"rejected_trust": 0.25, "answer": "It moves.", "generated_by": {"pipeline": "leanpo"}}
    (folder / "broken.mp4").write_bytes(b"no video at all" * 40)
    rows[2]["videos"] = [str(folder / "broken.mp4")]
    rows.append(row(None, id="words", chosen="A red 🙂 car\u2028stops.", rejected="السماء زرقاء", source="by hand"))
    write_jsonl(rows, folder / "rows.jsonl")
    with (folder / "rows.jsonl").open("a") as file:
        file.write("{nonsense\n")
    kinds = ["answered correctly"] * 12 + ["unreadable media"] * 4
    left_out = [{"id": f"in-{n}", "kind": kind, "reason": f"Reason {n}."} for n, kind in enumerate(kinds)]
    write_jsonl(left_out, folder / "rejected.jsonl")
    (folder / "summary.json").write_text(json.dumps({"kept": 14, "rejected_by_kind": {"unreadable media": 4}}))
    write_page(folder, folder / "page.html")
    return folder / "page.html"
