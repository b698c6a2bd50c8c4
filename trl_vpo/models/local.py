"""A model in this process: answers whose randomness no batch changes, and log-probs as training computes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, ProcessorMixin, TopPLogitsWarper

from trl_vpo.data.accepted import check_accepted
from trl_vpo.data.chat import stop_token
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.rows import Row, place_media
from trl_vpo.errors import ModelError, RowError
from trl_vpo.forward.families import merge_media
from trl_vpo.forward.tower import clear_causal_flags
from trl_vpo.forward.tree import Tree, Trunk, tree_batch
from trl_vpo.models.requests import Answer, AnsweringModel, Request, Sampling
from trl_vpo.text.responses import Failure, is_thought_tag, opens_thoughts, unusable, without_reasoning

if TYPE_CHECKING:
    from trl_vpo.forward.scoring import Scores

logger = logging.getLogger(__name__)

TAIL = 16  # tokens that an opening tag of thoughts and the white space behind it take, at most
Key, Result = TypeVar("Key"), TypeVar("Result")


class SeededSampling(LogitsProcessor):
    """Temperature and top-p, then noise: the most likely token of what comes out is a sample of what went in.

    With u_i uniform on [0, 1), i independent, the arg max over i of `log p_i - log(-log u_i)` is i with probability
    p_i: that is sampling, not an approximation of it (the Gumbel-max trick; Gumbel 1954, Maddison et al. 2014,
    arXiv 1411.0030). A constant added to all scores moves no arg max, so unnormalized logits will do, and a token
    outside the nucleus has -inf and never wins. `generate` then decodes greedily.

    The noise of a row at a step is a function of its seed (0 or above) and the step alone, drawn on the CPU with 24
    bits: neither the row's place in the batch, nor its neighbours, its padding or the device change it.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, sampling: Sampling):
        self._seeds = list(seeds)
        self._prompt_length = prompt_length
        self._temperature = sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.size(1) - self._prompt_length
        if step == 0 and bool(scores.isnan().any()):
            raise ModelError("the model's logits are nan. float16 overflows in many models: use dtype bfloat16.")
        if self._temperature == 0:
            return scores
        scores = scores.float() / self._temperature  # (B, V)
        if self._top_p is not None:
            scores = self._top_p(input_ids, scores)
        rows = [np.random.default_rng((seed, step)).random(scores.size(1), np.float32) for seed in self._seeds]
        uniform = torch.from_numpy(np.stack(rows)).to(scores.device)  # (B, V)
        return scores - torch.log(-torch.log(uniform))


