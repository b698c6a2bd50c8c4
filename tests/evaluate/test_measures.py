"""Every measure on rows small enough to count by hand."""

import math
import re
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest

from trl_vpo.evaluate import measures
from trl_vpo.evaluate.measures import Measure, PairScores, difference, estimate
from trl_vpo.text.chair import ObjectTable, read_response
from trl_vpo.text.choices import by_logprob


def values(rows, clusters=None):
    """The figures alone, each row a cluster of its own."""
    count = len(next(iter(rows.values())))
    return {name: figures.value for name, figures in estimate(rows, clusters or range(count), resamples=10).items()}


def scores(chosen, rejected) -> PairScores:
    return PairScores(*map(np.array, (chosen, rejected, [3, 2, 9, 5], [8, 2, 3, 20])))


MODEL = scores([-6.0, -4.0, -9.0, -5.0], [-8.0, -4.0, -6.0, -20.0])
BASE = scores([-7.0, -3.0, -8.0, -5.0], [-8.0, -3.0, -3.0, -9.0])


def test_preference_counts_ties_half():
    # Sums: win, tie, loss, win. Per token: -2/-1 loss, -2/-2 tie, -1/-2 win, -1/-1 tie.
    expected = {"preference/accuracy": 2.5 / 4, "preference/accuracy_average": 2 / 4}
    assert values(measures.preference(MODEL)) == expected


def test_movement():
    # Chosen moved by +1, -1, -1, 0; rejected by 0, -1, -3, -11; both fell in the second and third pair.
    rows = measures.movement(MODEL, BASE)
    np.testing.assert_array_equal(rows["reward/margin"], [1, 0, 2, 11])
    names = ("reward/accuracy", "reward/margin", *(f"displacement/{x}" for x in ("chosen", "rejected", "both_fall")))
    assert values(rows) == dict(zip(names, (3.5 / 4, 14 / 4, -1 / 4, -15 / 4, 2 / 4)))
    assert values(measures.movement(MODEL, MODEL)) == dict(zip(names, (0.5, 0, 0, 0, 0)))


def test_divergence_per_response_and_per_token():
    assert values(measures.divergence([1.0, 5.0], [10, 2])) == {"kl/chosen": 3, "kl/chosen_per_token": 6 / 12}


def test_sensitivity():
    clean, tokens = np.array([-2.0, -6.0, -4.0]), np.array([2, 3, 1])
    # Lost per token on a blank: 2, 0 and -3; shuffled: 1, 1 and 4.
    for damage, damaged, mean, share in (
        ("blank", [-6.0, -6.0, -1.0], -1 / 3, 1 / 3),
        ("shuffled", [-4.0, -9.0, -8.0], 2, 1),
    ):
        rows = measures.sensitivity(damage, clean, np.array(damaged), tokens)
        expected = {f"sensitivity/{damage}": mean, f"sensitivity/{damage}_share": share}
        assert values(rows) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),  # 5 pairs agree, 1 does not
        ([1, 2, 3], [1, 1, 2], 2 / math.sqrt(3 * 2)),  # 2 agree, 1 is tied on the right
        ([1, 1, 2], [1, 1, 2], 1),
        ([1, 2, 3], [5, 5, 5], math.nan),
        ([1], [1], math.nan),
    ],
)
def test_kendall_tau(first, second, tau):
    assert measures.kendall_tau(first, second) == pytest.approx(tau, nan_ok=True)
    assert measures.kendall_tau(second, first) == pytest.approx(tau, nan_ok=True)


def test_kendall_tau_of_all_orders_is_symmetric_around_zero():
    taus = [measures.kendall_tau(range(5), order) for order in permutations(range(5))]
    assert np.mean(taus) == pytest.approx(0) and sorted(taus)[0] == -1 and taus.count(1.0) == 1
    # Variance without ties: 2 (2K + 5) / (9 K (K - 1)).
    assert np.var(taus) == pytest.approx(2 * 15 / (9 * 5 * 4))


def test_visibility():
    lists = [[-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0], [-1.0, -3.0, -2.0, -4.0], [-1.0, -1.0], [-1.0, -1.0, -2.0]]
    figures = estimate(measures.visibility(lists), range(5), resamples=10)
    # The fourth list is all ties: no tau, not ordered.
    assert figures["visibility/tau"].value == pytest.approx((1 - 1 + 4 / 6 + 2 / math.sqrt(6)) / 4)
    assert figures["visibility/tau"].n == 4
    assert figures["visibility/ordered"].value == 1 / 5 and figures["visibility/ordered"].n == 5


def test_lengths():
    assert values(measures.lengths(["a red dog", "", " one\ntwo  "], [4, 1, 4])) == {
        "length/words": 5 / 3,
        "length/tokens": 3,
    }


