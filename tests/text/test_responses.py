"""Thoughts of reasoning models are no part of their answers."""

import pytest

from trl_vpo.text.responses import Failure, behind_thoughts, opens_thoughts, unusable, without_reasoning

TAGS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<REASONING>", "</REASONING>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
]


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


@pytest.mark.parametrize("begin, end", TAGS)
def test_tags_of_thoughts(begin, end):
    assert without_reasoning(f"{begin}a 2{end}\nb") == without_reasoning(f"a 2\n{end}\n\nb ", thinking=True) == "b"
    assert without_reasoning(f"{begin}a") == without_reasoning("a", thinking=True) == ""
    assert behind_thoughts(f"{begin}a{end} b") == " b"
    assert opens_thoughts(f"assistant\n{begin}") and not opens_thoughts(f"assistant\n{begin}\n{end}\n\n")
    assert isinstance(unusable(f"It moves. {begin}a"), Failure)
    assert unusable("It thinks (in thought) of a channel, <b>reasoning</b>.") is None