class LocalModel(AnsweringModel):
    """A vision-language model and its processor. Prompts and media are encoded by the collator that training uses.

    The model's own generation settings (repetition penalty, sampling defaults, forced tokens) are taken off it; only
    its end-of-sequence tokens stay; the token with which the chat template ends an answer is one of them. Raises
    ModelError for a model without chat template or end-of-sequence token.
    """

    can_score = True

    def __init__(
        self,
        model: PreTrainedModel,  # without PEFT around it; the layers of an adapter may be in it
        processor: ProcessorMixin,
        *,
        batch_size: int = 8,  # sequences in one call, at most; halved when the device runs out of memory
        max_pixels: int | None = None,  # see `PreferenceCollator`
        description: dict[str, str | None] | None = None,  # for `record`
    ):
        if getattr(processor, "chat_template", None) is None:
            raise ModelError(
                f"{type(processor).__name__} has no chat template, so the model cannot be asked anything: use its "
                "chat (instruct) version."
            )
        self.model = model.eval()
        clear_causal_flags(model)  # before it answers, not only where it scores
        self.processor = processor
        self.batch_size = batch_size
        # Not all models bring pixels into their own dtype.
        self._collator = PreferenceCollator(processor, max_pixels=max_pixels, pixel_dtype=model.dtype)
        self.video_budget = self._collator.budget
        name = model.config._name_or_path or None
        self._description = description or {"model": name, "adapter": None, "revision": None}
        tokenizer = self._collator.tokenizer
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = {*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id} - {None}
        if not ends:
            raise ModelError(f"{type(model).__name__} and its tokenizer have no end-of-sequence token: set one.")
        self._ends = ends | ({stop_token(processor)} - {None})
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._ends)
        # `generate` fills whatever a call leaves open from here.
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._pad, bos_token_id=tokenizer.bos_token_id
        )
        self._scorer = None

    def record(self) -> dict[str, str | None]:
        return dict(self._description)

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[str | Failure]:
        """See `AnsweringModel`. A prompt that the processor refuses is a `Failure` of that request.

        Raises ModelError for media that the model cannot see, or one request that does not fit on the device.
        """
        answers = self.complete(requests, sampling)
        for place, answer in enumerate(answers):
            if isinstance(answer, Answer):
                cut = None if answer.ended else Failure(f"cut off after {answer.tokens} tokens")
                answers[place] = cut or unusable(answer.text) or answer.text
        return answers

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer | Failure]:
        """Return the answers as they are, empty and cut-off ones too. Failures and errors as in `answer`."""
        trees: dict[int, Tree] = {}
        failures: dict[int, Failure] = {}
        for place, request in enumerate(requests):
            try:
                trees[place] = self._encode_request(request)
            except RowError as error:
                failures[place] = Failure(str(error))

        def run(places: list[int]) -> list[Answer]:
            return self.generate([trees[i] for i in places], [requests[i].seed for i in places], sampling)

        answers = failures | self.in_batches(trees, run)
        return [answers[place] for place in range(len(requests))]

    def average_logps(self, requests: Sequence[Request], responses: Sequence[str]) -> list[float]:
        """Return the mean log-prob (nats, float32) per token of each response, its end of turn included.

        Tokens, positions and log-probs are those of training; every response stands behind a prompt of its own, so
        its figure does not depend on the others. Raises ModelError for a prompt that the processor refuses, or one
        request that does not fit on the device.
        """
        try:
            trees = [self._encode_request(*pair) for pair in zip(requests, responses, strict=True)]
        except RowError as error:
            raise ModelError(f"a response cannot be scored: {error}") from error

        def run(places: list[int]) -> list[float]:
            scores = self.score(self.batch([trees[i] for i in places]))
            return (scores.sums / scores.mask.sum(-1)).tolist()

        averages = self.in_batches(dict(enumerate(trees)), run)
        return [averages[place] for place in range(len(requests))]

    @torch.no_grad()
    def generate(self, trees: Sequence[Tree], seeds: Sequence[int], sampling: Sampling) -> list[Answer]:
        """Return the answer to the prompt of each tree, all of them in one call of the model."""
        trunks = [tree.trunks[0] for tree in trees]
        inputs = send_to_device(_left_padded(trunks, self._pad), self.model.device)
        width = inputs["input_ids"].size(1)
        output = self.model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            logits_processor=[SeededSampling(seeds, width, sampling)],
        )
        return [self._read(ids, trunk) for ids, trunk in zip(output[:, width:].tolist(), trunks)]

    def _read(self, ids: list[int], trunk: Trunk) -> Answer:
        """An answer that ended outside of tags is one without thoughts, also where the prompt opened some."""
        decode = self._collator.tokenizer.decode
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        thinking = end is None and opens_thoughts(decode(trunk.ids[-TAIL:]))
        # Special tokens are left out, but for tags of thoughts (Gemma 4's, Magistral's): thoughts would stay.
        tags = {token for token in {*ids[:end]} if is_thought_tag(decode([token]).strip())}
        parts = groupby(ids[:end], key=tags.__contains__)
        text = "".join(decode([*part], skip_special_tokens=not is_tag) for is_tag, part in parts)
        text = without_reasoning(text, thinking=thinking)
        return Answer(text, len(ids[:end]), ended=end is not None)

    def batch(self, trees: list[Tree]) -> dict[str, Any]:
        """Return the trees as one batch on the model's device, for `score`."""
        return send_to_device(tree_batch(trees, self._pad), self.model.device)

    @torch.no_grad()
    def score(self, batch: dict[str, Any], reference: Scores | None = None) -> Scores:
        """Return the scores of all branches of a batch in one call; with a reference also the KL."""
        if self._scorer is None:
            from trl_vpo.forward.scorer import Scorer  # imports TRL

            # Not the shared layout: it would put another attention into the model that also answers.
            self._scorer = Scorer(self.model, layout="separate", pad_token_id=self._pad, trains=False)
        return self._scorer.score(self.model, batch, reference)

    def in_batches(self, trees: Mapping[Key, Tree], run: Callable[[list[Key]], list[Result]]) -> dict[Key, Result]:
        """Return what `run` gives for each tree. It gets the keys of as many as `batch_size` and memory allow."""
        results: dict[Key, Result] = {}
        for group in _stackable([tree.trunks[0].media for tree in trees.values()]):
            keys = [list(trees)[i] for i in group]
            while keys:
                batch = keys[: self.batch_size]
                try:
                    results |= zip(batch, run(batch), strict=True)
                    keys = keys[len(batch) :]
                    continue
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        trunk = trees[batch[0]].trunks[0]
                        media = {key: tuple(value.shape) for key, value in trunk.media.items()} or "none"
                        raise ModelError(
                            f"one request alone does not fit on {self.model.device}: {len(trunk.ids)} prompt tokens, "
                            f"media {media}. Lower num_frames, max_pixels or max_new_tokens, set load_in_4bit, or "
                            "spread the model with device='auto'."
                        ) from None
                # Outside of the handler: its traceback would keep the failed call's tensors alive.
                torch.cuda.empty_cache()
                half = len(batch) // 2
                logger.warning(f"{len(batch)} requests at once do not fit on {self.model.device}: from now on {half}.")
                self.batch_size = half
        return results

    def encode(self, row: Row, sides: tuple[str, ...] = ()) -> Tree:
        """Encode a row with decoded media and some of its responses. Raises RowError, naming the row."""
        return self._collator.encode_row(row, sides)

    def _encode_request(self, request: Request, response: str | None = None) -> Tree:
        """Encode a request, as the prompt of a response if there is one. Raises RowError and ModelError."""
        images, videos = list(request.media.images), list(request.media.videos)
        row = Row("the request", prompt=[], chosen=[], rejected=[], images=images, videos=videos)
        try:
            row.prompt = place_media(request.messages, len(images), len(videos))
            check_accepted(row, self.processor)
        except RowError as error:
            raise ModelError(f"{type(self.model).__name__} cannot be asked this: {error}") from error
        if response is None:
            return self.encode(row)
        row.chosen = [{"role": "assistant", "content": [{"type": "text", "text": response}]}]
        return self.encode(row, ("chosen",))


