"""Metrics as sums and weights, so that averages over steps, ranks and ragged responses are exact."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl_vpo.data.numbers import both_fall
from trl_vpo.forward.scoring import Scores
from trl_vpo.losses import PreferenceLoss
from trl_vpo.trainers.row_groups import RowGroups

Metric = Tensor | tuple[Tensor, Tensor]  # (B,) values; or (B,) values and weights, for a mean over tokens


def preference_metrics(scores: Scores, reference: Scores | None, out: PreferenceLoss) -> dict[str, Metric]:
    """Return the metrics of every method: TRL's keys, the parts of the loss, and the distance to the reference."""
    chosen, rejected = scores.chosen, scores.rejected
    tokens = scores.mask.sum(-1).float()  # (S,)
    mean = {k: getattr(scores, k).float().sum(-1) / tokens for k in ("mean_logits", "is_top1")}
    both = tokens[chosen] + tokens[rejected]  # (B,)
    metrics = {
        "loss": out.losses,  # instead of transformers' own, which is a mean over steps and micro-batches
        "entropy": ((scores.entropy[chosen].sum(-1) + scores.entropy[rejected].sum(-1)) / both, both),
        "logits/chosen": (mean["mean_logits"][chosen], tokens[chosen]),
        "logits/rejected": (mean["mean_logits"][rejected], tokens[rejected]),
        "mean_token_accuracy": (mean["is_top1"][chosen], tokens[chosen]),
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).float(),
        "rewards/margins": out.chosen_rewards - out.rejected_rewards,
        "logps/chosen": scores.sums[chosen],
        "logps/rejected": scores.sums[rejected],
        "logps/chosen_average": scores.sums[chosen] / tokens[chosen],
        "logps/rejected_average": scores.sums[rejected] / tokens[rejected],
    }
    metrics |= {f"loss/{name}": term for name, term in out.terms.items()}
    if scores.aux_loss is not None:
        metrics["aux_loss"] = scores.aux_loss.expand_as(out.losses)
    if reference is not None:
        moved = scores.sums - reference.sums  # (S,)
        metrics |= {"displacement/chosen": moved[chosen], "displacement/rejected": moved[rejected]}
        metrics["displacement/both_fall"] = both_fall(moved[chosen], moved[rejected]).float()
    if scores.kl is not None:
        metrics |= {"kl/chosen": scores.kl[chosen].sum(-1), "kl/rejected": scores.kl[rejected].sum(-1)}
    return metrics


class MetricSums:
    """Sums and weights since the last average.

    With `gathers`, each record gathers the rows of all ranks, as evaluation must: it drops the rows that fill up the
    last batch. Otherwise each rank sums for itself, and the sums meet in `averages`.
    """

    def __init__(self, accelerator: Accelerator, groups: RowGroups, *, gathers: bool):
        self._accelerator, self._groups = accelerator, groups
        self._gathers = gathers
        self._sums: dict[str, list[float]] = {}

    @torch.no_grad()
    def record(self, metrics: dict[str, Metric]) -> None:
        """Add the B rows of a batch."""
        pairs = [m if isinstance(m, tuple) else (m, torch.ones_like(m)) for m in metrics.values()]
        sums = torch.stack([torch.stack([v.float() * w.float(), w.float()]) for v, w in pairs])  # (K, 2, B)
        if not self._gathers:
            _add(self._sums, dict(zip(metrics, sums.sum(-1).tolist())))
            return
        rows = [dict(zip(metrics, row)) for row in sums.permute(2, 0, 1).tolist()]
        for row in self._accelerator.gather_for_metrics(rows if self._groups.speaks else [], use_gather_object=True):
            _add(self._sums, row)

    def averages(self) -> dict[str, float]:
        """Return the averages over all ranks, and start anew. All ranks call this."""
        totals: dict[str, list[float]] = {}
        for sums in [self._sums] if self._gathers else gather_object([self._sums]):
            _add(totals, sums)
        self._sums = {}
        return {key: value / weight for key, (value, weight) in totals.items() if weight}


def _add(totals: dict[str, list[float]], sums: dict[str, list[float]]) -> None:
    for key, pair in sums.items():
        totals[key] = [total + more for total, more in zip(totals.get(key, (0.0, 0.0)), pair)]
