"""The forward pass over a tree batch: choose the layout, call the model once, score all branches.

Before its first call a model is proven on a short row of each kind, see `trl_vpo.forward.proof`. Where packed and
padded rows agree, rows are packed; where the model cannot be packed, or they do not agree, rows are padded, and the
log says why.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_vpo.forward.attention import use_segments
from trl_vpo.forward.families import padded_layout_reason, rope_limit
from trl_vpo.forward.frozen import FrozenModules
from trl_vpo.forward.layouts import Layout, packed, padded
from trl_vpo.forward.proof import Proof, ProofRow, row_of
from trl_vpo.forward.ranks import sync_calls
from trl_vpo.forward.router import column_counts
from trl_vpo.forward.scoring import ScoreRequest, Scores, attach_scoring
from trl_vpo.forward.sequence_parallel import SequenceRanks, check_heads
from trl_vpo.forward.tower import clear_causal_flags, use_whole_towers
from trl_vpo.forward.vision import vision_features

logger = get_logger(__name__)


class Scorer:
    """Score tree batches with a policy (without PEFT or a distributed wrapper around it) and its reference."""

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        layout: str,  # "shared", "separate" (one copy of a prompt, or one for each response), "auto" until it is known
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        ranks: SequenceRanks | None = None,
        trains: bool = True,
        balances: bool = False,  # scores have the load-balancing loss of a model with experts
        kl_sides: tuple[str, ...] = ("chosen",),
    ):
        self._policy, self._backbone = policy, policy.base_model
        self._padding = {"pad_token_id": pad_token_id, "pad_to_multiple_of": pad_to_multiple_of}
        self._vision = vision_features(self._backbone)
        self._frozen = FrozenModules(policy)
        self._ranks, self.trains, self.balances, self._kl_sides = ranks, trains, balances, kl_sides
        if ranks is not None:
            check_heads(policy, ranks.size)
        self.squares = False  # scores have `log_sum_sq_probs`
        self.layout, self.packs = layout, True if layout == "shared" else None  # rows are packed; None: not yet known
        self._rope_limit = rope_limit(policy)
        self.proven: list[str] = []  # the kinds of rows on which the model was proven
        self.to_prove: list[ProofRow] = []  # on which it is to be proven before the next call
        self._asked = layout
        attach_scoring(policy)  # refuses what is not supported
        if reason := padded_layout_reason(policy):
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
        clear_causal_flags(model)
        if self.packs is not False:
            use_segments(model)

    def score(self, model: nn.Module, batch: dict, reference: Scores | None = None) -> Scores:
        """Return the scores of all S branches; with `reference` also the KL. The first call decides on packing."""
        self.prove(model, batch)
        return self._score(model, batch, reference)

    def _score(self, model: nn.Module, batch: dict, reference: Scores | None = None) -> Scores:
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
            kl_rows=torch.isin(layout.branches, torch.cat([batch[side] for side in self._kl_sides])),
            column_counts=column_counts(layout, len(batch["branch_mask"])) if self.balances else None,
            squares=self.squares,
        )
        output = model(**layout.inputs, score=request)
        order = layout.branches.argsort()[: len(batch["branch_mask"])]  # padding rows are the last ones
        names = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "kl")
        scores = {name: getattr(output, name) for name in names}
        return Scores(
            **{name: None if values is None else values[order] for name, values in scores.items()},
            mask=batch["branch_mask"],
            chosen=batch["chosen"],
            rejected=batch["rejected"],
            hidden=output.hidden,
            aux_loss=output.aux_loss,
        )

    def _layout(self, batch: dict) -> Layout:
        """Return the model call of a batch, laid out once for policy and reference."""
        kind = (self.layout, self.packs)
        if batch.get("layout", (None,))[0] != kind:
            rows = batch.get("padded", batch)
            self._warn_of_length(rows)
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

    def prove(self, model: nn.Module, batch: dict) -> None:
        """Prove a model on the rows that wait for it, and those that came with a batch, see `trl_vpo.forward.proof`.

        Every rank proves the rows of all ranks, and all keep the same layout. Raises ProofError.
        """
        rows, self.to_prove = self.to_prove, []
        if "proof_rows" in batch:  # what the ranks carry differs; once for all passes of a step
            rows = rows + [row for carried in gather_object([batch.pop("proof_rows")]) for row in carried]
        if not rows and self.packs is None:
            rows = [row_of(batch)]
        rows = [row for row in rows if row.kind not in self.proven]
        if not rows:
            return
        training = model.training
        model.eval()
        packs = self.packs
        if self.layout == "auto":
            self.layout = "shared"
        try:
            with self._vision.paused(), torch.compiler.set_stance("force_eager"):  # its shapes come but once
                for row in {row.kind: row for row in rows}.values():
                    score, pad = partial(self._logps, model), self._padding["pad_token_id"]
                    proof = Proof(row, score, model, pad, trains=self.trains, ranks=self._ranks)
                    proof.check_scores()
                    problem = proof.disagreement() if packs is not False else None
                    if problems := [p for p in gather_object([problem]) if p]:
                        packs = False
                        self._pad_rows(problems[0])
                    self.proven.append(row.kind)
        finally:
            model.train(training)
        if packs is not False:
            self.packs = True
        logger.info(f"{type(self._policy).__name__} is proven: {self}.")

    def __str__(self) -> str:
        """What was proven."""
        kinds = ", ".join(kind.removeprefix("rows with ") for kind in self.proven)
        return f"{'packed' if self.packs else 'padded'} rows give the model's own log-probs ({kinds})"

    def _logps(self, model: nn.Module, batch: dict, *, packs: bool) -> Tensor:
        """Return the log-probs of a batch, in packed or in padded rows."""
        before, self.packs = self.packs, packs
        try:
            return self._score(model, batch).logps
        finally:
            self.packs = before

    def _warn_of_length(self, rows: dict) -> None:
        length = rows["trunk_ids"].size(1) + rows["branch_ids"].size(1)
        if self._rope_limit is None or length <= self._rope_limit:
            return
        logger.warning(
            f"{type(self._policy).__name__} chooses its rotary embeddings by the longest sequence of a call: in "
            f"batches beyond {self._rope_limit} tokens the scores of a row depend on the rows beside it. max_length: "
            f"{self._rope_limit} keeps them apart."
        )
        self._rope_limit = None  # said once

    def _pad_rows(self, reason: str) -> None:
        name = type(self._policy).__name__
        if self._asked == "shared":
            raise ValueError(f"layout='shared' does not fit {name}: {reason}. Use 'auto'.")
        if self._ranks is not None:
            raise ValueError(f"sp_size splits packed rows, and {name} cannot have them: {reason}. Leave sp_size out.")
        self.layout, self.packs = "separate", False
        logger.warning(f"{name} is trained with padded rows and the separate layout, because {reason}.")
