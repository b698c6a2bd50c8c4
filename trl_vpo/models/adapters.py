"""LoRA adapters: the presets of `lora_target_modules`, and what vLLM needs of a saved adapter."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors import safe_open
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from trl_vpo.errors import RecipeError, did_you_mean
from trl_vpo.forward.parts import CHOOSERS, named, output_head, part_of
from trl_vpo.models.source import read_config

PRESETS = ("language", "language+projector", "all")
# Ways to begin a LoRA that leave the base's weights as they are; the others (PiSSA, OLoRA, ...) subtract something.
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
PEFT_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # PEFT's names of experts and routers
MAX_LORA_RANK = 16  # vLLM's default
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


def check_targets(targets: str | Iterable[str] | None) -> None:
    """Raise RecipeError for a single word that is no preset, or a preset among other names: they match nothing."""
    if targets is None or targets in (*PRESETS, "all-linear"):
        return
    if isinstance(targets, str):
        if re.fullmatch(r"[\w+-]+", targets):
            raise RecipeError(
                f"lora_target_modules: {targets!r} is none of the presets {', '.join(PRESETS)}."
                f"{did_you_mean(targets, PRESETS)} Anything else is a regular expression of whole module names, such "
                rf"as .*\.{targets}"
            )
    elif presets := [name for name in targets if name in PRESETS]:
        raise RecipeError(
            f"lora_target_modules: the preset {presets[0]!r} stands alone, without other names. Write a regular "
            "expression to adapt something else."
        )


def check_parameters(config: Any, remedy: str = "leave lora_target_parameters out") -> None:
    """Raise RecipeError for what PEFT does not do to single parameters (`target_parameters`), as those of experts."""
    remedies = {"lora_dropout": "0.0", "use_dora": "false", "lora_bias": "false"}
    given = [name for name in remedies if getattr(config, name, None)]
    if given and getattr(config, "target_parameters", None):
        raise RecipeError(
            f"{' and '.join(given)}: PEFT has that for layers, not for lora_target_parameters. Set "
            f"{', '.join(f'{name}: {remedies[name]}' for name in given)}, or {remedy}."
        )


def preset_targets(model: PreTrainedModel, preset: str) -> tuple[str | list[str], list[str]]:
    r"""Return the modules of a preset as a regular expression of whole names, and parameters beside them.

    Both load without `trl_vpo`. The model may be empty, and has no adapter.

    - `language`: the linear layers of the language model (attention and MLP of its decoder layers). Not the
      embeddings, not the LM head, no routers. Experts that are stored as one fused parameter are no linear layers; a
      warning names them, `lora_target_parameters` adapts them.
    - `language+projector`: those, and the linear layers between vision tower and language model: Qwen's mergers with
      those of DeepStack, the multi-modal projector of LLaVA and InternVL, the connector of Idefics and SmolVLM with
      the perceiver of Idefics2; Gemma 3's projector is a parameter.
    - `all`: those, and the linear layers of the vision tower. Not its convolutions and embeddings. Layers behind
      `vision_feature_layer` are adapted too, and learn nothing.

    Where PEFT would rewrite the expression, it is a list of names, and what it takes for experts goes by its weights.
    Without a projector or vision tower that is known: RecipeError.
    """
    modules = dict(model.named_modules())
    text, head = model.get_decoder(), output_head(model)
    prefix = next(name for name, module in modules.items() if module is text) + "."
    # `nn.MultiheadAttention` reads the weight of its own kind of linear layer and never calls it: LoRA would not act.
    uncalled = NonDynamicallyQuantizableLinear
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and not isinstance(m, uncalled)]
    names = {
        name
        for name in linear
        if name.startswith(prefix) and part_of(name) == "language" and not named(CHOOSERS).search(name)
    } - {name for name in linear if modules[name] is head}
    _warn_of_fused(text)
    parameters = []
    for what, part in [("projector", "projector"), ("vision tower", "vision")][: PRESETS.index(preset)]:
        matches = {name for name in linear if part_of(name) == part}
        weights = [name for name, p in model.named_parameters() if part_of(name) == part and p.dim() == 2]
        if not matches and (part == "vision" or not weights):
            raise RecipeError(
                f"lora_target_modules: {preset}: {type(model).__name__} has no {what} that is known. Use language, or "
                "a regular expression of whole module names."
            )
        names |= matches
        parameters += [] if matches else weights
    names -= _misplaced(names, model)
    pattern = _pattern(names, set(modules))
    if _as_peft_reads(pattern, model) == pattern:
        return pattern, parameters
    # `_convert_peft_config_moe` of peft/utils/transformers_weight_conversion.py (0.21): there is no way to name an
    # MLP beside the experts as a module.
    kept = {name for name in names if name.rpartition(".")[2] not in PEFT_EXPERTS}
    return sorted(kept), parameters + [f"{name}.weight" for name in sorted(names - kept)]


def _misplaced(names: set[str], model: PreTrainedModel) -> set[str]:
    """Return the layers whose adapter PEFT would load in another place, and warn of them.

    All of the language model's: RecipeError.
    """
    lost = _lost(names, model)
    if lost and lost.issuperset(name for name in names if part_of(name) == "language"):
        raise RecipeError(
            f"an adapter of {type(model).__name__} would not load: PEFT looks for its weights in other places. "
            "use_peft: false trains the whole model."
        )
    if lost:
        warnings.warn(
            f"{len(lost)} linear layers such as {min(lost)} are not adapted: PEFT would load their adapter in another "
            "place.",
            stacklevel=3,
        )
    return lost


def _lost(names: Iterable[str], model: PreTrainedModel) -> set[str]:
    """Return the layers whose adapter would not load.

    PEFT 0.21 renames the weights of a saved adapter as those of its base's checkpoints. To be deleted when it stops.
    """
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict.fromkeys(keys, torch.zeros(1)))
    return {name for key, name in keys.items() if key not in loaded}


def _as_peft_reads(targets: str | list[str], model: PreTrainedModel) -> str | set[str]:
    """Return what PEFT makes of some targets, which it takes for those of an older transformers in some MoE models."""
    config = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(config, model, None)
    return config.target_modules


def resolve_targets(peft_config: Any, model: nn.Module) -> None:
    """Replace the preset of a LoRA config by names of a model, in place. Other targets stay as they are."""
    targets = getattr(peft_config, "target_modules", None)
    check_targets(targets)
    if targets in PRESETS:
        peft_config.target_modules, more = preset_targets(model, targets)
        if more:
            peft_config.target_parameters = [*(peft_config.target_parameters or []), *more]
            check_parameters(peft_config, f"name modules in the place of {targets!r}, which adapts {more[0]} here")


def check_adapted(model: PeftModel) -> None:
    """Raise RecipeError for a new adapter that PEFT would not load, and for names in its lists that match nothing.

    PEFT would leave the latter out.
    """
    tuner, config, base = model.base_model, model.peft_config[model.active_adapter], model.get_base_model()
    if lost := _lost(tuner.targeted_module_names, base):
        raise RecipeError(
            f"an adapter of {min(lost)} would not load into {type(base).__name__}: PEFT looks for its weights in "
            "another place. Leave such layers out of lora_target_modules; use_peft: false trains the whole model."
        )
    saved = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    there = {
        "target_modules": tuner.targeted_module_names,
        "target_parameters": tuner.targeted_parameter_names,
        "modules_to_save": saved,
    }
    for key, matched in there.items():
        names = getattr(config, key, None) or ()
        names = () if isinstance(names, str) else sorted(names)
        ends = "" if key == "modules_to_save" else "."  # as PEFT compares
        lost = [name for name in names if not any(f".{one}".endswith(ends + name) for one in matched)]
        if lost:
            experts = {".".join(name.replace(".base_layer", "").split(".")[-3:]) for name in _fused(model)}
            hint = f" lora_target_parameters takes its experts: [{', '.join(sorted(experts))}]." if experts else ""
            raise RecipeError(
                f"lora_{key}: {type(base).__name__} has nothing to adapt that is called "
                f"{', '.join(lost)}, and PEFT would leave that out. Correct or drop it.{hint}"
            )


def _fused(model: nn.Module) -> list[str]:
    """Return the parameters that hold the weights of several experts."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]


