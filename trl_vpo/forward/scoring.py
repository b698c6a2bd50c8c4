"""Per-token log-probabilities (and the KL to the reference) of one model call, never the full logits.

[`attach_scoring`] teaches a model a second way to be called: `model(**inputs, score=ScoreRequest(...))` runs the
backbone, takes the hidden states that predict response tokens and meets the LM head with those alone, chunk by
chunk. The call goes through the model's own `forward`, so that DDP, FSDP, DeepSpeed and autocast see it.
"""

import contextlib
import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from trl_vpo.errors import ModelError
from trl_vpo.forward.attention import Segments
from trl_vpo.forward.head import Head, check_head, check_model_class, head_inputs, lm_head
from trl_vpo.forward.kl import partly_differentiable_kl
from trl_vpo.forward.mixed import Mixed, Split
from trl_vpo.forward.router import load_balancing_loss, router_logits
from trl_vpo.forward.vision import Copies, vision_features

VOCAB_CHUNK = 32768


@dataclass
class ScoreRequest:
    """A request to score R branches of T response tokens, N of them real."""

    rows: Tensor  # (R,) sequence of the call that holds each branch
    positions: Tensor  # (R, T) column whose hidden state predicts each token
    mask: Tensor  # (R, T) true on real tokens
    labels: Tensor  # (R, T) the tokens
    segments: Segments | None = None  # the attention of a packed row; None: padded rows
    copies: Copies | Mixed | Split | None = None  # sequences that read the same media; None: each has its own
    ref_hidden: Tensor | None = None  # (N, H) the reference's hidden states at the same places; gives the KL
    ref_head: Head | None = None  # the reference's LM head; None: the model's own
    kl_rows: Tensor | None = None  # (R,) rows whose KL needs gradients; the others' is a metric
    column_counts: Tensor | None = None  # (R, L) of the load-balancing loss; None: it is not computed
    squares: bool = False  # whether `log_sum_sq_probs` is computed, too


