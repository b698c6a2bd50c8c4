"""The probes of a row: prompts to answer and responses to score; and the numbers of `rows.jsonl` that come of them.

A row becomes probes: a prompt with its media and the responses behind it. A preference row has one with both
responses, one with the chosen response for each kind of damaged media, and one for each item of its list; a question
has one that is answered and, for multiple choice, one with its options. `candidates` runs them on the command line,
`callback` in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from trl_vpo.data.chat import SeamError
from trl_vpo.data.check import check_media as open_media
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.inputs import InputRow, hashed
from trl_vpo.data.rows import Row
from trl_vpo.data.trunk_media import trunk_media
from trl_vpo.errors import InputError, MediaError, RowError
from trl_vpo.evaluate.rows import EvalRow, preference_row, refuse
from trl_vpo.files import THREADS, json_digest
from trl_vpo.forward.tree import Tree
from trl_vpo.media.corruptions import PerturbSettings, blanked, perturb
from trl_vpo.media.load import Media
from trl_vpo.models.requests import Answer, stream_seed
from trl_vpo.models.scoring import Scored
from trl_vpo.text.choices import read_options, with_options

PAIR, ANSWER, OPTIONS, IMAGE = "pair", "answer", "options", "image "  # names of probes; others are kinds of damage
MODES = {"shuffled": "global", "masked": "mask"}  # damage -> mode of `perturb`


@dataclass(frozen=True)
class Probe:
    """A prompt with its media, and the attributes of `row` that hold responses; without any: the model answers.

    An `optional` one is left out where the chat template has no place for a response.
    """

    name: str
    row: Row
    sides: tuple[str, ...] = ()
    optional: bool = False


Results = dict[str, dict[str, list[Scored] | Answer]]  # candidate -> probe -> scores of its responses, or the answer


def run_probes(
    rows: Sequence[Sequence[Probe] | RowError],
    encode: Callable[[Row, tuple[str, ...]], Tree],
    score: Callable[[list[Tree], bool], dict[str, list[list[Scored]]]],
    ask: Callable[[list[Tree]], dict[str, list[Answer]]] | None = None,
) -> list[Results | RowError]:
    """Run all probes of a batch of rows, those of one name together: they are alike, and so are their lengths.

    A row is its probes, or the reason why it cannot be used, and so is what is returned for it. `encode` turns a row
    with some of its responses into a tree, or raises RowError; `score` (with the KL, if told so) and `ask` give for
    each candidate the branches' scores, or an answer, of every tree.
    """
    results: list[Results | RowError] = [row if isinstance(row, RowError) else {} for row in rows]
    jobs = [(i, probe) for i, row in enumerate(rows) if not isinstance(row, RowError) for probe in row]
    for name in dict.fromkeys(probe.name for _, probe in jobs):
        trees: dict[int, Tree] = {}  # by place of the row
        for place, probe in jobs:
            if probe.name != name or isinstance(results[place], RowError):
                continue
            try:
                trees[place] = encode(probe.row, probe.sides)
            except RowError as error:
                if not (probe.optional and isinstance(error.__cause__, SeamError)):
                    results[place] = error
        batch = list(trees.values())
        columns = {} if not batch else ask(batch) if name == ANSWER else score(batch, name == PAIR)
        for candidate, values in columns.items():
            for place, value in zip(trees, values, strict=True):
                results[place].setdefault(candidate, {})[name] = value
    return results


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Return what `rows.jsonl` holds of a row under one candidate, from its results by probe."""
    columns: dict[str, Any] = {}
    if PAIR in results:
        chosen, rejected = results[PAIR]
        columns |= {"chosen_logp": chosen.logp, "rejected_logp": rejected.logp}
        columns |= {"chosen_tokens": chosen.tokens, "rejected_tokens": rejected.tokens, "chosen_kl": chosen.kl}
        images = [scored[0].logp for name, scored in results.items() if name.startswith(IMAGE)]
        damages = [name for name in results if name not in (PAIR, ANSWER) and not name.startswith(IMAGE)]
        columns["damaged_logps"] = {name: results[name][0].logp for name in damages} or None
        columns["image_logps"] = images or None
    if ANSWER in results:
        answer = results[ANSWER]
        columns |= {"response": answer.text, "response_tokens": answer.tokens, "response_ended": answer.ended}
    if OPTIONS in results:
        columns["option_logps"] = [scored.logp for scored in results[OPTIONS]]
        columns["option_tokens"] = [scored.tokens for scored in results[OPTIONS]]
    return columns


# --- questions ----------------------------------------------------------------------------------------------------


