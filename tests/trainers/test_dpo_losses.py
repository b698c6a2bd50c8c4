"""The losses of the DPO family against `trl.DPOTrainer`, in sums, on videos; what is refused."""

import pytest
import torch
import trl
from helpers import row, write_clip
from parity_kit import batch, pair
from step_kit import assert_same_gradients, gradients
from trainer_kit import PAIRS, collated, config, shake, text_rows, trainer_of

from trl_vpo.losses.dpo_sum import LOSS_TYPES
from trl_vpo.losses.dpo_variants import DIVERGENCES

DEFAULTS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "use_weighting": False,
    "discopop_tau": 0.05,
}
SMOOTHED = {"exo_pair": 0.001, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.2}
THEIRS = [name for name in LOSS_TYPES if name != "dpop"]
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
VARIANTS = {
    **{name: {"loss_type": [name], "label_smoothing": SMOOTHED.get(name, 0.0)} for name in THEIRS},
    "robust, smoother": {"loss_type": ["robust"], "label_smoothing": 0.3},
    "discopop, warm": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "MPO": MPO,
    "two, no weights": {"loss_type": ["hinge", "apo_zero"]},
    **{f"ld {name}": {"loss_type": [name], "ld_alpha": 0.3} for name in ("sigmoid", "ipo", "aot")},
    "ld, sft": {"loss_type": ["apo_down", "sft"], "ld_alpha": 0.0},
    **{f"wpo {name}": {"loss_type": [name], "use_weighting": True} for name in ("sigmoid", "ipo", "bco_pair")},
    "wpo, two": {"loss_type": ["sigmoid", "nca_pair"], "loss_weights": [0.5, 2.0], "use_weighting": True},
    "js": {"f_divergence_type": "js_divergence"},
    "forward": {"f_divergence_type": "forward_kl", "loss_type": ["hinge", "sigmoid_norm"]},
    "forward, ipo": {"f_divergence_type": "forward_kl", "loss_type": ["ipo"]},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "alpha, ld": {"f_divergence_type": "alpha_divergence", "ld_alpha": 0.5},
}
LOGPS = {"logps/chosen", "logps/rejected"}
COMPARED = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")} | LOGPS | {"entropy"}


def settle(ours, theirs, options):
    """Let both trainers have these options."""
    for name, value in (DEFAULTS | options).items():
        setattr(ours.args, name, value)
        setattr(theirs.args, name, value)
        setattr(theirs, {"loss_type": "loss_types"}.get(name, name), value)
    theirs.loss_weights = theirs.loss_weights or [1.0] * len(theirs.loss_types)


