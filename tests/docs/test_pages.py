"""What the pages show is read, built and parsed by the package itself."""

import ast
import json
import re
from dataclasses import fields
from itertools import pairwise

import pytest
from datasets import Dataset
from import_records import import_rows
from pages import PAGES, ROOT, blocks, commands, objects
from PIL import Image

from trl_vpo import cli
from trl_vpo.compare.plan import read_plan
from trl_vpo.data.import_formats import FORMATS
from trl_vpo.data.inputs import Inputs, row_ids
from trl_vpo.data.rows import read_row
from trl_vpo.evaluate.rows import read_rows
from trl_vpo.generate.leanpo import LeanPOGenerateConfig, LeanPOPipeline
from trl_vpo.generate.lpoi import LPOIGenerateConfig, LPOIPipeline
from trl_vpo.generate.objects.boxes import annotated
from trl_vpo.generate.rrpo import RRPOGenerateConfig, RRPOPipeline
from trl_vpo.report.plot.runs import METHOD_NAMES
from trl_vpo.runs.named_recipes import recipe_names
from trl_vpo.runs.recipe_list import recipe_facts
from trl_vpo.text.chair import ObjectTable
from trl_vpo.training.methods import METHODS, method_classes, method_of
from trl_vpo.training.run import make_parser

GENERATE = {
    "leanpo": (LeanPOPipeline, LeanPOGenerateConfig),
    "rrpo": (RRPOPipeline, RRPOGenerateConfig),
    "lpoi": (LPOIPipeline, LPOIGenerateConfig),
}
BATCHES = {"dpo": 64, "leanpo": 8, "rrpo": 32, "lpoi": 64, "simpo": 128, "tdpo": 64, "ddpo": 32}
BATCHES |= {"mdpo": 32, "dpa": 64, "symmpo": 64}  # of the papers
LAUNCH = {"--accelerate_config", "--num_processes", "--config", "--help", "--help-all"}
PLACEHOLDER = re.compile(r"^[A-Z_]+(\.\w+)?$|^\.\.\.$|^OUT|^URL$")


def marked(mark):
    found = blocks("json", mark)
    assert found, f"no page has a block with the mark {mark!r}"
    return pytest.mark.parametrize("block", found, ids=str)


def inputs_of(block):
    rows = [{"id": str(i), **row} for i, row in enumerate(objects(block))]
    dataset = Dataset.from_list(rows)
    return Inputs(dataset, row_ids(dataset))


# --- data -----------------------------------------------------------------------------------------------------------


FORMS = {"dpo": "pair", "mdpo": "contrast", "lpoi": "ranking", "symmpo": "symmetric"}


@marked("reads: row")
def test_rows_are_read(block):
    form = next((form for method, form in FORMS.items() if method in block.mark.split()), None)
    needs = {"phrases": "rrpo" in block.mark and "paired", "media_form": form}
    needs["scores"] = "score" if "scores" in block.mark else None
    for example in objects(block):
        row = read_row(example, **needs)
        assert row.images or row.videos or "<" not in str(row.prompt)
        if needs["phrases"]:
            spans = [(row.chosen, row.chosen_phrases), (row.rejected, row.rejected_phrases)]
            texts = [[m[0]["content"][0]["text"][slice(*span)] for span in found] for m, found in spans]
            assert texts == [["red cup"], ["phone"]]


@marked("reads: evaluate")
def test_held_out_rows_are_read(block):
    table = ObjectTable({"cup": ["mug"], "table": ["desk"]}) if "chair" in block.mark else None
    assert len(read_rows(inputs_of(block), table)) == len(objects(block))


@marked("reads: generate")
def test_inputs_of_generate_are_read(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths start there; the files only have to exist
    for example in objects(block):
        for path in filter(None, [example.get("image"), example.get("video")]):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(b"x")
    for method in set(block.mark.split()) & set(GENERATE):
        pipeline, config = GENERATE[method]
        settings = config(boxes="annotations") if "annotations" in block.mark else config()
        for row in inputs_of(block):
            pipeline(settings, None).check(row)
            if "annotations" in block.mark:
                labels = [each.label for each in annotated(row.example["objects"], Image.new("RGB", (640, 480)).size)]
                assert labels == ["cup", "table", "door", "gate"]


@marked("imports: ")
def test_records_of_other_projects_are_imported(block, tmp_path):
    formats = block.mark.split()[1:]
    for fmt, record in zip(formats, objects(block), strict=True):
        (tmp_path / "in.json").write_text(json.dumps([record]), encoding="utf-8")
        (row,) = import_rows(fmt, tmp_path / "in.json")
        if "chosen" in row:
            read_row(row)
        else:
            assert row["question"] and row["answer"]


def test_the_tables_of_formats_are_the_importers():
    data, evaluate = ((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("data", "evaluate"))
    shown = re.findall(r"^\| `([\w-]+)` \| .*? \| (.*?) \| ", data, re.M)
    shown += re.findall(r"^\| `([\w-]+)` \| (.*?) \| ", evaluate, re.M)
    fields = [", ".join(one.layout.replace(";", " ;").split()).replace(", ;,", ";") for one in FORMATS.values()]
    expected = list(zip(FORMATS, [text.replace("|", " or ") for text in fields], strict=True))
    assert [row for row in shown if row[0] in FORMATS] == expected


def test_every_format_has_an_example():
    assert {name for block in blocks("json", "imports: ") for name in block.mark.split()[1:]} == {
        name for name, fmt in FORMATS.items() if fmt.makes != "held-out rows"
    }


def test_every_json_block_is_read_by_a_test():
    unread = [str(block) for block in blocks("json") if not block.mark.startswith(("reads: ", "imports: "))]
    assert not unread


# --- python ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_import_what_exists(block):
    tree = ast.parse(block.text)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), str(block), "exec"), {})