def question_probes(row: EvalRow, source: InputRow, media: Media) -> list[Probe]:
    """Return the probes of a question: its answer, and for multiple choice the log-probs of its options.

    The model answers the question with its options listed; their texts are scored behind the question as it is.
    """
    question, options = row.facts["question"], row.facts.get("options", ())

    def asked(text: str) -> Row:
        return _with_media(Row(row.name, [source.user_message(text)], chosen=[], rejected=[]), media)

    probes = [Probe(ANSWER, asked(with_options(question, read_options(question, options)) if options else question))]
    if options:
        plain, sides = asked(question), tuple(f"option_{place}" for place in range(len(options)))
        for side, text in zip(sides, options):  # responses are attributes of their row, like `chosen`
            setattr(plain, side, [{"role": "assistant", "content": [{"type": "text", "text": text}]}])
        probes.append(Probe(OPTIONS, plain, sides, optional=True))
    return probes


# --- preference rows ----------------------------------------------------------------------------------------------


def preference_probes(
    row: Row,
    media: Media,
    *,
    seed: int,
    damages: Sequence[str],
    listed: Sequence[Media] = (),
    answered: bool = False,
) -> list[Probe]:
    """Return the probes of a preference row, whose media are taken from `media`.

    `listed` is its list, most visible first. Media that cannot be damaged in one of the ways are left out.
    """
    row = _with_media(row, media)
    probes = [Probe(PAIR, row, ("chosen", "rejected"))]
    for kind in damages:
        if (changed := damaged(media, kind, seed)) is not None:
            probes.append(Probe(kind, _with_media(row, changed), ("chosen",)))
    probes += [Probe(f"{IMAGE}{k}", _with_media(row, item), ("chosen",)) for k, item in enumerate(listed)]
    return [*probes, Probe(ANSWER, row)] if answered else probes


def _with_media(row: Row, media: Media) -> Row:
    alone = {"media_list": None, "critical_box": None, "critical_span": None}
    return replace(row, images=list(media.images), videos=list(media.videos), **alone)


def row_seed(seed: int, row_id: str) -> int:
    """Return the seed of a row's damages: the same for every candidate, batch and worker."""
    return stream_seed(seed, row_id, "sensitivity")


def damaged(media: Media, kind: str, seed: int) -> Media | None:
    """Return damaged copies of all media, or None where they cannot be damaged so.

    Sizes, frame counts and timestamps stay. shuffled: the frames of every clip change places over its whole length,
    none stays (RRPO's global shuffling). Images, single frames and clips that stand still cannot be. masked: a light
    grey square over 25-50 % of each image and clip (RRPO's mask). blank: black.
    """
    if not media.images and not media.videos:
        return None
    if kind == "blank":
        return blanked(media)
    try:
        return perturb(media, seed, PerturbSettings(mode=MODES[kind]))
    except InputError:  # only of shuffling: nothing moves
        return None


def own_media(row: Row, media: Media, collator: PreferenceCollator) -> Media:
    """Return the media of a row; one that has only a list is asked about the first of it. Raises RowError."""
    if media.images or media.videos:
        return media
    if row.media_list is not None:  # the others are not read
        row = replace(row, media_list=row.media_list[:1])
    return [*listed_media(row, collator), media][0]


def listed_media(row: Row, collator: PreferenceCollator) -> list[Media]:
    """Return the media of a row's list, the one with the whole object first, as LPOI trains on them. Or RowError."""
    if row.media_list is None and row.critical_box is None and row.critical_span is None:
        return []
    try:
        return trunk_media(row, collator)
    except ValueError as error:
        raise RowError(f"{row.name}: {error}") from error


# --- media before a run ---------------------------------------------------------------------------------------------


def check_media(rows: Sequence[EvalRow], inputs: Sequence[InputRow], settings: Any, remedy: str = "") -> None:
    """Open all media of these rows, as training does before its first step; raise EvaluateError with what is wrong.

    `settings` are those of an evaluation or a training. A medium of several rows is opened once.
    """
    how = {name: getattr(settings, name) for name in ("media_root", "max_pixels", "video_options")}
    how |= {"num_images": getattr(settings, "num_images", 5), "check_media": "header", "media_contrast": None}

    def read(row: EvalRow) -> Row:
        source = inputs[row.place]
        if row.task == "preference":
            return preference_row(source)
        return Row(row.name, [], [], [], images=list(source.images), videos=list(source.videos))

    def problem(row: EvalRow) -> str | None:
        try:
            if unusable := inputs[row.place].problem:
                raise MediaError(unusable)
            open_media(read(row), SimpleNamespace(**how))
        except (MediaError, RowError) as error:
            return str(error)

    keys = []
    for row in rows:
        pair = read(row)
        media = [pair.images, pair.videos, pair.media_list, pair.critical_box, pair.critical_span]
        keys.append(json_digest([media, inputs[row.place].problem], default=hashed))
    first = dict(zip(reversed(keys), reversed(rows)))
    bar = {"desc": "Checking media", "leave": False, "disable": None}  # None: a bar on terminals only
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(first, tqdm(pool.map(problem, first.values()), total=len(first), **bar)))
    refuse([f"{row.name}: {found[key]}" for row, key in zip(rows, keys) if found[key]], len(rows), remedy)
