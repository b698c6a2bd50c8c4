"""The log: averages over all pairs of what steps and evaluations recorded, and the tokens trained on."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_vpo.forward.scoring import Scores
from trl_vpo.losses import PreferenceLoss
from trl_vpo.trainers.alarms import Alarms
from trl_vpo.trainers.finite import check_losses
from trl_vpo.trainers.metrics import MetricSums, preference_metrics
from trl_vpo.trainers.rates import RatesTrainer
from trl_vpo.trainers.row_groups import RowGroupsTrainer
from trl_vpo.trainers.setup import check_batch

ADDED = "loss/added"  # to our loss by a subclass's `compute_loss`, in evaluation; never logged by itself
PAIRWISE = "pairwise "  # the weighted mean over pairs of the method's NLL; never logged by itself
WEIGHTED = "weighted "  # the NLL per token times the rows' weights; never logged by itself


class LoggingTrainer(RatesTrainer, RowGroupsTrainer):
    """`trl.DPOTrainer` with metrics that are averaged over all pairs since the last log, on all ranks.

    `loss` is the exact mean over these pairs of what is trained on, with all that a subclass's `preference_loss`,
    `compute_loss` or `training_step` does to it; it replaces transformers' own. What a subclass appends to
    `self._metrics[mode][name]` is logged as in TRL.
    """

    def _start_logs(self) -> None:
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        of = (self.accelerator, self.row_groups)
        self._sums = {mode: MetricSums(*of, gathers=mode == "eval") for mode in ("train", "eval")}
        self.add_callback(Alarms(self.args.displacement_warning))
        self._new_tokens = 0
        self._step: tuple[Tensor, Tensor] | None = None  # Trainer's sum of losses before this step, and its pairs
        self._step_rates: dict[str, float] = {}  # of this step
        self._own_losses: list[Tensor] = []  # what `compute_loss` itself gave for this batch of an evaluation
        self._own_scores: Scores | None = None  # the same

    def extra_metrics(self, scores: Scores, reference: Scores | None, batch: dict) -> dict:
        """Return the method's own metrics: name -> (values, weights), (B,) each."""
        return {}

    @property
    def nll_term(self) -> tuple[str, float] | None:
        """The metric and the weight of a negative log-likelihood of chosen tokens that the method's loss has."""
        return None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of an optimizer step, each with the step's `totals`. All ranks call this."""
        batches, num_items = super().get_batch_samples(map(check_batch, epoch_iterator), num_batches, device)
        totals = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            totals[0] += len(batch["chosen"])
            totals[1] += batch["branch_mask"][batch["chosen"]].sum().to(device)
        totals = self.accelerator.reduce(totals, reduction="sum")
        for batch in batches:
            batch["totals"] = totals
        self._step = (self._tr_loss.clone(), totals[0] / self.accelerator.num_processes)
        self._step_rates = self._part_rates()  # now: the scheduler steps before the log
        return batches, num_items

    def _prepare_input(self, data):
        """Leave the numbers of rows in float32: `Trainer` would round them to DeepSpeed's dtype."""
        if isinstance(data, Tensor) and data.dim() == 1:
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _record(self, scores: Scores, reference: Any, out: PreferenceLoss, batch: dict, loss: Tensor) -> None:
        metrics = preference_metrics(scores, reference, out)
        if self.nll_term is not None:
            metrics |= _token_mean(self.nll_term[0], metrics, scores, batch)
        metrics |= self.extra_metrics(scores, reference, batch)
        if self.model.training:
            del metrics["loss"]  # taken from Trainer, which has what a subclass made of it
            self._new_tokens += _tokens(batch)
        else:
            self._own_losses.append(loss.detach())
            self._own_scores = scores
        self._sums["train" if self.model.training else "eval"].record(metrics)

    def _record_returned(self, returned: Tensor, pairs: int) -> None:
        """Record by how much a loss that `compute_loss` returned in an evaluation differs from our own."""
        if self._own_losses:
            metrics = {ADDED: returned - torch.stack(self._own_losses).mean()}
        else:  # a subclass has a loss of its own
            metrics = {"loss": returned, ADDED: torch.zeros_like(returned)}
        self._sums["eval"].record({key: value.expand(pairs) for key, value in metrics.items()})

    def _averages(self, mode: str) -> dict[str, float]:
        """Return the averages since the last call, and the tokens trained on. All ranks call this."""
        averages = self._sums[mode].averages()
        if "loss" in averages:  # not where a batch was scored without a step
            averages["loss"] = self._exact_loss(averages) + averages.pop(ADDED, 0.0)
        averages = {key: value for key, value in averages.items() if not key.startswith((PAIRWISE, WEIGHTED))}
        self._total_train_tokens += sum(gather_object([self._new_tokens])) // self.row_groups.size
        self._new_tokens = 0
        return averages | {"num_tokens": self._total_train_tokens} if averages else {}

    def _exact_loss(self, averages: dict[str, float]) -> float:
        """Return the loss, given its mean over pairs as `loss`, with the NLL's mean over all tokens of the interval.

        Each step weighs it for itself, by its own number of tokens.
        """
        name, weight = self.nll_term or ("", 0.0)
        if (pairwise := averages.get(PAIRWISE + name)) is None:
            return averages["loss"]
        return averages["loss"] + weight * (averages[WEIGHTED + name] - pairwise)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        check_losses(loss.expand(len(inputs["chosen"])), inputs["names"], self.state.global_step)  # a subclass's, too
        return loss

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        if self._step is not None:  # by how much it raised Trainer's sum of losses, once for each of its pairs
            before, pairs = self._step
            self._sums["train"].record({"loss": ((tr_loss - before)[None], pairs[None])})
        self._step = None
        if self.control.should_log:
            self._average_training()
            self._metrics["train"].update({key: [rate] for key, rate in self._step_rates.items()})
            self._take_exact_loss(tr_loss)
            self._metrics["train"].pop("loss", None)  # `log` gets Trainer's
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._average_training()
        self._take_exact_loss(self._tr_loss)  # of the steps that were not logged: Trainer has this rank's alone
        return super()._finalize_training(*args, **kwargs)

    def _take_exact_loss(self, tr_loss: Tensor) -> None:
        """Put the mean loss of all pairs since the last log, of all ranks, in place of Trainer's sum over steps."""
        if "loss" in self._metrics["train"]:
            steps = self.state.global_step - self._globalstep_last_logged
            tr_loss.fill_(self._metrics["train"]["loss"][-1] * steps)

    def _average_training(self) -> None:
        """Reduce the metrics now, so that `log` needs no collective: one rank may call it alone."""
        if self.model.training:
            self._metrics["train"].update({key: [value] for key, value in self._averages("train").items()})

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Prefix the metrics with their dataset, so that those of several sets stay apart."""
        own = self._metrics["eval"]  # what a subclass appended
        self._sums["eval"].averages()  # whatever an interrupted evaluation left
        own.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        averages = {key: sum(values) / len(values) for key, values in own.items()} | self._averages("eval")
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in averages.items()})
        own.clear()
        return output

    def evaluate(self, *args, **kwargs):
        """Evaluate, and go back to training mode in the midst of training: the next log goes by it."""
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self.is_in_train:
                self.model.train()

    def floating_point_ops(self, inputs):
        """Count 6 operations per parameter and token, as transformers does, over both branches of a pair."""
        return 6 * self._parameters * _tokens(inputs) // self.row_groups.size


def _token_mean(name: str, metrics: dict, scores: Scores, batch: dict) -> dict:
    """Return an NLL per token, so that the logs average over all tokens, whatever the micro-batches."""
    tokens = scores.mask[scores.chosen].sum(-1)  # (B,)
    nll, weights = -scores.sums[scores.chosen] / tokens, batch["weights"]
    pairwise = {PAIRWISE + name: weights * metrics[name]} if name in metrics else {}  # not in a subclass's own loss
    return pairwise | {name: (nll, tokens), WEIGHTED + name: (weights * nll, tokens)}


def _tokens(batch: dict) -> int:
    """Count a batch's tokens: every branch counts with its own copy of the prompt."""
    prompts = batch["trunk_mask"].sum(-1)[batch["branch_trunk"]].sum()
    return int(prompts + batch["branch_mask"].sum())
