"""The proof of a model: one short row of each kind, computed in several ways before the first step.

The scores of a row in padded form have to agree with the model's own full logits on what its processor makes of
prompt and response together, and a token must not see what comes after it. A model that fails either would be
trained on wrong numbers. Then packed rows have to agree with padded ones, in log-probs and in the gradient at
the decoder layers: attention that sees what it should not may hardly move the former.

How far two ways may differ is measured: by what rounding in each layer does to the scores. In the batch lies a decoy
beside the row, the row itself with other pixels, so that media which are joined wrongly show.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_vpo.errors import UserError
from trl_vpo.forward.families import family_of
from trl_vpo.forward.parts import part_of
from trl_vpo.forward.sequence_parallel import SequenceRanks
from trl_vpo.forward.tree import Branch, Tree, Trunk, tree_batch

# How many times the measured noise two ways may differ: packed and padded rows; a model and itself, or it is refused.
PACKED, REFUSED = 4, 8


class ProofError(UserError):
    """A model whose scores are not what it computes itself. Names its class and the kind of row."""


@dataclass
class ProofRow:
    """A short row of a kind."""

    kind: str  # what media it has, in words
    tree: Tree  # one trunk, and the branches chosen and rejected
    # What the processor makes of the prompt and the chosen response; None: not known, and then the scores are not
    # compared with the model's own.
    inputs: dict[str, Tensor] | None = None

    def batch(self, pad_token_id: int) -> dict:
        """Return the tree batch of the decoy and the row."""
        trunk = self.tree.trunks[0]
        other = lambda pixels: -pixels if pixels.is_floating_point() else pixels.max() - pixels  # noqa: E731
        media = {k: other(v) if "pixel_values" in k else v for k, v in trunk.media.items()}
        decoy = replace(self.tree, trunks=[replace(trunk, media=media)], branches=self.tree.branches[:1])
        return tree_batch([decoy, self.tree], pad_token_id)

    def alone(self, pad_token_id: int, last: int | None = None) -> dict:
        """Return the batch of the chosen response alone; `last`: another last token."""
        chosen = self.tree.branches[0]
        if last is not None:
            chosen = replace(chosen, ids=[*chosen.ids[:-1], last])
        return tree_batch([replace(self.tree, branches=[chosen])], pad_token_id)


def row_of(batch: dict) -> ProofRow:
    """Return the first row of a batch that came without proof rows."""
    parts = [s for s, t in enumerate(batch["branch_trunk"].tolist()) if t == 0][:2]
    branches = [Branch(batch["branch_ids"][s][batch["branch_mask"][s]].tolist()) for s in parts]
    mask = batch["trunk_mask"][0]
    types = {name: values[0][mask].tolist() for name, values in batch["trunk_types"].items()}
    trunk = Trunk(batch["trunk_ids"][0][mask].tolist(), types, batch["media"][0])
    return ProofRow("rows like the first", Tree(batch["names"][0], [trunk], branches))


class Proof:
    """The checks of one row."""

    def __init__(
        self,
        row: ProofRow,
        score: Callable,  # returns the (S, T) log-probs of a tree batch; called as `score(batch, packs=...)`
        model: nn.Module,  # what is called, with its wrappers
        pad_token_id: int,  # of its batches
        *,
        trains: bool = True,  # compare gradients, too
        ranks: SequenceRanks | None = None,  # the ranks that share a packed row
    ):
        self._row, self._score, self._model, self._pad = row, score, model, pad_token_id
        # DeepSpeed takes every backward pass for one of its step.
        self._trains = trains and type(model).__name__ != "DeepSpeedEngine"
        self._ranks = ranks
        self._bare = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
        self._device = self._bare.get_input_embeddings().weight.device
        self._batch = send_to_device(row.batch(pad_token_id), self._device)
        self._chosen = int(self._batch["chosen"][1])  # of the row; the decoy's is the first

    def check_scores(self) -> None:
        """Compare the scores with the model's own, and look for tokens that see later ones. Raises ProofError."""
        try:
            self._logps, self._gradient = self._run(self._batch)
            if not self._logps.isfinite().all():  # of ruined weights: the step names the rows
                return
            self._measure_noise()
            problem = self._own_problem() or self._causality_problem()
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # whatever a model's code may raise on inputs that it was not written for
            problem = f"it cannot be computed: {type(error).__name__}: {error}"
            raise ProofError(self._refusal(problem)) from error
        if problem:
            raise ProofError(self._refusal(problem))

    def disagreement(self) -> str | None:
        """Return why packed rows do not agree with padded ones, or None."""
        if not self._logps.isfinite().all():
            return None
        try:
            logps, gradient = self._run(self._batch, packs=True)
            gradient = gradient if self._ranks is None else self._ranks.mean(gradient)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"packed rows fail: {type(error).__name__}: {error}"
        where = f"differ between packed and padded rows, on {self._row.kind}, by"
        for of in (torch.mean, torch.max):
            if problem := self._difference(logps, self._logps, PACKED, of):
                return f"its log-probs {where} {problem}"
        off, limit = _distance(gradient, self._gradient), PACKED * self._gradient_noise
        return None if off <= limit else f"its gradients {where} {off:.1%} (rounding explains {limit:.1%})"

    # --- calls ----------------------------------------------------------------------------------------------------

    def _run(self, batch: dict, packs: bool = False, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the (S, T) log-probs of a batch, and their gradient at the (N, H) features of the decoder layers.

        It is the gradient of factors by which each feature is multiplied, so a sum over tokens, in whatever order and
        however often they are computed. `noise`: how far the factors are from 1.
        """
        layers = _layers(self._bare)
        generator = torch.Generator().manual_seed(0)
        size = (len(layers), self._bare.config.get_text_config().hidden_size)
        factors = (1 + noise * torch.randn(size, generator=generator)).to(self._device).requires_grad_()
        with torch.set_grad_enabled(self._trains), _multiplied(layers, factors):
            logps = self._score(batch, packs=packs)
            if not self._trains:
                return logps, factors
            weights = torch.randn(logps.shape, generator=generator).to(logps.device)
            (gradient,) = torch.autograd.grad((logps * weights).sum(), factors)
        return logps.detach(), gradient

    @torch.no_grad()
    def _alone(self, last: int | None = None) -> Tensor:
        """Return the (T,) log-probs of the chosen response in a call of its own; `last`: another last token."""
        return self._score(send_to_device(self._row.alone(self._pad, last), self._device), packs=False)[0]

    @torch.no_grad()
    def _own(self) -> Tensor:
        """Return the (T, V) logits that the model itself gives for the chosen response."""
        inputs = send_to_device(dict(self._row.inputs), self._device)
        count = len(self._row.tree.branches[0].ids)
        for name, value in family_of(self._bare).response_types.items():
            inputs[name] = inputs[name].clone()
            inputs[name][:, -count:] = value
        if "logits_to_keep" in inspect.signature(self._bare.forward).parameters:
            inputs["logits_to_keep"] = count + 1
        return self._model(**inputs, use_cache=False).logits[0, -count - 1 : -1].float()

    # --- comparisons ------------------------------------------------------------------------------------------------

    def _measure_noise(self) -> None:
        """Measure how far log-probs and gradients move by rounding alone."""
        device = self._device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._bare.dtype
        # Scores are float32 in a float64 model, too.
        noise = max(torch.finfo(kind).eps for kind in (autocast, torch.float32))
        self._noisy, gradient = self._run(self._batch, noise=noise)
        self._gradient_noise = _distance(gradient, self._gradient)

    def _difference(self, got: Tensor, want: Tensor, margin: int, of: Callable = torch.mean) -> str | None:
        """Return how far log-probs are apart, where that is more than noise; nan is."""
        mask = self._batch["branch_mask"]
        noise, largest = (self._noisy - self._logps)[mask].abs(), self._logps.abs().max()
        limit = margin * (of(noise) + torch.finfo(torch.float32).eps * largest).item()
        off = of((got - want)[want != 0].abs()).item()
        return None if off <= limit else f"{off:.2g} nats (rounding explains {limit:.2g})"

    def _own_problem(self) -> str | None:
        if self._row.inputs is None:
            return None
        logits = self._own()
        labels = torch.tensor(self._row.tree.branches[0].ids, device=logits.device)
        own = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)  # (T,)
        if problem := self._difference(self._logps[self._chosen, : len(own)], own, REFUSED):
            return f"the scores of its responses and the model's own logits differ by {problem} a token"
        return None

    def _causality_problem(self) -> str | None:
        """Change the last token of the chosen response: what comes before must not move."""
        ids = self._row.tree.branches[0].ids
        last = next((i for branch in self._row.tree.branches for i in branch.ids if i != ids[-1]), None)
        if last is None or len(ids) == 1:
            return None
        before = self._logps[self._chosen, : len(ids) - 1]
        if problem := self._difference(self._alone(last)[:-1], before, REFUSED):
            return f"its tokens see those behind them: another last token of a response moves the others by {problem}"
        return None

    def _refusal(self, problem: str) -> str:
        return (
            f"{type(self._bare).__name__} cannot be trained on {self._row.kind}: {problem}. Nothing was trained. "
            "Leave such rows out or take another model; docs/models.md has those that were tried."
        )


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def _layers(policy: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model."""
    count, modules = policy.config.get_text_config().num_hidden_layers, policy.get_decoder().named_modules()
    lists = [m for name, m in modules if isinstance(m, nn.ModuleList) and part_of(name) == "language"]
    return list(next((m for m in lists if len(m) == count), lists[0]))  # an adapter may repeat layers


@contextlib.contextmanager
def _multiplied(layers: list[nn.Module], factors: Tensor) -> Iterator[None]:
    """Multiply the features that enter each layer, of which only these are kept for the backward pass."""

    def multiply(factor: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = args[0] if args else kwargs.pop("hidden_states")
        factor = factor.repeat(states.size(-1) // len(factor))  # of several streams, as Qwen4-exp's
        return ((states.float() * factor.to(states.device)).to(states.dtype), *args[1:]), kwargs

    recomputed = {"training": True, "gradient_checkpointing": True}
    recomputed["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
    with contextlib.ExitStack() as stack:
        for layer, factor in zip(layers, factors):
            stack.callback(layer.register_forward_pre_hook(partial(multiply, factor), with_kwargs=True).remove)
            if isinstance(layer, GradientCheckpointingLayer):
                stack.enter_context(patch.multiple(layer, create=True, **recomputed))
        yield
