"""Generated answers: what a row asks the model, and what `rows.jsonl` holds of the answer.

An empty answer, or one that was cut off after `max_new_tokens`, is scored as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import Row
from trl_vpo.evaluate.rows import HeldOutRow
from trl_vpo.evaluate.scoring import Probe
from trl_vpo.forward.tree import Trunk
from trl_vpo.media.load import Media
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Sampling
from trl_vpo.text.choices import read_options, with_options
from trl_vpo.text.responses import opens_thoughts, without_reasoning

OPTIONS = "options"  # the probe of a multiple-choice question's options
TAIL = 16  # tokens that an opening tag and white space behind it take, at most


@dataclass(frozen=True)
class Answer:
    """A model's answer, stripped and without its thoughts; `tokens` before the one that ends it, thoughts counted."""

    text: str
    tokens: int
    ended: bool  # False: it was cut off


class AnswersAsTheyAre(LocalModel):
    """Unlike for data: an answer that is empty or cut off is an answer, and counts as what it is."""

    def _generate(self, trunks: list[Trunk], seeds: list[int], sampling: Sampling) -> list[Answer]:
        answers = super()._generate(trunks, seeds, sampling)
        return [self._without_reasoning(*pair) for pair in zip(answers, trunks, strict=True)]

    def _without_reasoning(self, answer: Answer, trunk: Trunk) -> Answer:
        """Where the prompt opened thoughts, an answer that ended outside of tags is one without thoughts."""
        opened = opens_thoughts(self._collator.tokenizer.decode(trunk.ids[-TAIL:]))
        return replace(answer, text=without_reasoning(answer.text, thinking=opened and not answer.ended))

    def _read(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        text = self._collator.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(text, len(ids[:end]), ended=end is not None)


def question_probes(row: HeldOutRow, source: InputRow, media: Media) -> list[Probe]:
    """The probes of a row that asks a question: its answer, and for multiple choice the log-probs of its options.

    The answer is given to the question with its options listed; the options' texts are scored as responses to the
    question as the row has it.
    """
    question, options = row.facts["question"], row.facts.get("options", ())
    listed = with_options(question, read_options(question, options)) if options else question
    probes = [Probe("answer", _asked(row, source, media, listed))]
    if options:
        plain, sides = _asked(row, source, media, question), []
        for place, text in enumerate(options):
            sides.append(f"option_{place}")  # responses are attributes of their row, like `chosen`
            setattr(plain, sides[-1], [{"role": "assistant", "content": [{"type": "text", "text": text}]}])
        probes.append(Probe(OPTIONS, plain, tuple(sides), optional=True))
    return probes


def _asked(row: HeldOutRow, source: InputRow, media: Media, question: str) -> Row:
    prompt = [source.user_message(question)]
    return Row(row.name, prompt, chosen=[], rejected=[], images=list(media.images), videos=list(media.videos))


def answer_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What `rows.jsonl` holds of an answer, from a row's probes under one model; empty where nothing was asked."""
    numbers: dict[str, Any] = {}
    if "answer" in found:
        answer: Answer = found["answer"]
        numbers |= {"response": answer.text, "response_tokens": answer.tokens, "response_ended": answer.ended}
    if OPTIONS in found:
        numbers["option_logps"] = [scored.logp for scored in found[OPTIONS]]
        numbers["option_tokens"] = [scored.tokens for scored in found[OPTIONS]]
    return numbers