def _stackable(media: list[dict[str, Tensor]]) -> list[list[int]]:
    """Group trunks whose media fit into one model call; trunks without videos go with the first group.

    Families that take videos as (N, frames, C, H, W) need them in one shape.
    """
    shapes: dict[tuple | None, list[int]] = {}
    for trunk, tensors in enumerate(media):
        video = tensors.get("pixel_values_videos")
        shape = tuple(video.shape[1:]) if video is not None and video.dim() == 5 else None
        shapes.setdefault(shape, []).append(trunk)
    rest = shapes.pop(None, [])
    groups = list(shapes.values()) or [[]]
    groups[0] = sorted(groups[0] + rest)
    return groups


def _left_padded(trunks: list[Trunk], pad_token_id: int) -> dict[str, Tensor]:
    """Prompts as inputs of `generate`: ids, mask and token types (B, P), padded on the left, and their media."""
    width = max(len(trunk.ids) for trunk in trunks)

    def pad(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([[value] * (width - len(row)) + row for row in rows])

    inputs = {
        "input_ids": pad([trunk.ids for trunk in trunks], pad_token_id),
        "attention_mask": pad([[1] * len(trunk.ids) for trunk in trunks], 0),
    }
    inputs |= {key: pad([trunk.types[key] for trunk in trunks], 0) for key in trunks[0].types}
    return inputs | merge_media([trunk.media for trunk in trunks])
