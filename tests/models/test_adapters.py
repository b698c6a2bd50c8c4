"""The presets of `lora_target_modules` in every family, and the adapters that vLLM takes."""

import copy
import re
from functools import cache

import pytest
import torch
import transformers as T
from adapter_kit import adapted_modules, changed, pickled, recipe_of, train, trained
from families import FAMILIES, text_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from trl_vpo.doctor import checks as doctor
from trl_vpo.errors import AdapterError, RecipeError
from trl_vpo.forward.parts import part_of
from trl_vpo.models import model_size as footprint
from trl_vpo.models.adapters import PRESETS, check_adapted, preset_targets, resolve_targets, vllm_problems


def findings(folder, **keys):
    """The doctor's findings about a recipe: (check, status, text)."""
    recipe, method = recipe_of(folder / "out", **keys)
    return doctor.examine(recipe, [], method=method, rows=1).findings


def layers(stem, leaves, numbers=(0, 1)):
    return {f"{stem}.{i}.{leaf}" for i in numbers for leaf in leaves.split()}


SEVEN = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
LANGUAGE, TEXT = (layers(f"model.{name}.layers", SEVEN) for name in ("language_model", "text_model"))
BLOCKS = "model.visual.blocks"
CLIP = layers(
    "model.vision_tower.encoder.layers",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2",
)
IDEFICS = {name.replace("vision_tower", "vision_model") for name in CLIP}
MERGER = {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
LLAVA = {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
PARTS = {  # family: (language model, projector, vision tower)
    "Qwen2-VL": (LANGUAGE, MERGER, layers(BLOCKS, "attn.qkv attn.proj mlp.fc1 mlp.fc2")),
    "Qwen2.5-VL": (LANGUAGE, MERGER, layers(BLOCKS, "attn.qkv attn.proj mlp.gate_proj mlp.up_proj mlp.down_proj")),
    "Qwen3-VL": (
        LANGUAGE,
        {"model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"}
        | layers("model.visual.deepstack_merger_list", "linear_fc1 linear_fc2", numbers=(0,)),
        layers(BLOCKS, "attn.qkv attn.proj mlp.linear_fc1 mlp.linear_fc2"),
    ),
    **dict.fromkeys(("LLaVA-1.5", "LLaVA-NeXT-Video", "LLaVA-OneVision"), (LANGUAGE, LLAVA, CLIP)),
    "Idefics2": (
        TEXT,
        {f"model.connector.modality_projection.{n}_proj" for n in ("gate", "up", "down")}
        | layers("model.connector.perceiver_resampler.layers", SEVEN, numbers=(0,)),
        IDEFICS,
    ),
    **dict.fromkeys(("Idefics3", "SmolVLM"), (TEXT, {"model.connector.modality_projection.proj"}, IDEFICS)),
    "InternVL": (
        LANGUAGE,
        LLAVA,
        layers(
            "model.vision_tower.encoder.layer",
            "attention.q_proj attention.k_proj attention.v_proj attention.projection_layer mlp.fc1 mlp.fc2",
        ),
    ),
}


@cache
def config_of(family):
    model, _ = FAMILIES[family][0]()
    model.config.architectures = [type(model).__name__]
    return model.config


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_adapts_the_same_parts_of_every_family(family, preset, tmp_path):
    expected = set().union(*PARTS[family][: PRESETS.index(preset) + 1])
    config = LoraConfig(r=2, target_modules=preset)
    _, what = footprint.adapt(footprint.empty_model(config_of(family)), config)
    assert set(what) == expected
    assert {name for name in what if part_of(name) != "language"} == expected - PARTS[family][0]
    config.save_pretrained(tmp_path)  # and what is saved needs nothing of ours
    again = get_peft_model(footprint.empty_model(config_of(family)), LoraConfig.from_pretrained(tmp_path))
    assert adapted_modules(again) == expected


def test_presets_of_text_models():
    model, _ = text_model()
    config = LoraConfig(target_modules="language")
    _, what = footprint.adapt(copy.deepcopy(model), config)
    assert set(what) == layers("model.layers", SEVEN)
    for preset in ("language+projector", "all"):
        with pytest.raises(RecipeError, match=f"{re.escape(preset)}: Qwen2ForCausalLM has no projector"):
            preset_targets(model, preset)[0]


class Odd(nn.Module):
    """Layers that differ, a head that is never called, experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.text = nn.Module()
        self.text.layers = nn.ModuleList([nn.Module(), nn.Module()])
        self.text.layers[0].mix = nn.Linear(2, 2)
        self.text.layers[1].mix = nn.Conv1d(2, 2, 1)
        self.text.layers[1].experts = nn.Module()
        self.text.layers[1].experts.up = nn.Parameter(torch.zeros(3, 2, 2))
        self.connector = nn.Linear(2, 2)
        self.vision_model = nn.Module()
        self.vision_model.head = nn.MultiheadAttention(2, 1)
        self.vision_model.out = nn.Linear(2, 2)

    def get_decoder(self):
        return self.text

    def get_output_embeddings(self):
        return None


def test_presets_of_an_odd_model():
    with pytest.warns(UserWarning, match=r"1 parameters such as layers\.1\.experts\.up .*lora_target_parameters"):
        config = LoraConfig(target_modules=preset_targets(Odd(), "all")[0])
    assert adapted_modules(get_peft_model(Odd(), config)) == {"text.layers.0.mix", "connector", "vision_model.out"}


def glm_moe():
    tower = {"depth": 1, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    text = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "n_routed_experts": 4}
    text |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "pad_token_id": 0}
    return T.Glm4vMoeForConditionalGeneration(T.Glm4vMoeConfig(text_config=text, vision_config=tower))


def test_names_that_peft_takes_for_experts(tmp_path):
    """PEFT turns a regular expression into leaf names there, and MLPs into experts, both in training and loading."""
    config, model = LoraConfig(r=2, target_modules="language"), glm_moe()
    with pytest.warns(UserWarning, match="hold the weights of several experts"):
        resolve_targets(config, model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name.startswith("model.language_model.")}
    for again in (config, config.save_pretrained(tmp_path) or LoraConfig.from_pretrained(tmp_path)):
        assert set(map(by_name, lora_parameters(get_peft_model(glm_moe(), again)))) == expected


def lora_parameters(model):
    return [name for name, _ in model.named_parameters() if ".lora_A." in name]


def by_name(parameter):
    return parameter.removeprefix("base_model.model.").split(".lora_A.")[0]


def inner_llama():
    text = {"hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}
    text |= {"num_local_experts": 2, "moe_layers": [1], "layer_types": ["chunked_attention", "full_attention"]}
    tower = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 56, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24}
    return T.Llama4ForConditionalGeneration(T.Llama4Config(text_config=text, vision_config=tower))


def test_heads_and_routers_inside_a_decoder_are_left_out():
    """Llama 4 holds a whole language model, whose head and routers are linear layers."""
    with pytest.warns(UserWarning, match=r"2 parameters such as .*feed_forward\.experts\.gate_up_proj"):
        config = LoraConfig(target_modules=preset_targets(inner_llama(), "language")[0])
    names = adapted_modules(get_peft_model(inner_llama(), config))
    dense = layers("language_model.model.layers", " ".join(SEVEN.split()[:4])) | {
        f"language_model.model.layers.{layer}.{leaf}_proj"
        for layer in ("0.feed_forward", "1.feed_forward.shared_expert")
        for leaf in ("gate", "up", "down")
    }
    assert names == dense


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("langage", r"'langage' is none of the presets language, language\+projector, all. Did you mean language"),
        ("language+projektor", r"Did you mean language\+projector"),
        ("q_proj", r"whole module names, such as \.\*\\.q_proj"),
        (["language", "lm_head"], "the preset 'language' stands alone"),
    ],
)
def test_targets_that_match_nothing_are_refused(tmp_path, targets, message):
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, lora_target_modules=targets, dataset_name="nowhere")  # before data and model are loaded


NOWHERE = [
    ({"target_modules": ["q_proj", "gate_prj"]}, "lora_target_modules: .* called gate_prj, and PEFT"),
    (
        {"target_parameters": ["experts.gate_up_proj", "experts.up"]},
        r"called experts\.up, .*feed_forward\.experts\.down",
    ),
    (
        {"target_modules": "all-linear", "modules_to_save": ["lm_head", "haed"]},
        "lora_modules_to_save: .* called haed,",
    ),
]


@pytest.mark.parametrize(("keys", "message"), NOWHERE)
def test_names_beside_others_that_match_nothing(keys, message):
    """PEFT says nothing where another name of the list matches."""
    with pytest.raises(RecipeError, match=message):
        check_adapted(get_peft_model(inner_llama(), LoraConfig(r=2, **keys)))


def test_names_that_match_are_not_refused():
    parameters = ["experts.gate_up_proj", "feed_forward.experts.down_proj"]
    keys = {"target_modules": ["q_proj", "fc1"], "target_parameters": parameters, "modules_to_save": ["head"]}
    check_adapted(get_peft_model(inner_llama(), LoraConfig(r=2, **keys)))


def test_the_doctor_names_what_matches_nothing(tmp_path):
    found = findings(tmp_path, lora_target_modules=["q_proj", "gate_prj"])
    assert ("LoRA", "stop") in [finding[:2] for finding in found if "gate_prj" in finding[2]]


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("lora", []),
        ("rslora", []),
        ("dora", ["it is DoRA"]),
        ("head", ["modules_to_save: lm_head"]),
        (
            "all",
            [r"10 of its 31 modules are in vision tower or projector, such as model\.visual\.blocks\.0\.attn\.proj"],
        ),
    ],
)
def test_what_vllm_takes(name, messages):
    problems = vllm_problems(trained(name).folder)
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages):
        assert re.search(message, problem), problem


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 64}, "its rank is 64, vLLM's max_lora_rank 16: start vLLM with --max-lora-rank 64"),
        ({"rank_pattern": {"q_proj": 20}}, "its rank is 20, .* --max-lora-rank 32"),
        ({"r": 1024}, "vLLM takes 512 at most"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"bias": "all"}, "it has biases"),
        ({"peft_type": "OFT"}, "it is OFT, not LoRA"),
    ],
)
def test_what_vllm_does_not_take(keys, message, tmp_path):
    (problem,) = vllm_problems(changed(trained("lora").folder, tmp_path, **keys))
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    ("keys", "status", "message"),
    [
        ({"lora_r": 4}, "ok", r"nothing that it is known to refuse \(not tried\)"),
        ({"lora_r": 64}, "ok", "its rank is 64, .* start vLLM with --max-lora-rank 64"),
        ({"use_dora": True}, "warning", "it is DoRA"),
        ({"lora_modules_to_save": ["lm_head"]}, "warning", "modules_to_save: lm_head"),
        ({"lora_target_modules": "all"}, "warning", "10 of its 31 modules are in vision tower or projector"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, "stop", "LM head"),
    ],
)
def test_the_doctor_says_what_vllm_takes(keys, status, message, tmp_path):
    """Before anything is trained, and the same as of the saved adapter; and what training does not take."""
    check = "LoRA" if status == "stop" else "vLLM"
    texts = [text for name, reported, text in findings(tmp_path, **keys) if (name, reported) == (check, status)]
    assert any(re.search(message, text) for text in texts), texts


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "It is in PEFT's layout, which vLLM reads (not"),
        ({"use_dora": True}, "vLLM and this adapter: it is DoRA"),
    ],
)
def test_the_end_of_training_says_what_vllm_takes(keys, message, tmp_path, capsys):
    train(tmp_path / "out", max_steps=1, **keys)
    assert f"Saved to {tmp_path / 'out'}. {message}" in capsys.readouterr().out


def test_vllm_takes_safetensors_of_linear_layers_only(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        vllm_problems(pickled(trained("lora").folder, tmp_path))
    (tmp_path / "changed" / "adapter_model.bin").unlink()
    save_file({"base_model.model.x.lora_embedding_A": torch.zeros(1)}, tmp_path / "changed/adapter_model.safetensors")
    (problem,) = vllm_problems(tmp_path / "changed")
    assert "1 tensors are no LoRA weights of linear layers, such as base_model.model.x.lora_embedding_A" in problem
