"""One model call -> per-token log-probabilities (and the KL to the reference), never the full logits.

[`attach_scoring`] teaches a model a second way to be called: `model(**inputs, score=ScoreRequest(...))` runs the
backbone, takes the hidden states that predict response tokens and meets the LM head with those alone, chunk by
chunk. The call goes through the model's own `forward`, so that DDP, FSDP, DeepSpeed and autocast see it.
"""

import contextlib
import functools
import types
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from trl_vpo.forward.head import logit_transform

VOCAB_CHUNK = 32768


@dataclass
class Head:
    """An LM head: `softcap(scale * (hidden @ weight.T + bias))`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) float32 logits: the slow way, for tests and as fallback."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass
class ScoreRequest:
    """What to score: R branches of T response tokens, N of them real.

    Attributes:
        rows: (R,) sequence of the call that holds each branch.
        positions: (R, T) column whose hidden state predicts each token.
        mask: (R, T) true on real tokens.
        labels: (R, T) the tokens.
        ref_hidden: (N, H) the reference's hidden states at the same places; gives the KL.
        ref_head: the reference's LM head; None: the model's own.
        kl_rows: (R,) rows whose KL needs gradients; the others' is a metric.
    """

    rows: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    ref_hidden: Tensor | None = None
    ref_head: Head | None = None
    kl_rows: Tensor | None = None


@dataclass
class ScoreOutput(ModelOutput):
    """(R, T) float32 each, zero where the request's mask is false; `hidden` is (N, H)."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    kl: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class Scores:
    """Per-token scores of all S branches of a batch, (S, T) each, zero outside `mask`.

    Attributes:
        logps: log-probability of each response token, nats, float32, with gradient.
        mask: true on response tokens.
        entropy: of the next-token distribution, nats.
        mean_logits: mean logit over the vocabulary.
        is_top1: whether the token is the most likely one.
        kl: KL(reference || model) at each token over the whole vocabulary, nats; only where it was asked for.
        chosen, rejected: (B,) the branches of each pair.
        hidden: (N, H) hidden states that predict the response tokens, one tensor per model call.
        head: the LM head that made the scores, where they are a reference's.
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    chosen: Tensor
    rejected: Tensor
    kl: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    head: Head | None = None

    @property
    def sums(self) -> Tensor:
        """(S,) log-probability of each response."""
        return self.logps.sum(-1)

    chosen_logps = property(lambda self: self.logps[self.chosen])  # (B, T)
    rejected_logps = property(lambda self: self.logps[self.rejected])
    chosen_mask = property(lambda self: self.mask[self.chosen])
    rejected_mask = property(lambda self: self.mask[self.rejected])
    chosen_kl = property(lambda self: self.kl[self.chosen])


@dataclass
class ReferenceSums:
    """All that is known of a reference that was scored ahead: (S,) the log-probability of each response."""

    sums: Tensor


def lm_head(model: PreTrainedModel) -> Head:
    """The LM head of `model`, and what its `forward` does with the logits."""
    if not hasattr(model, "_trl_vpo_logits"):
        model._trl_vpo_logits = logit_transform(model)
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)  # PEFT's layer for single tokens has none
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, bias))
    return Head(weight, bias, *model._trl_vpo_logits)


def check_head(model: torch.nn.Module) -> None:
    """Refuse an LM head that is more than its weight and bias: scores would pass the rest by without a word.

    Raises:
        ValueError: it carries an adapter, or its weight is quantized. A fully trained copy (`modules_to_save`) and
            single trained tokens (`trainable_token_indices`) are well.
    """
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "an adapter on the LM head is not supported: log-probs are computed from the head's weight, and the "
            "adapter is not in it. Leave lm_head out of target_modules; modules_to_save=['lm_head'] trains the head "
            "itself. An adapter that was trained so can be merged into its base first (`trl-vpo merge`)."
        )
    if head is not None and not head.weight.is_floating_point():
        raise ValueError(
            f"the LM head is quantized ({type(head).__name__}), and log-probs are computed from its plain weight: "
            "name lm_head in llm_int8_skip_modules of the quantization config."
        )


def token_scores(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, mean logit and "is the most likely" of N tokens, (N,) each, from (N, H) hidden states.

    TRL's chunked kernel: the (N, V) logits never exist in full. Without it, `token_scores_plain`.
    """
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return token_scores_plain(hidden, head, labels)
    names = ("entropy", "mean_logits", "is_top1")
    chunk = min(VOCAB_CHUNK, head.weight.size(0))
    logps, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, labels, 1.0, chunk, head.softcap, head.scale, names
    )
    return logps, entropy, mean_logits, is_top1


