"""The base's own preference data: what the pipelines claim about their rows, and that training on them helps."""

import json

import pytest

from studies.testbed import selfmade
from trl_vpo import cli
from trl_vpo.testbed import quickstart, world


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfmade, "INPUT_CLIPS", 60)
        patch.setattr(selfmade, "INPUT_SCENES", 40)
        return selfmade.write_inputs(tmp_path_factory.mktemp("inputs"))


def figures(method, inputs, out):
    rows = selfmade.generate(method, inputs[method], out)
    summary = json.loads((rows.parent / "summary.json").read_text())
    assert summary["kept"] + summary["rejected"] == summary["inputs"] and summary["rows"] > 20
    return summary["figures"]


def test_leanpo_chosen_responses_are_right_more_often(inputs, tmp_path):
    right = figures("leanpo", inputs, tmp_path)
    assert right["chosen_right"] > right["plain_right"] + 0.1 > right["rejected_right"] + 0.2
    assert right["reward_trust_spearman"] > 0.5


def test_rrpo_rejected_responses_are_wrong(inputs, tmp_path):
    assert set(figures("rrpo", inputs, tmp_path)["rows_by_kind"]) == {"open", "short", "yes_no"}
    assert selfmade.true_rejections(tmp_path / "rrpo-data/rows.jsonl") == 0


def test_lpoi_claims_fall_as_the_object_is_hidden(inputs, tmp_path):
    claimed = figures("lpoi", inputs, tmp_path)["claimed_at"]
    assert len(claimed) == 5 and claimed == sorted(claimed, reverse=True)
    assert claimed[0] > 0.8 and claimed[-1] < 0.3


@pytest.mark.parametrize(
    ("question", "true", "false"),
    [
        ("Describe the video.", "a red square moves left.", "a red square moves up."),
        ("What colour is the shape?", "It is red", "blue"),
        ("Which shape is it?", "square.", "circle"),
        ("Where does it move?", "left", "right"),
        ("Is the square red?", "Yes.", "No"),
        ("Is there a circle?", "no", "yes"),
        ("Does the square move up?", "No.", "Yes"),
    ],
)
def test_what_the_world_calls_true(question, true, false):
    things = (world.Thing("red", "square", "left", (0, 0, 9, 9)),)
    assert selfmade.is_true(question, true, things) and not selfmade.is_true(question, false, things)


@pytest.mark.slow
@pytest.mark.parametrize("method", selfmade.PIPELINES)
def test_training_on_self_made_data_helps(method, tmp_path):
    quickstart.write_data(tmp_path / "data")
    data = {method: selfmade.generate(method, selfmade.write_inputs(tmp_path / "data")[method], tmp_path)}
    recipes = {method: f"quickstart/{method}-selfmade"}
    (folder,) = quickstart.compare_on(quickstart.kind_of(method), recipes, tmp_path, cli.main, data)
    results = json.loads((folder.parent / "evaluation/results.json").read_text())["contestants"]
    before, after = (results[name]["measures"]["chair/s"]["value"] for name in ("base", method))
    assert after < before / 2