@pytest.mark.parametrize("block", blocks("python", "paper: "), ids=str)
def test_the_papers_settings_are_a_config(block):
    scope = {}
    exec(block.text.replace("output_dir=", "use_cpu=True, output_dir="), scope)
    args, method = scope["args"], block.mark.split()[-1]
    assert type(args).__name__ == METHODS[method][0]
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == BATCHES[method]
    own = {field.name for field in fields(type(args))} & {"beta", "alpha", "num_images", "target_margin"}
    assert own - args.refused.keys() <= set(re.findall(r"^    (\w+)=", block.text, re.M))


# --- the command line -----------------------------------------------------------------------------------------------


def shown_commands():
    """Every command of the pages' shell blocks and of code in their text, and of the examples."""
    found = {}
    texts = [(block.page.name, block.text) for block in blocks("bash")]
    for page in PAGES:
        inline = re.findall(r"(?<!`)`(trl-vpo [^`]+)`", page.read_text(encoding="utf-8").replace("\n", " "))
        texts += [(page.name, text) for text in inline]
    for path in sorted((ROOT / "examples").glob("*.sh")):
        texts.append((path.name, path.read_text(encoding="utf-8")))
    for name, text in texts:
        for words in commands(text):
            if words:
                found.setdefault(" ".join(words), (name, words))
    return list(found.values())


def options_of(command, method):
    """The options that a command takes besides those that argparse checks itself."""
    if command == "generate":
        from trl_vpo.generate.run import make_parser as parser
    elif command == "compare":
        from trl_vpo.evaluate.run import make_parser as evaluate

        return {*make_parser(method)._option_string_actions, *evaluate()._option_string_actions}
    elif command in ("train", "doctor"):
        parser = make_parser
    else:
        from trl_vpo.evaluate.command import _benchmark_parser
        from trl_vpo.evaluate.run import make_parser as evaluate

        return {*evaluate()._option_string_actions, *_benchmark_parser()._option_string_actions}
    return set(parser(method)._option_string_actions)


@pytest.mark.parametrize(("page", "words"), shown_commands(), ids=lambda value: str(value)[:60])
def test_commands_have_the_options_shown(page, words):
    (commands_of,) = cli.make_parser()._subparsers._group_actions
    if words[0] == "--version" or PLACEHOLDER.match(words[0]):
        return
    command = commands_of.choices.get(words[0])
    assert command, f"{page}: trl-vpo {words[0]} is no command"
    methods = [word for word in words if word in METHODS] or ["rrpo"]
    valid = LAUNCH | set(command._option_string_actions)
    if words[0] in ("train", "generate", "doctor", "evaluate", "compare"):
        valid |= options_of(words[0], methods[0])
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert options <= valid, f"{page}: {words}"
    names = [after for word, after in pairwise(words) if word == "--config"]
    names += words[1:2] if words[0] == "doctor" else words[2:3] if words[0] == "recipes" else []
    named = [name for name in names if name != "mine.yaml" and not PLACEHOLDER.match(name)]
    assert set(named) <= set(recipe_names()), f"{page}: {named}"


def test_a_recipe_of_ones_own_parses(tmp_path):
    (block,) = blocks("yaml", "recipe: rrpo")
    (tmp_path / "mine.yaml").write_text(block.text, encoding="utf-8")
    assert method_of(tmp_path / "mine.yaml") == "rrpo"
    args = make_parser("rrpo", any_device=True).parse(["--config", str(tmp_path / "mine.yaml")])[1]
    assert args.output_dir == "outputs/mine" and args.learning_rate == 5e-6


def test_a_recipe_of_a_comparison_parses(tmp_path):
    (block,) = blocks("yaml", "recipe: compare")
    (tmp_path / "mine.yaml").write_text(block.text, encoding="utf-8")
    plan = read_plan([str(tmp_path / "mine.yaml")], None, None, [])
    assert [training.method for training in plan.trainings] == ["leanpo", "dpo", "simpo"]
    for training in plan.trainings:
        make_parser(training.method, any_device=True).parse(training.options(plan.folder(training)))


# --- the pages themselves -------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    listed = re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_table_of_recipes_says_what_their_headers_say():
    facts = [recipe_facts(name) for name in recipe_names() if not name.startswith("accelerate/")]
    lines = [
        "| recipe | written for | memory, computed | run on | time | peak memory | result |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in sorted(facts, key=lambda one: (one.command == "generate", one.name.startswith("quickstart"), one.name)):
        run = one.run if len(one.run) == 4 else one.run * 4
        lines.append(f"| {' | '.join([f'`{one.name}`', one.hardware, one.memory or '-', *run])} |")
    assert "\n".join(lines) in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def test_the_table_of_methods_has_papers_and_equations():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \[(\w+)\]\(#(\w+)\) \|.* \[([\d.]+)\]\((.*)\) \|$", text, re.M)
    papers = [method_classes(method)[1]._paper["id"] for method in METHODS]
    names = [METHOD_NAMES[method] for method in METHODS]
    assert table == [(n, n.lower(), id, f"https://arxiv.org/abs/{id}") for n, id in zip(names, papers, strict=True)]
    for name in names:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert re.search(r"^```\n(.*\n)*?L +=", section, re.M), name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target
