"""Warnings of what breaks a model while loss and accuracy look good."""

from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

logger = get_logger(__name__)

LOGS = 5  # in a row that an alarm needs: a single one may be of unlike rows
SATURATED = 1e-3  # nats: at a smaller preference term, hardly anything pulls at the pairs
PREFERENCE = ("loss/preference", "loss/sigmoid", "loss/dpo", "loss/alignment")  # the same term in the methods
FALLEN = (
    "Step {step}: the chosen responses have become {fall:.1f} nats less likely than {start}, at rewards/accuracies of "
    "{accuracy:.2f}: the rejected ones only fall faster. Answers may get worse although loss and accuracy look good. "
    "Lower the learning rate, stop earlier, or take what holds the chosen response: an NLL term (nll_weight of LeanPO "
    "and SimPO), RRPO's KL, LPOI's anchor. See docs/troubleshooting.md; displacement_warning sets the limit."
)
AT_ZERO = (
    "Step {step}: {term} was below {limit:g} in the last {logs} logs: all pairs are told apart, and what still moves "
    "the model only moves it further away. Answers may be broken at a loss of 0: read some. Lower the learning rate, "
    "stop earlier, or look for what gives the rejected responses away (their length, their style). See "
    "docs/troubleshooting.md."
)


class Alarms(TrainerCallback):
    """Warn on the main process of chosen responses that fall, and of a loss that stays at 0; once a run each.

    A run that is continued reads what was logged before, so it does not repeat them. Every rank has the same logs.
    """

    def __init__(self, limit: float | None):  # nats by which the chosen responses may fall; None: any
        self._limit = limit
        self._logs: list[dict[str, float]] = []  # of training
        self._given: set[str] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        self._logs, self._given = [], set()
        for logs in state.log_history:
            self._new_alarms(logs, 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for message in self._new_alarms(logs or {}, state.global_step):
            logger.warning(message)

    def _new_alarms(self, logs: dict[str, Any], step: int) -> list[str]:
        """Return the messages of alarms that these logs bring for the first time."""
        if "rewards/accuracies" not in logs:  # an evaluation's, or of a loss that a subclass has of its own
            return []
        self._logs.append(logs)
        found = {kind: message for kind in (self._fallen, self._at_zero) if (message := kind(step))}
        new = {kind.__name__: message for kind, message in found.items() if kind.__name__ not in self._given}
        self._given |= set(new)
        return list(new.values())

    def _fallen(self, step: int) -> str | None:
        last, first = self._logs[-LOGS:], self._logs[:LOGS]
        accuracy = sum(logs["rewards/accuracies"] for logs in last) / len(last)
        if "displacement/chosen" in last[-1]:
            start, falls = "under the reference", [-logs["displacement/chosen"] for logs in last]
        else:  # of other rows, so that the least of them has to lie below the least of the first logs
            start, before = "in the first logs", min(logs["logps/chosen"] for logs in first)
            falls = [before - logs["logps/chosen"] for logs in last]
        if self._limit is None or len(last) < LOGS or accuracy <= 0.5 or min(falls) <= self._limit:
            return None
        return FALLEN.format(step=step, fall=min(falls), start=start, accuracy=accuracy)

    def _at_zero(self, step: int) -> str | None:
        term = next((name for name in PREFERENCE if name in self._logs[-1]), None)
        last = [logs.get(term, 1.0) for logs in self._logs[-LOGS:]]
        if len(last) < LOGS or max(last) >= SATURATED:
            return None
        return AT_ZERO.format(step=step, term=term, limit=SATURATED, logs=LOGS)
