"""Thoughts of reasoning models are no part of their answers."""

import pytest

from trl_vpo.text.responses import opens_thoughts, without_reasoning


@pytest.mark.parametrize(
    "text, thinking, answer",
    [
        ("<think>a</think>b", False, "b"),
        ("a</think>\n b ", False, "b"),  # the template had the opening tag
        ("<think>a</think><think>b</think> c", False, "c"),
        ("<think>\na", False, ""),
        ("2 < 3 <think>", False, "2 < 3 <think>"),
        (" plain ", False, "plain"),
        ("It moves, so yes", True, ""),
        ("It moves.\n</think>\n\nyes", True, "yes"),
        ("<think>\nIt moves", True, ""),
        ("</think>", True, ""),
    ],
)
def test_reasoning_is_taken_off(text, thinking, answer):
    assert without_reasoning(text, thinking=thinking) == answer


@pytest.mark.parametrize(
    "prompt, opens",
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),  # thoughts that are switched off
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_prompts_that_open_thoughts(prompt, opens):
    assert opens_thoughts(prompt) == opens
