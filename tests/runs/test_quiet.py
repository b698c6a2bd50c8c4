"""Messages at start-up that mean nothing are hidden; all others come through."""

import io
import logging
import sys
import warnings

import datasets
import pytest
import transformers
from transformers import TrainingArguments

from trl_vpo.runs import quiet


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def filters():
    """Filters as they were before, afterwards."""
    kept = {name: list(logging.getLogger(name).filters) for name in quiet.HIDDEN}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    for name, before in kept.items():
        logging.getLogger(name).filters[:] = before


def test_only_the_deprecations_of_trl_itself_are_hidden(tmp_path, filters):
    TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=False)
    assert any("`gradient_checkpointing` is deprecated" in str(warning.message) for warning in filters)  # still needed
    filters.clear()
    quiet.quiet_libraries(bars=True)
    TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=False)
    assert not [warning for warning in filters if issubclass(warning.category, FutureWarning)]
    warnings.warn("`learning_rate` is deprecated", FutureWarning, stacklevel=1)
    warnings.warn("`gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
    assert len(filters) == 2


def test_loggers_lose_one_message_each(filters, caplog):
    for _ in range(2):
        quiet.quiet_libraries(bars=True)
    name = "bitsandbytes.backends.cpu.ops"
    logger = logging.getLogger(name)
    assert len(logger.filters) == 1
    with caplog.at_level(logging.WARNING, name):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
        logger.warning("Failed to load the library")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load the library"]


@pytest.mark.parametrize(
    ("stream", "rank", "shown"), [(Terminal, "0", True), (Terminal, "1", False), (io.StringIO, "0", False)]
)
def test_bars_of_libraries_are_for_the_terminal_of_rank_0(filters, monkeypatch, stream, rank, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("RANK", rank)
    datasets.enable_progress_bars()  # another test may have switched them off
    transformers.logging.enable_progress_bar()
    try:
        quiet.quiet_libraries()
        assert transformers.logging.is_progress_bar_enabled() is shown
        assert datasets.are_progress_bars_disabled() is not shown
    finally:
        datasets.enable_progress_bars()
        transformers.logging.enable_progress_bar()
