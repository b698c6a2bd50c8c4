"""Adapters of many kinds load, answer and merge elsewhere as they trained; what cannot be merged is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_kit import BASE, VARIANTS, assert_same, changed, hub_model, logps_of, pickled, train, trained
from distributed_run import wide_model
from families import text_model, write_model
from local_kit import plain
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from trl_vpo.errors import AdapterError
from trl_vpo.models.adapters import preset_targets
from trl_vpo.models.merge import merge

LAYERS = 2  # of the wide models, each with seven linear layers


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_answers_elsewhere_as_it_trained(name, tmp_path):
    """Through plain PEFT, through its `merge_and_unload`, and merged by us; the reference was the base all along."""
    run = trained(name)
    want = run.logps[run.mask]
    base = logps_of(plain(), run)
    assert (want - base).abs().max() > 1e-2, "training did nothing"
    if run.reference is not None:
        assert_same(run.reference[run.mask], base)
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["target_modules"].startswith(r"model\.language_model\.layers\.\d+\.mlp\.(down_proj|gate_proj|up_")
    adapted = PeftModel.from_pretrained(plain(), run.folder)
    assert_same(logps_of(adapted, run), want)
    assert_same(logps_of(adapted.merge_and_unload(), run), want)
    assert merge(run.folder, tmp_path / "merged") == []
    assert_same(logps_of(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), run), want)


def test_every_adapter_of_the_preset_all_learns():
    """And vision features of the adapted tower are not those of the reference."""
    weights = load_file(trained("all").folder / "adapter_model.safetensors")
    names = [name for name in weights if "lora_B" in name]
    assert len(names) == 7 * 3 + 2 + 4 * 2  # language model, merger, tower
    assert not [name for name in names if weights[name].abs().max() == 0]


def test_a_trained_head_is_saved_whole_and_untied(tmp_path):
    run = trained("head")
    merge(run.folder, tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    embeddings, base = model.get_input_embeddings().weight, plain().get_input_embeddings().weight
    assert model.config.tie_word_embeddings is False
    assert torch.equal(embeddings, base)
    assert (model.lm_head.weight - base).abs().max() > 1e-3


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide"), *wide_model())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_training(bits, wide, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    kinds = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}
    keys = {f"load_in_{bits}bit": True, "dtype": "bfloat16", "use_bnb_nested_quant": bits == 4, "max_steps": 3}
    trainer = train(tmp_path / "adapter", model_name_or_path=wide, gradient_checkpointing=True, **keys)
    model = trainer.model.get_base_model()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n}
    quantized = {n.removesuffix(".base_layer") for n, m in linear.items() if type(m) is kinds[bits]}
    assert len(quantized) == 7 * LAYERS
    assert not [name for name in quantized if not name.startswith("model.language_model.layers.")]
    assert {type(m) for n, m in linear.items() if n.removesuffix(".base_layer") not in quantized} == {nn.Linear}
    assert model.lm_head.weight.dtype == model.model.visual.merger.mlp[0].weight.dtype == torch.bfloat16
    if bits == 4:
        config = model.config.quantization_config
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert not any(m.support_avx512bf16_for_cpu for m in linear.values() if type(m) is kinds[4])  # keep_gradients
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    learned = [name for name in weights if "lora_B" in name and weights[name].abs().max() > 0]
    assert len(learned) == 7 * LAYERS == len(weights) / 2
    load = partial(AutoModelForImageTextToText.from_pretrained, wide)
    again = load(quantization_config=model.config.quantization_config, dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    ids = torch.arange(8, 24)[None]
    with torch.no_grad():
        got, want = (m.eval()(input_ids=ids).logits.float() for m in (again, trainer.model))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
    (note,) = merge(tmp_path / "adapter", tmp_path / "merged")
    assert f"trained on {bits}-bit weights" in note
    assert note in (tmp_path / "merged" / "README.md").read_text()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto")
    full = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    with torch.no_grad():
        assert_same(merged(input_ids=ids).logits, full(input_ids=ids).logits)


def test_a_merged_model_is_complete(tmp_path):
    run = trained("lora")
    (tmp_path / "out").mkdir()  # an empty folder is taken
    merge(run.folder, tmp_path / "out", dtype="bfloat16")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "tokenizer.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt")) or name.startswith("adapter")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    given, want = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "out", run.folder))
    assert type(given) is type(want)
    assert given.chat_template == want.chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("library_name: transformers", "`trl_vpo/testbed/base` with the adapter `adapter` merged", "bfloat16",
                 "AutoModelForImageTextToText", "## Training", "2504.12083"):  # fmt: skip
        assert part in card
    assert "PeftModel" not in card and "base_model:" not in card  # the base is a folder, no model of the Hub


def test_a_merged_model_says_how_it_was_trained(tmp_path, monkeypatch):
    """`trl-vpo evaluate` samples its videos by that. The results of the end are not those of a checkpoint."""
    adapter, base = tmp_path / "dpo/checkpoint-2", str(Path(BASE).absolute())
    shutil.copytree(trained("lora").folder, adapter, ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    run = {"method": "dpo", "recipe": {"num_frames": 8, "max_pixels": 900}, "seed": 3, "steps": 4, "metrics": {}}
    (tmp_path / "dpo/run.json").write_text(json.dumps(run))
    monkeypatch.chdir(tmp_path)
    merge(Path("dpo/checkpoint-2"), Path("m/dpo"), base=base)
    assert json.loads(Path("m/dpo/run.json").read_text()) == {
        "method": "dpo", "recipe": run["recipe"], "seed": 3,
        "merged": {"adapter": "checkpoint-2", "base": "base"},  # folders of this machine are left out
    }  # fmt: skip
    card = Path("m/dpo/README.md").read_text()
    assert card.count('from_pretrained("m/dpo"') == 2 and "model_name: dpo" in card
    (tmp_path / "dpo/run.json").write_text("[1]")
    with pytest.raises(AdapterError, match=r"dpo/run\.json: it holds no JSON object\. Correct the file"):
        merge(adapter, tmp_path / "again", base=base)


def test_the_revision_of_the_base_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = hub_model(tmp_path / "hub", main=1.0, v2=1.5)
    train(tmp_path / "adapter", model_name_or_path="me/base", model_revision="v2", max_steps=1)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    (name,) = [name for name in merged if "patch_embed" in name]  # no adapter is on it
    torch.testing.assert_close(merged[name], weights[name] * 1.5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v2"
    assert "base_model: me/base" in (tmp_path / "merged" / "README.md").read_text()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'from_pretrained("me/base", revision="v2", dtype="auto"' in card
    merge(tmp_path / "adapter", tmp_path / "main", revision="main")
    torch.testing.assert_close(load_file(tmp_path / "main" / "model.safetensors")[name], weights[name])


def test_a_text_model_merges(tmp_path):
    model, tokenizer = text_model()
    base = write_model(tmp_path / "base", model, tokenizer)
    config = LoraConfig(target_modules=preset_targets(model, "language")[0], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "out", base=base) == []
    ids = torch.arange(8, 24)[None]
    with torch.no_grad():
        want = adapted.eval()(input_ids=ids).logits
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits, want)
    assert "AutoModelForCausalLM" in (tmp_path / "out" / "README.md").read_text()


REFUSED = {
    "pickled": (pickled, "has only adapter_model.bin, which can run code"),
    "fewer targets": (
        lambda f, t: changed(f, t, target_modules=r".*\.q_proj"),
        "36 weights have no place in the model: base_model",
    ),
    "no base": (lambda f, t: changed(f, t, base_model_name_or_path=None), "does not name its base model: give `base`"),
    "a base that is gone": (lambda f, t: changed(f, t, init_lora_weights="lora_ga"), "changed the base's weights"),
    "no adapter": (lambda f, t: t, "adapter_config.json cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged(case, tmp_path):
    make, message = REFUSED[case]
    adapter = make(trained("lora").folder, tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=message):
        merge(adapter, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_merge_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="is not an empty folder"):
        merge(trained("lora").folder, tmp_path)
    with pytest.raises(AdapterError, match="give one of auto, bfloat16"):
        merge(trained("lora").folder, tmp_path / "out", dtype="int8")


def test_an_adapter_on_shared_embeddings_is_not_merged(tmp_path):
    """Merged, it would change the LM head, too."""
    config = LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    get_peft_model(plain(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"differs from base and adapter by .* was not saved"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_base_is_refused(tmp_path):
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    config = json.loads(Path(BASE, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(AdapterError, match="are quantized"):
        merge(trained("lora").folder, tmp_path / "out", base=str(tmp_path))
