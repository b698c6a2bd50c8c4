"""Pages in one file: the same bytes again, and a security policy that admits their own style and script only."""

import base64
import hashlib
import json
import re

import pytest
from helpers import row

from trl_vpo.report.plot.page import plot_runs
from trl_vpo.report.view.page import write_page
from trl_vpo.testbed.rows import write_jsonl


def view(folder, out):
    write_page(write_jsonl([row(None)], folder / "rows.jsonl"), out)


def plot(folder, out):
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 0.5}]}))
    plot_runs([folder], out)


@pytest.mark.parametrize(("write", "tags"), [(view, {"style", "script"}), (plot, {"style"})])
def test_a_page_is_one_file_and_runs_nothing_else(write, tags, tmp_path):
    for name in ("one.html", "two.html"):
        write(tmp_path / "data", tmp_path / name)
    text = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert (tmp_path / "two.html").read_text(encoding="utf-8") == text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert {key.removesuffix("-src") for key in rules} & {"style", "script"} == tags
    for tag in tags:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:|//)", text)
    assert not re.search(r" style=|\.innerHTML|insertAdjacentHTML|document\.write", text)
