"""Every tensor of a saved adapter finds its place: names of older versions are translated, strays are refused."""

import copy
import json

import pytest
import torch
from adapter_kit import BASE, changed, edited, trained
from families import build
from local_kit import plain
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trainer_kit import lora, trainable, trainer_of

from trl_vpo.errors import AdapterError
from trl_vpo.evaluate.candidates import ModelSet
from trl_vpo.models.attach import PREFIX, attach_adapter
from trl_vpo.models.load import load_model
from trl_vpo.models.merge import merge

IDS = torch.arange(8, 24)[None]
# What modules were called before transformers 4.52, and CLIP's before 5.
QWEN = {"model.language_model.": "model.", "model.visual.": "visual."}
LLAVA = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model.",
         "model.multi_modal_projector.": "multi_modal_projector.", "lm_head.": "language_model.lm_head."}  # fmt: skip
INTERNVL = {**LLAVA, "model.vision_tower.": "vision_tower."}
OLD = {"Qwen2-VL": QWEN, "Qwen2.5-VL": QWEN, "LLaVA-1.5": LLAVA, "LLaVA-NeXT-Video": LLAVA, "LLaVA-OneVision": LLAVA,
       "InternVL": INTERNVL}  # fmt: skip


def renamed(folder, names):
    """The adapter's tensors under their old names, in place."""
    path = folder / "adapter_model.safetensors"

    def old(key):
        key = key.removeprefix(PREFIX)
        return PREFIX + next((o + key.removeprefix(new) for new, o in names.items() if key.startswith(new)), key)

    save_file({old(key): tensor for key, tensor in load_file(path).items()}, path)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", OLD)
def test_old_names_are_translated(family, tmp_path):
    model = build(family)[0]
    kind = {"init_lora_weights": False, "use_dora": True, "modules_to_save": ["lm_head"]}
    config = LoraConfig(target_modules="all-linear", **kind)
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight += 1
    adapted.save_pretrained(tmp_path)
    renamed(tmp_path, OLD[family])
    again = attach_adapter(copy.deepcopy(model), tmp_path)
    want, got = adapted.state_dict(), again.state_dict()
    own = [name for name in want if "default" in name]
    assert len(own) > 60 and not [name for name in own if not torch.equal(want[name], got[name])]
    assert torch.equal(logits(again), logits(adapted))


@pytest.fixture
def old(tmp_path):
    """The testbed's trained adapter with the names of its family before transformers 4.52."""
    folder = changed(trained("lora").folder, tmp_path)
    renamed(folder, QWEN)
    return folder


