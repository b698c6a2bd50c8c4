"""Chat servers for the tests of a model behind one."""

import pytest
from chat_server import KEY, chat_servers

from trl_vpo.models import server


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_servers() as start:
        yield start


@pytest.fixture
def fast(monkeypatch):
    """Pauses of 0.02 s at most, where the server names none."""
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.02)
