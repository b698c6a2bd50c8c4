"""Work that one process does for all of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from trl_vpo.errors import UserError


def print_main(message: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(f"trl-vpo: {message}", flush=True)


def on_main_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process; return its result, or raise its `UserError`, on all ranks.

    All ranks call this.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(*args)
        except UserError as error:  # for all ranks: the others would wait
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
