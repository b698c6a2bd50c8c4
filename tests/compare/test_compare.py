"""`trl-vpo compare`: real trainings of the small world's base, of which one is killed and continued."""

import json
import os
import re
import shutil
import signal

import pytest
import yaml
from resume_run import watch_changes
from resume_runs import RECIPE

from trl_vpo import cli
from trl_vpo.compare.plan import check_plan, read_plan
from trl_vpo.compare.run import run_compare, write_figure
from trl_vpo.compare.table import print_table, write_table
from trl_vpo.errors import EvaluateError, ModelError, RecipeError, UserError
from trl_vpo.testbed import language, rows

SHARED = {key: value for key, value in RECIPE.items() if key != "resume_from_checkpoint"}
SHARED = {**SHARED, "model_name_or_path": str(RECIPE["model_name_or_path"]), "max_steps": 4, "logging_steps": 1}
EVALUATION = {"max_new_tokens": 16, "sensitivity": "none", "resamples": 200, "batch_size": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with rows, the table of objects, recipes of two methods, and a recipe that compares them."""
    folder = tmp_path_factory.mktemp("compare")
    rows.write_jsonl(rows.write_preferences("clip", 8, 3, folder / "train")[1], folder / "train.jsonl")
    samples, pairs = rows.write_preferences("clip", 4, 4, folder / "held_out")
    captions = [rows.caption_row(sample, row) for sample, row in zip(samples, pairs)]
    rows.write_jsonl([*pairs, *captions], folder / "held_out.jsonl")
    rows.write_jsonl(pairs, folder / "pairs.jsonl")
    (folder / "objects.txt").write_text("\n".join(language.all_objects()))
    for method in ("dpo", "simpo"):
        recipe = SHARED | {"dataset_name": str(folder / "train.jsonl")}
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(recipe))
    own = {"recipes": [str(folder / f"{method}.yaml") for method in ("dpo", "simpo")]}
    own |= {"held_out": str(folder / "held_out.jsonl"), "synonyms": str(folder / "objects.txt")}
    (folder / "both.yaml").write_text(yaml.safe_dump(own | EVALUATION))
    return folder


def plan(world, *words, configs=("both.yaml",)):
    return read_plan([str(world / config) for config in configs], None, str(world / "out"), words)


def test_a_killed_training_is_named_and_continued(world, capfd):
    """The table's figures follow from the rows; the weights are those of a training without interruption."""
    out = world / "out"

    def dying(words):
        if words[:2] == ["train", "simpo"]:
            watch_changes(lambda n: n == 1 and os.kill(os.getpid(), signal.SIGKILL), out / "simpo", "checkpoint-4")
        return cli.main(words)

    with pytest.raises(UserError, match=r"the training of simpo failed with exit code -9"):
        run_compare(plan(world), dying)
    assert (out / "simpo/checkpoint-2/complete.json").is_file() and not (out / "evaluation").exists()
    first = (out / "dpo/run.json").read_bytes()
    assert set(json.loads(first)["contents"]) == {"model_name_or_path", "dataset_name"}
    capfd.readouterr()
    assert cli.main(["compare", "--config", str(world / "both.yaml"), "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    assert "1 of 2: dpo is finished." in printed and f"Continuing from {out}/simpo/checkpoint-2" in printed
    assert (out / "dpo/run.json").read_bytes() == first

    whole = world / "whole"
    assert cli.main(["train", "simpo", "--config", str(world / "simpo.yaml"), "--output_dir", str(whole)]) == 0
    weights = "adapter_model.safetensors"
    assert (out / "simpo" / weights).read_bytes() == (whole / weights).read_bytes()

    records = [json.loads(line) for line in (out / "evaluation/rows.jsonl").read_text().splitlines()]
    table = [line.split(" | ") for line in (out / "table.md").read_text().splitlines() if line.startswith("| ")]
    cells = {row[0].strip("| "): row[1:] for row in table}
    assert list(cells) == ["model", "---", "base", "dpo", "simpo"]
    for model in ("base", "dpo", "simpo"):
        pairs = [r for r in records if r["contestant"] == model and r["task"] == "preference"]
        right = sum(r["chosen_logp"] > r["rejected_logp"] for r in pairs) / 4
        assert float(cells[model][0].split()[0]) == pytest.approx(right, abs=1e-3)
        captions = [r for r in records if r["contestant"] == model and r["task"] == "chair"]
        false = sum(bool(r["hallucinated"]) for r in captions) / 4
        assert float(cells[model][cells["model"].index("CHAIRs")].split()[0]) == pytest.approx(false, abs=1e-3)
    moved = [
        {r["id"]: r["chosen_logp"] for r in records if r["contestant"] == model and r["task"] == "preference"}
        for model in ("base", "simpo")
    ]
    mean = sum(moved[1][row] - moved[0][row] for row in moved[0]) / 4
    shown = cells["simpo"][cells["model"].index("Δ logp chosen")]
    assert float(shown.split()[0]) == pytest.approx(mean, abs=1e-3) and re.search(r"\[-?\d.*, -?\d.*\]", shown)
    assert cells["base"][1:5] == ["-"] * 4 and int(cells["dpo"][-1].strip("| ")) >= 0
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--betta", "1"], RecipeError, "unknown option --betta. Did you mean --beta"),
        (["--use_peft", "false"], RecipeError, "dpo: it trains all weights"),
        (["--lora_target_modules", "language", "--init_lora_weights", "x"], RecipeError, "init_lora_weights"),
        (["--dataset_name", "no.jsonl"], UserError, "no.jsonl does not exist"),
        (["--synonyms", "no.txt"], UserError, "no.txt"),
        (["--limit", "0"], UserError, "limit is 0"),
    ],
)
def test_nothing_is_trained_with_a_wrong_option(world, words, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check_plan(plan(world, *words))


def recipe(world, name, **values):
    own = yaml.safe_load((world / "dpo.yaml").read_text()) | values
    (world / name).write_text(yaml.safe_dump(own))
    return name


def test_recipes_of_different_bases_are_refused(world, tmp_path):
    configs = ("dpo.yaml", recipe(world, "leanpo.yaml", model_name_or_path="Qwen/Qwen2-VL-2B-Instruct"))
    held_out = str(world / "pairs.jsonl")
    two = read_plan([str(world / config) for config in configs], held_out, str(tmp_path), [])
    with pytest.raises(RecipeError, match=r"different bases.*\n.*dpo: .*testbed/base.*\n.*leanpo: .*Qwen2-VL-2B"):
        check_plan(two)
    same = [*(str(world / config) for config in configs)]
    base = SHARED["model_name_or_path"]
    assert check_plan(read_plan(same, held_out, str(tmp_path), ["--model_name_or_path", base])) == set()


def test_trainings_on_other_frames_are_refused(world, tmp_path):
    configs = [str(world / name) for name in ("dpo.yaml", recipe(world, "rrpo.yaml", num_frames=4))]
    held_out = str(world / "pairs.jsonl")
    with pytest.raises(ModelError, match=r"different settings .*dpo: num_frames 2; rrpo: num_frames 4"):
        check_plan(read_plan(configs, held_out, str(tmp_path), []))
    check_plan(read_plan(configs, held_out, str(tmp_path), ["--num_frames", "4"]))


def test_held_out_media_are_opened_before_any_training(world, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rows.write_jsonl([*pairs[:-1], pairs[-1] | {"videos": ["gone.mp4"]}], held_out)
    made = read_plan([str(world / "dpo.yaml")], str(held_out), str(tmp_path), [])
    with pytest.raises(EvaluateError, match=r"1 of 4 held-out rows cannot be used:\n.*row 3 .*gone\.mp4"):
        check_plan(made)
    check_plan(read_plan([str(world / "dpo.yaml")], str(held_out), str(tmp_path), ["--on_bad", "skip"]))


def test_rows_are_checked_with_every_method_before_any_training(world, tmp_path):
    """Clips without boxes train DPO, and not LPOI; of a missing medium a training may leave the row out."""
    held_out, base = str(world / "pairs.jsonl"), yaml.safe_load((world / "dpo.yaml").read_text())
    config = tmp_path / "methods.yaml"
    config.write_text(yaml.safe_dump(base | {"methods": {"dpo": None, "lpoi": None}}))
    with pytest.raises(UserError, match=r"^lpoi: 8 of 8 train rows cannot be trained on:\n.*critical_box"):
        check_plan(read_plan([str(config)], held_out, str(tmp_path), []))
    train = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rows.write_jsonl([train[0] | {"videos": ["gone.mp4"]}, *train[1:]], tmp_path / "train.jsonl")
    words = ["--dataset_name", str(tmp_path / "train.jsonl")]
    dpo = [str(world / "dpo.yaml")]
    with pytest.raises(UserError, match=r"^dpo: 1 of 8 train rows.*\n.*gone\.mp4"):
        check_plan(read_plan(dpo, held_out, str(tmp_path), words))
    check_plan(read_plan(dpo, held_out, str(tmp_path), [*words, "--on_bad_media", "skip"]))
    assert not (tmp_path / "dpo").exists()


def test_an_evaluation_of_other_trainings_is_refused(world, tmp_path):
    """Before the new one is trained; what is finished need not be trained again."""
    record = {"method": "dpo", "recipe": yaml.safe_load((world / "dpo.yaml").read_text())}
    for folder, name, text in (
        ("dpo", "run.json", record),
        ("evaluation", "settings.json", {"adapters": {"dpo": "x"}}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(text))
    one, two = [str(world / "dpo.yaml")], [str(world / f"{method}.yaml") for method in ("dpo", "simpo")]
    assert check_plan(read_plan(one, str(world / "pairs.jsonl"), str(tmp_path), [])) == {"dpo"}
    with pytest.raises(RecipeError, match=r"evaluation is of dpo, .*Delete this folder, .* trainings are kept"):
        check_plan(read_plan(two, str(world / "pairs.jsonl"), str(tmp_path), []))
    shutil.rmtree(tmp_path / "dpo")  # to train it again
    earlier = "evaluation holds answers of an earlier training of dpo, to be trained anew. Delete this folder"
    with pytest.raises(RecipeError, match=earlier):
        check_plan(read_plan(one, str(world / "pairs.jsonl"), str(tmp_path), []))


def test_sets_of_questions_are_in_table_and_figure(tmp_path):
    def measures(*values):
        names = ("binary/accuracy", "sets/figure", "sets/in_video", "sets/sah_ratio", "sets_of/others")
        return {name: {"value": v, "low": None, "high": None, "n": 40} for name, v in zip(names, values)}

    up = {"sets/figure": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 40}}
    results = {"data": {"rows": 9, "clusters": 9}, "settings": {"level": 0.95}, "contestants": {
        "base": {"measures": measures(0.5, 0.25, 0.125, None, 1), "differences": {}},
        "dpo": {"measures": measures(0.75, 0.45, 0.125, None, 1), "differences": up},
    }}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({"metrics": {"train": {"train_runtime": 3.0}}}))
    log = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    table = write_table(results, {"dpo": tmp_path}, tmp_path / "table.md").read_text()
    assert "| model | yes/no | sets figure | sets in_video | sets sah_ratio | seconds |" in table
    assert "| dpo | 0.750 | 0.450▲ | 0.125 | - | 3 |" in table
    write_figure(results, {"dpo": tmp_path}, tmp_path / "compare.png")
    print_table(results, {"dpo": tmp_path})


def test_checking_leaves_the_environment_alone(world, tmp_path):
    """Else the variables of one recipe would reach the next training; bf16 would count as launched already."""
    name, before = recipe(world, "leanpo.yaml", env={"TRL_VPO_TRIED": 1}, bf16=True), dict(os.environ)
    check_plan(read_plan([str(world / name)], str(world / "pairs.jsonl"), str(tmp_path), ["--num_processes", "2"]))
    assert dict(os.environ) == before


def test_a_finished_training_of_other_settings_is_refused(world, tmp_path):
    configs, held_out = [str(world / "dpo.yaml")], str(world / "pairs.jsonl")
    (tmp_path / "dpo").mkdir()
    record = {"method": "dpo", "recipe": yaml.safe_load((world / "dpo.yaml").read_text()) | {"output_dir": "x"}}
    (tmp_path / "dpo/run.json").write_text(json.dumps(record))
    assert check_plan(read_plan(configs, held_out, str(tmp_path), ["--save_steps", "1"])) == {"dpo"}
    with pytest.raises(RecipeError, match=r"other settings:\n  beta: was its default, is 0.3\n"):
        check_plan(read_plan(configs, held_out, str(tmp_path), ["--beta", "0.3"]))
    record["contents"] = {"dataset_name": "that of other rows"}
    (tmp_path / "dpo/run.json").write_text(json.dumps(record))
    with pytest.raises(RecipeError, match=r"other settings:\n  dataset_name: .*train.jsonl has changed since\n"):
        check_plan(read_plan(configs, held_out, str(tmp_path), []))
    (tmp_path / "dpo/run.json").write_text("[1]")
    with pytest.raises(RecipeError, match=r"dpo/run\.json: it holds no JSON object\. Delete the folder"):
        check_plan(read_plan(configs, held_out, str(tmp_path), []))


def test_methods_share_keys_and_options_win(world):
    """Keys of the evaluation alone go to it, those of both to both, but for the seed and the trainings' data."""
    own = {"methods": {"dpo": None, "leanpo": {"beta": 1.5, "max_steps": 3}}, "held_out": "h.jsonl", "beta": 0.2}
    own |= {"num_frames": 4, "synonyms": "s.txt", "seed": 7, "sensitivity": ["masked", "blank"], "num_processes": 2}
    (world / "methods.yaml").write_text(yaml.safe_dump(own))
    made = read_plan([str(world / "methods.yaml")], None, None, ["--max_steps=9", "--dataset_name", "d.jsonl"])
    dpo, leanpo = made.trainings
    assert (dpo.name, leanpo.name, str(made.out)) == ("dpo", "leanpo", "outputs/compare")
    shared = {"num_frames": 4, "seed": 7, "num_processes": 2, "max_steps": "9", "dataset_name": "d.jsonl"}
    assert dpo.keys == shared | {"beta": 0.2} and leanpo.keys == shared | {"beta": 1.5}
    assert made.keys == {"num_frames": 4, "synonyms": "s.txt", "sensitivity": ["masked", "blank"], "num_processes": 2}
    assert leanpo.options(made.folder(leanpo))[-2:] == ["--output_dir", "outputs/compare/leanpo"]


def test_what_cannot_be_compared_is_refused(world):
    with pytest.raises(RecipeError, match="`held_out` is not set"):
        read_plan([str(world / "dpo.yaml")], None, None, [])
    twice = [str(world / "dpo.yaml")] * 2
    with pytest.raises(RecipeError, match="two trainings are named dpo-dpo"):
        read_plan(twice, "h.jsonl", None, [])
    with pytest.raises(RecipeError, match="is for `trl-vpo generate rrpo`"):
        read_plan(["rrpo/generate"], "h.jsonl", None, [])
    for text, message in (
        ("methods: {dpo: 0.2}", "`methods` a mapping of methods to keys"),
        ("methods: [dpo]", "`methods` a mapping of methods to keys"),
        ("recipes: [3]", "`recipes` is a list of recipes"),
        ("methods: {dpo: {output_dir: mine}}", "a method has an `output_dir`"),
    ):
        (world / "methods.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_plan([str(world / "methods.yaml")], "h.jsonl", None, [])
