"""The settings that a run may change when it is continued. Any other change is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The folder, which of the inputs, where they lie, and how fast: none of it changes what is made of an input.
_INPUTS = {"output_dir", "limit", "batch_size", "device", "dataset_name", "dataset_config", "dataset_split"}
RESUME_MAY_CHANGE = {
    "generate": _INPUTS
    | {"dry_run", "timeout", "max_retries", "max_requests", "api_key_env", "judge_api_key_env"}
    | {"server_url", "judge_url"},  # who answers there is compared, not the address
    "evaluate": _INPUTS
    | {"media_root", "on_bad"}
    | {"adapters"}  # compared by their contents
    | {"yes_no_rule", "synonyms", "level", "resamples"},  # the answers stay, the results are computed anew
}


def fixed_settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that have to stay as they are when a run of this command is continued."""
    return {key: value for key, value in settings.items() if key not in RESUME_MAY_CHANGE[command]}
