"""Numbers of a row: its weight in the loss, the margin of its scores, and whether both its responses fell."""

from typing import Any

from trl_vpo.errors import RowError

LARGEST = 1e38


def row_weight(example: dict) -> float:
    """Return the weight of a row's loss; 1 where it has none."""
    weight = example.get("weight")
    if weight is None:
        return 1.0
    if not _finite(weight) or weight < 0:
        raise RowError(
            f"`weight` is {weight!r:.80}, but it multiplies the row's loss: give a finite number of at least 0 (1 is "
            "that of a row without a weight), or rename the column if it means something else."
        )
    return float(weight)


def score_margin(example: dict, kind: str) -> float:
    """Return the score of the chosen response minus that of the rejected one; `kind`: "score" or "trust"."""
    scores = {name: example.get(name) for name in (f"chosen_{kind}", f"rejected_{kind}")}
    for name, score in scores.items():
        if not _finite(score):
            raise RowError(
                f"`{name}` is {score!r:.80}, but score_scale_weight scales beta by the margin of the two scores: give "
                "a finite number, name the columns that the rows have (score_columns), or set score_scale_weight to 0."
            )
    chosen, rejected = scores.values()
    return float(chosen - rejected)


def both_fall(chosen: Any, rejected: Any) -> Any:
    """Return whether both responses lost log-prob, (B,) of what they gained in nats: more than rounding makes."""
    return (chosen < -0.1) & (rejected < -0.1)


def _finite(value: Any) -> bool:
    """Return whether a value is a number, of which a difference is finite in float32, too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
