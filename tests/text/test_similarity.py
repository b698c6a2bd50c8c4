"""Trustworthiness: words, ROUGE-L F1, right answers and correlations, against values worked out by hand."""

import numpy as np
import pytest

from trl_vpo.text.similarity import (
    common_subsequence,
    pair_figures,
    pearson,
    right,
    similarity,
    spearman,
    trust_margin,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red Square!", ["a", "red", "square"]),
        ("  left-hand,\nisn’t  3.5 m ", ["left", "hand", "isn't", "3.5", "m"]),
        ("Ｆｕｌｌ ３ ﬁne Straße", ["full", "3", "fine", "strasse"]),
        ("e\u0301t\u00e9", ["\u00e9t\u00e9"]),  # composed or not, one word
        ("红色 cat 向左。", ["红", "色", "cat", "向", "左"]),
        ("-5 % 👍 ...", ["5"]),
        ("?! 👍", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("a red square moves left.", "A red square moves left", 1.0),
        ("a red square moves left.", "a blue square moves up.", 0.6),  # a, square, moves: 2 * 3 / (5 + 5)
        ("red", "a red square moves left.", 1 / 3),  # 2 * 1 / (1 + 5)
        ("left right", "right left", 0.5),  # order counts: 2 * 1 / (2 + 2)
        ("红色方块向左", "蓝色方块向左", 5 / 6),  # characters: 2 * 5 / (6 + 6)
        ("", "no", 0.0),
        ("👍", " 👍", 1.0),
        ("👍", "👎", 0.0),
    ],
)
def test_similarity(answer, truth, expected):
    assert similarity(answer, truth) == pytest.approx(expected)
    assert similarity(truth, answer) == similarity(answer, truth)


def test_the_common_subsequence_agrees_with_the_textbook_table():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ([str(word) for word in rng.integers(0, 4, rng.integers(0, 90))] for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, left in enumerate(a):
            for j, other in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if left == other else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(a, b) == table[-1, -1]


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Red.", "red", True),
        ("It is red.", "red", False),  # it could go on to say "... and not blue"
        ("not red", "red", False),
        ("", "red", False),
        ("👍", "👎", False),
        ("👍 ", "👍", True),
    ],
)
def test_right(answer, truth, expected):
    assert right(answer, truth) is expected


def test_correlations_worked_out_by_hand():
    assert pearson([0, 1, 2], [0, 1, 4]) == pytest.approx(4 / (2 * 78 / 9) ** 0.5)
    assert spearman([0, 1, 2], [0, 1, 4]) == pytest.approx(1.0)
    assert spearman([10, 20, 30, 40], [-4, -2, -3, -1]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # ranks 1, 2.5, 2.5, 4
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


@pytest.mark.parametrize("correlation", [pearson, spearman])
@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1, 2], [1, 2]), ([0.1, 0.1, 0.1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5])]
)
def test_too_few_points_or_none_that_vary_have_no_correlation(correlation, x, y):
    assert correlation(x, y) is None


def pair(chosen_trust, rejected_trust, plain_right, rewards=(), **more):
    more |= dict(zip(("chosen_reward", "rejected_reward", "answer_reward"), rewards))
    rights = {"chosen_right": chosen_trust == 1, "rejected_right": rejected_trust == 1, "plain_right": plain_right}
    return {"chosen_trust": chosen_trust, "rejected_trust": rejected_trust} | rights | more


def test_figures_of_pairs():
    pairs = [
        pair(1.0, 0.25, True, (-1.0, -2.0, -0.5)),
        pair(1.0, 0.75, False, (-3.0, -1.5, -1.0)),
        pair(0.5, 0.0, False, (-2.0, -4.0, -1.5), plain_failure="empty"),
        pair(1.0, 1.0, True),  # identical responses: not scored
    ]
    figures = pair_figures(pairs, plain=True, rewards=True)
    trusts, rewards = [1.0, 0.25, 1.0, 0.75, 0.5, 0.0], [-1.0, -2.0, -3.0, -1.5, -2.0, -4.0]
    # ranks of trusts: 5.5, 2, 5.5, 4, 3, 1; of rewards: 6, 3.5, 2, 5, 3.5, 1; products of their distances from 3.5:
    # 2 * 2.5, -1.5 * 0, 2 * -1.5, 0.5 * 1.5, -0.5 * 0, -2.5 * -2.5 = 9; squares: 17 and 17
    assert figures == pytest.approx(
        {
            "pairs": 4,
            "chosen_right": 0.75,
            "rejected_right": 0.25,
            "plain_right": 0.5,
            "plain_failures": 1,
            "chosen_trust": 0.875,
            "rejected_trust": 0.5,
            "chosen_reward": -2.0,
            "rejected_reward": -2.5,
            "answer_reward": -1.0,
            "reward_accuracy": 2 / 3,
            "reward_trust_pearson": float(np.corrcoef(rewards, trusts)[0, 1]),
            "reward_trust_spearman": 9 / 17,
        }
    )
    assert trust_margin(pairs[0]) == 0.75
    without = pair_figures(pairs, plain=False, rewards=False)
    assert set(without) == {"pairs", "chosen_right", "rejected_right", "chosen_trust", "rejected_trust"}
