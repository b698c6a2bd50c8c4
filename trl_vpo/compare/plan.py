"""What `trl-vpo compare` trains and measures: recipes, or methods with one set of keys, checked before any training.

A recipe of a comparison is a YAML file with `recipes` (names or files), `methods` (method: its own keys), or both,
with `held_out` and `output_dir`. All other keys, and all options, are for every training; those that trainings do not
have are for the evaluation.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_vpo.data.check import prepare_dataset
from trl_vpo.data.sources import load_splits
from trl_vpo.errors import RecipeError, UserError
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.run import check_held_out, held_out_rows
from trl_vpo.evaluate.run import make_parser as make_evaluation_parser
from trl_vpo.files import read_object
from trl_vpo.models.adapters import loses_base
from trl_vpo.models.paths import check_paths
from trl_vpo.models.trained import agreed_media
from trl_vpo.runs.digests import model_files
from trl_vpo.runs.named_recipes import shipped_model
from trl_vpo.runs.recipe_file import LAUNCH_KEYS, read_recipe
from trl_vpo.runs.recipe_list import check_command
from trl_vpo.runs.resume_rules import fixed_recipe
from trl_vpo.runs.secrets import scrub
from trl_vpo.runs.store import read_settings
from trl_vpo.runs.values import annotations
from trl_vpo.training.checkpoints import why_no_resume
from trl_vpo.training.launch import launch_options
from trl_vpo.training.methods import method_classes, method_of
from trl_vpo.training.run import make_parser, peft_config
from trl_vpo.training.run_identity import contents

DEFAULT_OUT = "outputs/compare"
BASE = ("model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "trust_remote_code")
# Keys that an evaluation has, too, with another meaning.
OF_TRAINING = {"seed", "dataset_name", "dataset_config", "output_dir"}


@dataclass(eq=False)
class Training:
    """One training of a comparison: a method, with a recipe or without, and keys that win over it."""

    name: str  # of its folder, and in the table
    method: str
    recipe: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    resumes: bool = True  # whether it can be continued; known once it is checked

    def options(self, folder: Path) -> list[str]:
        """Return the options of `trl-vpo train METHOD`."""
        config = ["--config", self.recipe] if self.recipe else []
        return [*config, *option_words(self.keys | {"output_dir": str(folder)})]

    def values(self) -> dict[str, Any]:
        """Return the keys of the recipe, with those that win over it."""
        return (read_recipe(self.recipe) if self.recipe else {}) | self.keys


@dataclass
class Plan:
    """Trainings on one base, and the rows on which all are measured. `keys` are those of the evaluation."""

    trainings: list[Training]
    held_out: str
    out: Path
    keys: dict[str, Any] = field(default_factory=dict)

    def folder(self, training: Training) -> Path:
        return self.out / training.name

    @property
    def evaluation(self) -> Path:
        return self.out / "evaluation"

    def evaluation_options(self) -> list[str]:
        """Return the options of `trl-vpo evaluate`, without the adapters."""
        first = self.trainings[0].values()
        keys = {key: first[key] for key in BASE if first.get(key) is not None}
        keys["model_name_or_path"] = shipped_model(str(keys["model_name_or_path"]))
        if str(first.get("use_cpu")).lower() == "true":
            keys["device"] = "cpu"
        return option_words(keys | self.keys | {"dataset_name": self.held_out, "output_dir": str(self.evaluation)})


def read_plan(configs: Sequence[str], held_out: str | None, out: str | None, words: Sequence[str]) -> Plan:
    """Return what a command line asks for: recipes of trainings, or one recipe of a comparison.

    `words` are the further options. Raises RecipeError, also if two trainings have the same name.
    """
    recipes, methods, given = list(configs), {}, {}
    if len(configs) == 1 and {"recipes", "methods"} & (values := read_recipe(configs[0])).keys():
        check_command(configs[0], "compare", None)
        recipes, methods = values.pop("recipes", None) or [], values.pop("methods", None) or {}
        _check_lists(configs[0], recipes, methods)
        own_rows, own_folder = values.pop("held_out", None), values.pop("output_dir", None)
        held_out, out, given = held_out or own_rows, out or own_folder, values
    if not held_out:
        raise RecipeError("`held_out` is not set: give the rows on which all are measured, --held_out FILE.")
    trainings = [Training("", method_of(Path(recipe)), str(recipe)) for recipe in recipes]
    trainings += [Training("", method, None, keys or {}) for method, keys in methods.items()]
    _name(trainings)
    options = _options(words)
    of_trainings, of_evaluation = _split(given | options, {training.method for training in trainings})
    for training in trainings:
        if training.recipe:
            check_command(training.recipe, "train", training.method)
        win = {key: value for key, value in of_trainings.items() if key in options}
        training.keys = of_trainings | training.keys | win
    return Plan(trainings, held_out, Path(out or DEFAULT_OUT), of_evaluation)


def _check_lists(config: str, recipes: Any, methods: Any) -> None:
    names = recipes if isinstance(recipes, list) else [None]
    of_methods = list(methods.values()) if isinstance(methods, dict) else [methods]
    if not all(isinstance(name, str) for name in names) or not all(
        isinstance(keys or {}, dict) for keys in of_methods
    ):
        raise RecipeError(f"{config}: `recipes` is a list of recipes, `methods` a mapping of methods to keys.")
    if any("output_dir" in (keys or {}) for keys in of_methods):
        raise RecipeError(f"{config}: a method has an `output_dir`, but its folder is in the comparison's. Drop it.")


def check_plan(plan: Plan) -> set[str]:
    """Check recipes and held-out rows, load no weights, and return the names of the trainings that are finished.

    Raises UserError, also if bases differ, or a finished training had other settings.
    """
    _check_bases(plan.trainings)
    todo, media = {}, {}
    for training in plan.trainings:
        parsed, given = _check_training(training, plan.folder(training))
        media[training.name] = vars(parsed[1].video_options())
        training.resumes = why_no_resume(parsed[1]) is None
        if not _is_finished(plan.folder(training), training.method, given):
            todo[training] = parsed
    finished = {training.name for training in plan.trainings if training not in todo}
    _check_evaluation(plan, finished)
    config = make_evaluation_parser().parse(launch_options(plan.evaluation_options())[0])[0]
    agreed = agreed_media(media, {key: getattr(config, key) for key in plan.keys if hasattr(config, key)})
    inputs, rows, _ = held_out_rows(config)
    if todo:
        check_held_out(replace(config, **agreed), inputs, rows, finished=())
    for training, (script_args, args, _, mixture) in todo.items():
        try:
            _check_rows(training.method, script_args, args, mixture)
        except UserError as error:
            raise UserError(f"{training.name}: {error}") from error
    return finished


def _check_evaluation(plan: Plan, finished: set[str]) -> None:
    """Refuse an evaluation of other trainings, which could not be continued, before any of them is trained."""
    if not (plan.evaluation / "settings.json").exists():
        return
    known = {*read_settings(plan.evaluation).get("adapters", ())}
    names = {training.name for training in plan.trainings}
    if known == names == finished:
        return
    why = f"is of {', '.join(sorted(known)) or 'no training'}, and not of the trainings that are compared now"
    if known == names:
        why = f"holds answers of an earlier training of {', '.join(sorted(names - finished))}, to be trained anew"
    raise RecipeError(
        f"{plan.evaluation} {why}. Delete this folder, and all models are asked again; finished trainings are kept."
    )


def _check_rows(method: str, script_args: Any, args: Any, mixture: Any) -> None:
    """Check the rows of a training as it does at its start, but for lengths and what only a processor refuses."""
    unopened = args.on_bad_media == "skip" or args.check_media == "off"
    args.check_media = "off" if unopened else "header"
    splits = load_splits(script_args, mixture, evaluate=args.eval_strategy != "no", seed=args.seed)
    for name, dataset in zip(("train", "eval"), splits):
        if dataset is not None:
            phrases = method_classes(method)[1].needs_phrases
            prepare_dataset(dataset, args, name=name, processing_class=None, phrases=phrases)


def _check_training(training: Training, folder: Path) -> tuple[tuple, dict[str, Any]]:
    """Return the parsed arguments of a training, and those that are not defaults."""
    options, _ = launch_options(training.options(folder))
    check_paths(options)
    parser, before = make_parser(training.method, any_device=True), dict(os.environ)
    try:  # on the CPU: this process keeps no memory of a GPU
        parsed = parser.parse([*options, "--use_cpu", "true"])
    finally:  # recipes set variables, and so do the argument classes, which the other commands must not see
        os.environ.clear()
        os.environ.update(before)
    adapter = peft_config(parsed[2])
    if why := "it trains all weights" if adapter is None else loses_base(adapter):
        raise RecipeError(f"{training.name}: {why}, and a comparison needs LoRA adapters on one base.")
    return parsed, parser.given


def option_words(keys: Mapping[str, Any]) -> list[str]:
    """Return keys of a recipe as options: `["--max_steps", "2", ...]`."""
    words = []
    for key, value in keys.items():
        if value is None:
            raise RecipeError(f"`{key}` has no value: give one, or leave it out.")
        values = value if isinstance(value, list) else [value]
        texts = (json.dumps(one) if isinstance(one, (bool, dict)) else str(one) for one in values)
        words += [f"--{key}", *texts]
    return words


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return options by their keys: a text, several, or True for a switch."""
    found: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            key = name.replace("-", "_")
            found[key] = [value] if given else []
        elif key is None:
            raise RecipeError(f"{word!r} belongs to no option.")
        else:
            found[key].append(word)
    return {key: values[0] if len(values) == 1 else values or True for key, values in found.items()}