def token_scores_plain(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_scores` through the full logits."""
    logits = head.logits(hidden)  # (N, V)
    logps = logits.log_softmax(-1)
    token_logps = logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return token_logps, entropy, logits.mean(-1).detach(), logits.argmax(-1) == labels


def token_kl(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    """(N,) exact KL(reference || model) over the whole vocabulary, nats; the gradient flows into `hidden`.

    TRL's chunked divergence with beta 0: no (N, V) tensor. Without it, `token_kl_plain`.
    """
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        return token_kl_plain(hidden, head, ref_hidden, ref_head)
    return ChunkedDivergenceFunction.apply(
        hidden,
        head.weight,
        head.bias,
        ref_hidden,
        ref_head.weight,
        ref_head.bias,
        0.0,  # forward KL(teacher || student)
        1.0,  # temperature
        head.scale,
        head.softcap,
        ref_head.scale,
        ref_head.softcap,
    )[0]


def token_kl_plain(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    """`token_kl` through the full logits."""
    logps = head.logits(hidden).log_softmax(-1)
    ref_logps = ref_head.logits(ref_hidden).log_softmax(-1).detach()
    return (ref_logps.exp() * (ref_logps - logps)).sum(-1)


def attach_scoring(model: PreTrainedModel) -> None:
    """Let `model(..., score=ScoreRequest(...))` give a `ScoreOutput`. Other calls behave as before.

    Raises:
        ValueError: as `check_head` and `logit_transform` say.
    """
    check_head(model)
    if getattr(model, "_trl_vpo_scoring", False):
        return
    model._trl_vpo_logits = logit_transform(model)
    model._trl_vpo_plain = model.forward  # on the model: a deep copy then has its own

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward(self, *args, score: ScoreRequest | None = None, **kwargs):
        if score is None:
            return self._trl_vpo_plain(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None}  # PEFT passes labels=None and the like
        tree = getattr(self, "_trl_vpo_tree", None)  # of models that know shared layouts
        # Both are looked up at each call: FSDP and PEFT replace modules after this patch.
        with tree.given(kwargs.get("attention_mask")) if tree else contextlib.nullcontext():
            hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state  # (R, L, H)
        return _score(hidden, lm_head(self), score)

    model.forward = types.MethodType(forward, model)
    model._trl_vpo_scoring = True


def _score(hidden: Tensor, head: Head, request: ScoreRequest) -> ScoreOutput:
    device = head.weight.device  # a model split over devices may begin and end elsewhere
    mask = request.mask.to(device)
    rows, positions, labels = (x.to(device) for x in (request.rows, request.positions, request.labels))
    rows = rows.unsqueeze(1).expand_as(mask)[mask]  # (N,)
    hidden = hidden.to(device)[rows, positions[mask]]  # (N, H)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 shards the head; the KL's kernel gathers by itself
        per_token = list(token_scores(hidden, head, labels[mask]))
    if request.ref_hidden is not None:
        per_token.append(_kl(hidden, head, request, mask))
    else:
        per_token.append(None)
    # `masked_scatter` rather than indexing: the result stays connected to the model even where nothing is scored.
    spread = [None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token]
    return ScoreOutput(*(None if x is None else x.to(request.mask.device) for x in spread), hidden=hidden)


def _kl(hidden: Tensor, head: Head, request: ScoreRequest, mask: Tensor) -> Tensor:
    """(N,) KL, with gradients for the tokens of `kl_rows` only: the rest of the backward pass would be wasted."""
    ref_head = request.ref_head or head
    wanted = request.kl_rows.to(mask.device) if request.kl_rows is not None else torch.ones_like(mask[:, 0])  # (S',)
    needs_grad = wanted.unsqueeze(1).expand_as(mask)[mask]  # (N,)
    with torch.no_grad():
        rest = token_kl(hidden[~needs_grad], head, request.ref_hidden[~needs_grad], ref_head)
    kl = token_kl(hidden[needs_grad], head, request.ref_hidden[needs_grad], ref_head)
    return kl.new_zeros(len(hidden)).masked_scatter(needs_grad, kl).masked_scatter(~needs_grad, rest)
