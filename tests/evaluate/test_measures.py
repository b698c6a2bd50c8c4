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
from trl_vpo.text.chair import ObjectTable, count_objects
from trl_vpo.text.choices import by_logprob
from trl_vpo.text.yes_no import score_pairs


def values(rows, clusters=None):
    """The figures alone, each row a cluster of its own."""
    count = len(next(iter(rows.values())))
    return {name: found.value for name, found in estimate(rows, clusters or range(count), resamples=10).items()}


@pytest.fixture
def model():
    return PairScores([-6.0, -4.0, -9.0, -5.0], [-8.0, -4.0, -6.0, -20.0], [3, 2, 9, 5], [8, 2, 3, 20])


@pytest.fixture
def base():
    return PairScores([-7.0, -3.0, -8.0, -5.0], [-8.0, -3.0, -3.0, -9.0], [3, 2, 9, 5], [8, 2, 3, 20])


def test_preference_counts_ties_half(model):
    # Sums: win, tie, loss, win. Per token: -2/-1 loss, -2/-2 tie, -1/-2 win, -1/-1 tie.
    assert values(measures.preference(model)) == {
        "preference/accuracy": 2.5 / 4,
        "preference/accuracy_average": 2 / 4,
    }


def test_movement(model, base):
    # Chosen moved by +1, -1, -1, 0; rejected by 0, -1, -3, -11; both fell in the second and third pair.
    rows = measures.movement(model, base)
    np.testing.assert_array_equal(rows["reward/margin"], [1, 0, 2, 11])
    assert values(rows) == {
        "reward/accuracy": 3.5 / 4,
        "reward/margin": 14 / 4,
        "displacement/chosen": -1 / 4,
        "displacement/rejected": -15 / 4,
        "displacement/both_fall": 2 / 4,
    }


def test_a_model_has_not_moved_from_itself(model):
    assert values(measures.movement(model, model)) == {
        "reward/accuracy": 0.5,
        "reward/margin": 0,
        "displacement/chosen": 0,
        "displacement/rejected": 0,
        "displacement/both_fall": 0,
    }


def test_divergence_per_response_and_per_token():
    assert values(measures.divergence([1.0, 5.0], [10, 2])) == {"kl/chosen": 3, "kl/chosen_per_token": 6 / 12}
    assert values(measures.divergence([1.0], [2], side="rejected")).keys() == {
        "kl/rejected",
        "kl/rejected_per_token",
    }


def test_sensitivity():
    rows = measures.sensitivity(
        [-2.0, -6.0, -4.0], {"blank": [-6.0, -6.0, -1.0], "shuffled": [-4.0, -9.0, -8.0]}, [2, 3, 1]
    )
    # Lost per token on a blank: 2, 0 and -3; shuffled: 1, 1 and 4.
    assert values(rows) == pytest.approx(
        {
            "sensitivity/blank": -1 / 3,
            "sensitivity/blank_share": 1 / 3,
            "sensitivity/shuffled": 2,
            "sensitivity/shuffled_share": 1,
        }
    )


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
    found = estimate(measures.visibility(lists), range(5), resamples=10)
    # The fourth list is all ties: no tau, not ordered.
    assert found["visibility/tau"].value == pytest.approx((1 - 1 + 4 / 6 + 2 / math.sqrt(6)) / 4)
    assert found["visibility/tau"].n == 4
    assert found["visibility/ordered"].value == 1 / 5 and found["visibility/ordered"].n == 5


def test_lengths():
    assert values(measures.lengths(["a red dog", "", " one\ntwo  "], [4, 1, 4])) == {
        "length/words": 5 / 3,
        "length/tokens": 3,
    }
    assert measures.lengths(["a"]).keys() == {"length/words"}


def test_yes_no():
    basic = ["Yes.", "Yes", "No", "I cannot tell"]
    hallucinated = ["No.", "Yes", "Yes, yes", "No"]
    # Yes 1, 2, 1, 0 of two; wrong 0, 1, 2, 1, of which "yes" was said twice; one unparsed of eight.
    assert values(measures.yes_no(score_pairs(basic, hallucinated))) == {
        "yes_no/basic": 2 / 4,
        "yes_no/hallucinated": 2 / 4,
        "yes_no/overall": 1 / 4,
        "yes_no/yes_rate": 4 / 8,
        "yes_no/pct_diff": 0,
        "yes_no/fp_ratio": 2 / 4,
        "yes_no/unparsed": 1 / 8,
    }