def test_yes_no():
    basic, hallucinated = ["yes", "yes", "no", None], ["no", "yes", "yes", "no"]
    # Yes 1, 2, 1, 0 of two; wrong 0, 1, 2, 1, of which "yes" was said twice; one unparsed of eight.
    assert values(measures.yes_no(basic, hallucinated)) == {
        "yes_no/basic": 2 / 4,
        "yes_no/hallucinated": 2 / 4,
        "yes_no/overall": 1 / 4,
        "yes_no/yes_rate": 4 / 8,
        "yes_no/pct_diff": 0,
        "yes_no/fp_ratio": 2 / 4,
        "yes_no/unparsed": 1 / 8,
    }


@pytest.mark.parametrize(("answer", "pct_diff", "fp_ratio"), [("yes", 0.5, 1), ("no", -0.5, 0)])
def test_yes_no_bias_of_a_model_that_says_one_word(answer, pct_diff, fp_ratio):
    biased = values(measures.yes_no([answer] * 3, [answer] * 3))
    assert (biased["yes_no/pct_diff"], biased["yes_no/fp_ratio"], biased["yes_no/overall"]) == (pct_diff, fp_ratio, 0)


def test_no_wrong_answer_has_no_fp_ratio():
    figures = estimate(measures.yes_no(["yes"], ["no"]), ["video"])["yes_no/fp_ratio"]
    assert math.isnan(figures.value) and figures.n == 0


def test_choice():
    assert values(measures.choice_letters([True, None, False, True])) == {
        "choice/letter": 2 / 4,
        "choice/unparsed": 1 / 4,
    }
    credits = [by_logprob([-1.0, -2.0], 0), by_logprob([-1.0, -1.0], 0), by_logprob([-1.0, -2.0], 1)]
    assert values(measures.choice_logps(credits, [1, 1, 0])) == {"choice/logp": 0.5, "choice/logp_average": 2 / 3}


def test_cut_off():
    assert values(measures.cut_off("length", [True, False, True, True])) == {"length/cut_off": 1 / 4}
    assert values(measures.cut_off("yes_no", [[True, True], [False, True]])) == {"yes_no/cut_off": 1 / 4}


def test_chair():
    table = ObjectTable({"dog": [], "cup": [], "person": ["man"]})
    responses = ["a dog and a dog and a man", "a man", "", "nothing here", "a cup"]
    truths = [["person", "cup"], ["person"], ["dog"], [], ["cup", "dog"]]
    objects = [read_response(response, truth, table) for response, truth in zip(responses, truths)]
    figures = estimate(measures.chair(objects), range(5), resamples=10)
    # Mentions 3, 1, 0, 0, 1, of which 2 are false, in one response; 3 of 6 true objects are mentioned.
    assert {name: (measure.value, measure.n) for name, measure in figures.items()} == {
        "chair/i": (2 / 5, 3),
        "chair/s": (1 / 5, 5),
        "chair/s_mentioning": (1 / 3, 3),
        "chair/cover": (3 / 6, 4),
    }


def test_estimate_passes_clusters_and_settings_on():
    rows = {"length/words": np.array([1.0, 2.0, 0.0])}
    assert estimate(rows, ["a", "a", "b"], level=0.98) == {"length/words": Measure(1.0, 0.0, 1.5, 3)}
    assert math.isnan(estimate(rows, ["a", "a", "a"])["length/words"].low)


def test_difference():
    first = {"mean": [0.0, 1.0], "ratio": [(1, 2), (0, 0)]}
    second = {"mean": [1.0, 1.0], "ratio": [(2, 2), (0, 2)]}
    figures = difference(first, second, ["a", "b"], level=0.98)
    assert figures["mean"] == Measure(0.5, 0.0, 1.0, 2)
    assert figures["ratio"].value == 0 and figures["ratio"].n == 2
    with pytest.raises(ValueError, match=r"only one side has \['ratio'\]"):
        difference(first, {"mean": [1.0, 1.0]}, ["a", "b"])


def test_errors_name_the_measure_and_the_row():
    with pytest.raises(ValueError, match="length/words: row 1 holds"):
        estimate({"length/words": [1.0, math.nan]}, "ab")


def test_the_table_names_every_measure():
    named = set(re.findall(r"`([a-z_]+/[a-z_<>]+)`", measures.__doc__))
    rows = measures.preference(MODEL) | measures.movement(MODEL, BASE) | measures.divergence([1.0], [1])
    rows |= measures.sensitivity("<damage>", *np.ones((3, 1))) | measures.visibility([[-1.0, -2.0]])
    rows |= measures.lengths(["a"], [1]) | measures.yes_no(["yes"], ["no"])
    rows |= measures.choice_letters([True]) | measures.choice_logps([1.0], [1.0])
    for name in ("length", "yes_no", "choice"):
        rows |= measures.cut_off(name, [True])
    rows |= measures.chair([read_response("a", [], ObjectTable({"dog": []}))])
    assert named == set(rows)


def test_scorers_import_without_torch():
    code = "import sys, trl_vpo.evaluate.measures, trl_vpo.text.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
