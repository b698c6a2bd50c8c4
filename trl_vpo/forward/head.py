"""What a model does with the output of its LM head: multiply it, cap it, or nothing.

Config fields do not tell. Cohere's text model multiplies by its `logit_scale`; Aya Vision has the same text config and
does not. So the model's own `forward` is run, with given numbers in the place of what its backbone and head compute.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

PROBES = (1.0, -1.0, 2.0**-20, -3.0, 20.0, 1e6)  # logits; the last one is far beyond every cap


class _Hidden(BaseModelOutputWithPast):
    """A backbone's output that has every optional field."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, cap) of a model whose logits are `cap * tanh(scale * head(hidden) / cap)`; cap None: not capped.

    Raises:
        ValueError: the model's `forward` does something else.
    """
    backbone, head, config = model.base_model, model.get_output_embeddings(), model.config.get_text_config()
    name = type(model).__name__
    if backbone is model or head is None:
        raise ValueError(f"{name} has no backbone apart from its LM head; its log-probs cannot be computed here.")
    given = torch.tensor(PROBES, dtype=torch.float64)
    hidden = (torch.arange(len(PROBES) * config.hidden_size) % 3 + 1.0).reshape(1, len(PROBES), -1)  # (1, N, H)
    logits = given.reshape(1, -1, 1).expand(1, len(PROBES), config.vocab_size)
    taken: list[Tensor] = []
    with (
        _instead(backbone, lambda *args, **kwargs: _Hidden(last_hidden_state=hidden)),
        _instead(head, lambda states: taken.append(states) or logits.clone()),
    ):
        out = type(model).forward(model, input_ids=torch.zeros(1, len(PROBES), dtype=torch.long)).logits
    problem = f"{name} computes its logits from its hidden states in a way that is not known here: "
    if not taken:
        raise ValueError(problem + "it does not call its output embeddings.")
    before = (taken[-1].double() / hidden).unique()
    if before.numel() != 1 or (before.item() != 1 and getattr(head, "bias", None) is not None):
        raise ValueError(problem + "its head takes something else than the backbone's output.")
    if not torch.equal(out, out[..., :1].expand_as(out)):
        raise ValueError(problem + "some tokens of the vocabulary are treated unlike the others.")
    found = out[0, :, 0].double()  # (N,)
    scale, end = found[2].item() / PROBES[2], found[-1].item()
    cap = None if end > 1e4 * scale else end
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # (x / cap) * cap is rounded
    want = given * scale if cap is None else cap * torch.tanh(given * scale / cap)
    if not torch.allclose(found, want, rtol=16 * torch.finfo(out.dtype).eps, atol=0):
        raise ValueError(problem + f"logits {given.tolist()} became {found.tolist()}.")
    return scale * before.item(), cap


@contextlib.contextmanager
def _instead(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let `module(...)` be `forward(...)`."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
