"""Messages of libraries at start-up that mean nothing is wrong, and that whoever trains can do nothing about."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# FutureWarnings about names that TRL, transformers and PEFT themselves still use; TRL's configs know no other
DEPRECATED = (
    r"`gradient_checkpointing(_kwargs|_enable|_disable)?` is deprecated",
    r"`is_gradient_checkpointing` is deprecated",
)
HIDDEN = {  # logger: how the message begins
    "DeepSpeed": "Setting accelerator to CPU",  # it is asked although it is not used
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # a faster kernel, on the CPU alone
}


def hide_messages() -> None:
    """Hide the messages above, and no other."""
    for message in DEPRECATED:
        warnings.filterwarnings("ignore", message, FutureWarning)
    for name in HIDDEN:
        logging.getLogger(name).addFilter(_is_news)


def quiet_libraries(*, bars: bool | None = None) -> None:
    """Hide the messages above, and bars of libraries where they would fill a log. Call it before building a trainer.

    By default `bars` are shown on rank 0 of a terminal only: in a log file each step of a bar is a line.
    """
    hide_messages()
    if bars is None:
        bars = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if not bars:
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HIDDEN[record.name])
