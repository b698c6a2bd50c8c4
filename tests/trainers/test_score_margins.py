"""A beta for each pair from the margin of its scores, in every method that takes them."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import IterableDataset
from trainer_kit import collated, config, shake, text_rows, trainer_of

from trl_vpo.errors import RowError

MARGINS = (3.0, 0.0, -2.0, 0.5)
SCORED = ("leanpo", "dpo")


def scored(kind="score", rows=4):
    more = [{f"chosen_{kind}": 1.0 + d, f"rejected_{kind}": 1} for d in MARGINS]
    return [r | m for r, m in zip(text_rows(rows), more)]


@pytest.mark.parametrize("kind", ["score", "trust"])
@pytest.mark.parametrize("method", SCORED)
def test_each_pair_has_the_loss_of_its_own_beta(method, kind, tmp_path):
    """Row by row, with that beta for all: the slow way. The rewards keep the beta of the config."""
    options = {"score_scale_weight": 0.8, "score_sensitivity": 2.0, "score_columns": kind}
    trainer = trainer_of(method, tmp_path, scored(kind), **options)
    shake(trainer.model)
    batch = collated(trainer)
    scores = trainer.concatenated_forward(trainer.model, batch)
    reference = trainer.reference_scores(batch) if trainer.needs_reference else None
    got, base = trainer.preference_loss(scores, reference, batch), trainer.beta
    betas = [base * (1 + 0.8 * (1 - math.exp(-2.0 * max(0.0, d)))) for d in MARGINS]
    assert got.terms["beta"].tolist() == pytest.approx(betas)
    plain = trainer_of(method, tmp_path, scored(kind))
    assert "score_margins" not in collated(plain)
    for i, beta in enumerate(betas):
        plain.beta = beta
        want = plain.preference_loss(scores, reference, batch)
        torch.testing.assert_close(got.losses[i], want.losses[i])
        torch.testing.assert_close(got.chosen_rewards[i] / base, want.chosen_rewards[i] / beta)
    assert "beta" not in want.terms


@pytest.mark.parametrize("method", SCORED)
def test_the_mean_beta_is_logged(method, tmp_path):
    trainer = trainer_of(method, tmp_path, scored(), score_scale_weight=0.5, max_steps=2)
    trainer.train()
    betas = [trainer.beta * (1 + 0.5 * (1 - math.exp(-0.5 * max(0.0, d)))) for d in MARGINS]
    logged = [entry["loss/beta"] for entry in trainer.state.log_history if "loss/beta" in entry]
    assert sum(logged) / 2 == pytest.approx(sum(betas) / 4)  # two steps of two rows


BAD = [({"rejected_score": None}, "`rejected_score` is None"), ({"chosen_score": math.inf}, "`chosen_score` is inf")]
BAD += [({"chosen_score": 1e39}, "`chosen_score` is 1e\\+39")]  # infinite in float32


@pytest.mark.parametrize(("change", "says"), BAD)
@pytest.mark.parametrize("method", SCORED)
def test_a_row_without_scores_is_named_before_any_step(method, change, says, tmp_path):
    rows = scored()
    rows[2] |= change
    with pytest.raises(RowError, match=rf"1 of 4 train rows .*\s.*row 2 \(id 't2'\): {says}, but score_scale_weight"):
        trainer_of(method, tmp_path, rows, score_scale_weight=0.5)
    trainer_of(method, tmp_path, rows)  # nobody asks for them
    stream = IterableDataset.from_generator(lambda: iter(rows[2:] + rows[:2]))
    with pytest.raises(RowError, match="`chosen_trust` is None"):
        trainer_of(method, tmp_path, stream, score_scale_weight=0.5, score_columns="trust", max_steps=1)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"score_scale_weight": -0.1}, "score_scale_weight is -0.1"),
        ({"score_sensitivity": math.nan}, "score_sensitivity is nan"),
        ({"score_sensitivity": 2.0}, "do nothing without score_scale_weight"),
        ({"score_columns": "trust"}, "do nothing without score_scale_weight"),
        ({"score_columns": "reward"}, "'reward' is not one of score, trust"),
    ],
)
def test_options_that_have_no_meaning(option, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        config("leanpo", tmp_path, **option)
    with pytest.raises(ValueError, match="loss_type aot sorts the pairs"):
        config("dpo", tmp_path, loss_type=["aot"], score_scale_weight=0.5)


def test_padding_and_proof_rows_need_no_scores(tmp_path):
    """Rows that the package makes itself have none."""
    trainer = trainer_of("leanpo", tmp_path, scored(), score_scale_weight=0.5, layout="auto", proves=True)
    assert trainer._padding_rows(None)["names"] == ["row (id 'padding')"]
    trainer.train()
    assert trainer.scorer.proven
    assert replace(trainer.data_collator, scores=None).encode(text_rows(1)[0]).score_margin is None
