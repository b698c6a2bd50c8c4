"""One training step without data: the model's own code on tensors that have shapes and no memory behind them.

What autograd keeps between the passes depends on a model's code, on its adapters and on autocast, and formulas for it
are soon wrong. So the language model is run, layer by layer, on fake tensors (`torch._subclasses`), which costs
seconds on a CPU whatever the size of the model, and the bytes of the tensors that live at the same time are counted.

A GPU's kernels are not run. Known to differ, and followed: dropout keeps a byte a number there, and TRL's Triton
kernels work in place. The same on both: SDPA's fused kernels keep queries, keys, values, output and a logsumexp a row,
and a mask as numbers of their dtype. Not followed: SDPA's math kernel, which torch takes where no fused one fits (it
keeps all attention weights), eager attention, flash-attention 2's unpadding, torch.compile, workspaces of cuBLAS.
"""

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_vpo.forward.attention import TREE, use_tree_attention
from trl_vpo.forward.scoring import VOCAB_CHUNK

CAUSAL = "trl_vpo_causal_sdpa"
TOKEN_CHUNK = 4096  # TRL's kernels take so many tokens at a time
# Tiles of (tokens, VOCAB_CHUNK) float32 numbers that a kernel holds besides its buffers, forward and backward: Triton
# folds a tile in place, the torch fallback on a CPU does not (`trl.kernels`).
EXTRA_TILES = {"logps": {"cuda": (0, 0), "cpu": (3.25, 7.25)}, "kl": {"cuda": (0, 0), "cpu": (6, 8)}}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, exactly and the same on every device.

    A storage counts once, however many views it has, from the operation that makes it until it is freed. What an
    operation allocates and frees inside of itself is not seen, nor are the allocator's rounding and its cache.

    Attributes:
        now, peak: bytes alive, and the most that ever were.
        gradients: bytes of finished gradients, counted by whoever owns them; `gradients_at_peak`: at the peak.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self.gradients_at_peak = self.now, self.gradients

    def _free(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out


@dataclass
class Call:
    """The shapes of one model call.

    Attributes:
        rows, length: of its input ids, tokens.
        masked: rows of its attention mask: `length` for a mask over everything, fewer for the branches of a shared
            layout, 0 where attention is plain causal.
        scored: response tokens whose log-probabilities are computed.
        compared: those of them whose KL needs a gradient (RRPO).
        features: vision features among its tokens.
    """

    rows: int
    length: int
    masked: int
    scored: int
    compared: int = 0
    features: int = 0


@dataclass
class Activations:
    """Bytes of a step, weights not counted.

    Attributes:
        peak: the most at any moment, finished gradients included.
        gradients: of those, at that moment.
        kept: what the forward pass keeps for the backward pass.
    """

    peak: int
    gradients: int
    kept: int


class DryStep:
    """Runs steps of one model on fake tensors.

    Args:
        model: on the meta device, with or without an adapter; its text part is made fake, in place.
        weights: dtype of its weights.
        adapter: dtype of its adapter's weights.
        autocast: dtype of autocast; None: none.
        dropout: whether it is on; TRL turns it off (disable_dropout).
        device: "cuda" or "cpu", where the step would run: kernels differ.

    Raises:
        Exception: of any kind, by `run`: model code that cannot do without data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: torch.dtype,
        adapter: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        dropout: bool = False,
        device: str = "cuda",
    ):
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._model, self._autocast, self._device = model, autocast, device
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._has_adapter = self._base is not model
        self._parts = [self._base.get_decoder(), self._base.get_input_embeddings(), self._base.get_output_embeddings()]
        made: dict[int, nn.Parameter] = {}
        with self._fake:
            for part in self._parts:
                self._make_fake(part, weights, adapter or weights, made)
        self._parameters = list({id(p): p for p in made.values()}.values())
        _set_dropout(self._parts[0], dropout, device)
        model.train()

    def _make_fake(self, part: nn.Module, weights: torch.dtype, adapter: torch.dtype, made: dict) -> None:
        for name, module in part.named_modules():
            for key, old in module._parameters.items():
                if old is not None and id(old) not in made:
                    dtype = adapter if ".lora_" in f".{name}.{key}" else weights
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
                    made[id(made[id(old)])] = made[id(old)]  # a part may lie inside of another
                module._parameters[key] = None if old is None else made[id(old)]
            for key, old in module._buffers.items():
                module._buffers[key] = None if old is None else torch.empty(old.shape, dtype=old.dtype)

    def run(self, calls: list[Call], *, checkpointing: bool, gradients: str, inputs: int = 0) -> Activations:
        """Forward and backward of a micro-batch.

        Args:
            calls: its model calls; the backward pass begins after the last of them.
            checkpointing: gradient checkpointing.
            gradients: "kept" if they are there before the step (accumulation), "grown" if it makes them, "dropped" if
                they leave as soon as they are made (ZeRO-2 and -3, FSDP).
            inputs: bytes of the calls' inputs, which are gone before the backward pass.
        """
        self._set_checkpointing(checkpointing)
        trained = [p for p in self._parameters if p.requires_grad]
        config = self._base.config.get_text_config()
        attention = config._attn_implementation
        live = LiveBytes(self._parameters)
        handles = [p.register_post_accumulate_grad_hook(_after(live, gradients)) for p in trained]
        try:
            self._set_attention(calls)
            with self._fake:
                for p in trained:
                    p.grad = torch.zeros_like(p) if gradients == "kept" else None
                    if p.grad is not None:
                        live.hold(p.grad)
                held = live.now
                live.restart()
                with live:
                    laid_out = torch.empty(inputs, dtype=torch.uint8)
                    loss = self._forward(calls)
                    del laid_out
                    kept = live.now - held
                    loss.backward()
        finally:
            config._attn_implementation = attention
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None
        return Activations(live.peak - held, live.gradients_at_peak, kept)

    def _set_attention(self, calls: list[Call]) -> None:
        """SDPA under a mask, over a shared layout, or plain causal: models would make a mask for fake tensors."""
        if any(call.masked not in (0, call.length) for call in calls):
            use_tree_attention(self._base)
        elif not any(call.masked for call in calls):
            AttentionInterface.register(CAUSAL, ALL_ATTENTION_FUNCTIONS["sdpa"])
            AttentionMaskInterface.register(CAUSAL, lambda *args, **kwargs: None)
            self._base.config.get_text_config()._attn_implementation = CAUSAL

    def _set_checkpointing(self, on: bool) -> None:
        if not on:
            self._base.gradient_checkpointing_disable()
            self._base.disable_input_require_grads()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename it
            self._base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._has_adapter:
            self._base.enable_input_require_grads()

    def _forward(self, calls: list[Call]) -> Tensor:
        """The sum of everything that is scored."""
        width = self._base.config.get_text_config().hidden_size
        dtype = self._autocast or self._parts[1].weight.dtype
        features = [torch.empty(call.features, width, dtype=dtype) for call in calls]  # made before the first call
        with torch.autocast("cpu", dtype=self._autocast, enabled=self._autocast is not None):
            return sum(self._call(call, found) for call, found in zip(calls, features))

    def _call(self, call: Call, features: Tensor) -> Tensor:
        decoder, embed, head = self._parts
        states = embed(torch.zeros(call.rows, call.length, dtype=torch.long))  # (R, L, H)
        if call.features:
            where = torch.zeros(call.rows, call.length, 1, dtype=torch.bool).expand_as(states)
            states = states.masked_scatter(where, features.to(states.dtype))
        mask = torch.ones(call.rows, 1, call.masked, call.length, dtype=torch.bool) if call.masked else None
        tree = {TREE: mask} if call.masked not in (0, call.length) else {}
        hidden = decoder(inputs_embeds=states, attention_mask=mask, use_cache=False, **tree).last_hidden_state
        place = torch.zeros(call.scored, dtype=torch.long)
        hidden = hidden[place, place]  # (N, H)
        scores = _Head.apply(hidden, head.weight, "logps", self._device, self._autocast).sum()
        if call.compared:
            compared = hidden[place[: call.compared]]
            scores = scores + _Head.apply(compared, head.weight, "kl", self._device, self._autocast).sum()
        return scores


def _after(live: LiveBytes, gradients: str) -> Any:
    def hook(parameter: Tensor) -> None:
        if gradients == "dropped":
            parameter.grad = None
        elif gradients == "grown":
            live.gradients += parameter.grad.untyped_storage().nbytes()

    return hook


class _Head(torch.autograd.Function):
    """What `trl.kernels` allocate for (N, H) hidden states and a (V, H) head; (N,) zeros come out of it.

    A buffer of (tokens, VOCAB_CHUNK) logits in the dtype of the computation; for the KL two of them, float32.
    Gradients are accumulated in float32. A chunk of the head is cast where its dtype is another one, and to float32 on
    CPUs.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, kind: str, device: str, autocast: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        chunk = min(VOCAB_CHUNK, weight.size(0))
        tile = 4 * min(len(hidden), TOKEN_CHUNK) * chunk
        number = (autocast or hidden.dtype).itemsize
        piece = chunk * weight.size(1)
        cast = piece * number if number != weight.dtype.itemsize else 0
        raised = 4 * piece + tile if device == "cpu" and number < 4 else 0  # multiplied in float32, after the tile
        whole = 2 * 4 * min(len(hidden), TOKEN_CHUNK) * VOCAB_CHUNK  # of both models, also where there is less to hold
        buffers = (tile * number / 4 if kind == "logps" else whole) + cast
        forward, backward = (max(extra * tile, raised) for extra in EXTRA_TILES[kind][device])
        ctx.buffers = int(buffers + backward + (tile / 2 if kind == "kl" and number < 4 else 0))
        hidden.new_empty(int(buffers + forward), dtype=torch.uint8)
        return hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=torch.float32) for x in (hidden, weight)[: sum(ctx.needs_input_grad[:2])]]
        hidden.new_empty(ctx.buffers, dtype=torch.uint8)
        grads = [x.to(to.dtype) for x, to in zip(grads, (hidden, weight))]
        return (*grads, *(None,) * (5 - len(grads)))


class _FusedDropout(nn.Module):
    """Dropout as on GPUs, where a byte for each number is kept; on CPUs it is a number."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


def _set_dropout(part: nn.Module, on: bool, device: str) -> None:
    for module in part.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout and not on:
                child.p = 0.0
            elif type(child) is nn.Dropout and child.p > 0 and device == "cuda":
                module._modules[name] = _FusedDropout(child.p)
