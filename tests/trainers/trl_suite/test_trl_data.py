"""The forms of data that TRL's DPO tests train on, and what they ask of lengths, padding and collators."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, default_data_collator
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_standins import TOOLS_TEMPLATE, conversations, plain, tool_rows
from trl_training import trainer_on, trains_all

from trl_vpo.errors import RowError


@pytest.fixture
def tokenizer(hub):
    return AutoTokenizer.from_pretrained(hub("Qwen2.5"))


def texts(trainer):
    """(prompt, chosen, rejected) of the first row, as the model reads them."""
    tree = trainer.data_collator.encode(trainer.train_dataset[0])
    decode = trainer.processing_class.decode
    return (decode(tree.trunks[0].ids), *(decode(branch.ids) for branch in tree.branches))


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_plain_rows(implicit, hub, tmp_path):
    trainer = trains_all(hub("Qwen2.5"), plain(implicit), tmp_path)
    assert texts(trainer) == ("What moves left?", " a red square moves left.<|im_end|>", " nothing.<|im_end|>")


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_conversations(implicit, hub, tmp_path):
    trainer = trains_all(hub("Qwen2.5"), conversations(implicit), tmp_path)
    prompt, chosen, rejected = texts(trainer)
    assert prompt == "<|im_start|>user\nWhat moves left?<|im_end|>\n<|im_start|>assistant\n"
    assert chosen.startswith("a red square moves left.<|im_end|>") and rejected.startswith("nothing.<|im_end|>")


def test_tool_calls(hub, tokenizer, tmp_path):
    tokenizer.chat_template = TOOLS_TEMPLATE
    trainer = trains_all(hub("Qwen2.5"), tool_rows(), tmp_path, processing_class=tokenizer)
    prompt, chosen, rejected = texts(trainer)
    assert prompt.startswith('<|im_start|>system\n{"type"') and '"name": "b"' in prompt
    assert chosen.startswith('a({"text": " a red square moves left."})<|im_end|>')
    assert rejected.startswith('b({"n": 1})<|im_end|>')


def test_chat_template_kwargs(hub, tokenizer, tmp_path):
    tokenizer.chat_template = TOOLS_TEMPLATE
    rows = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in conversations()]
    trainer = trains_all(hub("Qwen2.5"), rows, tmp_path, processing_class=tokenizer)
    prompt, chosen, _ = texts(trainer)
    assert prompt.endswith("<|im_start|>assistant\n<think></think>") and chosen.startswith("a red square moves left.<")


@pytest.mark.parametrize("rows", [plain, conversations])
def test_a_stream(rows, hub, tmp_path):
    trains_all(hub("Qwen2.5"), Dataset.from_list(rows()).to_iterable_dataset(), tmp_path, max_steps=2)


def test_several_processes_for_the_data(hub, tmp_path):
    """TRL's own command for pictures sets it."""
    trains_all(hub("Qwen2.5"), plain(), tmp_path, dataset_num_proc=2)


# --- lengths and padding ------------------------------------------------------------------------------------------


def test_a_row_that_is_too_long(hub, tmp_path):
    """TRL cuts the responses, and drops the row when nothing is left; here nothing is cut."""
    with pytest.raises(RowError, match=r"row \d: \d+ prompt tokens.*max_length=8.*Nothing is cut: raise max_length"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, max_length=8).train()


@pytest.mark.parametrize("collator", [DataCollatorForPreference(pad_token_id=0), default_data_collator])
def test_the_collators_of_trl_and_transformers(collator, hub, tmp_path):
    name = getattr(collator, "__name__", type(collator).__name__)
    with pytest.raises(ValueError, match=rf"{name}.*PreferenceCollator.*Leave it out"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, data_collator=collator)
