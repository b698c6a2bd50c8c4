"""What is logged: averages over all pairs of what steps and evaluations recorded, and the tokens trained on."""

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import DPOTrainer

from trl_vpo.forward.scoring import Scores
from trl_vpo.losses import PreferenceLoss
from trl_vpo.trainers.metrics import MetricSums, preference_metrics

ADDED = "loss/added"  # to our loss by a subclass; never logged by itself


class LoggingTrainer(DPOTrainer):
    """`trl.DPOTrainer` with metrics that are averaged over all pairs since the last log, on all ranks.

    `loss` is the exact mean of the method's loss over these pairs, plus what a subclass's `compute_loss` adds to it.
    What a subclass appends to `self._metrics[mode][name]` is logged as in TRL.
    """

    def _start_logs(self) -> None:
        """At the end of construction."""
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self._sums = {mode: MetricSums(self.accelerator, gathers=mode == "eval") for mode in ("train", "eval")}
        self._new_tokens = 0
        self._own_losses: list[Tensor] = []  # what `compute_loss` itself gave since the step began

    def extra_metrics(self, scores: Scores, reference: Scores | None, batch: dict) -> dict:
        """The method's own metrics: name -> (values, weights), (B,) each."""
        return {}

    def _record(self, scores: Scores, reference: Scores | None, out: PreferenceLoss, batch: dict) -> None:
        metrics = preference_metrics(scores, reference, out) | self.extra_metrics(scores, reference, batch)
        self._sums["train" if self.model.training else "eval"].record(metrics)
        if self.model.training:
            self._new_tokens += _tokens(batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._own_losses = []
        loss = super().training_step(model, inputs, num_items_in_batch)  # a part of the mean over the micro-batches
        parts, totals = self.current_gradient_accumulation_steps, inputs.get("totals")
        pairs = len(inputs["chosen"]) if totals is None else totals[0] / (parts * self.accelerator.num_processes)
        self._record_returned("train", loss, parts, torch.as_tensor([pairs], device=loss.device))
        return loss

    def _record_returned(self, mode: str, returned: Tensor, parts: int, weights: Tensor) -> None:
        """Record by how much a loss that `compute_loss` returned, divided by `parts`, differs from our own."""
        if self._own_losses:
            metrics = {ADDED: returned - torch.stack(self._own_losses).mean() / parts}
        else:  # a subclass has a loss of its own
            metrics = {"loss": returned, ADDED: torch.zeros_like(returned)}
        self._sums[mode].record({k: ((v * parts).expand(len(weights)), weights) for k, v in metrics.items()})

    def _averages(self, mode: str) -> dict[str, float]:
        """Averages of what was recorded since the last call, and the tokens trained on. All ranks call this."""
        averages = self._sums[mode].averages()
        if averages:
            averages["loss"] = self._own_average(averages) + averages.pop(ADDED, 0.0)
        self._total_train_tokens += sum(gather_object([self._new_tokens]))
        self._new_tokens = 0
        return averages | {"num_tokens": self._total_train_tokens} if averages else {}

    def _own_average(self, averages: dict[str, float]) -> float:
        """The average of the method's own loss."""
        return averages["loss"]

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log:
            self._average_training()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._average_training()
        return super()._finalize_training(*args, **kwargs)

    def _average_training(self) -> None:
        """Ready the averages for the next `log`, which then meets no other rank: one may call it alone."""
        if self.model.training:
            self._metrics["train"].update({key: [value] for key, value in self._averages("train").items()})

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The metrics carry the prefix of their dataset, so that those of several sets stay apart."""
        mine = self._metrics["eval"]
        self._sums["eval"].averages()  # whatever an interrupted evaluation left
        mine.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        averages = {key: sum(values) / len(values) for key, values in mine.items()} | self._averages("eval")
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in averages.items()})
        mine.clear()
        return output

    def evaluate(self, *args, **kwargs):
        """In the midst of training the model goes back to training: what is logged next goes by its mode."""
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self.is_in_train:
                self.model.train()

    def floating_point_ops(self, inputs):
        """6 operations per parameter and token, as transformers estimates them; both branches of a pair count."""
        return 6 * self._parameters * _tokens(inputs)


def _tokens(batch: dict) -> int:
    """Tokens that a batch sends through the model: every branch counts with its own copy of the prompt."""
    prompts = batch["trunk_mask"].sum(-1)[batch["branch_trunk"]].sum()
    return int(prompts + batch["branch_mask"].sum())
