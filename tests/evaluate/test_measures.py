"""Every measure on rows small enough to count by hand."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_vpo.evaluate.intervals import Interval
from trl_vpo.evaluate.measures import difference, estimate, evidence
from trl_vpo.evaluate.questions import read, read_rating
from trl_vpo.text.chair import ObjectTable

TABLE = ObjectTable({"dog": [], "cup": [], "person": ["man"]})
TOKENS, REJECTED_TOKENS = (3, 2, 9, 5), (8, 2, 3, 20)


def pairs(chosen, rejected, **more) -> list[dict]:
    """Records of preference rows; `more` has further columns."""
    columns = {"chosen_logp": chosen, "rejected_logp": rejected, "chosen_tokens": TOKENS, **more}
    columns |= {"rejected_tokens": REJECTED_TOKENS, "chosen_kl": more.get("chosen_kl", [0.0] * 4)}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return [{"task": "preference", "cluster": str(i), **row} for i, row in enumerate(rows)]


def answered(task, responses, ended=(), **columns) -> list[dict]:
    ended = ended or [True] * len(responses)
    columns |= {"response": responses, "response_ended": ended, "response_tokens": [len(r) for r in responses]}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]
    return [read({"task": task, "cluster": str(i), **row}, table=TABLE) for i, row in enumerate(rows)]


def questions(basic, hallucinated, ended=()) -> list[dict]:
    texts = [text for pair in zip(basic, hallucinated) for text in pair]
    expected, names = ["yes", "no"] * len(basic), [str(i // 2) for i in range(len(texts))]
    return answered("yes_no", texts, ended, expected=expected, pair=names)


MODEL = pairs([-6.0, -4.0, -9.0, -5.0], [-8.0, -4.0, -6.0, -20.0], chosen_kl=[1.0, 5.0, 2.0, 0.0])
BASE = pairs([-7.0, -3.0, -8.0, -5.0], [-8.0, -3.0, -3.0, -9.0])
ANSWER_ROWS = [
    *answered("choice", ["A", "hmm", "B", "A"], [True, True, True, False], expected=["A", "A", "A", "A"],
              options=[["x", "y"]] * 4, option_logps=[[-1.0, -2.0], [-1.0, -1.0], [-2.0, -1.0], [-3.0, -2.0]],
              option_tokens=[[1, 1], [1, 2], [2, 1], [3, 1]]),
    *answered("chair", ["a dog and a dog and a man", "a man", "", "nothing here", "a cup"], [True] * 4 + [False],
              objects=[["person", "cup"], ["person"], ["dog"], [], ["cup", "dog"]]),
    *questions(["Yes.", "Yes", "No", "I cannot tell"], ["No.", "Yes", "Yes, yes", "No"], [True] * 6 + [False, True]),
]  # fmt: skip


def single(said, expected, **columns) -> list[dict]:
    """Records of yes/no rows without a pair: responses as words, their right answers, and further columns."""
    return answered("yes_no", list(said), expected=list(expected), **columns)


def figures(records, base=None) -> dict[str, tuple[float, int]]:
    """The figures and numbers of rows of all measures."""
    kinds = evidence(records, base or records).values()
    return {
        name: (measure.value, measure.n)
        for rows, clusters in kinds
        for name, measure in estimate(rows, clusters, resamples=10).items()
    }


def of_room(room, records, base=None) -> dict[str, float]:
    values = {name: value for name, (value, _) in figures(records, base).items()}
    return {name.removeprefix(f"{room}/"): value for name, value in values.items() if name.startswith(f"{room}/")}


def test_preference_counts_ties_half():
    # Sums: win, tie, loss, win. Per token: -2/-1 loss, -2/-2 tie, -1/-2 win, -1/-1 tie.
    assert of_room("preference", MODEL) == {"accuracy": 2.5 / 4, "accuracy_average": 2 / 4}


def test_movement_and_divergence():
    # Chosen moved by +1, -1, -1, 0; rejected by 0, -1, -3, -11; both fell in the second and third pair.
    assert of_room("reward", MODEL, BASE) == {"accuracy": 3.5 / 4, "margin": 14 / 4}
    assert of_room("displacement", MODEL, BASE) == {"chosen": -1 / 4, "rejected": -15 / 4, "both_fall": 2 / 4}
    near = pairs([-6.05, -4.2, -9.05, -5.2], [-8.2, -4.2, -6.05, -20.05])  # less than 0.1 nat is rounding
    assert of_room("displacement", near, MODEL)["both_fall"] == 1 / 4
    assert of_room("kl", MODEL, BASE) == {"chosen": 8 / 4, "chosen_per_token": 8 / 19}
    assert of_room("reward", MODEL) == {"accuracy": 0.5, "margin": 0}
    assert not set(of_room("displacement", MODEL).values()) - {0}


def test_sensitivity():
    # Lost per token on a blank: 0, 2, -1; shuffled: 1 and 4. Not every row can be shuffled.
    damaged = [{"blank": -6.0, "shuffled": -9.0}, {"blank": -8.0}, {"blank": 0.0}, {"shuffled": -25.0}]
    records = pairs([-6.0, -4.0, -9.0, -5.0], [0.0] * 4, damaged_logps=damaged)
    assert of_room("sensitivity", records) == pytest.approx(
        {"blank": 1 / 3, "blank_share": 1 / 3, "shuffled": 2.5, "shuffled_share": 1}
    )


def test_visibility():
    lists = [[-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0], [-1.0, -3.0, -2.0, -4.0], [-1.0, -1.0]]
    values = figures(pairs([0.0] * 4, [0.0] * 4, image_logps=lists))
    # Of the third list 5 pairs agree and 1 does not. The fourth is all ties: no tau, not ordered.
    assert values["visibility/tau"] == pytest.approx(((1 - 1 + 4 / 6) / 3, 3))
    assert values["visibility/ordered"] == (1 / 4, 4)
    tied = figures(pairs([0.0] * 4, [0.0] * 4, image_logps=[[-1.0, -1.0, -2.0]] * 4))  # 2 pairs agree, 1 is tied
    assert tied["visibility/tau"][0] == pytest.approx(2 / math.sqrt(3 * 2))


def test_answers():
    assert of_room("choice", ANSWER_ROWS) == {
        "letter": 2 / 4, "unparsed": 1 / 4, "cut_off": 1 / 4, "logp": 1.5 / 4, "logp_average": (1 + 0 + 0.5 + 1) / 4
    }  # fmt: skip
    # Mentions 3, 1, 0, 0, 1, of which 2 are false, in one response; 3 of 6 true objects are mentioned.
    assert {name: value for name, value in figures(ANSWER_ROWS).items() if name.startswith("chair/")} == {
        "chair/i": (2 / 5, 3), "chair/s": (1 / 5, 5), "chair/s_mentioning": (1 / 3, 3), "chair/cover": (3 / 6, 4)
    }  # fmt: skip
    assert of_room("length", ANSWER_ROWS) == {"words": (8 + 2 + 0 + 2 + 2) / 5, "tokens": 47 / 5, "cut_off": 1 / 5}


def test_yes_no():
    # Yes 1, 2, 1, 0 of two; wrong 0, 1, 2, 1, of which "yes" was said twice; one unparsed of eight.
    assert of_room("yes_no", ANSWER_ROWS) == {
        "basic": 2 / 4, "hallucinated": 2 / 4, "overall": 1 / 4, "yes_rate": 4 / 8, "pct_diff": 0, "fp_ratio": 2 / 4,
        "unparsed": 1 / 8, "cut_off": 1 / 8,
    }  # fmt: skip
    for answer, pct_diff, fp_ratio in (("yes", 0.5, 1), ("no", -0.5, 0)):  # a model that says one word
        values = of_room("yes_no", questions([answer] * 3, [answer] * 3))
        assert (values["pct_diff"], values["fp_ratio"], values["overall"]) == (pct_diff, fp_ratio, 0)
    value, n = figures(questions(["yes"], ["no"]))["yes_no/fp_ratio"]
    assert math.isnan(value) and n == 0  # none is wrong
    assert evidence(questions(["yes"], ["no"])[:1], []) == {}  # half of a pair


# Said and true: yes/yes, yes/no, no/yes, no/no, yes/yes, neither/no, no/no. By group: a has the first three.
SAID = ["Yes.", "Yes", "no", "No.", "yes", "A dog.", "No"]
TRUE = ["yes", "no", "yes", "no", "yes", "no", "no"]


def test_single_questions():
    values = of_room("binary", single(SAID, TRUE))
    # Yes: 2 right of 3 said, of 3 true ones. No: 2 right of 3 said, of 4 true ones. An unread answer finds nothing.
    assert values == {
        "accuracy": 4 / 7, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3,
        "precision_no": 2 / 3, "recall_no": 2 / 4, "f1_no": pytest.approx(2 * (2 / 3 * 1 / 2) / (2 / 3 + 1 / 2)),
        "yes_rate": 3 / 7, "unparsed": 1 / 7, "cut_off": 0,
    }  # fmt: skip
    same = figures([*single(SAID, TRUE), *questions(["yes"], ["no"])])  # pairs stand apart
    assert {name.removeprefix("binary/"): same[name][0] for name in same if name.startswith("binary/")} == values
    assert same["yes_no/overall"] == (1, 1) and same["binary/precision"] == (2 / 3, 3)
    assert math.isnan(of_room("binary", single(["no"], ["no"]))["precision"])  # nothing of that kind was said


def test_groups_of_questions():
    records = single(SAID, TRUE, group=["a"] * 3 + ["b"] * 4)
    everything, first, second = (of_room(f"binary{end}", records) for end in ("", "[a]", "[b]"))
    assert everything == of_room("binary", single(SAID, TRUE))
    assert first == of_room("binary", single(SAID[:3], TRUE[:3]))
    assert (second["accuracy"], second["recall_no"], second["f1"]) == (3 / 4, 2 / 3, 1)
    choices = [row | {"group": str(i % 2)} for i, row in enumerate(ANSWER_ROWS[:4])]  # right, unread; wrong, right
    values = figures(choices)
    assert [values[f"choice{end}/letter"] for end in ("", "[0]", "[1]")] == [(2 / 4, 4), (1 / 2, 2), (1 / 2, 2)]


def test_sets_of_questions():
    """HallusionBench: a question over all figures, and a figure over all of its questions; one has no figure."""
    said = ["yes", "no", "yes", "no", "no"]
    true = ["yes", "no", "yes", "yes", "no"]
    sets = [
        {"question": "0", "figure": "0"},
        {"question": "1", "figure": "0"},
        {"question": "0", "figure": "1"},
        {"question": "1", "figure": "1"},  # the wrong one
        {"question": "2"},
    ]
    values = figures(single(said, true, sets=sets))
    assert values["binary/accuracy"] == (4 / 5, 5)
    assert values["sets/question"] == (2 / 3, 3) and values["sets/figure"] == (1 / 2, 2)
    _, clusters = evidence(single(said, true, sets=sets), [])["sets/question"]
    assert clusters == ["0", "1", "4"]  # rows 0 and 2, 1 and 3, 4
    _, clusters = evidence([row | {"cluster": row["sets"].get("figure", "")} for row in single(said, true, sets=sets)],
                           [])["sets/question"]  # fmt: skip
    assert len(set(clusters)) == 2  # the figures are connected by their questions


def test_what_is_not_in_the_video_is_easier():
    """ELV-Halluc: a true caption, one with what comes elsewhere in the video, one with what does not come."""
    said = [("yes", "no", "no"), ("yes", "yes", "no"), ("no", "no", "no"), ("yes", "yes", "yes")]
    triplet = [("in_video", "out_video"), ("in_video",), ("out_video",)]
    sets = [{kind: str(i) for kind in kinds} for i in range(4) for kinds in triplet]
    records = single([one for three in said for one in three], ["yes", "no", "no"] * 4, sets=sets)
    values = of_room("sets", records)
    assert values == {"in_video": 1 / 4, "out_video": 2 / 4, "sah_ratio": pytest.approx((2 / 4 - 1 / 4) / (1 - 1 / 4))}


def test_several_letters():
    responses = ["B, A", "AB", "The answers are A and D.", "A dog runs.", "BD, since A dog runs"]
    options = {"letters": ["ABCD"] * 5}
    values = figures(
        answered("letters", responses, expected=["AB", "AB", "AD", "A", "B"], ordered=[False] * 5, **options)
    )
    assert (values["letters/accuracy"], values["letters/unparsed"]) == ((3 / 5, 5), (1 / 5, 5))
    responses = ["BA", "B then A", "Action A, then Action B", "A after B", "A"]
    values = figures(
        answered("letters", responses, expected=["BA", "BA", "BA", "BA", "A"], ordered=[True] * 5, **options)
    )
    assert (values["letters/accuracy"], values["letters/unparsed"]) == ((3 / 5, 5), (1 / 5, 5))


def test_rated_answers():
    replies = ["Fine. Rating: 6", "rating: 3", "**Rating**: 2", "Rating: 0", "Rating: 6 or rating: 5", "no idea"]
    values = of_room("rated", answered("rated", ["x"] * 6, judgement=replies))
    assert values == {
        "score": 11 / 6, "hallucination": 4 / 6, "informativeness": pytest.approx((3 + 0 + 2) / 3 / 6),
        "unread": 2 / 6, "cut_off": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "rating, replies",
    [
        (5, ["Rating (0-6): 5", "Rating (0 to 6): 5.", "**Rating** [0–6]: **5**", "Rating - 5\n- 2 cups"]),
        (5, ["Rating: 5 - 2 hallucinations", "Rating: 5 – 2 objects are missing", "Rating: 5.0"]),
        (4, ["Rating 0-6: 4", "Rating: 4, since 3.5 is too low", "Rating: 4 to be fair"]),
        (None, ["Rating: -1", "Rating: −1", "Rating: 3.5", "Rating: 3-4", "Rating: 3 to 4", "Rating: 0-6"]),
    ],
)
def test_a_rating_is_one_whole_number(rating, replies):
    assert [read_rating(reply) for reply in replies] == [rating] * len(replies)


def test_estimate_passes_clusters_and_settings_on():
    rows = {"length/words": np.array([1.0, 2.0, 0.0])}
    assert estimate(rows, ["a", "a", "b"], level=0.98) == {"length/words": Interval(1.0, 0.0, 1.5, 3)}
    assert math.isnan(estimate(rows, ["a", "a", "a"])["length/words"].low)
    with pytest.raises(ValueError, match="length/words: row 1 holds"):
        estimate({"length/words": [1.0, math.nan]}, "ab")


def test_difference():
    first = {"mean": [0.0, 1.0], "ratio": [(1, 2), (0, 0)]}
    second = {"mean": [1.0, 1.0], "ratio": [(2, 2), (0, 2)]}
    changes = difference(first, second, ["a", "b"], level=0.98)
    assert changes["mean"] == Interval(0.5, 0.0, 1.0, 2)
    assert changes["ratio"].value == 0 and changes["ratio"].n == 2
    with pytest.raises(ValueError, match=r"only one side has \['ratio'\]"):
        difference(first, {"mean": [1.0, 1.0]}, ["a", "b"])


def test_the_documentation_names_every_measure():
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    section = page.split("\n## Measures of evaluate\n")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| (.*?) \|", section, re.M)) - {"name", "---"}
    named = {name.strip("`") for names in named for name in names.split(", ")}
    more = {"damaged_logps": [{"<damage>": -1.0}] * 4, "image_logps": [[-1.0, -2.0]] * 4}
    sets = [{"<kind>": "0", "in_video": "0", "out_video": "0"}]
    rows = [*pairs([0.0] * 4, [0.0] * 4, **more), *ANSWER_ROWS, *single(["yes"], ["yes"], sets=sets)]
    rows += answered("letters", ["A"], expected=["A"], ordered=[True], letters=["AB"]) + answered(
        "rated", ["x"], judgement=["Rating: 1"]
    )
    assert named == set(figures(rows)) - {"sets/in_video", "sets/out_video"}


def test_scorers_import_without_torch():
    code = "import sys, trl_vpo.evaluate.measures, trl_vpo.text.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
