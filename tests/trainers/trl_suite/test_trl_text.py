"""The demands of TRL's DPO tests on text models, adapters and data, made of `VisualDPOTrainer`."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, default_data_collator
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_standins import TEXT_MODELS, TOOLS_TEMPLATE, conversations, plain, text_standin, tool_rows
from trl_training import assert_same_as_trl, steps, trainer_on, trains_adapter, trains_all

from trl_vpo.errors import RowError


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_full_fine_tuning(name, hub, tmp_path):
    trainer = trainer_on(hub(name), conversations(), tmp_path / "ours")
    assert_same_as_trl(trainer, conversations(), tmp_path / "theirs")
    assert steps(trainer) == set(dict(trainer.model.named_parameters()))


def test_float16_weights(hub, tmp_path):
    trainer = trains_all(hub("Qwen2.5"), plain(), tmp_path, model_init_kwargs={"dtype": torch.float16})
    assert {p.dtype for m in (trainer.model, trainer.ref_model) for p in m.parameters()} == {torch.float16}


def test_trust_remote_code(tmp_path):
    """The folder brings the class of its model and the class of its config."""
    model, tokenizer = text_standin("Qwen2.5")
    folder = tmp_path / "remote"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\nclass OwnConfig(Qwen2Config):\n"
        "    model_type = 'own'\n\n\nclass OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        trainer_on(str(folder), plain(), tmp_path / "out")
    trainer = trains_all(str(folder), plain(), tmp_path / "out", trust_remote_code=True)
    assert type(trainer.model).__name__ == type(trainer.ref_model).__name__ == "OwnModel"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3-MoE"])
def test_a_new_adapter(name, checkpointing, hub, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    trains_adapter(hub(name), conversations(), tmp_path, peft_config=lora, gradient_checkpointing=checkpointing)


def test_an_adapter_on_the_experts(hub, tmp_path):
    """Experts are tensors, not layers: `target_parameters` names them."""
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    trains_adapter(hub("Qwen3-MoE"), conversations(), tmp_path, peft_config=lora)


@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "adapter"])
def test_tags_for_the_hub(peft_config, hub, tmp_path):
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path, peft_config=peft_config)
    assert {"dpo", "trl"} <= set(trainer.model.model_tags)


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


def test_several_processes_for_the_data(hub, tmp_path):
    """TRL's own command for pictures sets it."""
    trains_all(hub("Qwen2.5"), plain(), tmp_path, dataset_num_proc=2)


def test_a_row_that_is_too_long(hub, tmp_path):
    """TRL cuts the responses, and drops the row when nothing is left; here nothing is cut."""
    with pytest.raises(RowError, match=r"row \d: \d+ prompt tokens.*max_length=8.*Nothing is cut: raise max_length"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, max_length=8).train()


@pytest.mark.parametrize("collator", [DataCollatorForPreference(pad_token_id=0), default_data_collator])
def test_the_collators_of_trl_and_transformers(collator, hub, tmp_path):
    name = getattr(collator, "__name__", type(collator).__name__)
    with pytest.raises(ValueError, match=rf"{name}.*PreferenceCollator.*Leave it out"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, data_collator=collator)
