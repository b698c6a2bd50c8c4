"""LeanPO's self-generated pairs (Wang et al. 2025, arXiv 2506.05260): videos or images with questions and answers.

Winning response: the model answers with the ground truth as a hint in the prompt; it is then shown this first answer
and the ground truth, and improves the answer (reflection). Losing response: the same model answers the plain question
on a damaged clip (`corruptions.py`). The training row has the plain question and the untouched media. A pair whose losing
response is right after all, by the rules of `tasks.py`, or whose winning one is wrong, is left out.

The paper's prompts are not published: the ones here are ours, and settings. So are the filters, which are all off
unless set, and the similarity that stands for trustworthiness (`similarity.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_vpo.data.inputs import InputRow, given_text
from trl_vpo.errors import GenerateError, InputError
from trl_vpo.generate.config import GenerateConfig, check_template
from trl_vpo.generate.pipeline import Pipeline, training_row
from trl_vpo.generate.tasks import Task, read_task
from trl_vpo.media.corruptions import DamageSettings, damage
from trl_vpo.media.load import Media
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
# What the model is asked, in order, and how messages call it.
STAGES = {
    "hint": "first answer, with the hint",
    "reflection": "winning response, after reflection",
    "damaged": "losing response, on the damaged media",
    "plain": "plain answer, for the summary",
}
FILTERS = {  # setting: (what it limits from below, its least and largest value)
    "min_margin": ("reward margin", -math.inf, math.inf),
    "min_trust": ("trust of the winning response", 0, 1),
    "min_trust_margin": ("trust margin", -1, 1),
}
_ROUNDING = 1e-9  # 0.7 - 0.4 is a margin of 0.3


@dataclass
class LeanPOGenerateConfig(GenerateConfig):
    """Settings of LeanPO's pipeline.

    Parameters:
        hint_prompt (`str`): with `{question}` and `{answer}`, the ground truth. Other braces are doubled.
        reflection_prompt (`str`): with `{first_answer}` too.
        reflection (`bool`, defaults to `True`): off, the first answer is the winning response.
        plain_answer (`bool`, defaults to `True`): also ask the plain question, greedily, to compare in the summary.
        num_damaged_frames (`int`, defaults to 2): frames left of a damaged clip.
        flip_probability (`float`, defaults to 0.5): how often they are flipped, 0 where left and right matter.
        min_margin (`float`, *optional*): least margin of the rewards, in nats per token before beta.
        min_trust, min_trust_margin (`float`, *optional*): least trust of the winning response, and least margin over
            the losing one; trust is the similarity with the ground truth, 0 to 1.
        keep_top (`float`, *optional*): of the rows that pass all this, keep this share, those with the largest trust
            margin; rounded up.
    """

    hint_prompt: str = field(default=HINT_PROMPT, metadata={"help": "Prompt with {question} and {answer}."})
    reflection_prompt: str = field(
        default=REFLECTION_PROMPT, metadata={"help": "Prompt with {question}, {answer} and {first_answer}."}
    )
    reflection: bool = field(default=True, metadata={"help": "Let the model improve its hinted answer."})
    plain_answer: bool = field(default=True, metadata={"help": "Ask the plain question too, for the summary."})
    num_damaged_frames: int = field(default=2, metadata={"help": "Frames left of a damaged clip."})
    flip_probability: float = field(default=0.5, metadata={"help": "How often damaged media are flipped."})
    min_margin: float | None = field(default=None, metadata={"help": "Least margin of the rewards, nats per token."})
    min_trust: float | None = field(default=None, metadata={"help": "Least trust of the winning response, 0 to 1."})
    min_trust_margin: float | None = field(default=None, metadata={"help": "Least margin of the trusts, -1 to 1."})
    keep_top: float | None = field(
        default=None, metadata={"help": "Share of the rows to keep, by trust margin, above 0 and up to 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("hint_prompt", self.hint_prompt, {"question", "answer"})
        check_template("reflection_prompt", self.reflection_prompt, {"question", "answer", "first_answer"})
        if self.num_damaged_frames < 1:
            raise ValueError(f"num_damaged_frames is {self.num_damaged_frames}: give a whole number of at least 1.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability is {self.flip_probability}: give a number from 0 to 1.")
        for name, (_, least, most) in FILTERS.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                limits = "a finite number" if math.isinf(most) else f"a number from {least} to {most}"
                raise ValueError(f"{name} is {value}: give {limits}, or leave it out.")
        if self.keep_top is not None and not 0 < self.keep_top <= 1:
            raise ValueError(
                f"keep_top is {self.keep_top}: give a share above 0 and up to 1 (0.5 is half of the rows)."
            )

    def damage_settings(self) -> DamageSettings:
        return DamageSettings(num_frames=self.num_damaged_frames, flip_p=self.flip_probability)


@dataclass
class _Work:
    """One input on its way: the answers by stage, and why there is no pair once that is known."""

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
    def pair(self) -> tuple[str, str]:
        """The winning and the losing response."""
        return self.answers.get("reflection", self.answers["hint"]), self.answers["damaged"]

    def reject(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason


class LeanPOPipeline(Pipeline):
    """Video or images, `question` and `answer` (the ground truth) -> one pair.

    Further columns of a row: `chosen_trust` and `rejected_trust`, the similarity with the ground truth; and where the
    model can score, `chosen_reward`, `rejected_reward` and `answer_reward` (of the ground truth): the mean log-prob
    per token, given the plain question and the untouched media, in nats before beta.
    """

    name = "leanpo"
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
        work = _Work(row, media, {"hint": "<the first answer>"})
        return [(STAGES[stage], self._request(stage, work)) for stage in self._stages()]

    def make(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Outcome]:
        works = [_Work(row, media) for row, media in batch]
        for stage in self._stages():
            self._ask(stage, [work for work in works if not work.reason])
        pairs = [work for work in works if not work.reason]
        for work in pairs:
            self._judge(work)
        if self.model.can_score:
            self._score([work for work in pairs if not work.reason])
        for work in pairs:
            if not work.reason:
                self._filter(work)
        return [self._outcome(work) for work in works]

    def select(self, outcomes: list[Outcome]) -> list[Outcome]:
        return outcomes if self.config.keep_top is None else keep_top(outcomes, self.config.keep_top)

    def summarize(self, outcomes: Iterable[Outcome]) -> dict[str, Any]:
        """`similarity.pair_figures` over every pair of responses that came about, kept or not.

        Where a filter is set, the same over the pairs that were kept, as `kept_...`.
        """
        pairs = [(outcome.notes, bool(outcome.rows)) for outcome in outcomes if "chosen_trust" in outcome.notes]
        groups = {"": [notes for notes, _ in pairs]}
        if any(getattr(self.config, name) is not None for name in (*FILTERS, "keep_top")):
            groups["kept_"] = [notes for notes, kept in pairs if kept]
        what = {"plain": self.config.plain_answer, "rewards": self.model is not None and self.model.can_score}
        return {
            prefix + name: figure
            for prefix, notes in groups.items()
            for name, figure in pair_figures(notes, **what).items()
        }

    def _stages(self) -> list[str]:
        skipped = {"reflection": not self.config.reflection, "plain": not self.config.plain_answer}
        return [stage for stage in STAGES if not skipped.get(stage)]

    def _request(self, stage: str, work: _Work) -> Request:
        seed, text, media = self.config.seed, work.question, work.media
        if stage == "hint":
            text = self.config.hint_prompt.format(question=text, answer=work.truth)
        elif stage == "reflection":
            text = self.config.reflection_prompt.format(
                question=text, answer=work.truth, first_answer=work.answers["hint"]
            )
        elif stage == "damaged":
            rng = np.random.default_rng(stream_seed(seed, work.row.id, "damage"))
            media = damage(media, rng, self.config.damage_settings())
        return Request([work.row.user_message(text)], media, stream_seed(seed, work.row.id, stage))

    def _ask(self, stage: str, works: list[_Work]) -> None:
        if not works:
            return
        sampling = self.config.sampling(temperature=0.0) if stage == "plain" else self.config.sampling()
        answers = self.model.answer([self._request(stage, work) for work in works], sampling)
        for work, answer in zip(works, answers, strict=True):
            if not isinstance(answer, Failure):
                work.answers[stage] = answer
            elif stage == "plain":  # the pair does not need it
                work.notes["plain_failure"] = answer.reason
            else:
                work.reject("no answer", f"there is no {STAGES[stage]}: {answer.reason}")

    def _judge(self, work: _Work) -> None:
        """Compare both responses with the ground truth, and with each other."""
        for side, text in zip(("chosen", "rejected"), work.pair):
            work.notes[f"{side}_trust"] = similarity(text, work.truth)
            work.notes[f"{side}_right"] = right(text, work.truth)
        if self.config.plain_answer:
            work.notes["plain_right"] = "plain" in work.answers and right(work.answers["plain"], work.truth)
        if right(*work.pair):
            work.reject(
                "identical responses", f"both responses say {work.pair[0][:200]!r}, up to case and punctuation."
            )
        elif task := _task(work.row):
            chosen, rejected = (task.check(text).result for text in work.pair)
            if rejected == RIGHT:
                work.reject("losing response is right", f"{work.pair[1][:200]!r} is right: {work.truth[:200]!r}.")
            elif chosen == WRONG and task.kind != "open":  # other words are nothing wrong in an open-ended answer
                work.reject("winning response is wrong", f"{work.pair[0][:200]!r} is not {work.truth[:200]!r}.")

    def _score(self, works: list[_Work]) -> None:
        """The rewards of both responses and of the ground truth, given the plain question and the untouched media."""
        if not works:
            return
        requests = [self._request("plain", work) for work in works for _ in range(3)]
        responses = [text for work in works for text in (*work.pair, work.truth)]
        rewards = np.reshape(self.model.average_logps(requests, responses), (len(works), 3)).tolist()
        for work, values in zip(works, rewards):
            if not np.isfinite(values).all():
                work.reject("no reward", f"the rewards of chosen, rejected and answer are {values}, not all finite.")
                continue
            work.notes |= zip(("chosen_reward", "rejected_reward", "answer_reward"), values)

    def _filter(self, work: _Work) -> None:
        notes = work.notes
        values = {"min_trust": notes["chosen_trust"], "min_trust_margin": trust_margin(notes)}
        if "chosen_reward" in notes:
            values["min_margin"] = notes["chosen_reward"] - notes["rejected_reward"]
        for name, (what, *_) in FILTERS.items():
            least = getattr(self.config, name)
            if least is not None and values[name] < least - _ROUNDING:
                work.reject(f"below {name}", f"the {what} is {values[name]:.4g}, {name} is {least:.4g}.")
                return

    def _outcome(self, work: _Work) -> Outcome:
        notes = {"answers": work.answers, **work.notes}
        if work.reason:
            return Outcome(work.row.id, reason=work.reason, kind=work.kind, notes=notes)
        columns = {key: value for key, value in work.notes.items() if key.endswith(("_reward", "_trust"))}
        chosen, rejected = work.pair
        row = training_row(
            work.row, prompt=work.question, chosen=chosen, rejected=rejected, generated_by=self.generated_by, **columns
        )
        return Outcome(work.row.id, rows=(row,), notes=notes)


def _task(row: InputRow) -> Task | None:
    """What rules can check a response with; None where options and answer do not fit together."""
    try:
        return read_task(row.example, SHORT_WORDS)
    except InputError:
        return None


def keep_top(outcomes: Sequence[Outcome], share: float) -> list[Outcome]:
    """Keep `share` (rounded up) of the outcomes with rows, those with the largest trust margin; reject the others.

    Equal margins are kept in the order of their ids, so the choice does not depend on the order of the outcomes.
    """
    made = [outcome for outcome in outcomes if outcome.rows]
    margins = {outcome.id: trust_margin(outcome.rows[0]) for outcome in made}
    ranked = sorted(margins, key=lambda id: (-round(margins[id] / _ROUNDING), id))
    count = math.ceil(share * len(ranked) - _ROUNDING)
    dropped = set(ranked[count:])
    return [
        Outcome(
            outcome.id,
            reason=f"the trust margin {margins[outcome.id]:.4g} is not among the {count} largest of {len(ranked)} "
            f"(keep_top {share}).",
            kind="outside keep_top",
            notes=outcome.notes,
        )
        if outcome.id in dropped
        else outcome
        for outcome in outcomes
    ]
