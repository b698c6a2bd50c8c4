"""A judge that rates answers from 0 to 6, MMHal-Bench's scale: from 3 on without a hallucination.

MMHal-Bench: Sun et al. 2023, arXiv 2309.14525; RLHF-V/RLAIF-V@83d917b, eval/eval_gpt_mmhal.py. The judge, a language
model behind an endpoint, sees texts only: what the image shows, the question, a person's answer and the model's. The
prompt is ours; another one, such as the authors', is a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_vpo.errors import EvaluateError
from trl_vpo.models.requests import AnsweringModel, Request, Sampling
from trl_vpo.text.responses import Failure

SAMPLING = Sampling(max_new_tokens=1024, temperature=0)
FIELDS = ("contents", "question", "reference", "response")
PROMPT = """\
Rate what a model answered to a question about an image. You do not see the image.

In the image: {contents}
Question: {question}
A person's answer, which is true but may be short: {reference}
The model's answer: {response}

The model hallucinates if it states something about the image that is wrong, or that neither the list nor the \
person's answer shows or suggests. Conclusions, general knowledge, doubts and gaps are no hallucinations.

Give your reason in one or two sentences. Then write one last line, "Rating: " and a number:
6: no hallucination, very informative, with good reasoning
5: no hallucination, very informative
4: no hallucination, somewhat informative
3: no hallucination, not informative
2: a hallucination, otherwise very informative
1: a hallucination, otherwise somewhat informative
0: a hallucination, not informative
"""


def read_prompt(path: str | None) -> str:
    """Return the judge's prompt from a file, or ours; EvaluateError unless each of `FIELDS` stands in it in braces."""
    if path is None:
        return PROMPT
    try:
        prompt = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(f"judge_prompt: {path} cannot be read ({error}).") from error
    if missing := [f"{{{name}}}" for name in FIELDS if f"{{{name}}}" not in prompt]:
        raise EvaluateError(f"judge_prompt: {path} lacks {', '.join(missing)}.")
    return prompt


def judgements(judge: AnsweringModel, records: Sequence[Mapping[str, Any]], prompt: str) -> list[str | Failure]:
    """Return the judge's reply about the response of each record."""
    contents = [[{"type": "text", "text": _filled(prompt, record)}] for record in records]
    return judge.answer([Request([{"role": "user", "content": content}]) for content in contents], SAMPLING)


def _filled(prompt: str, record: Mapping[str, Any]) -> str:
    """Return the prompt with the record's values in it; other braces stay, and so do those of the values."""
    return re.sub(r"\{(\w+)\}", lambda m: (record.get(m[1]) or "unknown") if m[1] in FIELDS else m[0], prompt)
