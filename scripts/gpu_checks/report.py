"""Results as files: all rows as JSON, and a page of tables."""

import json
from datetime import UTC, datetime
from pathlib import Path

COLUMNS = {  # by part: key -> heading
    "parity": {
        "family": "family",
        "attention": "attention",
        "dtype": "dtype",
        "asked": "layout",
        "layout": "took",
        "logps_error": "log-probs",
        "gradient_error": "gradients",
        "alone_logps_error": "alone, log-probs",
        "alone_gradient_error": "alone, gradients",
        "ok": "ok",
    },
    "step": {
        "model": "model",
        "media": "prompt",
        "prompts": "tokens",
        "method": "method",
        "attention": "attention",
        "layout": "layout",
        "seconds": "seconds",
        "peak_mib": "peak MiB",
        "activations_mib": "above weights, MiB",
        "ratio_vs_trl": "TRL / this",
        "memory_vs_trl": "above weights / TRL's",
    },
    "kl": {
        "method": "what",
        "tokens": "tokens",
        "candidate": "how",
        "value_error": "values",
        "gradient_error": "gradients",
        "seconds": "seconds",
        "peak_mib": "peak MiB",
        "ok": "ok",
    },
    "memory": {
        "model": "model",
        "method": "method",
        "prompts": "tokens",
        "asked": "layout",
        "peak_mib": "measured MiB",
        "estimated_mib": "estimated MiB",
        "ratio": "estimated / measured",
        "within": "within 15 %",
    },
    "qlora": {
        "method": "method",
        "model": "model",
        "numbers": "weights",
        "codec": "codec",
        "steps": "steps",
        "seconds": "seconds a step",
        "peak_mib": "peak MiB",
        "losses": "loss, first and last",
        "ok": "ok",
    },
}
TITLES = {
    "parity": "Parity: relative errors against every branch alone in float32",
    "step": "A training step",
    "kl": "Log-probs and KL over the vocabulary",
    "memory": "The doctor's estimate",
    "qlora": "RRPO on video files",
}
SAME_STEP = ("model", "media", "prompts", "response")


def with_ratios(rows: list[dict]) -> list[dict]:
    """Return the rows, those of steps with how they compare with stock TRL's on the same rows."""
    stock = {}
    for row in rows:
        if row["part"] == "step" and row.get("method") == "trl" and "seconds" in row:
            stock[str([row[name] for name in SAME_STEP])] = row
    found = []
    for row in rows:
        base = stock.get(str([row.get(name) for name in SAME_STEP])) if row["part"] == "step" else None
        if base and "seconds" in row:
            row = row | {"ratio_vs_trl": base["seconds"] / row["seconds"]}
            row["memory_vs_trl"] = row["activations_mib"] / base["activations_mib"]
        found.append(row)
    return found


def write(folder: Path, rows: list[dict], machine: dict[str, object], command: str) -> tuple[Path, Path]:
    """Write both files whole, in the place of those of before."""
    rows = with_ratios(rows)
    facts = {"command": command, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"} | machine
    texts = {
        folder / "gpu_check.json": json.dumps([{"part": "machine"} | facts, *rows], indent=1) + "\n",
        folder / "gpu_check.md": page(rows, facts),
    }
    for path, text in texts.items():
        part = path.with_suffix(f"{path.suffix}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return tuple(texts)


def page(rows: list[dict], facts: dict[str, object]) -> str:
    """Return the tables as Markdown."""
    dry = ["", "**A dry run on tiny models (`--tiny`): its figures mean nothing.**"] if facts["tiny"] else []
    facts = facts | {"command": f"`{facts['command']}`"}
    lines = ["# GPU check", *dry, "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    for part in dict.fromkeys(row["part"] for row in rows):
        columns = COLUMNS[part]
        mine = [row for row in rows if row["part"] == part]
        heads = [*columns.values(), "note"]
        lines += ["", f"## {TITLES[part]}", "", _line(heads), _line(["---"] * len(heads))]
        lines += [_line([*(_shown(row.get(name)) for name in columns), note_of(row)]) for row in mine]
    return "\n".join(lines) + "\n"


def note_of(row: dict) -> str:
    """Return what is unusual about a row: why it was not measured, the kernels of a parity, what took the place."""
    return "; ".join(filter(None, [row.get("note"), row.get("instead"), ", ".join(row.get("kernels") or [])]))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