@pytest.mark.parametrize(("said", "pct_diff", "fp_ratio"), [("yes", 0.5, 1), ("no", -0.5, 0)])
def test_yes_no_bias_of_a_model_that_always_says_the_same(said, pct_diff, fp_ratio):
    found = values(measures.yes_no(score_pairs([said] * 3, [said] * 3)))
    assert found["yes_no/pct_diff"] == pct_diff and found["yes_no/fp_ratio"] == fp_ratio
    assert found["yes_no/overall"] == 0


def test_no_wrong_answer_has_no_fp_ratio():
    found = estimate(measures.yes_no(score_pairs(["yes"], ["no"])), ["video"])["yes_no/fp_ratio"]
    assert math.isnan(found.value) and found.n == 0


def test_choice():
    assert values(measures.choice_letters([True, None, False, True])) == {
        "choice/letter": 2 / 4,
        "choice/unparsed": 1 / 4,
    }
    credits = [by_logprob([-1.0, -2.0], 0), by_logprob([-1.0, -1.0], 0), by_logprob([-1.0, -2.0], 1)]
    assert values(measures.choice_logps(credits)) == {"choice/logp": 0.5}
    assert measures.choice_logps(credits, average=True).keys() == {"choice/logp_average"}


def test_cut_off():
    assert values(measures.cut_off("length", [True, False, True, True])) == {"length/cut_off": 1 / 4}
    assert values(measures.cut_off("yes_no", [[True, True], [False, True]])) == {"yes_no/cut_off": 1 / 4}


def test_chair():
    table = ObjectTable({"dog": [], "cup": [], "person": ["man"]})
    responses = ["a dog and a dog and a man", "a man", "", "nothing here", "a cup"]
    truths = [["person", "cup"], ["person"], ["dog"], [], ["cup", "dog"]]
    counts, _ = count_objects(responses, truths, table)
    found = estimate(measures.chair(counts), range(5), resamples=10)
    # Mentions 3, 1, 0, 0, 1, of which 2 are false, in one response; 3 of 6 true objects are mentioned.
    assert {name: (measure.value, measure.n) for name, measure in found.items()} == {
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
    found = difference(first, second, ["a", "b"], level=0.98)
    assert found["mean"] == Measure(0.5, 0.0, 1.0, 2)
    assert found["ratio"].value == 0 and found["ratio"].n == 2
    with pytest.raises(ValueError, match=r"only one side has \['ratio'\]"):
        difference(first, {"mean": [1.0, 1.0]}, ["a", "b"])


def test_errors_say_which_measure_and_row(model):
    with pytest.raises(ValueError, match="length/words: row 1 holds"):
        estimate({"length/words": [1.0, math.nan]}, "ab")
    with pytest.raises(ValueError, match="row 1 has chosen -inf"):
        PairScores([-1.0, -math.inf], [-1.0, -1.0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match=r"row 0 has rejected_tokens 0\.0"):
        PairScores([-1.0], [-1.0], [1], [0])
    with pytest.raises(ValueError, match=r"'chosen': 2, 'rejected': 1"):
        PairScores([-1.0, -1.0], [-1.0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="'model': 4, 'base': 1"):
        measures.movement(model, PairScores([-1.0], [-1.0], [1], [1]))
    with pytest.raises(ValueError, match="row 0 has damaged nan"):
        measures.sensitivity([-1.0], {"blank": [math.nan]}, [1])
    with pytest.raises(ValueError, match="list 1 is"):
        measures.visibility([[-1.0, -2.0], [-1.0]])


def test_the_table_names_every_measure(model, base):
    named = set(re.findall(r"`([a-z_]+/[a-z_<>]+)`", measures.__doc__))
    made = measures.preference(model) | measures.movement(model, base) | measures.divergence([1.0], [1])
    made |= measures.sensitivity([-1.0], {"<damage>": [-1.0]}, [1]) | measures.visibility([[-1.0, -2.0]])
    made |= measures.lengths(["a"], [1]) | measures.yes_no(score_pairs(["yes"], ["no"]))
    made |= measures.choice_letters([True]) | measures.choice_logps([1.0]) | measures.choice_logps([1.0], average=True)
    for name in ("length", "yes_no", "choice"):
        made |= measures.cut_off(name, [True])
    made |= measures.chair(count_objects(["a"], [[]], ObjectTable({"dog": []}))[0])
    assert named - {"kl/<side>"} == set(made)


def test_scorers_import_without_torch():
    code = "import sys, trl_vpo.evaluate.measures, trl_vpo.text.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
