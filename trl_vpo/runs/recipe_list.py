"""`trl-vpo recipes`: the recipes of the package with what their headers say, and a copy of one to edit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from trl_vpo.errors import RecipeError
from trl_vpo.runs.console import make_console
from trl_vpo.runs.named_recipes import find_recipe, recipe_names, recipes_folder
from trl_vpo.runs.recipe_file import read_recipe, recipe_text

COMMAND = r"^#   trl-vpo (train|generate|compare) (?:(\w+) )?--config "
HARDWARE = r"^# Hardware: written for ([^.,:;]+)[.,:;]"
MEMORY = r"^# Memory: the doctor computes ([\d.]+ GiB) for .*$"
RUN = r"^# Run: (.+)\.$"


@dataclass
class RecipeFacts:
    """What a recipe's header says about it."""

    name: str  # as `--config` takes it; `accelerate/NAME` is for `--accelerate_config NAME`
    title: str  # the first sentence
    command: str  # `train`, `generate` or `compare`; empty for an accelerate config, which goes with all of them
    method: str  # of that command; `compare` has none
    model: str  # that it names
    hardware: str  # that it is written for, up to the first comma
    memory: str  # of a GPU, as the doctor computes it; empty where it was not computed
    run: tuple[str, ...]  # where it was run, the time, the peak memory and the result; `("not run",)` where it was not


def recipe_facts(name: str) -> RecipeFacts:
    """Read the facts of a recipe from its header. Raises RecipeError, also where one is missing."""
    text = recipe_text(name)

    def fact(pattern: str, what: str) -> re.Match:
        if found := re.search(pattern, text, re.MULTILINE):
            return found
        raise RecipeError(f"the header of the recipe {name} has no line {what}.")

    values = read_recipe(name)
    command, method = "", ""
    if "compute_environment" not in values:
        command, method = fact(COMMAND, "`#   trl-vpo train METHOD --config NAME`").groups()
    return RecipeFacts(
        name=name,
        title=re.search(r"(.+?\.)(\s|$)", text.replace("\n# ", " "))[1].removeprefix("# "),
        command=command,
        method=method or "",
        model=values.get("model_name_or_path") or values.get("detector", ""),
        hardware=fact(HARDWARE, "`# Hardware: written for ...`")[1],
        memory=(re.search(MEMORY, text, re.MULTILINE) or ["", ""])[1],
        run=tuple(fact(RUN, "`# Run: ...`")[1].split("; ")),
    )


def list_recipes(*, as_json: bool = False) -> None:
    """Print what there is: a table, or JSON with all facts."""
    facts = sorted(map(recipe_facts, recipe_names()), key=lambda one: (not one.command, one.command == "generate"))
    if as_json:
        print(json.dumps([asdict(one) for one in facts], indent=2))
        return
    console = make_console()
    console.print(recipes_table(facts))
    text = "trl-vpo train METHOD --config NAME; trl-vpo recipes show NAME; trl-vpo recipes copy NAME, to edit it.\n"
    console.print(text + "The accelerate configs are for --accelerate_config, without accelerate/.", soft_wrap=True)


def recipes_table(facts: list[RecipeFacts]) -> Table:
    """Return one line for each recipe, in groups by command and method."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)  # so that it fits 80 columns
    table.add_column("name", no_wrap=True)
    for heading, width in (("model", 22), ("hardware, needs", 15), ("run", 9)):
        table.add_column(heading, overflow="fold", width=width)
    for group in dict.fromkeys((one.command, one.method) for one in facts):
        table.add_section()
        table.add_row(Text(" ".join(group).strip() or "accelerate configs", style="bold"))
        for one in facts:
            if (one.command, one.method) == group:
                model = one.model if one.model.startswith("trl_vpo/") else one.model.split("/")[-1]
                hardware = f"{one.hardware}\n{one.memory}".strip()
                table.add_row(one.name, model, hardware, one.run[min(1, len(one.run) - 1)])
    return table


def copy_recipe(name: str, place: Path) -> Path:
    """Copy a recipe of the package into a folder, or to a file that ends in .yaml, and return the new file.

    Raises RecipeError, also where that file exists.
    """
    source = find_recipe(name)
    target = place if place.suffix == ".yaml" and not place.is_dir() else place / source.name
    if target.exists():
        raise RecipeError(f"{target} is there already: name another place, `trl-vpo recipes copy {name} PLACE`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(source, target)


def check_command(name: str, command: str, method: str | None) -> None:
    """Refuse a recipe of the package that is for another command or method; with None, any method will do.

    Raises RecipeError.
    """
    if not find_recipe(name).resolve().is_relative_to(recipes_folder().resolve()):
        return
    facts = recipe_facts(name)
    if not facts.command:
        raise RecipeError(f"{name} is no recipe but an accelerate config: --accelerate_config {Path(name).stem}.")
    if facts.command != command or method not in (None, facts.method):
        its_own = " ".join(filter(None, [facts.command, facts.method]))
        raise RecipeError(
            f"the recipe {name} is for `trl-vpo {its_own}`. For something else make a copy, and change its keys: "
            f"`trl-vpo recipes copy {name}`."
        )


def run_recipes(action: str, name: str | None, folder: Path, *, as_json: bool = False) -> None:
    """Run `trl-vpo recipes ACTION`."""
    if action == "list":
        list_recipes(as_json=as_json)
        return
    if name is None:
        raise RecipeError(f"`trl-vpo recipes {action}` needs a name. {len(recipe_names())} are in {recipes_folder()}.")
    if action == "show":
        print(recipe_text(name), end="")
        return
    facts, target = recipe_facts(name), copy_recipe(name, folder)
    launch = f"train METHOD --config NAME --accelerate_config {target}"
    command = " ".join(filter(None, [facts.command, facts.method, f"--config {target}"]))
    print(f"{target}\ntrl-vpo {command if facts.command else launch}")
