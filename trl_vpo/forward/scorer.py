"""The forward pass over a tree batch: choose the layout, call the model, score all branches.

`layout="auto"` is checked on the first batch: both layouts are scored without gradients. Where they agree, the shared
one is used; where the model cannot have it, or they do not agree, the separate one is, and the log says why.
"""

import contextlib
from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_vpo.forward.attention import use_tree_attention
from trl_vpo.forward.families import separate_layout_reason
from trl_vpo.forward.frozen import FrozenModules
from trl_vpo.forward.layouts import Layout, separate, shared
from trl_vpo.forward.ranks import sync_calls
from trl_vpo.forward.scoring import ScoreRequest, Scores, attach_scoring
from trl_vpo.forward.tower import use_whole_towers
from trl_vpo.forward.vision import vision_features

logger = get_logger(__name__)

# How far the log-probs of a token may differ between the layouts, by dtype of the computation: mean, maximum (nats).
TOLERANCES = {torch.float32: (1e-4, 1e-2), torch.float16: (1e-2, 0.2), torch.bfloat16: (0.05, 1.0)}


class Scorer:
    """Score tree batches with a policy (without PEFT or a distributed wrapper around it) and its reference."""

    def __init__(
        self, policy: PreTrainedModel, *, layout: str, pad_token_id: int, pad_to_multiple_of: int | None = None
    ):
        self._backbone = policy.base_model
        self._pad_token_id = pad_token_id
        self._pad_to_multiple_of = pad_to_multiple_of
        self._vision = vision_features(self._backbone)
        self._frozen = FrozenModules(policy)
        reason = separate_layout_reason(policy) if layout != "separate" else None
        if layout == "shared" and reason:
            raise ValueError(f"layout='shared' does not fit {type(policy).__name__}: {reason}. Use 'auto'.")
        self.layout = "separate" if reason else layout
        self.add_model(policy)
        if reason:
            self._log_fallback(reason)

    @property
    def pixel_dtype(self) -> torch.dtype | None:
        """The dtype in which pixels may be collated, with the same result; None: as the processor gives them."""
        return self._vision.pixel_dtype

    def add_model(self, model: PreTrainedModel) -> None:
        """Prepare a model (the policy, a reference) for being scored."""
        attach_scoring(model)
        use_whole_towers(model)
        if self.layout != "separate":
            use_tree_attention(model)

    def score(self, model: nn.Module, batch: dict, reference: Scores | None = None) -> Scores:
        """Return the scores of all S branches; with `reference` also the KL. The first call of "auto" decides."""
        if self.layout == "auto":
            self._compare_layouts(model, batch)
        self._frozen.keep_in_eval()
        layouts = self._layouts(batch)
        hidden = reference.hidden if reference is not None else [None] * len(layouts)
        head = reference.head if reference is not None else None
        outputs = []
        for layout, states in zip(layouts, hidden):
            responses = (layout.rows, layout.positions, layout.mask, layout.labels)
            kl_rows = torch.isin(layout.branches, batch["chosen"])
            outputs.append(model(**layout.inputs, score=ScoreRequest(*responses, states, head, kl_rows)))
        padding_last = torch.cat([layout.branches for layout in layouts]).argsort()
        order = padding_last[: len(batch["branch_mask"])]

        def gather(name: str) -> Tensor | None:
            parts = [getattr(output, name) for output in outputs]
            return None if parts[0] is None else torch.cat(parts)[order]

        return Scores(
            **{name: gather(name) for name in ("logps", "entropy", "mean_logits", "is_top1", "kl")},
            mask=batch["branch_mask"],
            chosen=batch["chosen"],
            rejected=batch["rejected"],
            hidden=[output.hidden for output in outputs],
        )

    def _layouts(self, batch: dict) -> list[Layout]:
        """Return the model calls of a batch, built once for policy and reference."""
        if batch.get("layouts", (None,))[0] != self.layout:
            rows = batch.get("padded", batch) | {"calls": batch.get("calls")}
            padding = {"pad_token_id": self._pad_token_id, "pad_to_multiple_of": self._pad_to_multiple_of}
            shares = self.layout == "shared"
            layouts = shared(rows, self._backbone, **padding) if shares else separate(rows, **padding)
            batch["layouts"] = (self.layout, layouts)
        return batch["layouts"][1]

    def sync_calls(self, batch: dict, padding_row: Callable[[str | None], dict], sharding: str | None) -> None:
        """Agree on the model calls of a step, see `trl_vpo.forward.ranks`. All ranks call this."""
        if "calls" not in batch:
            sync_calls(batch, padding_row, sharding=sharding, trains_vision=self._vision.trained)

    def record_vision(self) -> contextlib.AbstractContextManager:
        """Record frozen vision features during the reference pass of a step."""
        self._frozen.keep_in_eval()  # dropout of the tower would mean that its features differ between the passes
        return self._vision.record()

    def replay_vision(self) -> contextlib.AbstractContextManager:
        """Replay the recorded features during the policy pass."""
        return self._vision.replay()

    @torch.no_grad()
    def _compare_layouts(self, model: nn.Module, batch: dict) -> None:
        """Score a batch in both layouts, and keep the shared one if they agree on every rank."""
        logps = {}
        training = model.training
        model.eval()
        try:
            with self._vision.paused():
                for self.layout in ("separate", "shared"):
                    logps[self.layout] = self.score(model, batch).logps
        except Exception as error:  # whatever a model's code may raise on inputs that it was not written for
            problem = f"the {self.layout} layout fails: {type(error).__name__}: {error}"
            if self.layout == "separate":
                raise
        else:
            problem = self._disagreement(logps["separate"], logps["shared"], batch["branch_mask"])
        finally:
            model.train(training)
        problems = [p for p in gather_object([problem]) if p]
        self.layout = "separate" if problems else "shared"
        if problems:
            self._log_fallback(problems[0])

    def _disagreement(self, separate_logps: Tensor, shared_logps: Tensor, mask: Tensor) -> str | None:
        """Return why the layouts do not agree, or None."""
        difference = (separate_logps - shared_logps)[mask].abs()  # (N,)
        device = mask.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._backbone.dtype
        mean, maximum = difference.mean().item(), difference.max().item()
        mean_limit, limit = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        if mean <= mean_limit and maximum <= limit:  # nan fails
            return None
        return (
            f"its log-probs differ between the layouts by {maximum:.2g} nats at most and {mean:.2g} on average "
            f"({dtype} allows {limit:g} and {mean_limit:g})"
        )

    def _log_fallback(self, reason: str) -> None:
        name = type(self._backbone).__name__
        logger.warning(f"layout='auto': {name} is trained with the separate layout, because {reason}.")