def _warn_of_fused(text: nn.Module) -> None:
    if fused := _fused(text):
        warnings.warn(
            f"{len(fused)} parameters such as {fused[0]} hold the weights of several experts; no preset adapts them. "
            "Name them in lora_target_parameters to do so.",
            stacklevel=3,
        )


def _pattern(names: set[str], every: set[str]) -> str:
    """A regular expression for exactly `names` out of `every` module name, with layer numbers as `\\d+` if it can."""
    leaves = defaultdict(set)
    for name in names:
        *parents, leaf = name.split(".")
        leaves["".join(r"\d+\." if p.isdigit() else rf"{re.escape(p)}\." for p in parents)].add(re.escape(leaf))
    pattern = "|".join(f"{stem}({'|'.join(sorted(leaves[stem]))})" for stem in sorted(leaves))
    if {name for name in every if re.fullmatch(pattern, name)} == names:
        return pattern
    return "|".join(re.escape(name) for name in sorted(names))  # layers that differ from one another


def loses_base(config: Any) -> str | None:
    """Say why a model is not its base where an adapter of this config is switched off; None: it is."""
    init = getattr(config, "init_lora_weights", True)
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"bias={bias!r} trains the base's own biases"
    return f"init_lora_weights={init!r} changes the base's weights" if _changes_base(init) else None


