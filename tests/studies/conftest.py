"""What the studies' command sets for its own process and its workers does not outlive a test."""

import pytest
import torch

from studies.testbed import command


@pytest.fixture(autouse=True)
def portable_arithmetic_ends_with_the_test(monkeypatch):
    for name in command.PORTABLE:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)  # resized pixels depend on it
