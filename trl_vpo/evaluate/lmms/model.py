"""lmms-eval's requests, answered by a `LocalModel`. Importing this needs lmms-eval.

An lmms-eval model only has to answer requests (`lmms_eval.api.model.lmms`). Prompts, frames and the adapter are those
of training: each request becomes a chat with media, encoded by the collator that training uses.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from trl_vpo.errors import EvaluateError, MediaError
from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.images import describe, load_image
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Answer, Request, Sampling, stream_seed
from trl_vpo.runs.driver import DECODERS, decoded_ahead
from trl_vpo.text.responses import Failure

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}  # what lmms-eval takes for an image
READ = {"max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until"}  # generation settings of a task


class BenchmarkModel(lmms):
    """A model that answers what lmms-eval asks. Where a task samples, the seed fixes its answers.

    `is_simple` is lmms-eval's word for tasks that give a text and a list of media; False: they give whole messages.
    Only tasks that compare log-probs need True.
    """

    is_simple = False

    def __init__(self, model: LocalModel, video_options: VideoOptions, *, max_new_tokens: int = 256, seed: int = 0):
        super().__init__()
        self._model, self._options = model, video_options
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self.begin({})

    def begin(self, answers: dict[str, Any], keep: Callable[[str, Any], None] = lambda name, answer: None) -> None:
        """Begin a benchmark. `answers`: those known, text and tokens, or loss and whether it is the greedy answer.

        They are named as in "mvbench_x/7: answer 1". `keep` is called with the name of each new one, and with it.
        """
        self._answers, self._keep, self._times = answers, keep, Counter()

    def _add(self, name: str, answer: Any) -> None:
        self._keep(name, answer)
        self._answers[name] = answer

    @property
    def device(self) -> Any:  # of what several processes exchange
        return self._model.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return one answer to each request, cut before the first of the task's stop strings."""
        _warn_of_unread_settings(requests)
        names = self._names(requests)
        jobs = [job for job in zip(requests, names) if job[1] not in self._answers]
        with tqdm(total=len(names), initial=len(names) - len(jobs), desc="Answering", disable=self.rank != 0) as bar:
            for sampling, group in groupby(jobs, key=lambda job: self._sampling(job[0])):
                for batch in self._loaded(list(group)):
                    answers = self._model.complete([request for *_, request in batch], sampling)
                    for (instance, name, _), answer in zip(batch, answers):
                        self._add(name, self._answer(instance, answer))
                    bar.update(len(batch))
        answers = [self._answers[name] for name in names]
        return [GenerationResult(text, TokenCounts(output_tokens=tokens)) for text, tokens in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return how likely each continuation is, and whether it is the greedy answer; both with its end of turn.

        lmms-eval's models give the mean negative log-prob per token here, and its scoring takes the lowest. It comes
        in the place of a text, because lmms-eval 0.7.3 makes a string of a bare pair (`unwrap_generation_output`), on
        which its scoring fails.
        """
        names = self._names(requests)
        jobs = [job for job in zip(requests, names) if job[1] not in self._answers]
        with tqdm(total=len(names), initial=len(names) - len(jobs), desc="Scoring", disable=self.rank != 0) as bar:
            for batch in self._loaded(jobs):
                texts, asked = [], [request for *_, request in batch]
                for instance, *_ in batch:
                    _, text, *_, doc_id, task, split = instance.args
                    texts.append((text(self.task_dict[task][split][doc_id]) if callable(text) else text).strip())
                averages = self._model.average_logps(asked, texts)
                # One token more than the longest has: an answer that goes on is longer than its text.
                tokens = max(len(self._model.processor.tokenizer(text)["input_ids"]) for text in texts) + 1
                greedy = self._model.complete(asked, Sampling(max_new_tokens=tokens, temperature=0))
                for (_, name, _), average, answer, text in zip(batch, averages, greedy, texts, strict=True):
                    self._add(name, (-average, isinstance(answer, Answer) and answer.text == text))
                bar.update(len(batch))
        return [GenerationResult(tuple(self._answers[name])) for name in names]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise EvaluateError("tasks of several rounds are not supported.")  # refused before anything is loaded

    def _names(self, requests: Sequence[Instance]) -> list[str]:
        """Name each request by task, document and, as some come again, also in a later round, which time it is."""
        names = []
        for instance in requests:
            *_, doc_id, task, _ = instance.args
            self._times[task, doc_id] += 1
            names.append(f"{task}/{doc_id}: answer {self._times[task, doc_id]}")
        return names

    # --- requests ----------------------------------------------------------------------------------------------------

    def _loaded(self, jobs: list[tuple[Instance, str]]) -> Iterator[list[tuple[Instance, str, Request]]]:
        """The instances with their names and requests, in batches; the next batch's media are decoded ahead."""
        with ThreadPoolExecutor(DECODERS) as pool:
            yield from decoded_ahead(pool, lambda i: self._request(*jobs[i]), range(len(jobs)), self._model.batch_size)

    def _request(self, instance: Instance, name: str) -> tuple[Instance, str, Request]:
        *_, doc_id, task, split = instance.args
        seed = stream_seed(self._seed, *name.split(": "))
        try:
            document = self.task_dict[task][split][doc_id]
            if self.is_simple:
                text, _, to_visuals, *_ = instance.args
                content = [_part(visual) for visual in to_visuals(document) or []] if callable(to_visuals) else []
                messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
            else:
                messages = instance.args[1](document)
            return instance, name, as_request(messages, self._options, seed, self._model.video_budget)
        # Some tasks leave the interpreter where a video is missing.
        except (MediaError, EvaluateError, FileNotFoundError, SystemExit) as error:
            raise EvaluateError(f"{task}, document {doc_id}: {error}") from error

    # --- answers -----------------------------------------------------------------------------------------------------

    def _settings(self, instance: Instance) -> dict[str, Any]:
        return instance.args[1 if self.is_simple else 2] or {}

    def _sampling(self, instance: Instance) -> Sampling:
        """Greedy, unless a task wants a temperature; lmms-eval's own models read it like this."""
        settings = self._settings(instance)
        if (settings.get("num_beams") or 1) > 1:
            raise EvaluateError(f"{instance.task_name} wants {settings['num_beams']} beams; there is no beam search.")
        temperature = (settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        return Sampling(
            max_new_tokens=settings.get("max_new_tokens") or self._max_new_tokens,
            temperature=temperature,
            top_p=(settings.get("top_p") or 1.0) if temperature else 1.0,
        )

    def _answer(self, instance: Instance, answer: Answer | Failure) -> tuple[str, int]:
        *_, doc_id, task, _ = instance.args
        if isinstance(answer, Failure):
            raise EvaluateError(f"{task}, document {doc_id} cannot be asked: {answer.reason}")
        stops, text = self._settings(instance).get("until") or [], answer.text
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text, answer.tokens


def as_request(
    messages: Sequence[dict], video_options: VideoOptions, seed: int = 0, budget: PixelBudget | None = None
) -> Request:
    """Turn lmms-eval's messages, which carry their media, into a request, whose messages have placeholders."""
    images, sources, turns = [], [], []
    for message in messages:
        content = message["content"]
        for part in content if not isinstance(content, str) else ():
            if part["type"] == "image":
                images.append(load_image(part["url"], max_pixels=video_options.max_pixels))
            elif part["type"] == "video":
                sources.append(_video_source(part))
            elif part["type"] != "text":
                raise EvaluateError(f"it has {part['type']} in it; models here take text, images and videos.")
        turns.append({"role": message["role"], "content": _placeholders(content)})
    budget = budget and budget.shared(len(sources))
    videos = [load_video(source, video_options, budget=budget) for source in sources]
    return Request(turns, Media(tuple(images), tuple(videos)), seed)


def _warn_of_unread_settings(requests: list[Instance]) -> None:
    unread: dict[str, set[str]] = {}
    for instance in requests:
        settings = next((arg for arg in instance.args if isinstance(arg, dict)), {})
        unread.setdefault(instance.task_name, set()).update(settings.keys() - READ)
    for task, keys in unread.items():
        if keys:
            logger.warning(f"{task}: generation settings that play no role here: {', '.join(sorted(keys))}.")


def _part(visual: Any) -> dict:
    """One item of a task's `doc_to_visual` as a message part."""
    if isinstance(visual, dict):
        return {"type": visual.get("type", "video"), "url": visual}
    is_image = not isinstance(visual, (str, Path)) or Path(visual).suffix.lower() in IMAGE_SUFFIXES
    return {"type": "image" if is_image else "video", "url": visual}


def _video_source(part: dict) -> Any:
    """A video of a message as `load_video` takes it, with its window in seconds where the task sets one."""
    url = part["url"]
    options = {**url, **part} if isinstance(url, dict) else part
    window = {f"video_{end}": options.get(f"video_{end}", options.get(f"{end}_time")) for end in ("start", "end")}
    if isinstance(url, dict):
        url = next((url[key] for key in ("url", "path", "video") if key in url), None)
    if url is None:
        raise EvaluateError(f"it shows a video without a path: {describe(part['url'])}")
    window = {key: value for key, value in window.items() if value is not None}
    return {"video": url, **window} if window else url


def _placeholders(content: str | list[dict]) -> str | list[dict]:
    """A message's content with placeholders. `<image>` in its text says where the images stand, if the numbers fit."""
    if isinstance(content, str):
        return content
    kinds = Counter(part["type"] for part in content)
    text = "".join(part["text"] for part in content if part["type"] == "text")
    if kinds["image"] and not kinds["video"] and text.count("<image>") == kinds["image"]:
        return text
    return [part if part["type"] == "text" else {"type": part["type"]} for part in content]
