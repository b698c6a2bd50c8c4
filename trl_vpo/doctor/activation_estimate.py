"""The memory of a training step, estimated without data: the model's own code runs on weights without memory.

What autograd keeps between the passes depends on a model's code, on its adapters and on autocast. So vision tower and
language model run layer by layer on fake tensors (`torch._subclasses`), in seconds on a CPU whatever the model's size,
and the bytes of the tensors that are alive at the same time are counted. A model whose tower and decoder cannot be run
apart is run as a whole, over the ids and media of real rows. Experts are taken to be chosen equally often.

A GPU's kernels do not run. That TRL's Triton kernels work in place is followed; SDPA's fused kernels keep the same on
both. Not followed: dropout (a byte per number on a GPU, a number on a CPU), SDPA's math kernel (it keeps all attention
weights, where no fused one fits), eager attention, flash-attention 2's unpadding, torch.compile, cuBLAS' workspaces,
and what is offloaded to the host, which counts here.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_vpo.doctor.live_bytes import LiveBytes
from trl_vpo.forward.attention import SEGMENTS, Segments, use_segments
from trl_vpo.forward.families import PIXELS, vision_inputs
from trl_vpo.forward.layouts import Layout, spans_of
from trl_vpo.forward.parts import output_head
from trl_vpo.forward.scoring import VOCAB_CHUNK, ScoreRequest, hidden_states
from trl_vpo.forward.vision import vision_features
from trl_vpo.trainers.compat import keep_attention, turn_off_dropout

CAUSAL = "trl_vpo_causal_sdpa"
TOKEN_CHUNK = 4096  # tokens that TRL's kernels take at a time
# Tiles of (tokens, VOCAB_CHUNK) float32 numbers that a kernel holds besides its buffers, forward and backward: Triton
# folds a tile in place, the torch fallback on a CPU does not (`trl.kernels`).
EXTRA_TILES = {"logps": {"cuda": (0, 0), "cpu": (3.25, 7.25)}, "kl": {"cuda": (0, 0), "cpu": (6, 8)}}
EXPERTS = 1024  # the most among which a router chooses; those among keys are more
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices with the places of real masks, whose number a fake operation would not know."""
    masks = (torch.bool, torch.uint8)
    known = [
        [index] if index is None or isinstance(index, FakeTensor) or index.dtype not in masks
        else index.nonzero().unbind(1)
        for index in indices
    ]  # fmt: skip
    return [index for several in known for index in several]


