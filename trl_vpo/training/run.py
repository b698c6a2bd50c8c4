"""The one entry point of training: the command line, `scripts/train.py` and the quickstart all come here.

TRL's parser and conventions (see its scripts/dpo.py). Relative paths in a recipe start from the working directory.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import constants
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config

from trl_vpo.data.sources import load_splits
from trl_vpo.errors import RecipeError, UserError, as_user_errors, did_you_mean
from trl_vpo.forward.parts import part_of
from trl_vpo.models.adapters import check_parameters, check_targets, vllm_problems
from trl_vpo.models.load import NOT_QUANTIZED
from trl_vpo.models.source import check_model
from trl_vpo.runs.quiet import quiet_libraries
from trl_vpo.runs.recipe import RecipeParser, VisualScriptArguments
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.setup import check_memory
from trl_vpo.training import hub, resume
from trl_vpo.training.checkpoints import what_is_left
from trl_vpo.training.failed_saves import explain_failed_save
from trl_vpo.training.main_process import on_main_process
from trl_vpo.training.methods import METHODS, method_classes
from trl_vpo.training.output_dir import hold_output_dir
from trl_vpo.training.progress import show_progress
from trl_vpo.training.run_identity import contents, describe_run, digest_rows
from trl_vpo.training.run_json import write_run_json
from trl_vpo.training.sigterm import end_with_launcher
from trl_vpo.training.start import describe_start


def make_parser(method: str, *, any_device: bool = False) -> RecipeParser:
    """The parser of a method's recipes and options. Raises RecipeError for an unknown method."""
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}; one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    types = (VisualScriptArguments, method_classes(method)[0], ModelConfig, DatasetMixtureConfig)
    return RecipeParser(types, any_device=any_device, prog=f"trl-vpo train {method}")


def parse(method: str, argv: list[str], *, any_device: bool = False) -> tuple:
    """Return (script_args, training_args, model_args, dataset_args) of a recipe and options, and load nothing.

    `any_device`: parse also where the recipe could not run, such as a bf16 recipe without a GPU. Raises UserError.
    """
    return make_parser(method, any_device=any_device).parse(argv)


def run_training(
    method: str, argv: list[str], *, left: Callable[[str], str] = what_is_left
) -> VisualPreferenceTrainer:
    """Train with a method; save adapter (or model), processor, model card and `run.json` into `output_dir`.

    `argv` are the options of `trl-vpo train METHOD`, such as `["--config", "recipe.yaml"]`. `left` says of an
    `output_dir` how to go on after an interruption. Raises UserError (see `trl_vpo.errors`), and TrainingStopped where
    SIGTERM came and a checkpoint was saved.
    """
    end_with_launcher()
    quiet_libraries()
    started = datetime.now(UTC)
    parser = make_parser(method)
    script_args, training_args, model_args, dataset_args = parser.parse(argv)
    _check_arguments(training_args, model_args)
    offline = constants.HF_HUB_OFFLINE
    check_model(model_args.model_name_or_path, revision=model_args.model_revision)
    with hold_output_dir(training_args.output_dir):
        checkpoint = on_main_process(resume.find_checkpoint, training_args)
        push = hub.connect(training_args)
        with as_user_errors():
            evaluate = training_args.eval_strategy != "no"
            train, test = load_splits(script_args, dataset_args, evaluate=evaluate, seed=training_args.seed)
            trainer = build_trainer(method, script_args, training_args, model_args, train, test)
        rows = len(train) if hasattr(train, "__len__") else None
        dataset_name = script_args.dataset_name or ", ".join(d.path for d in dataset_args.datasets)
        if push:
            constants.HF_HUB_OFFLINE = offline  # what was loaded from the cache is pushed once the Hub is there
            push.attach(trainer, dataset_name)
        show_progress(trainer, describe_start(trainer, train, push.repo.name if push else None))
        run = describe_run(trainer, method, parser.given)
        about = {"method": method, "recipe": parser.given, "recipe_path": parser.recipe_path}
        about["contents"] = contents(parser.given, run["model files"]) if trainer.is_world_process_zero() else {}
        if push and checkpoint:
            push.add_earlier(resume.earlier_parts(checkpoint, run, training_args.output_dir))
        in_use = push.in_use if push else tuple
        result = resume.train(trainer, checkpoint, run, digest_rows(trainer, parser.given), in_use=in_use, left=left)
        trainer.accelerator.print("Training completed.")
        with explain_failed_save(trainer, Path(training_args.output_dir)):
            trainer.save_model(training_args.output_dir)  # with the processor
            trainer.save_state()  # the log history, for `trl-vpo plot`
            name = push.repo.name if push else training_args.hub_model_id
            trainer.create_model_card(model_name=name, dataset_name=dataset_name)
            if trainer.is_world_process_zero():
                write_run_json(trainer, about, rows, result.metrics, started)
        trainer.accelerator.print(f"Saved to {training_args.output_dir}.{_serving_note(trainer)}")
        trainer.end()
        if push:
            push.finish()
    return trainer


