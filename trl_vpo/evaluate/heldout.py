"""Held-out measures of a trained model: preferences, how far likelihoods moved, and what the model says itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trl_vpo.evaluate.measures import PairScores, preference
from trl_vpo.forward.layouts import merge_media
from trl_vpo.trainers.reference import evaluating


@dataclass(frozen=True)
class PreferenceMeasures:
    """Means over the N pairs of a held-out set; log-probs and KL in nats, summed over a response.

    Attributes:
        pairs: N.
        accuracy: share of pairs whose chosen response has the higher log-prob; a tie counts half.
        average_accuracy: the same with the log-prob divided by the response's tokens (LeanPO's reward).
        chosen_logp, rejected_logp: mean log-prob of the responses.
        kl: mean KL(reference || model) along the chosen response, exact over the vocabulary; 0 for the reference.
    """

    pairs: int
    accuracy: float
    average_accuracy: float
    chosen_logp: float
    rejected_logp: float
    kl: float


@contextmanager
def base_model(model) -> Iterator[None]:
    """The model without its adapter, for a while."""
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"{type(model).__name__} has no adapter to switch off, so its base is not known here. "
            "Measure the base before training, with a trainer of its own."
        )
    with model.disable_adapter():
        yield


@torch.no_grad()
def measure_preferences(trainer, dataset=None) -> tuple[PreferenceMeasures, PreferenceMeasures]:
    """Score every pair of a dataset (default: the trainer's `eval_dataset`) under the reference and under the model.

    The reference is the trainer's: the model without its adapter, or `ref_model`. Returns (reference, model).
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    before, after = [], []
    with evaluating(model):
        for batch in _batches(trainer, dataset):
            reference = trainer.reference_scores(batch)
            scores = trainer.concatenated_forward(model, batch, reference)
            before.append(_columns(reference, torch.zeros_like(scores.kl)))
            after.append(_columns(scores, scores.kl))
    return _summary(torch.cat(before, dim=1)), _summary(torch.cat(after, dim=1))


def _columns(scores, kl: torch.Tensor) -> torch.Tensor:
    """(5, B): summed log-probs of chosen and rejected, tokens of both, KL along the chosen response."""
    tokens = scores.mask.sum(-1)  # (S,)
    columns = [values[side] for values in (scores.sums, tokens) for side in (scores.chosen, scores.rejected)]
    return torch.stack([*columns, kl[scores.chosen].sum(-1)]).double().cpu()


def _summary(columns: torch.Tensor) -> PreferenceMeasures:
    chosen, rejected, *tokens, kl = columns.numpy()  # (N,) each
    wins = preference(PairScores(chosen, rejected, *tokens))
    return PreferenceMeasures(
        pairs=len(chosen),
        accuracy=wins["preference/accuracy"].mean().item(),
        average_accuracy=wins["preference/accuracy_average"].mean().item(),
        chosen_logp=chosen.mean().item(),
        rejected_logp=rejected.mean().item(),
        kl=kl.mean().item(),
    )


@torch.no_grad()
def generate_responses(trainer, dataset=None, *, max_new_tokens: int = 32) -> list[str]:
    """The model's own greedy response to each prompt, in the order of the dataset.

    Media and prompts go through the trainer's collator, so the model sees what it was trained on.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    responses = []
    with evaluating(model):
        for batch in _batches(trainer, dataset):
            inputs = _prompts(batch, tokenizer.pad_token_id)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[:, inputs["input_ids"].size(1) :]
            responses += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return responses


def _batches(trainer, dataset) -> Iterator[dict]:
    for batch in trainer.get_eval_dataloader(dataset):
        yield trainer._prepare_inputs(batch)


def _prompts(batch: dict, pad_token_id: int) -> dict:
    """The prompt of each pair with its media as model inputs, padded on the left: ids and mask (B, P)."""
    trunks = batch["branch_trunk"][batch["chosen"]]  # (B,)
    mask = batch["trunk_mask"][trunks]
    width = mask.size(1)
    column = torch.arange(width, device=mask.device) - (width - mask.sum(-1, keepdim=True))  # (B, P), < 0: padding
    filled, source = column >= 0, column.clamp(min=0)

    def shift(values: torch.Tensor, padding: int) -> torch.Tensor:
        return values[trunks].gather(1, source).masked_fill(~filled, padding)

    inputs = {"input_ids": shift(batch["trunk_ids"], pad_token_id), "attention_mask": filled.long()}
    inputs |= {key: shift(values, 0) for key, values in batch["trunk_types"].items()}
    return inputs | merge_media([batch["media"][t] for t in trunks.tolist()])
