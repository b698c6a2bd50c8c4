"""RRPO's self-alignment data (Sarkar & Etemad, NeurIPS 2025, arXiv 2504.12083): videos or images with questions.

The model answers on perturbed media (`corruptions.py`). Where its answer is wrong, the ground truth is chosen and the
wrong answer rejected; the phrases are what differs between them. Multiple choice, yes/no and short answers are checked
by rules (`trl_vpo.text`), and by a judge if no rule can decide a short one. Open-ended ones are checked by the judge,
which then rewrites the ground truth with the model's mistakes (`judge.py`). The training row has the plain question
and the untouched media. What is ours and not the paper's is in docs/generate.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from trl_vpo.data.inputs import InputRow
from trl_vpo.errors import InputError, PhraseError
from trl_vpo.generate.judge import Difference, Question, ask, changed_share, read_judgement, read_rewrite
from trl_vpo.generate.pipeline import Pipeline, image_request, training_row
from trl_vpo.generate.rrpo_config import RRPOGenerateConfig
from trl_vpo.generate.tasks import Task, read_task
from trl_vpo.media.corruptions import effective_mode, perturb
from trl_vpo.media.load import Media
from trl_vpo.models.requests import Request, stream_seed
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.answers import RIGHT, UNDECIDED, WRONG
from trl_vpo.text.phrases import phrase_spans
from trl_vpo.text.responses import Failure, without_reasoning
from trl_vpo.text.similarity import mean

FAILED = "failed"  # an attempt that has no answer, or that the judge could not check
# Kinds of attempts without a wrong answer; a row is counted under the first that one of its attempts had.
NO_WRONG_ANSWER = (
    "judge", "undecided without a judge", "undecided", "answered correctly", "no key difference", "no answer",
)  # fmt: skip


@dataclass
class _Try:
    """One perturbation and what the model made of it."""

    mode: str
    seed: int
    answer: str = ""
    result: str = FAILED
    parsed: str | None = None
    kind: str = ""  # the reason why it gave no row, for counting
    why: str = ""  # the same in words
    differences: tuple[Difference, ...] = ()


@dataclass
class _Work:
    """One input in work. `stop` is (kind, reason) once it is certain that there will be no row."""

    row: InputRow
    media: Media
    task: Task
    tries: list[_Try] = field(default_factory=list)
    judged: bool = False  # its answers are open-ended, and a judge checks them
    rejected: str | None = None
    stop: tuple[str, str] | None = None

    @property
    def wrong(self) -> bool:
        return bool(self.tries) and self.tries[-1].result == WRONG


class RRPOPipeline(Pipeline):
    """Video or images, `question` and `answer` (the ground truth), perhaps `options` and `answer_kind` -> one pair.

    Further columns of a row: `chosen_phrases` and `rejected_phrases`; `answer_kind` (choice, yes_no, short or open);
    `model_answer`, the wrong answer as the model gave it; `perturbation`, {"mode", "seed"}: with the settings of the
    run, `perturb` makes the same media again.
    """

    config: RRPOGenerateConfig

    def _task(self, row: InputRow) -> Task:
        return read_task(row.example, self.config.short_words, self.config.open_check == "exact")

    def check(self, row: InputRow) -> None:
        self._task(row)
        if not row.images and not row.videos:
            raise InputError("the row has neither a video nor an image: RRPO needs media that it can perturb.")
        if not row.videos and "mask" not in self.config.perturbation:
            only = f"the row has images only, and perturbation is {self.config.perturbation}"
            raise InputError(f"{only}: images cannot be shuffled, use a perturbation with mask.")

    def preview(self, row: InputRow, media: Media) -> list[tuple[str, Request]]:
        work = self._work(row, media)
        steps = [(f"{work.task.kind} question on perturbed media", self._request(work, self._next_try(work)))]
        if not work.judged:
            return steps
        if self.judge is None and not self.config.judge_url:
            return [(f"{steps[0][0]}; left out: an open-ended answer needs a judge", steps[0][1])]
        values = {"question": work.task.question, "truth": work.task.answer, "answer": "<the model's answer>"}
        prompts = {
            "the judge: key differences": self.config.differences_prompt.format(**values),
            "the judge: rewrite": self.config.rewrite_prompt.format(**values, differences="<the differences>"),
        }
        return steps + [(title, image_request((), text, self._seed(work, title))) for title, text in prompts.items()]

    def make(self, batch: Sequence[tuple[InputRow, Media]]) -> list[Outcome]:
        works = [self._work(row, media) for row, media in batch]
        for _ in range(self.config.attempts):
            self._attempt([work for work in works if not work.stop and not work.wrong])
        wrong = [work for work in works if work.wrong]
        self._rewrite([work for work in wrong if work.judged])
        self._reject_in_form([work for work in wrong if not work.judged])
        return [self._outcome(work) for work in works]

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return the figures of docs/generate.md, None for one without data.

        Accuracies are those of the first attempts: further ones are made only if the first was not wrong. Undecided
        is also what the judge calls incorrect without a key difference.
        """
        rows = [row for outcome in outcomes for row in outcome.rows]
        firsts: dict[str, Counter] = defaultdict(Counter)
        left_out: dict[str, Counter] = defaultdict(Counter)
        for outcome in outcomes:
            kind = outcome.notes.get("answer_kind", "unread")
            firsts[kind].update(result for _, result in outcome.notes.get("tries", [])[:1])
            if outcome.reason:
                left_out[kind][outcome.kind] += 1
        tried = [(kind, counts) for kind, counts in firsts.items() if counts]
        decided = [RIGHT, WRONG]
        return {
            "rows_by_kind": dict(Counter(row["answer_kind"] for row in rows)),
            "rows_by_perturbation": dict(Counter(row["perturbation"]["mode"] for row in rows)),
            "perturbed_accuracy": {kind: _share(counts, RIGHT, decided) for kind, counts in tried},
            "perturbed_undecided": {kind: _share(counts, UNDECIDED, [*decided, UNDECIDED]) for kind, counts in tried},
            "words_in_phrases": mean([o.notes["changed"] for o in outcomes if o.rows]),
            "left_out": {kind: dict(counts) for kind, counts in left_out.items()},
        }

    # --- the model's answers ------------------------------------------------------------------------------------

    def _work(self, row: InputRow, media: Media) -> _Work:
        task = self._task(row)
        work = _Work(row, media, task, judged=task.kind == "open" and self.config.open_check == "judge")
        if work.judged and self.judge is None:
            work.stop = (
                "open-ended without a judge",
                f"the answer {task.answer!r} is open-ended, and there is no judge: set judge_url and judge_model, or "
                "open_check exact where answers have a fixed form.",
            )
            return work
        try:
            effective_mode(media, self.config.perturb_settings())
        except InputError as error:
            work.stop = ("nothing to perturb", str(error))
        return work

    def _seed(self, work: _Work, purpose: str) -> int:
        return stream_seed(self.config.seed, work.row.id, purpose)

    def _next_try(self, work: _Work) -> _Try:
        mode = effective_mode(work.media, self.config.perturb_settings())
        return _Try(mode, self._seed(work, f"perturb {len(work.tries)}"))

    def _request(self, work: _Work, attempt: _Try) -> Request:
        suffix = getattr(self.config, f"{work.task.kind}_prompt_suffix")
        text = f"{work.task.question}\n{suffix}" if suffix else work.task.question
        media = perturb(work.media, attempt.seed, self.config.perturb_settings())
        return Request([work.row.user_message(text)], media, self._seed(work, f"answer {len(work.tries)}"))

    def _attempt(self, works: list[_Work]) -> None:
        """Perturb each input once more, let the model answer, and check the answer by rules or the judge."""
        tries = [self._next_try(work) for work in works]
        requests = [self._request(work, attempt) for work, attempt in zip(works, tries)]
        answers = self.model.answer(requests, self.config.sampling())
        to_judge = []
        for work, attempt, answer in zip(works, tries, answers, strict=True):
            work.tries.append(attempt)
            if isinstance(answer, Failure):
                attempt.kind, attempt.why = "no answer", f"no answer ({answer.reason})"
                continue
            attempt.answer = answer
            if work.judged:
                to_judge.append(work)
                continue
            check = work.task.check(answer)
            attempt.result, attempt.parsed = check.result, check.parsed
            attempt.kind = {RIGHT: "answered correctly", UNDECIDED: "undecided"}.get(check.result, "")
            attempt.why = f"{answer!r} {check.why or 'is right'}"
            if check.judgeable and self.judge:
                to_judge.append(work)
            elif check.judgeable:
                attempt.kind = "undecided without a judge"
                attempt.why += " (judge_url and judge_model let a judge decide)"
        self._judge(to_judge)

    # --- the judge ----------------------------------------------------------------------------------------------

    def _question(self, work: _Work, step: str, template: str, read, **values: str) -> Question:
        answer = without_reasoning(work.tries[-1].answer)
        prompt = template.format(question=work.task.question, truth=work.task.answer, answer=answer, **values)
        seeds = tuple(self._seed(work, f"{step} {len(work.tries)} {number}") for number in range(2))
        return Question(prompt, seeds, read)

    def _judge(self, works: list[_Work]) -> None:
        template = self.config.differences_prompt
        questions = [self._question(work, "differences", template, read_judgement) for work in works]
        for work, judgement in zip(works, ask(self.judge, questions, self.config.judge_sampling())):
            attempt = work.tries[-1]
            if isinstance(judgement, Failure):
                attempt.kind, attempt.why = "judge", f"the judge's reply is unusable: {judgement.reason}"
            elif judgement.differences:
                attempt.result, attempt.differences = WRONG, judgement.differences
            else:
                # incorrect without contradicting anything is neither right nor wrong, and left out of accuracies
                attempt.result = RIGHT if judgement.correct else UNDECIDED
                attempt.kind = "no key difference"
                attempt.why = f"{attempt.answer!r} has no key difference"

    def _rewrite(self, works: list[_Work]) -> None:
        questions = []
        for work in works:
            read = partial(read_rewrite, truth=work.task.answer, max_changed=self.config.max_changed)
            listed = [f'- {d.kind}: "{d.answer}" instead of "{d.truth}"' for d in work.tries[-1].differences]
            template = self.config.rewrite_prompt
            questions.append(self._question(work, "rewrite", template, read, differences="\n".join(listed)))
        for work, rewritten in zip(works, ask(self.judge, questions, self.config.judge_sampling())):
            if isinstance(rewritten, Failure):
                work.stop = ("judge", f"the judge's rewrite is unusable: {rewritten.reason}.")
            else:
                work.rejected = rewritten

    # --- rows ---------------------------------------------------------------------------------------------------

    def _reject_in_form(self, works: list[_Work]) -> None:
        """Set the wrong answer as it is trained on. If a rule found it wrong, it must be wrong in this form, too."""
        for work in works:
            answer = work.tries[-1].answer
            work.rejected = work.task.rejected(answer, work.tries[-1].parsed)
            check = work.task.check(work.rejected)
            if check.result != WRONG and not work.tries[-1].differences:
                why = check.why or "is right"
                work.stop = ("undecided", f"{answer!r} is wrong, but in its trained form {work.rejected!r} {why}.")

    def _outcome(self, work: _Work) -> Outcome:
        notes: dict[str, Any] = {"answer_kind": work.task.kind, "tries": [[t.mode, t.result] for t in work.tries]}
        if not work.stop and not work.wrong:
            kinds = {attempt.kind for attempt in work.tries}
            attempts = [f"attempt {n} ({t.mode}): {t.why}" for n, t in enumerate(work.tries, 1)]
            work.stop = next(kind for kind in NO_WRONG_ANSWER if kind in kinds), "; ".join(attempts) + "."
        if work.stop:
            kind, reason = work.stop
            return Outcome(work.row.id, reason=reason, kind=kind, notes=notes)
        attempt = work.tries[-1]
        try:
            chosen, rejected, *phrases = phrase_spans(work.task.answer, work.rejected)
        except PhraseError as error:
            return Outcome(work.row.id, reason=str(error), kind="no phrase", notes=notes)
        notes["changed"] = mean(changed_share(text, spans) for text, spans in zip((chosen, rejected), phrases))
        if attempt.differences:
            notes["differences"] = [asdict(difference) for difference in attempt.differences]
        row = training_row(
            work.row,
            prompt=work.task.question,
            chosen=chosen,
            rejected=rejected,
            generated_by=self.generated_by,
            chosen_phrases=[list(span) for span in phrases[0]],
            rejected_phrases=[list(span) for span in phrases[1]],
            answer_kind=work.task.kind,
            model_answer=attempt.answer,
            perturbation={"mode": attempt.mode, "seed": attempt.seed},
        )
        return Outcome(work.row.id, (row,), notes=notes)


def _share(counts: Mapping[str, int], part: str, among: Sequence[str]) -> float | None:
    total = sum(counts[name] for name in among)
    return counts[part] / total if total else None
