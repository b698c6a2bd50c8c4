"""Parity: our training pass against every branch alone, by the plain forward of a model that we never touched.

Few layers, at the widths and head sizes of the real models, with pictures, a clip and text of unlike lengths in one
batch. Compared are the log-probs of the response tokens and the gradients of LoRA, both as the relative error against
the branches alone in float32. bfloat16 is held to what it costs the branches alone: its own rounding, not ours.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor

from gpu_checks import models
from gpu_checks.trainers import attention_kernels, free, lora, make_trainer, preference_row, synchronize, table

LIMITS = {"logps_error": 1e-5, "gradient_error": 1e-5}  # float32
ROUNDING = 1.5  # times the error of the branches alone in bfloat16
LAYOUTS = ("auto", "separate")


def cells(options: Any) -> list[dict]:
    fastest = models.fastest_attention(options.device)
    names = dict.fromkeys(["sdpa", fastest])
    return [
        {"method": "dpo", "family": family, "attention": attention}
        for attention in names
        for family in models.FAMILIES
    ]


def rows(family: str, side: int, tiny: bool) -> Dataset:
    """Rows whose prompts and responses differ in length: a picture, text alone, a clip where the family takes them."""
    size = 8 if tiny else 1
    made = [
        preference_row(300 // size, 48 // size, images=1, side=side, seed=1),
        preference_row(40 // size, 120 // size, seed=2),
    ]
    if family in models.TAKES_VIDEOS:
        made.append(preference_row(100 // size, 24 // size, frames=4, side=side, seed=3))
    return table(made)


def run(cell: dict, options: Any) -> list[dict]:
    family, attention, device = cell["family"], cell["attention"], options.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    made = models.shape(family, layers=2, tiny=options.tiny)
    data = rows(family, made.side, options.tiny)
    truth, cost, found = None, {}, []
    for dtype in (torch.float32, torch.bfloat16):
        bf16 = dtype == torch.bfloat16
        if attention.startswith("flash") and not bf16:
            continue
        for layout in LAYOUTS[:1] if options.tiny and bf16 else LAYOUTS:
            free(device)
            begin = time.perf_counter()
            model = models.build(made, device, dtype, attention)
            trainer, policy, batch = make_trainer("dpo", made, model, data, device, bf16=bf16, layout=layout)
            weights = torch.randn(batch["branch_mask"].shape, generator=torch.Generator().manual_seed(0)).to(device)
            weights = weights * batch["branch_mask"]
            truth = truth or alone(made, batch, weights, device, torch.float32)
            if bf16 and not cost:
                cost = errors(alone(made, batch, weights, device, dtype, attention), truth)
            fill_adapter(policy)
            row = errors(ours(trainer, policy, batch, weights), truth)
            synchronize(device)
            row |= {"dtype": str(dtype).removeprefix("torch."), "layout": trainer.scorer.layout, "asked": layout}
            row |= {f"alone_{name}": error for name, error in cost.items()}
            row["ok"] = all(row[name] <= _limit(name, cost) for name in LIMITS)  # nan fails
            row["seconds"] = time.perf_counter() - begin
            if device == "cuda" and layout == "auto":
                row["kernels"] = attention_kernels(lambda t=trainer, p=policy, b=batch, w=weights: ours(t, p, b, w))
            found.append(row)
            del model, trainer, policy, batch
    return found


def _limit(name: str, cost: dict[str, float]) -> float:
    return ROUNDING * cost[name] if cost else LIMITS[name]


def ours(trainer: Any, policy: Any, batch: dict, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, gradients of the adapter) by the trainer's own pass, its reference before it."""
    policy.zero_grad(set_to_none=True)
    with trainer.compute_loss_context_manager():
        _, scores = trainer.compute_loss(policy, dict(batch), return_outputs=True)
    return _backward(policy, scores.logps, weights)


def alone(made: Any, batch: dict, weights: Tensor, device: str, dtype: torch.dtype, attention: str = "sdpa") -> tuple:
    """(log-probs, gradients of the adapter), each branch in a call of its own behind its prompt, from full logits."""
    model = get_peft_model(models.build(made, device, dtype, attention), lora())
    fill_adapter(model)
    parts = []
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for branch, trunk in enumerate(batch["branch_trunk"].tolist()):
            prompt, response = batch["trunk_mask"][trunk], batch["branch_mask"][branch]
            n = int(response.sum())
            ids = torch.cat([batch["trunk_ids"][trunk][prompt], batch["branch_ids"][branch][response]]).unsqueeze(0)
            kinds = {k: F.pad(v[trunk][prompt], (0, n)).unsqueeze(0) for k, v in batch["trunk_types"].items()}
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **batch["media"][trunk]}
            logits = model(**inputs, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]  # (n, V)
            logps = logits.float().log_softmax(-1).gather(1, ids[0, -n:].unsqueeze(1)).squeeze(1)
            parts.append(F.pad(logps, (0, len(response) - n)))
    return _backward(model, torch.stack(parts), weights)


def _backward(model: Any, logps: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Backward through a sum that weighs every token differently."""
    (logps * weights).sum().backward()
    gradients = [p.grad.flatten().float() for name, p in sorted(model.named_parameters()) if p.grad is not None]
    return logps.detach().float(), torch.cat(gradients)


def fill_adapter(model: Any) -> None:
    """Give the adapter weights of its own: as it begins, half of its gradients are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad and "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.02 if "lora_B" in name else p.size(1) ** -0.5))


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> dict[str, float]:
    logps, gradients = (float((a - b).norm() / b.norm()) for a, b in zip(got, want))
    nats = float((got[0] - want[0]).abs().max())
    return {"logps_error": logps, "gradient_error": gradients, "logps_nats": nats}