def test_an_old_adapter_is_merged_asked_and_compared(old, tmp_path):
    want = logits(PeftModel.from_pretrained(plain(), trained("lora").folder))
    assert (want - logits(plain())).abs().max() > 1e-2
    merge(old, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(f"{BASE}/model.safetensors")
    assert sum(not torch.equal(merged[name], base[name]) for name in base) == 21  # as many as are adapted
    local = load_model(BASE, adapter=str(old), dtype="float32")
    torch.testing.assert_close(logits(local.model), want)
    candidates = ModelSet(load_model(BASE, dtype="float32"), [str(old)])
    with candidates.use("changed"):
        torch.testing.assert_close(logits(candidates.model.model), want)
    with candidates.use("base"):
        torch.testing.assert_close(logits(candidates.model.model), logits(plain()))


def test_an_old_adapter_is_trained_further(old, tmp_path):
    model = attach_adapter(plain(), old, trainable=True)
    again = PeftModel.from_pretrained(plain(), trained("lora").folder, is_trainable=True)
    assert trainable(model).keys() == trainable(again).keys()
    assert torch.equal(logits(model), logits(again))


def with_value(weights, value):
    name = next(name for name in weights if "layers.1" in name and "lora_B" in name)
    weights[name][0, 0] = value
    return weights


SPOILT = {  # how the tensors change
    "a layer is missing": (
        lambda weights: {name: t for name, t in weights.items() if "layers.1." not in name},
        "14 weights are not in the file: base_model.*layers.1",
    ),
    "no prefix": (
        lambda weights: {name.removeprefix(PREFIX): t for name, t in weights.items()},
        "does not begin with base_model.model.",
    ),
    "both names": (
        lambda weights: weights | {n.replace("model.language_model.", "model."): t + 0 for n, t in weights.items()},
        "42 weights have no place in the model",
    ),
    "other names": (
        lambda weights: {name.replace(".model.model.", ".model.transformer."): t for name, t in weights.items()},
        "42 weights have no place in the model: base_",
    ),
    "nan": (lambda w: with_value(w, float("nan")), r"layers\.1.*lora_B.* holds values that are not finite"),
    "inf": (lambda w: with_value(w, float("inf")), r"layers\.1.*lora_B.* holds values that are not finite"),
    "other sizes": (
        lambda weights: {name: torch.cat([t, t], -1).contiguous() for name, t in weights.items()},
        r"does not fit .*base: .*\[4, 256\].*is torch.Size\(\[4, 128\]\)\.$",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_strays_are_refused(case, tmp_path):
    change, message = SPOILT[case]
    folder = edited(trained("lora").folder, tmp_path, change)
    with pytest.raises(AdapterError, match=message):
        attach_adapter(plain(), folder)


def test_an_alpha_of_no_module_is_refused(tmp_path):
    folder = changed(trained("lora").folder, tmp_path, alpha_pattern={"model.layers.9.mlp.up_proj": 64})
    with pytest.raises(AdapterError, match=r"alpha_pattern names model\.layers\.9\.mlp\.up_proj"):
        attach_adapter(plain(), folder)


def saved(folder, **keys):
    """An adapter with random weights, also for the trained tokens."""
    config = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False} | keys)
    get_peft_model(plain(), config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({n: t + torch.randn_like(t) if "tokens_delta" in n else t for n, t in load_file(path).items()}, path)
    return folder


@pytest.mark.parametrize("name", ["a", "m", "lora"])
def test_an_adapter_may_be_called_a_part_of_a_word(name):
    folder = trained("lora").folder
    pair = attach_adapter(plain(), folder)
    attach_adapter(pair.get_base_model(), folder, name=name, wrapped=pair).set_adapter(name)
    assert torch.equal(logits(pair), logits(attach_adapter(plain(), folder)))


@pytest.mark.parametrize("name", ["layers", "lora_A", "0"])
def test_an_adapter_called_like_a_module(name):
    with pytest.raises(AdapterError, match=f"the adapter name '{name}' is what a part of the model is called"):
        attach_adapter(plain(), trained("lora").folder, name=name)


def test_an_adapter_beside_one_with_trained_tokens(tmp_path):
    folders = {"tokens": saved(tmp_path / "tokens", trainable_token_indices=[9, 12]), "lora": saved(tmp_path / "lora")}
    pair = attach_adapter(plain(), folders["tokens"], name="tokens")
    attach_adapter(pair.get_base_model(), folders["lora"], name="lora", wrapped=pair)
    alone = {name: logits(attach_adapter(plain(), folder)) for name, folder in folders.items()}
    assert (alone["tokens"] - alone["lora"]).abs().max() > 1
    for name in ("tokens", "lora", "tokens"):
        pair.set_adapter(name)
        assert torch.equal(logits(pair), alone[name])


def test_trained_tokens_beside_adapted_embeddings(tmp_path):
    pair = attach_adapter(plain(), saved(tmp_path / "embed", target_modules=["embed_tokens"]))
    tokens = saved(tmp_path / "tokens", trainable_token_indices=[9])
    with pytest.raises(AdapterError, match="trainable_token_indices cannot be applied"):
        attach_adapter(pair.get_base_model(), tokens, name="tokens", wrapped=pair)


def test_merging_biases_into_layers_without(tmp_path):
    folder = saved(tmp_path / "biased", target_modules=["o_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"cannot be merged: .*`lora_bias=True` because the base layer has no bias"):
        merge(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_alphas_of_old_names_are_translated(old):
    config = json.loads((old / "adapter_config.json").read_text())
    pattern = {"model.layers.1.mlp.up_proj": 64}
    (old / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": pattern}))
    layers = attach_adapter(plain(), old).base_model.model.model.language_model.layers
    assert [layer.mlp.up_proj.scaling["default"] for layer in layers] == [2.0, 16.0, 2.0]


@pytest.mark.parametrize("size", [0, 1e-9])
def test_a_merge_that_changes_nothing(size, tmp_path):
    """An adapter that was not trained, and one whose changes bfloat16 cannot hold."""
    small = lambda weights: {name: t * size if "lora_B" in name else t for name, t in weights.items()}  # noqa: E731
    folder = edited(trained("lora").folder, tmp_path, small)
    with pytest.raises(AdapterError, match=r"changes no weight of its base in torch\.bfloat16"):
        merge(folder, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_new_adapter_in_a_given_model_is_named(tmp_path):
    model, processor = build("Qwen2-VL")
    new = get_peft_model(copy.deepcopy(model), lora())
    with pytest.warns(UserWarning, match="every lora_B is zero"):
        trainer_of("dpo", tmp_path, model=new, processor=processor, peft=None)


def test_resuming_from_other_names(tmp_path):
    trainer = trainer_of("dpo", tmp_path / "out", name="Qwen2-VL")
    trainer.model.save_pretrained(tmp_path / "saved")
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    renamed(tmp_path / "saved", QWEN)
    with pytest.raises(AdapterError, match="28 weights have no place in the model"):
        trainer._load_from_checkpoint(str(tmp_path / "saved"))
