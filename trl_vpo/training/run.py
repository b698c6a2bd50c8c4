"""The one entry point of training: the command line, `scripts/train.py` and the quickstart all come here.

TRL's parser and conventions (see its scripts/dpo.py). Relative paths in a recipe start from the working directory.
Nothing heavy is imported before a trainer is needed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_vpo.runs.recipe import RecipeParser
    from trl_vpo.trainers.base import VisualPreferenceTrainer

METHODS = {  # method: (config, trainer), names in `trl_vpo`
    "dpo": ("VisualDPOConfig", "VisualDPOTrainer"),
    "leanpo": ("LeanPOConfig", "LeanPOTrainer"),
    "rrpo": ("RRPOConfig", "RRPOTrainer"),
    "lpoi": ("LPOIConfig", "LPOITrainer"),
}


def make_parser(method: str, *, any_device: bool = False) -> RecipeParser:
    """The parser of a method's recipes and options.

    Raises:
        RecipeError: there is no such method.
    """
    from trl import DatasetMixtureConfig, ModelConfig

    import trl_vpo
    from trl_vpo.errors import RecipeError, did_you_mean
    from trl_vpo.runs.recipe import RecipeParser, VisualScriptArguments

    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}; one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    config = getattr(trl_vpo, METHODS[method][0])
    types = (VisualScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    return RecipeParser(types, any_device=any_device, prog=f"trl-vpo train {method}")


def parse(method: str, argv: list[str], *, any_device: bool = False) -> tuple:
    """(script_args, training_args, model_args, dataset_args) of a recipe and options. Loads no model and no data.

    Args:
        method: a key of `METHODS`.
        argv: `["--config", "recipe.yaml", "--learning_rate", "1e-6", ...]`.
        any_device: parse also where the recipe could not run, such as a bf16 recipe without a GPU.

    Raises:
        RecipeError, ValueError: what is wrong, before anything is loaded.
    """
    return make_parser(method, any_device=any_device).parse(argv)


def run_training(method: str, argv: list[str]) -> VisualPreferenceTrainer:
    """Train with a method; save adapter (or model), processor, model card and `run.json` into `output_dir`.

    Args:
        method: dpo, leanpo, rrpo or lpoi.
        argv: the options of `trl-vpo train METHOD`, such as `["--config", "recipe.yaml"]`.

    Raises:
        RecipeError, ValueError: the recipe cannot be used.
        DatasetError, RowError: the data cannot be.
        NonFiniteLossError: training diverged; nothing was saved after the last checkpoint.
        CheckpointError: training cannot go on from the checkpoint that `resume_from_checkpoint` means.
        OutputDirError: `output_dir` cannot be written, or another training writes to it.
        SaveError: a checkpoint or the result could not be written.
        TrainingStopped: SIGTERM came; a checkpoint was saved.
        HubError: `push_to_hub`, and the Hub refuses it.
    """
    from huggingface_hub import constants

    from trl_vpo.models.source import check_model
    from trl_vpo.runs.quiet import quiet_libraries
    from trl_vpo.training import hub, resume
    from trl_vpo.training.output_dir import hold_output_dir
    from trl_vpo.training.run_identity import describe_run, digest_rows
    from trl_vpo.training.signals import end_with_launcher

    end_with_launcher()
    quiet_libraries()
    started = datetime.now(UTC)
    parser = make_parser(method)
    script_args, training_args, model_args, dataset_args = parser.parse(argv)
    refuse_jit_checkpoint(training_args)
    offline = constants.HF_HUB_OFFLINE
    if model_args.model_name_or_path:
        check_model(model_args.model_name_or_path, revision=model_args.model_revision)
    with hold_output_dir(training_args):
        checkpoint = resume.find_checkpoint(training_args)
        push = hub.connect(training_args)
        trainer, rows = build_trainer(method, script_args, training_args, model_args, dataset_args)
        if push:
            constants.HF_HUB_OFFLINE = offline  # what was loaded from the cache is pushed once the Hub is there
        dataset_name = script_args.dataset_name or ", ".join(d.path for d in dataset_args.datasets)
        if push:
            push.attach(trainer, dataset_name)
        run = describe_run(trainer, method, parser.given)
        result = resume.train(trainer, checkpoint, run, digest_rows(trainer))
        trainer.accelerator.print("Training completed.")
        with resume.explain_failed_saves(trainer):
            trainer.save_model(training_args.output_dir)  # with the processor
            trainer.save_state()  # the log history, for `trl-vpo plot`
        name = push.repo.name if push else training_args.hub_model_id
        trainer.create_model_card(model_name=name, dataset_name=dataset_name)
        if trainer.is_world_process_zero():
            from trl_vpo.runs.record import write_run_record

            write_run_record(
                trainer, method=method, recipe=parser.given, recipe_path=config_path(argv), rows=rows,
                metrics=result.metrics, started=started,
            )  # fmt: skip
        trainer.accelerator.print(f"Saved to {training_args.output_dir}.{_serving_note(trainer)}")
        trainer.end()
        if push:
            push.finish()
    return trainer


def _serving_note(trainer: Any) -> str:
    """What vLLM would make of the adapter that was saved; nothing for a whole model, which it loads as any other."""
    from accelerate.utils import is_peft_model

    from trl_vpo.models.adapters import vllm_problems

    if not trainer.is_world_process_zero() or not is_peft_model(trainer.model):
        return ""
    problems = vllm_problems(trainer.args.output_dir)
    return f" vLLM and this adapter: {' '.join(problems)}" if problems else " vLLM serves it as it is."


def build_trainer(method: str, script_args, training_args, model_args, dataset_args) -> tuple[Any, int | None]:
    """The trainer of parsed arguments, and how many rows its train split has (None: streamed)."""
    import trl_vpo
    from trl_vpo.data.sources import load_splits
    from trl_vpo.errors import RecipeError
    from trl_vpo.training.progress import show_progress

    if not model_args.model_name_or_path:
        raise RecipeError("there is no model: set `model_name_or_path` to a Hub model or a folder.")
    adapter_config = peft_config(model_args)
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    revision = training_args.model_init_kwargs["revision"]
    if adapter_config is not None and revision != "main":
        adapter_config.revision = revision  # of the base, for whoever loads the adapter
    evaluate = training_args.eval_strategy != "no"
    train, test = load_splits(script_args, dataset_args, evaluate=evaluate, seed=training_args.seed)
    rows = len(train) if hasattr(train, "__len__") else None
    trainer = getattr(trl_vpo, METHODS[method][1])(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=quantization_config(model_args),
        peft_config=adapter_config,
    )
    show_progress(trainer)
    if script_args.freeze_vision:
        freeze_vision(trainer.model)
    if script_args.ignore_bias_buffers:
        import torch

        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, b in buffers if b.dtype == torch.bool]
    return trainer, rows


def refuse_jit_checkpoint(training_args: Any) -> None:
    """Refuse transformers' checkpoint on SIGTERM.

    Raises:
        RecipeError: `enable_jit_checkpoint` is on.
    """
    from trl_vpo.errors import RecipeError

    if training_args.enable_jit_checkpoint:
        raise RecipeError(
            "enable_jit_checkpoint: leave it out. A checkpoint is saved at the end of the step when SIGTERM comes, "
            "always; the one of transformers may be saved in the middle of a step and cannot be gone on from exactly."
        )


def freeze_vision(model: Any) -> None:
    """Train nothing in vision tower and projector.

    Raises:
        ValueError: the model has none that we know.
    """
    from trl_vpo.models.model_size import VISION

    found = [parameter for name, parameter in model.named_parameters() if VISION.search(name)]
    if not found:
        raise ValueError(f"freeze_vision: {type(model).__name__} has no vision tower that we know. Leave it out.")
    for parameter in found:
        parameter.requires_grad_(False)


def model_init_kwargs(training_args: Any, model_args: Any) -> dict[str, Any]:
    """How the model is loaded, as TRL's scripts put it together; the recipe's own `model_init_kwargs` win."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "use_safetensors": True,  # other formats are pickled: loading them may run code
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def peft_config(model_args: Any) -> Any:
    """TRL's LoRA config, or None without LoRA. The trainer spells a preset of `lora_target_modules` out.

    Raises:
        RecipeError: there is no such preset; said before data are loaded.
    """
    from trl import get_peft_config

    from trl_vpo.models.adapters import check_targets

    config = get_peft_config(model_args)
    if config is not None:
        check_targets(config.target_modules)
    return config


def quantization_config(model_args: Any) -> Any:
    """TRL's quantization config, with vision tower, projector and head left in full precision."""
    from trl import get_quantization_config

    config = get_quantization_config(model_args)
    if config is not None:
        from trl_vpo.models.load import NOT_QUANTIZED

        config.llm_int8_skip_modules = list(NOT_QUANTIZED)
    return config


def config_path(argv: list[str]) -> str | None:
    """The recipe that options name, or None."""
    for arg, following in zip(argv, [*argv[1:], None]):
        if arg == "--config":
            return following
        if arg.startswith("--config="):
            return arg.removeprefix("--config=")
    return None