@pytest.mark.parametrize("kind", ["messages", "Qwen2-VL"])
def test_same_as_trl(kind, images, tmp_path):
    """Loss, gradients and metrics of every type, and of all that modifies them."""
    more = {"per_device_eval_batch_size": 4, "use_weighting": True, "beta": 0.7}
    ours, theirs = pair(kind, images, tmp_path, layout="shared", **more)
    batches = [batch(trainer) for trainer in (ours, theirs)]
    for name, options in VARIANTS.items():
        settle(ours, theirs, options)
        got, want = (t.compute_loss(t.model, b) for t, b in zip((ours, theirs), batches))
        # What float32 leaves of a difference of sums: squared (SPPO, IPO), or divided by DiscoPOP's small tau.
        rtol = 1e-3 if "discopop" in name else 1e-4
        torch.testing.assert_close(got, want, rtol=rtol / 2, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert_same_gradients(gradients(ours, got), gradients(theirs, want), rtol, of=name)
        logged, metrics = ours._averages("train"), theirs._metrics["train"]
        for key in COMPARED - (LOGPS if "ld_alpha" in options else set()):
            assert logged[key] == pytest.approx(metrics[key][-1], rel=1e-5, abs=5e-5), (name, key)
        assert {key for key in logged if key.startswith("loss/")} == {f"loss/{t}" for t in ours.args.loss_type}


def test_every_type_and_divergence_is_compared():
    theirs = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(theirs.split("`'")[1:]) and all(f"`'{name}'`" in theirs for name in THEIRS)
    assert theirs.count("`'") == len(THEIRS), "TRL has another loss type"
    assert {options.get("f_divergence_type", "reverse_kl") for options in VARIANTS.values()} == set(DIVERGENCES)


def clips(tmp_path, n):
    """Rows with clips and weights of their own, and one without any clip."""
    paths = [write_clip(tmp_path / f"{i}.mp4", seed=i) for i in range(n)]
    rows = [{**row("video", [path], *PAIRS[i]), "id": f"v{i}", "weight": 2.0 - i} for i, path in enumerate(paths)]
    return [*rows, {**text_rows(1, start=n)[0], "videos": [], "weight": 0.5}]


def test_a_sum_of_losses_on_videos(tmp_path):
    """A step and an evaluation, however they are cut: the loss is that of all rows in one batch, with their weights,
    and the NLL is a mean over all tokens of the step, and of the evaluation."""
    types, weights = ["sigmoid", "bco_pair", "dpop", "nca_pair", "sft"], [0.8, 0.2, 0.3, 0.1, 1.5]
    rows, logs = clips(tmp_path, 3), []
    for size, steps in ((4, 1), (1, 4)):
        trainer = trainer_of(
            *("dpo", tmp_path / "out", rows),
            **{"name": "Qwen2-VL", "layout": "shared", "num_frames": 4, "max_steps": 1, "seed": 1},
            **{"per_device_train_batch_size": size, "gradient_accumulation_steps": steps},
            **{"per_device_eval_batch_size": size, "loss_type": types, "loss_weights": weights, "penalty_weight": 2.0},
        )
        shake(trainer.model)
        whole = collated(trainer)
        with torch.no_grad():
            scores = trainer.concatenated_forward(trainer.model, whole)
            out = trainer.preference_loss(scores, trainer.reference_scores(whole), whole)
        want = (torch.tensor([2.0, 1.0, 0.0, 0.5]) * out.losses).mean().item()
        nll = -(scores.sums[scores.chosen].sum() / scores.mask[scores.chosen].sum()).item()
        evaluated = trainer.evaluate(trainer.train_dataset)
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        for prefix, entry in (("", logged), ("eval_", evaluated)):
            assert entry[f"{prefix}loss/sft"] == pytest.approx(nll, rel=1e-5)
            assert entry[f"{prefix}loss"] == pytest.approx(want, rel=1e-5)
            for name in types[:-1]:
                assert entry[f"{prefix}loss/{name}"] == pytest.approx(out.terms[name].mean().item(), rel=1e-5), name
        logs.append(logged)
    assert set(logs[0]) == set(logs[1])
    for key, want in logs[0].items():
        assert logs[1][key] == pytest.approx(want, rel=1e-5, abs=1e-5), key


def test_rows_with_weights_are_not_sorted(tmp_path):
    rows = [{**r, "weight": 1.0 + (i == 2)} for i, r in enumerate(text_rows(3))]
    trainer = trainer_of("dpo", tmp_path, rows, loss_type=["sigmoid", "aot"])
    with pytest.raises(ValueError, match=r"the `weight` of a row would be another row's.*t2"):
        trainer.compute_loss(trainer.model, collated(trainer))


def test_sums_of_the_reference_are_enough(tmp_path):
    """Precomputed, for several types and another divergence: the same loss as with a pass of the reference."""
    more = {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "ipo", "robust"], "label_smoothing": 0.2}
    losses = []
    for precompute in (True, False):
        trainer = trainer_of("dpo", tmp_path, text_rows(3), precompute_ref_log_probs=precompute, **more)
        shake(trainer.model)
        losses.append(trainer.compute_loss(trainer.model, collated(trainer)))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_type": ["sigmoid", "ippo"]}, "loss_type has 'ippo': give some of sigmoid, hinge, ipo,"),
        ({"loss_type": ["ipo", "ipo"]}, "loss_type has 'ipo': give some of .*, each once"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "Got 1 weights for 2 loss types"),
        (
            {"label_smoothing": 0.1},
            "label_smoothing=0.1 does nothing with loss_type sigmoid: it belongs to exo_pair, ",
        ),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 does nothing with loss_type sigmoid: it belongs to discopop"),
        ({"penalty_weight": 5.0}, "penalty_weight=5.0 does nothing with loss_type sigmoid: it belongs to dpop"),
        ({"loss_type": "dpop", "penalty_weight": -5.0}, "penalty_weight is -5.0: give at least 0"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0.0: give a number above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "loss_type 'robust' needs it below 0.5"),
        ({"loss_type": "aot", "label_smoothing": 1.0}, "label_smoothing is 1.0: give at least 0 and below 1"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0, -0.5]}, "loss_weights is .*-0.5.: give at least 0"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [0.0, 0.0]}, "trains nothing: give a weight above 0"),
        ({"loss_type": "exo_pair"}, "infinite without smoothing. Set label_smoothing: 0.001"),
        ({"f_divergence_type": "kl"}, "'kl' is not one of reverse_kl, forward_kl"),
        ({"f_alpha_divergence_coef": 0.3}, "does nothing with f_divergence_type='reverse_kl'"),
        (
            {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "bco_pair"]},
            "no meaning for loss_type 'bco_pair'.* or use sigmoid, hinge, ipo, exo_pair, robust, discopop, sft, sig",
        ),
        ({"ld_alpha": 1.5}, r"ld_alpha=1.5 is not in \[0, 1\]"),
        ({"ld_alpha": 0.5, "precompute_ref_log_probs": True}, "sums over whole responses. Set precompute_ref_log_pro"),
        ({"use_weighting": True, "loss_type": ["aot"]}, "'aot' sorts the pairs"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, "'sft' is a mean over tokens"),
    ],
)
def test_options_that_do_not_fit(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config("dpo", tmp_path, **values)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_type_is_taken_alone(name, tmp_path):
    assert config("dpo", tmp_path, loss_type=name, label_smoothing=SMOOTHED.get(name, 0.0)).loss_type == [name]