def _changes_base(init: Any) -> bool:
    return isinstance(init, str) and init.lower() not in KEEPS_BASE


def saved_names(folder: Path | str) -> set[str]:
    """Return the names of a saved adapter's tensors."""
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def vllm_problems(adapter: Path | str) -> list[str]:
    """Say why vLLM would refuse a saved adapter, or ignore parts of it; empty where nothing speaks against it."""
    return vllm_refuses(read_config(adapter), saved_names(adapter))


def vllm_refuses(config: dict[str, Any], tensors: Iterable[str], *, max_lora_rank: int = MAX_LORA_RANK) -> list[str]:
    """Like `vllm_problems`, of an adapter that is not saved yet: its config and the names of its tensors.

    After vLLM's own checks (`vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`, 2026): it takes plain LoRA and
    rsLoRA of linear layers. What it does not take can be merged into the base model.
    """
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    trained = ", ".join(config.get("modules_to_save") or [])
    merge = "merge it into the base model first."
    features = [  # (has it, what to say)
        (kind != "LORA", f"it is {kind}, not LoRA: {merge}"),
        (config.get("use_dora"), f"it is DoRA (use_dora): {merge}"),
        (trained, f"it holds fully trained modules (modules_to_save: {trained}): {merge}"),
        (config.get("bias", "none") != "none" or config.get("lora_bias"), f"it has biases: {merge}"),
        (config.get("alora_invocation_tokens"), "it is activated LoRA (alora_invocation_tokens)."),
        (config.get("layer_replication"), "it repeats layers (layer_replication)."),
        (
            _changes_base(init),
            f"init_lora_weights={init!r} changes the base model's weights, which vLLM leaves as they are: {merge}",
        ),
    ]
    problems = [problem for applies, problem in features if applies]
    matches = {name: re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name) for name in tensors}
    unknown = sorted(name for name, match in matches.items() if match is None)
    if unknown and not problems:
        problems.append(f"{len(unknown)} tensors are no LoRA weights of linear layers, such as {unknown[0]}.")
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    if rank > max_lora_rank:
        enough = next((number for number in LORA_RANKS if number >= rank), None)
        remedy = f"start vLLM with --max-lora-rank {enough}" if enough else f"vLLM takes {LORA_RANKS[-1]} at most"
        problems.append(f"its rank is {rank}, vLLM's max_lora_rank {max_lora_rank}: {remedy}.")
    modules = {match[1] for match in matches.values() if match}
    if vision := sorted(name for name in modules if part_of(name) != "language"):
        problems.append(
            f"{len(vision)} of its {len(modules)} modules are in vision tower or projector, such as {vision[0]}: vLLM "
            "ignores them unless it is started with --enable-tower-connector-lora, which some models do not have."
        )
    return problems
