"""The quickstart: what it writes can be trained on and checked; the next steps that it names are commands."""

import json

import pytest

from studies.testbed import truth
from trl_vpo import cli
from trl_vpo.data.inputs import read_inputs
from trl_vpo.evaluate.questions import chair
from trl_vpo.evaluate.rows import read_rows
from trl_vpo.testbed import language, quickstart, world
from trl_vpo.text.chair import ObjectTable, read_response


def test_the_next_steps_are_commands():
    text = quickstart.NEXT.format(data="out/data", kind="clip", runs="out/clips/dpo out/scenes/lpoi")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("  trl-vpo ")]
    assert [words[0] for words in commands] == ["view", "plot", "recipes", "doctor", "train"]
    for words in commands:
        args, rest = cli.make_parser().parse_known_args(words)
        assert (args.run.__name__ == words[0] and not rest) or words[0] == "doctor"
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_captions_are_checked_as_the_world_does(kind):
    """CHAIRs of true, usual and empty captions is the share that the world's own check calls hallucinated."""
    table, responses, hallucinated = ObjectTable({name: [] for name in language.all_objects()}), [], []
    for sample in world.draw_samples(kind, 40, 5, habits=False):
        usual = tuple(map(world.as_usual, sample.things))
        if expected := world.missing_companion(sample.things):
            usual = (*usual[: expected[0]], expected[1], *usual[expected[0] :])
        for text in (language.caption(sample.things), language.caption(usual, (1,) * 5), "nothing"):
            responses.append(vars(read_response(text, language.objects_of(sample.things), table)))
            hallucinated.append(truth.check_caption(text, sample.things).hallucinated)
    assert list(chair(responses)["chair/s"]) == hallucinated and 0.05 < sum(hallucinated) / len(hallucinated) < 0.8


def test_the_data_are_rows_to_train_on_and_held_out_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "TRAIN_ROWS", 3)
    monkeypatch.setattr(quickstart, "HELD_OUT_ROWS", 2)
    assert cli.main(["quickstart", "--out", str(tmp_path), "--data_only"]) == 0
    assert f"Rows and media: {tmp_path / 'data'}\n" in capsys.readouterr().out
    table = ObjectTable({name: [] for name in (tmp_path / "data/objects.txt").read_text().splitlines()})
    for kind in ("clip", "scene"):
        inputs = read_inputs(str(tmp_path / f"data/{kind}s_held_out.jsonl"))
        held_out = read_rows(inputs, table)
        assert [row.task for row in held_out] == ["preference"] * 2 + ["chair"] * 2
        assert [row.cluster for row in held_out[:2]] == [row.cluster for row in held_out[2:]]
        train = (tmp_path / f"data/{kind}s_train.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in train] == [f"{kind}s_train-{n:04d}" for n in range(3)]
    for name, count in (("captions", 3), ("questions", 6), ("pairs", 3)):  # what to generate from
        asked = read_inputs(str(tmp_path / f"data/{name}_input.jsonl"))
        assert [row.problem for row in asked] == [None] * count
