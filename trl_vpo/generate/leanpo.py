"""LeanPO's self-generated pairs (Wang et al. 2025, arXiv 2506.05260): videos or images with questions and answers.

Winning response: the model answers with the ground truth as a hint in the prompt; it is then shown this first answer
and the ground truth, and improves the answer (reflection). Losing response: the same model answers the plain question
on a damaged clip (`trl_vpo.media.corruptions`). The training row has the plain question and the untouched media. A
pair whose losing response is right after all, by the rules of `tasks.py`, or whose winning one is wrong, is left out.
What is ours and not the paper's is in docs/generate.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_vpo.data.inputs import InputRow, given_text
from trl_vpo.errors import GenerateError, InputError
from trl_vpo.generate.config import GenerateConfig, check_template
from trl_vpo.generate.pipeline import Pipeline, training_row
from trl_vpo.generate.tasks import read_task
from trl_vpo.media.corruptions import DamageSettings, damage
from trl_vpo.media.load import Media
from trl_vpo.models.config import option
from trl_vpo.models.requests import Request, stream_seed
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.answers import RIGHT, SHORT_WORDS, WRONG
from trl_vpo.text.responses import Failure
from trl_vpo.text.similarity import pair_figures, right, similarity, trust_margin

HINT_PROMPT = (
    "{question}\n"
    "The correct answer is known: {answer}\n"
    "Answer the question in agreement with it and with what you see, as if you had found the answer yourself. "
    "Reply with the answer only, and do not mention that you were told."
)
REFLECTION_PROMPT = (
    "{question}\n"
    "Your first answer was: {first_answer}\n"
    "The correct answer is known: {answer}\n"
    "Look again and improve your first answer so that it agrees with the correct answer and with what you see. "
    "Reply with the improved answer only, and do not mention the first answer or that you were told."
)
# The questions to the model in order, with their names in messages.
STAGES = {
    "hint": "first answer, with the hint",
    "reflection": "winning response, after reflection",
    "damaged": "losing response, on the damaged media",
    "plain": "plain answer, for the summary",
}
FILTERS = {  # setting: the quantity it limits from below
    "min_margin": "reward margin",
    "min_trust": "trust of the winning response",
    "min_trust_margin": "trust margin",
}
_ROUNDING = 1e-9  # 0.7 - 0.4 is a margin of 0.3


@dataclass
class LeanPOGenerateConfig(GenerateConfig):
    """Settings of LeanPO's pipeline; trust is the similarity with the ground truth, 0 to 1."""

    hint_prompt: str = option(
        HINT_PROMPT, "Prompt with {question} and {answer}, the ground truth; other braces are doubled."
    )
    reflection_prompt: str = option(REFLECTION_PROMPT, "Prompt with {question}, {answer} and {first_answer}.")
    reflection: bool = option(True, "Let the model improve its hinted answer; off, the first answer wins.")
    plain_answer: bool = option(True, "Ask the plain question too, greedily, to compare in the summary.")
    num_damaged_frames: int = option(2, "Frames kept of a damaged clip.")
    flip_probability: float = option(0.5, "Probability of flipping damaged media; use 0 if left and right matter.")
    min_margin: float | None = option(None, "Minimum reward margin, in nats per token before beta.")
    min_trust: float | None = option(None, "Minimum trust of the winning response, 0 to 1.")
    min_trust_margin: float | None = option(
        None, "Minimum difference in trust, winning minus losing response, -1 to 1."
    )
    keep_top: float | None = option(
        None, "Share of the rows to keep, those with the largest trust margins: above 0, up to 1."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("hint_prompt", self.hint_prompt, {"question", "answer"})
        check_template("reflection_prompt", self.reflection_prompt, {"question", "answer", "first_answer"})


@dataclass
class _Pair:
    """One input in work: the answers by stage, or the reason why it gives no pair."""

    row: InputRow
    media: Media
    answers: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    reason: str | None = None

    @property
    def question(self) -> str:
        return self.row.example["question"]

    @property
    def truth(self) -> str:
        return self.row.example["answer"].strip()

    @property
    def responses(self) -> tuple[str, str]:
        """Return the winning and the losing response."""
        return self.answers.get("reflection", self.answers["hint"]), self.answers["damaged"]

    def reject(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason


def _open(pairs: Iterable[_Pair]) -> list[_Pair]:
    return [pair for pair in pairs if not pair.reason]


class LeanPOPipeline(Pipeline):
    """Video or images, `question` and `answer` (the ground truth) -> one pair.

    Further columns of a row: `chosen_trust` and `rejected_trust`, the similarity with the ground truth; and if the
    model can score, `chosen_reward`, `rejected_reward` and `answer_reward` (of the ground truth): the mean log-prob
    per token, given the plain question and the untouched media, in nats before beta.
    """

    config: LeanPOGenerateConfig

    def __init__(self, config, model, judge=None, generated_by=None):
        super().__init__(config, model, judge, generated_by)
        scores = not config.server_url if model is None else model.can_score
        if config.min_margin is not None and not scores:
            raise GenerateError(
                f"min_margin is {config.min_margin}, but the model behind {config.server_url or type(model).__name__} "
                "gives no rewards. Leave min_margin out (min_trust_margin needs no rewards), or load the model in "
                "this process (no server_url)."
            )

    def check(self, row: InputRow) -> None:
        for name in ("question", "answer"):
            given_text(row.example, name, "LeanPO")
        if not row.images and not row.videos:
            raise InputError("the row has neither a video nor an image: LeanPO needs media that it can damage.")

    def preview(self, row: InputRow, media: Media) -> list[tuple[str, Request]]:
        pair = _Pair(row, media, {"hint": "<the first answer>"})
        return [(STAGES[stage], self._request(stage, pair)) for stage in self._stages()]

    def make(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Outcome]:
        pairs = [_Pair(row, media) for row, media in batch]
        for stage in self._stages():
            self._ask(stage, _open(pairs))
        for pair in _open(pairs):
            self._compare(pair)
        if self.model.can_score:
            self._score(_open(pairs))
        for pair in _open(pairs):
            self._filter(pair)
        return [self._outcome(pair) for pair in pairs]

    def select(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        return outcomes if self.config.keep_top is None else keep_top(outcomes, self.config.keep_top)

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return `pair_figures` of every pair of responses; with a filter, also of those kept, as `kept_...`."""
        pairs = [outcome for outcome in outcomes if "chosen_trust" in outcome.notes]
        groups = {"": [pair.notes for pair in pairs]}
        if any(getattr(self.config, name) is not None for name in (*FILTERS, "keep_top")):
            groups["kept_"] = [pair.notes for pair in pairs if pair.rows]
        options = {"plain": self.config.plain_answer, "rewards": self.model is not None and self.model.can_score}
        figures = {prefix: pair_figures(notes, **options) for prefix, notes in groups.items()}
        return {prefix + name: figure for prefix, group in figures.items() for name, figure in group.items()}

    def _stages(self) -> list[str]:
        skipped = {"reflection": not self.config.reflection, "plain": not self.config.plain_answer}
        return [stage for stage in STAGES if not skipped.get(stage)]

    def _request(self, stage: str, pair: _Pair) -> Request:
        seed, media, values = self.config.seed, pair.media, {"question": pair.question, "answer": pair.truth}
        if stage == "hint":
            text = self.config.hint_prompt.format(**values)
        elif stage == "reflection":
            text = self.config.reflection_prompt.format(**values, first_answer=pair.answers["hint"])
        else:
            text = pair.question
        if stage == "damaged":
            rng = np.random.default_rng(stream_seed(seed, pair.row.id, "damage"))
            settings = DamageSettings(self.config.num_damaged_frames, flip_p=self.config.flip_probability)
            media = damage(media, rng, settings)
        return Request([pair.row.user_message(text)], media, stream_seed(seed, pair.row.id, stage))

    def _ask(self, stage: str, pairs: list[_Pair]) -> None:
        sampling = self.config.sampling(temperature=0.0) if stage == "plain" else self.config.sampling()
        answers = self.model.answer([self._request(stage, pair) for pair in pairs], sampling)
        for pair, answer in zip(pairs, answers, strict=True):
            if not isinstance(answer, Failure):
                pair.answers[stage] = answer
            elif stage == "plain":  # the pair does not need it
                pair.notes["plain_failure"] = answer.reason
            else:
                pair.reject("no answer", f"there is no {STAGES[stage]}: {answer.reason}")

    def _compare(self, pair: _Pair) -> None:
        """Compare both responses with the ground truth, and with each other."""
        chosen, rejected = pair.responses
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            pair.notes[f"{side}_trust"] = similarity(text, pair.truth)
            pair.notes[f"{side}_right"] = right(text, pair.truth)
        if self.config.plain_answer:
            pair.notes["plain_right"] = "plain" in pair.answers and right(pair.answers["plain"], pair.truth)
        task = None
        with suppress(InputError):  # options and answer may not fit together: then no rule checks the responses
            task = read_task(pair.row.example, SHORT_WORDS)
        if right(chosen, rejected):
            pair.reject("identical responses", f"both responses say {chosen[:200]!r}, up to case and punctuation.")
        elif task and task.check(rejected).result == RIGHT:
            pair.reject("losing response is right", f"{rejected[:200]!r} is right: {pair.truth[:200]!r}.")
        elif task and task.kind != "open" and task.check(chosen).result == WRONG:
            # not for open-ended answers, which may use other words
            pair.reject("winning response is wrong", f"{chosen[:200]!r} is not {pair.truth[:200]!r}.")

    def _score(self, pairs: list[_Pair]) -> None:
        """Note the rewards of both responses and of the ground truth, given the plain question and the clean media."""
        requests = [self._request("plain", pair) for pair in pairs for _ in range(3)]
        responses = [text for pair in pairs for text in (*pair.responses, pair.truth)]
        rewards = np.reshape(self.model.average_logps(requests, responses), (len(pairs), 3)).tolist()
        for pair, values in zip(pairs, rewards):
            if np.isfinite(values).all():
                pair.notes |= zip(("chosen_reward", "rejected_reward", "answer_reward"), values)
            else:
                pair.reject("no reward", f"the rewards of chosen, rejected and answer are {values}, not all finite.")

    def _filter(self, pair: _Pair) -> None:
        notes = pair.notes
        values = {"min_trust": notes["chosen_trust"], "min_trust_margin": trust_margin(notes)}
        if "chosen_reward" in notes:
            values["min_margin"] = notes["chosen_reward"] - notes["rejected_reward"]
        for name, quantity in FILTERS.items():
            least = getattr(self.config, name)
            if least is not None and values[name] < least - _ROUNDING:
                pair.reject(f"below {name}", f"the {quantity} is {values[name]:.4g}, {name} is {least:.4g}.")
                return

    def _outcome(self, pair: _Pair) -> Outcome:
        notes = {"answers": pair.answers, **pair.notes}
        if pair.reason:
            return Outcome(pair.row.id, reason=pair.reason, kind=pair.kind, notes=notes)
        columns = {key: value for key, value in pair.notes.items() if key.endswith(("_reward", "_trust"))}
        chosen, rejected = pair.responses
        row = training_row(
            pair.row, prompt=pair.question, chosen=chosen, rejected=rejected, generated_by=self.generated_by, **columns
        )
        return Outcome(pair.row.id, rows=(row,), notes=notes)


def keep_top(outcomes: Sequence[Outcome], share: float) -> list[Outcome]:
    """Keep `share` (rounded up) of the outcomes with rows, those with the largest trust margin; reject the others.

    Equal margins are kept in the order of their ids, so the choice does not depend on the order of the outcomes.
    """
    margins = {outcome.id: trust_margin(outcome.rows[0]) for outcome in outcomes if outcome.rows}
    ranked = sorted(margins, key=lambda id: (-round(margins[id] / _ROUNDING), id))
    count = math.ceil(share * len(ranked) - _ROUNDING)
    dropped = set(ranked[count:])
    rank = f"is not among the {count} largest of {len(ranked)} (keep_top {share})."
    return [
        Outcome(o.id, reason=f"the trust margin {margins[o.id]:.4g} {rank}", kind="outside keep_top", notes=o.notes)
        if o.id in dropped
        else o
        for o in outcomes
    ]
