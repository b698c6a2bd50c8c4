"""The settings that a run may change when it is continued. Any other change is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The folder, the choice and place of the inputs, and speed: none of them changes the outcome of an input.
_INPUTS = {"output_dir", "limit", "batch_size", "device", "dataset_name", "dataset_config", "dataset_split"}
RESUME_MAY_CHANGE = {
    "generate": _INPUTS
    | {"dry_run", "timeout", "max_retries", "max_requests", "api_key_env", "judge_api_key_env"}
    | {"server_url", "judge_url"},  # who answers there is compared, not the address
    "evaluate": _INPUTS
    | {"media_root", "on_bad", "judge_url", "judge_api_key_env"}
    | {"adapters"}  # compared by their contents
    | {"yes_no_rule", "synonyms", "level", "resamples"},  # the answers stay, the results are computed again
    "train": {"output_dir", "run_name", "resume_from_checkpoint", "project", "disable_tqdm", "push_to_hub"}
    | {"frame_cache", "precompute_cache_dir", "check_media", "media_root", "ddp_timeout", "skip_memory_metrics"}
    | {"include_num_input_tokens_seen", "dataset_num_proc", "restore_callback_states_from_checkpoint"}
    | {"displacement_warning"},
}


def fixed_settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change when a run of this command is continued."""
    return {key: value for key, value in settings.items() if key not in RESUME_MAY_CHANGE[command]}


# --- training -------------------------------------------------------------------------------------------------------

# Besides the keys in the table: what is logged, saved and pushed, and how data are loaded.
TRAIN_PREFIXES = (
    "logging_", "log_", "save_", "hub_", "report_to", "trackio_", "dataloader_num_", "dataloader_pin_",
    "dataloader_prefetch_", "dataloader_persistent_",
)  # fmt: skip
# Compared by contents, not by name: clusters copy models and data to a new disk for every job.
TRAIN_MODEL = {"model_name_or_path", "model_revision"}
TRAIN_DATA = {"dataset_name", "dataset_config", "dataset_train_split", "datasets"}
ROUNDING = "The rest of the run may differ in rounding and random numbers."
SCHEDULE = "The {scheduler} schedule of the learning rate follows the new length."
NO_ROW = "It changes no row that was trained on."  # which rows are refused; nothing is cut
TRAIN_WARNS = {  # may change; the rest of the run is then not, bit for bit, what it would have been
    "max_steps": SCHEDULE,
    "num_train_epochs": SCHEDULE,
    "max_length": NO_ROW,
    "on_bad_media": NO_ROW,
    "per_device_eval_batch_size": ROUNDING,
    "gradient_checkpointing": ROUNDING,
    "gradient_checkpointing_kwargs": ROUNDING,
    "activation_checkpointing": ROUNDING,
    "activation_checkpointing_kwargs": ROUNDING,
    "activation_offloading": ROUNDING,
    "metric_for_best_model": ROUNDING,
    "load_best_model_at_end": ROUNDING,
    "greater_is_better": ROUNDING,
}
TRAIN_WARNS_PREFIXES = ("eval_", "test_split_", "dataset_test_")


def fixed_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a training recipe that must not change, or only with a warning."""
    return {key: value for key, value in fixed_settings("train", recipe).items() if not key.startswith(TRAIN_PREFIXES)}


def warning_of_change(key: str, scheduler: str) -> str | None:
    """Return the consequence of a changed key of a training recipe; None if it must not change."""
    if key.startswith(TRAIN_WARNS_PREFIXES):
        return ROUNDING
    warning = TRAIN_WARNS.get(key)
    return warning and warning.format(scheduler=scheduler)