def _split(given: Mapping[str, Any], methods: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of all trainings and those of the evaluation; the parsers refuse what neither has."""
    known = {key for method in methods for key in annotations(make_parser(method, any_device=True).dataclass_types)}
    asked = set(annotations([EvaluateConfig])) - OF_TRAINING
    return (
        {key: value for key, value in given.items() if key in known or key not in asked},
        {key: value for key, value in given.items() if key in asked or key in LAUNCH_KEYS},
    )


def _name(trainings: list[Training]) -> None:
    """Name trainings by their methods, those of one method by their recipes, too."""
    methods = Counter(training.method for training in trainings)
    for training in trainings:
        several = methods[training.method] > 1 and training.recipe
        training.name = f"{training.method}-{Path(training.recipe).stem}" if several else training.method
    twice = [name for name, count in Counter(training.name for training in trainings).items() if count > 1]
    if twice or not trainings:
        raise RecipeError(f"two trainings are named {twice[0]}: rename a recipe's file." if twice else "no recipe.")


def _check_bases(trainings: Sequence[Training]) -> None:
    bases = {}
    for training in trainings:
        values = training.values()
        if not values.get("model_name_or_path"):
            raise RecipeError(f"{training.name}: there is no model: set `model_name_or_path`.")
        bases[training.name] = ", ".join(f"{key} {values[key]}" for key in BASE if values.get(key) is not None)
    if len(set(bases.values())) > 1:
        listed = "".join(f"\n  - {name}: {base}" for name, base in bases.items())
        raise RecipeError(
            f"the recipes have different bases, which one table cannot compare:{listed}\nGive the keys that differ as "
            "options, for all of them, or compare those of one base."
        )


def _is_finished(folder: Path, method: str, given: dict[str, Any]) -> bool:
    """Return whether a training was finished; raise if it had other settings, another base or other rows."""
    if not (path := folder / "run.json").exists():
        return False
    try:
        record = read_object(path, "recipe")
    except ValueError as error:
        raise RecipeError(f"{path}: {error} Delete the folder to train it again, or name another --out.") from error
    now = json.loads(json.dumps(scrub(given), default=str))
    old, new = ({"method": m} | fixed_recipe(k) for m, k in ((record.get("method"), record["recipe"]), (method, now)))
    changed = sorted(key for key in {*old, *new} - {"use_cpu"} if old.get(key) != new.get(key))
    values = ((key, *(repr(keys[key]) if key in keys else "its default" for keys in (old, new))) for key in changed)
    lines = [f"\n  {key}: was {before}, is {after}" for key, before, after in values]
    if was := record.get("contents"):
        is_now = contents(given, model_files(given["model_name_or_path"], given.get("model_revision")))
        lines += [f"\n  {key}: {given.get(key)} has changed since" for key in was if was[key] != is_now.get(key)]
    if lines:
        raise RecipeError(
            f"{folder} was trained with other settings:{''.join(lines)}\nName another --out, or delete the folder to "
            "train it again."
        )
    return True