def _check_arguments(training_args: Any, model_args: Any) -> None:
    """Refuse what can be refused before data and model are loaded."""
    if not model_args.model_name_or_path:
        raise RecipeError("there is no model: set `model_name_or_path` to a Hub model or a folder.")
    check_memory(training_args, adapted=peft_config(model_args) is not None)
    if training_args.enable_jit_checkpoint:
        raise RecipeError(
            "enable_jit_checkpoint: leave it out. A checkpoint is always saved at the end of the step when SIGTERM "
            "comes; the one of transformers may be saved in the middle of a step, and cannot be resumed exactly."
        )


def build_trainer(
    method: str, script_args: Any, training_args: Any, model_args: Any, train: Any, test: Any = None
) -> VisualPreferenceTrainer:
    """Load the model of parsed arguments, and give the trainer of these datasets."""
    adapter_config = peft_config(model_args)
    training_args.model_init_kwargs = {  # as in TRL's scripts
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "use_safetensors": True,  # other formats are pickled: loading them may run code
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    revision = training_args.model_init_kwargs["revision"]
    if adapter_config is not None and revision != "main":
        adapter_config.revision = revision  # of the base, for whoever loads the adapter
    trainer = method_classes(method)[1](
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=quantization_config(model_args),
        peft_config=adapter_config,
    )
    if script_args.freeze_vision:
        freeze_vision(trainer.model)
    if script_args.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, b in buffers if b.dtype == torch.bool]
    show_progress(trainer)
    return trainer


def peft_config(model_args: Any) -> Any:
    """TRL's LoRA config, or None without LoRA. The trainer resolves a preset of `lora_target_modules`.

    Raises RecipeError, before data are loaded, for a preset or option that there is not.
    """
    config = get_peft_config(model_args)
    if config is not None:
        check_targets(config.target_modules)
        check_parameters(config)
    return config


def quantization_config(model_args: Any) -> Any:
    """TRL's quantization config, with vision tower, projector and head left in full precision."""
    config = get_quantization_config(model_args)
    if config is not None:
        config.llm_int8_skip_modules = list(NOT_QUANTIZED)
    return config


def freeze_vision(model: Any) -> None:
    """Train nothing but the language model. Raises UserError where no other part is known."""
    parameters = [p for name, p in model.named_parameters() if part_of(name) != "language"]
    if not parameters:
        raise UserError(f"freeze_vision: {type(model).__name__} has no vision tower that is known. Leave it out.")
    for parameter in parameters:
        parameter.requires_grad_(False)


def _serving_note(trainer: Any) -> str:
    """Say what vLLM makes of the adapter that was saved; nothing of a whole model, which it loads as any other."""
    if not trainer.is_world_process_zero() or not is_peft_model(trainer.model):
        return ""
    problems = " ".join(vllm_problems(trainer.args.output_dir))
    return (
        f" vLLM and this adapter: {problems}"
        if problems
        else " It is in PEFT's layout, which vLLM reads (not tried here)."
    )