class FakeWeights(FakeTensorMode):
    """Compute only what depends on real tensors alone: models read grids and masks."""

    _inside = False  # of an operation on fake tensors: what its decomposition allocates is fake, too

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outside = not self._inside
        if outside and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))
        if outside and func.overloadpacket in INDEXING:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        if outside and func is torch.ops.aten.topk.default and args[0].size(-1) <= EXPERTS:
            return self._even_choice(func, *args, **(kwargs or {}))
        self._inside = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = not outside

    def _even_choice(self, topk: Any, scores: Tensor, count: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Choose all experts equally often, as real numbers: models count the tokens of each."""
        values, indices = super().__torch_dispatch__(topk, (), (scores, count, *args), kwargs)
        return values, torch.arange(indices.numel()).view(indices.shape) % scores.size(-1)

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor that claims to be in CPU memory."""
        return FakeTensor(self, torch.empty(tuple(shape), dtype=dtype, device="meta"), torch.device("cpu"))


@dataclass
class Call:
    """The shapes of a model call."""

    rows: int  # of its input ids ...
    length: int  # ... and their tokens
    masked: bool  # it has a mask; not if it is plain causal, or packed
    scored: int  # response tokens whose log-probabilities are computed
    compared: int = 0  # those of them whose KL needs a gradient (RRPO)
    features: int = 0  # vision features among its tokens
    trunks: list[tuple[int, list[int]]] = field(default_factory=list)  # of a packed row, see `spans_of`


@dataclass
class Activations:
    """Bytes of a pass, weights not counted."""

    peak: int = 0  # the most at any moment, finished gradients included
    gradients: int = 0  # of those, at that moment
    kept: int = 0  # by the forward pass, for the backward pass


class DryStep:
    """Run steps of one model on fake weights.

    Args:
        model: on the meta device, with or without an adapter; it is made fake, in place.
        weights, adapter: dtypes of its weights and of its adapter's.
        autocast: dtype of autocast; None: none.
        dropout: whether it is on; TRL turns it off (`disable_dropout`).
        checkpointing: gradient checkpointing; `options`: its `gradient_checkpointing_kwargs`.
        gradients: "kept" if they exist before the step (accumulation), "grown" if it makes them, "dropped" if they
            are freed as soon as they are made (ZeRO-2 and -3, FSDP).
        device: "cuda" or "cpu", where the step would run: kernels differ.

    Its methods raise whatever model code raises that looks at data of the language model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: torch.dtype,
        adapter: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        dropout: bool = False,
        checkpointing: bool = True,
        options: dict[str, Any] | None = None,
        gradients: str = "grown",
        device: str = "cuda",
    ):
        self._fake = FakeWeights(allow_non_fake_inputs=True)
        self._autocast, self._gradients, self._device = autocast, gradients, device
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._embed = self._base.get_input_embeddings()
        self._make_fake(weights, adapter or weights)
        model.train()
        if not dropout:
            turn_off_dropout(self._base)
        self._base.activation_checkpointing_disable()
        if checkpointing:
            kinds = {**(options or {}), "use_reentrant": False}
            kinds.pop("offload", None)
            keep_attention(self._base)
            self._base.activation_checkpointing_enable(kinds, every_n_layers=kinds.pop("every_n_layers", 1))
        self._base.disable_input_require_grads()
        if checkpointing and self._base is not model:
            self._base.enable_input_require_grads()

    def _make_fake(self, weights: torch.dtype, adapter: torch.dtype) -> None:
        fakes: dict[int, nn.Parameter] = {}  # a weight may have several owners
        for path, module in self._base.named_modules():
            for name, old in module._parameters.items():
                if old is not None and id(old) not in fakes:
                    dtype = adapter if ".lora_" in f".{path}.{name}" else weights
                    fakes[id(old)] = nn.Parameter(self._fake.empty(old.shape, dtype), old.requires_grad)
                module._parameters[name] = old if old is None else fakes[id(old)]
            for name, old in module._buffers.items():
                module._buffers[name] = old if old is None else self._fake.empty(old.shape, old.dtype)

    def run(self, call: Call, inputs: int = 0) -> Activations:
        """Run the language model over the call of a micro-batch, forward, then backward.

        `inputs` are the bytes of the call's inputs, which are gone before the backward pass.
        """
        with self._attention(call), self._counting() as live:
            held = live.now
            laid_out = self._fake.empty([inputs], torch.uint8)
            width = self._base.config.get_text_config().hidden_size
            dtype = self._autocast or self._embed.weight.dtype
            features = self._fake.empty((call.features, width), dtype)
            loss = self._call(call, features)
            del features
            del laid_out
            kept = live.now - held
            loss.backward()
        return Activations(live.peak - held, live.gradients_at_peak, kept)

    def run_whole(self, layout: Layout, call: Call) -> Activations:
        """Run the whole model over a micro-batch: one whose decoder or tower cannot be run apart."""
        if not hasattr(self._base.base_model, "_trl_vpo_vision"):
            vision_features(self._base.base_model)
        if layout.segments is not None:
            use_segments(self._base)
        request = ScoreRequest(
            layout.rows, layout.positions, layout.mask, layout.labels, layout.segments, layout.copies
        )
        with self._counting(tree_leaves(layout.inputs)) as live:
            held = live.now
            hidden = hidden_states(self._base, request, **layout.inputs)
            loss = self._scores(hidden, call)
            del hidden
            kept = live.now - held
            loss.backward()
        return Activations(live.peak - held, live.gradients_at_peak, kept)

    def run_tower(self, media: dict[str, Tensor]) -> Activations:
        """Run vision tower and projector over the real inputs of a call: forward, and backward if trained."""
        backbone, text = self._base.base_model, {id(p) for p in self._base.get_decoder().parameters()}
        tower = [p for p in backbone.parameters() if id(p) not in text and p is not self._embed.weight]
        trained = any(p.requires_grad for p in tower)
        if not vision_inputs([media]):
            return Activations()
        with torch.set_grad_enabled(trained), self._counting(tree_leaves(media)) as live:
            held = live.now
            features = tower_features(backbone, media)
            kept = live.now - held
            if trained:
                sum(x.sum() for x in tree_leaves(features)).backward()
        return Activations(live.peak - held, live.gradients_at_peak, kept if trained else 0)

    @contextlib.contextmanager
    def _counting(self, inputs: Iterable[Tensor] = ()) -> Iterator[LiveBytes]:
        """Count bytes while the model runs on inputs that are counted already, with gradients as in the step."""
        weights = list(self._base.parameters())
        trained = [p for p in weights if p.requires_grad]
        live = LiveBytes([*weights, *inputs])

        def after(parameter: Tensor) -> None:
            if self._gradients == "dropped":
                parameter.grad = None
            elif self._gradients == "grown":
                live.gradients += parameter.grad.untyped_storage().nbytes()

        handles = [p.register_post_accumulate_grad_hook(after) for p in trained]
        try:
            for p in trained if self._gradients == "kept" else ():
                p.grad = self._fake.empty(p.shape, p.dtype)
                live.hold(p.grad)
            live.restart()
            with self._fake, torch.autocast("cpu", dtype=self._autocast, enabled=self._autocast is not None), live:
                yield live
        finally:
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None

    @contextlib.contextmanager
    def _attention(self, call: Call) -> Iterator[None]:
        """SDPA under a mask, over a packed row, or plain causal: models would make a mask for fake tensors."""
        config = self._base.config.get_text_config()
        saved_implementation = config._attn_implementation
        if call.trunks:
            use_segments(self._base)
        elif not call.masked:
            AttentionInterface.register(CAUSAL, ALL_ATTENTION_FUNCTIONS["sdpa"])
            AttentionMaskInterface.register(CAUSAL, lambda *args, **kwargs: None)
            config._attn_implementation = CAUSAL
        try:
            yield
        finally:
            config._attn_implementation = saved_implementation

    def _call(self, call: Call, features: Tensor) -> Tensor:
        """Return the sum of everything that is scored."""
        ids = self._fake.empty((call.rows, call.length), torch.long)
        states = self._embed(ids)  # (R, L, H)
        if call.features:
            where = self._fake.empty((call.rows, call.length, 1), torch.bool).expand_as(states)
            states = states.masked_scatter(where, features.to(states.dtype))
        size = (1, 1, 0, 0) if call.trunks else (call.rows, 1, call.length, call.length)
        mask = self._fake.empty(size, torch.bool) if call.trunks or call.masked else None
        tree = {SEGMENTS: Segments.of(spans_of(call.trunks))} if call.trunks else {}
        decoder = self._base.get_decoder()
        hidden = decoder(inputs_embeds=states, attention_mask=mask, use_cache=False, **tree).last_hidden_state
        return self._scores(hidden, call)

    def _scores(self, hidden: Tensor, call: Call) -> Tensor:
        """Return the sum of everything that is scored from the (R, L, H) states of a call."""
        head, place = output_head(self._base).weight, self._fake.empty([call.scored], torch.long)
        hidden = hidden[place, place]  # (N, H)
        scores = _Head.apply(hidden, head, "logps", self._device, self._autocast).sum()
        if call.compared:
            compared = hidden[place[: call.compared]]
            scores = scores + _Head.apply(compared, head, "kl", self._device, self._autocast).sum()
        return scores


def tower_features(backbone: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the vision features of one call, computed the way the model's `forward` does."""
    features = []
    for pixels, kind in PIXELS.items():
        if pixels in inputs:
            # Perception LM has one for both.
            method = getattr(backbone, f"get_{kind}_features", None) or backbone.get_image_features
            _, *others = inspect.signature(method).parameters
            output = method(inputs[pixels], **{key: inputs[key] for key in others if key in inputs})
            own = output.last_hidden_state if output.pooler_output is None else output.pooler_output  # Llama 4's
            features += tree_leaves([own, getattr(output, "deepstack_features", None)])
    if not features:
        raise ValueError(f"{type(backbone).__name__} has no method of its own for the features of {', '.join(inputs)}")
    return [x for x in features if isinstance(x, Tensor) and x.is_floating_point()]


class _Head(torch.autograd.Function):
    """Allocate what `trl.kernels` do for (N, H) hidden states and a (V, H) head; (N,) zeros come out of it.

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
        trained = (hidden, weight)[: sum(ctx.needs_input_grad[:2])]
        grads = [x.new_zeros(x.shape, dtype=torch.float32) for x in trained]
        hidden.new_empty(ctx.buffers, dtype=torch.uint8)
        grads = [grad.to(x.dtype) for grad, x in zip(grads, trained)]
        return (*grads, *(None,) * (5 - len(grads)))