@dataclass
class ScoreOutput(ModelOutput):
    """(R, T) float32 each, zero where the request's mask is false; `hidden` is (N, H), `aux_loss` a number."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    kl: Tensor | None = None
    hidden: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class Scores:
    """Per-token scores of all S branches of a batch, (S, T) each, zero outside `mask`."""

    logps: Tensor  # log-probability of each response token, nats, float32, with gradient
    mask: Tensor  # true on response tokens
    entropy: Tensor  # of the next-token distribution, nats
    mean_logits: Tensor  # mean logit over the vocabulary
    is_top1: Tensor  # whether the token is the most likely one
    chosen: Tensor  # (B,) the branches of each pair ...
    rejected: Tensor  # ... and these
    log_sum_sq_probs: Tensor | None = None  # log of the sum over the vocabulary of p^2; only where it was asked for
    kl: Tensor | None = None  # KL(reference || model) over the whole vocabulary, nats; only where it was asked for
    hidden: Tensor | None = None  # (N, H) states that predict the response tokens, in the order of the call
    head: Head | None = None  # the LM head that made the scores, where they are a reference's
    aux_loss: Tensor | None = None  # () the load-balancing loss of a policy with experts, before its coefficient

    @property
    def sums(self) -> Tensor:
        """(S,) log-probability of each response."""
        return self.logps.sum(-1)


@dataclass
class ReferenceSums:
    """A reference whose scores were precomputed."""

    sums: Tensor  # (S,) log-probability of each response


def token_scores(hidden: Tensor, head: Head, labels: Tensor, squares: bool = False) -> dict[str, Tensor]:
    """Return the scores of N tokens, (N,) each, from (N, H) states: `ScoreOutput`'s, without the KL.

    TRL's chunked kernel: the (N, V) logits never exist in full.
    """
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    wanted = [name for name in names if squares or name != "log_sum_sq_probs"]
    chunk = min(VOCAB_CHUNK, head.weight.size(0))
    logps, *others = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, labels, 1.0, chunk, head.softcap, head.scale, wanted
    )
    return {"logps": logps} | {name: values for name, values in zip(names, others) if name in wanted}


def attach_scoring(model: PreTrainedModel) -> None:
    """Let `model(..., score=ScoreRequest(...))` return a `ScoreOutput`. Other calls behave as before."""
    check_model_class(type(model), model.config)
    check_head(model)
    if getattr(model, "_trl_vpo_scoring", False):
        return
    lm_head(model)  # refuses what is not supported
    if not hasattr(model.base_model, "_trl_vpo_vision"):
        vision_features(model.base_model)
    model._trl_vpo_plain = model.forward  # on the model: a deep copy then has its own

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward(self, *args, score: ScoreRequest | None = None, **kwargs):
        if score is None:
            return self._trl_vpo_plain(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None}  # PEFT passes labels=None and the like
        counts = score.column_counts
        with contextlib.nullcontext() if counts is None else router_logits(self) as logits:
            hidden = hidden_states(self, score, *args, **kwargs)
        tokens = (args[0] if args else kwargs["input_ids"]).size(1)
        if hidden.size(1) != tokens and getattr(score.segments, "ranks", None) is None:
            raise ModelError(
                f"{type(self).__name__} is not supported: it computes {hidden.size(1)} positions for {tokens} tokens, "
                "as if images stood in front of the prompt."
            )
        output = _score(hidden, lm_head(self), score)
        if counts is not None:
            output.aux_loss = load_balancing_loss(self, logits, counts, getattr(score.segments, "ranks", None))
        return output

    model.forward = types.MethodType(forward, model)
    model._trl_vpo_scoring = True


def hidden_states(model: PreTrainedModel, request: ScoreRequest, *args, **kwargs) -> Tensor:
    """Return the (R, L, H) states that the LM head would be given, of a call with the layout of a request."""
    packed = getattr(model, "_trl_vpo_packed", None)  # of models that know packed rows
    # Both are looked up at each call: FSDP and PEFT replace modules after `attach_scoring`.
    vision, copies = model.base_model._trl_vpo_vision, request.copies
    if isinstance(copies, Mixed):
        kwargs, copies = copies.in_order(model.base_model, kwargs), None
    compute = functools.partial(_hidden_states, model)
    if isinstance(copies, Split):
        compute, copies = functools.partial(copies.in_parts, model, compute), None
    with packed.during(request.segments) if packed else contextlib.nullcontext(), vision.repeated(copies):
        return compute(*args, **kwargs, use_cache=False)


def _hidden_states(model: PreTrainedModel, *args, **kwargs) -> Tensor:
    """Return what the LM head would be given."""
    if model.base_model is not model:
        return model.base_model(*args, **kwargs).last_hidden_state
    with head_inputs(model) as states:  # a whole language model lies inside, with its head
        getattr(model, "_trl_vpo_plain", model)(*args, **kwargs)
    return states[-1]


def _score(hidden: Tensor, head: Head, request: ScoreRequest) -> ScoreOutput:
    device = head.weight.device  # a model split over devices may begin and end elsewhere
    mask = request.mask.to(device)
    rows, positions, labels = (x.to(device) for x in (request.rows, request.positions, request.labels))
    rows = rows.unsqueeze(1).expand_as(mask)[mask]  # (N,)
    labels, with_grad = labels[mask], torch.ones_like(mask)[mask]  # (N,) each
    if request.kl_rows is not None:
        with_grad = request.kl_rows.to(device).unsqueeze(1).expand_as(mask)[mask]
    ranks = request.segments.ranks if request.segments is not None else None
    if ranks is None:
        hidden = hidden.to(device)[rows, positions[mask]]  # (N, H)
    else:  # from here on N is this rank's share
        hidden = ranks.hand_out(hidden[0].to(device), positions[mask], request.segments.length)
        labels, with_grad = ranks.share(labels), ranks.share(with_grad)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 shards the head; the KL's kernel gathers by itself
        per_token = token_scores(hidden, head, labels, request.squares)
    if request.ref_hidden is not None:
        ref_head = request.ref_head or head
        per_token["kl"] = partly_differentiable_kl(hidden, head, request.ref_hidden, ref_head, with_grad)
    if ranks is not None:
        together = ranks.collect(torch.stack([x.float() for x in per_token.values()], dim=1), int(mask.sum()))
        per_token = dict(zip(per_token, together.unbind(1)))
    # `masked_scatter` rather than indexing: the result stays connected to the model even where nothing is scored.
    spread = {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in per_token.items()}
    return ScoreOutput(**{name: x.to(request.mask.device) for name, x in spread.items()}, hidden=hidden)
