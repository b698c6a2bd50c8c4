"""The forward pass over a tree batch: choose the layout, call the model once, score all branches.

Packed rows are checked on the first batch (unless `layout="shared"` asks for them): it is scored without gradients
packed, and as padded rows, which need no attention of ours. Where the two agree, rows are packed; where the model
cannot be packed, or they do not agree, rows are padded, and the log says why.
"""

import contextlib
from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_vpo.forward.attention import use_segments
from trl_vpo.forward.families import padded_layout_reason
from trl_vpo.forward.frozen import FrozenModules
from trl_vpo.forward.layouts import Layout, packed, padded
from trl_vpo.forward.ranks import sync_calls
from trl_vpo.forward.scoring import ScoreRequest, Scores, attach_scoring
from trl_vpo.forward.sequence_parallel import SequenceRanks, check_heads
from trl_vpo.forward.tower import use_whole_towers
from trl_vpo.forward.vision import vision_features

logger = get_logger(__name__)

# How far the log-probs of a token may differ between the layouts, by dtype of the computation: mean, maximum (nats).
TOLERANCES = {torch.float32: (1e-4, 1e-2), torch.float16: (1e-2, 0.2), torch.bfloat16: (0.05, 1.0)}


class Scorer:
    """Score tree batches with a policy (without PEFT or a distributed wrapper around it) and its reference.

    Attributes:
        layout: "shared" or "separate" (one copy of a prompt, or one for each response); "auto" until it is known.
        packs: whether rows are packed; None until it is known.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        layout: str,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        ranks: SequenceRanks | None = None,
    ):
        self._backbone = policy.base_model
        self._padding = {"pad_token_id": pad_token_id, "pad_to_multiple_of": pad_to_multiple_of}
        self._vision = vision_features(self._backbone)
        self._frozen = FrozenModules(policy)
        self._ranks = ranks
        if ranks is not None:
            check_heads(policy, ranks.size)
        self.layout, self.packs = layout, True if layout == "shared" else None
        if reason := padded_layout_reason(policy):
            if layout == "shared":
                raise ValueError(f"layout='shared' does not fit {type(policy).__name__}: {reason}. Use 'auto'.")
            self._pad_rows(reason)
        self.add_model(policy)

    @property
    def pixel_dtype(self) -> torch.dtype | None:
        """The dtype in which pixels may be collated, with the same result; None: as the processor gives them."""
        return self._vision.pixel_dtype

    def add_model(self, model: PreTrainedModel) -> None:
        """Prepare a model (the policy, a reference) for being scored."""
        attach_scoring(model)
        use_whole_towers(model)
        if self.packs is not False:
            use_segments(model)

    def score(self, model: nn.Module, batch: dict, reference: Scores | None = None) -> Scores:
        """Return the scores of all S branches; with `reference` also the KL. The first call decides on packing."""
        if self.packs is None:
            self._compare_layouts(model, batch)
        self._frozen.keep_in_eval()
        layout = self._layout(batch)
        request = ScoreRequest(
            layout.rows,
            layout.positions,
            layout.mask,
            layout.labels,
            layout.segments,
            layout.copies,
            ref_hidden=None if reference is None else reference.hidden,
            ref_head=None if reference is None else reference.head,
            kl_rows=torch.isin(layout.branches, batch["chosen"]),
        )
        output = model(**layout.inputs, score=request)
        order = layout.branches.argsort()[: len(batch["branch_mask"])]  # padding rows are the last ones
        scores = {name: getattr(output, name) for name in ("logps", "entropy", "mean_logits", "is_top1", "kl")}
        return Scores(
            **{name: None if values is None else values[order] for name, values in scores.items()},
            mask=batch["branch_mask"],
            chosen=batch["chosen"],
            rejected=batch["rejected"],
            hidden=output.hidden,
        )

    def _layout(self, batch: dict) -> Layout:
        """Return the model call of a batch, laid out once for policy and reference."""
        kind = (self.layout, self.packs)
        if batch.get("layout", (None,))[0] != kind:
            rows = batch.get("padded", batch)
            if self.packs:
                layout = packed(rows, self._backbone, shared=self.layout == "shared")
                layout.segments.ranks = self._ranks
            else:
                layout = padded(rows, self._backbone, **self._padding)
            batch["layout"] = (kind, layout)
        return batch["layout"][1]

    def sync_calls(self, batch: dict, padding_row: Callable[[str | None], dict], sharding: str | None) -> None:
        """Agree on the model call of a step, see `trl_vpo.forward.ranks`. All ranks call this."""
        if "padded" not in batch:
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
        """Score a batch as packed and as padded rows, and keep the packed ones if they agree on every rank."""
        logps, problem = {}, None
        training = model.training
        model.eval()
        if self.layout == "auto":
            self.layout = "shared"
        try:
            with self._vision.paused():
                for self.packs in (False, True):
                    logps[self.packs] = self.score(model, batch).logps
        except Exception as error:  # whatever a model's code may raise on inputs that it was not written for
            if not self.packs:
                raise
            problem = f"packed rows fail: {type(error).__name__}: {error}"
        else:
            problem = self._disagreement(logps[False], logps[True], batch["branch_mask"])
        finally:
            model.train(training)
        if problems := [p for p in gather_object([problem]) if p]:
            self._pad_rows(problems[0])

    def _pad_rows(self, reason: str) -> None:
        name = type(self._backbone).__name__
        if self._ranks is not None:
            raise ValueError(f"sp_size splits packed rows, and {name} cannot have them: {reason}. Leave sp_size out.")
        self.layout, self.packs = "separate", False
        logger.warning(f"{name} is trained with padded rows and the separate layout, because {reason}.")

    def _disagreement(self, padded_logps: Tensor, packed_logps: Tensor, mask: Tensor) -> str | None:
        """Return why packed and padded rows do not agree, or None."""
        difference = (padded_logps - packed_logps)[mask].abs()  # (N,)
        device = mask.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._backbone.dtype
        mean, maximum = difference.mean().item(), difference.max().item()
        mean_limit, limit = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        if mean <= mean_limit and maximum <= limit:  # nan fails
            return None
        return (
            f"its log-probs differ between packed and padded rows by {maximum:.2g} nats at most and {mean:.2g} on "
            f"average ({dtype} allows {limit:g} and {mean_limit:g})"
        )
