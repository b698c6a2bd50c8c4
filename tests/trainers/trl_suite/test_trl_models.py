"""The demands of TRL's DPO tests on text models and adapters, made of `VisualDPOTrainer`."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl_standins import TEXT_MODELS, conversations, plain, text_standin
from trl_training import (
    assert_same_as_trl,
    steps,
    trainer_on,
    trains_adapter,
    trains_all,
)

EXPERTS = ["Qwen3-MoE", "GPT-OSS"]  # those whose configs set a coefficient for the load-balancing loss


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_full_fine_tuning(name, hub, tmp_path):
    rows, more = conversations(), {"router_aux_loss_coef": 0.0} if name in EXPERTS else {}
    trainer = trainer_on(hub(name), rows, tmp_path / "ours", **more)
    assert_same_as_trl(trainer, rows, tmp_path / "theirs", **more)
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


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3-MoE"])
def test_a_new_adapter(name, checkpointing, hub, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    more = {"router_aux_loss_coef": 0.0} if name in EXPERTS else {}
    trains_adapter(
        hub(name), conversations(), tmp_path, peft_config=lora, gradient_checkpointing=checkpointing, **more
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_given_adapter(checkpointing, hub, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hub("Qwen2.5")), LoraConfig())
    trains_adapter(model, conversations(), tmp_path, gradient_checkpointing=checkpointing)


def test_an_adapter_on_the_experts(hub, tmp_path):
    """Experts are tensors, not layers: `target_parameters` names them."""
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    trains_adapter(hub("Qwen3-MoE"), conversations(), tmp_path, peft_config=lora, router_aux_loss_coef=0.0)


def test_full_fine_tuning_with_gradient_checkpointing(hub, tmp_path):
    trains_all(hub("Qwen2.5"), plain(), tmp_path, gradient_checkpointing=True)


@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "adapter"])
def test_tags_for_the_hub(peft_config, hub, tmp_path):
    trainer = trainer_on(hub("Qwen2.5"), plain(), tmp_path, peft_config=peft_config)
    assert {"dpo", "trl"} <= set(trainer.model.model_tags)
