"""What is logged: averages over all pairs of what steps and evaluations recorded, and the tokens trained on."""

from accelerate.utils import gather_object
from trl import DPOTrainer

from trl_vpo.forward.scoring import Scores
from trl_vpo.losses import PreferenceLoss
from trl_vpo.trainers.metrics import MetricSums, preference_metrics


class LoggingTrainer(DPOTrainer):
    """`trl.DPOTrainer` with metrics that are averaged over all pairs since the last log, on all ranks."""

    def _start_logs(self) -> None:
        """At the end of construction."""
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self._sums = {mode: MetricSums(self.accelerator, gathers=mode == "eval") for mode in ("train", "eval")}
        self._new_tokens = 0

    def extra_metrics(self, scores: Scores, reference: Scores | None, batch: dict) -> dict:
        """The method's own metrics: name -> (values, weights), (B,) each."""
        return {}

    def _record(self, scores: Scores, reference: Scores | None, out: PreferenceLoss, batch: dict) -> None:
        metrics = preference_metrics(scores, reference, out) | self.extra_metrics(scores, reference, batch)
        self._sums["train" if self.model.training else "eval"].record(metrics)
        if self.model.training:
            self._new_tokens += _tokens(batch)

    def _averages(self, mode: str) -> dict[str, float]:
        """Averages of what was recorded since the last call, and the tokens trained on. All ranks call this."""
        averages = self._sums[mode].averages()
        self._total_train_tokens += sum(gather_object([self._new_tokens]))
        self._new_tokens = 0
        return averages | {"num_tokens": self._total_train_tokens} if averages else {}

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
            self._metrics["train"] = {key: [value] for key, value in self._averages("train").items()}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The metrics carry the prefix of their dataset, so that those of several sets stay apart."""
        self._sums["eval"].averages()  # whatever an interrupted evaluation left
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{key}": v for key, v in self._averages("eval").items()})
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
