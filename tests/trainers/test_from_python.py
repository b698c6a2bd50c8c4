"""A trainer built in Python gets what the command line prepares: presets, 4-bit weights, hidden tokens."""

import copy
from pathlib import Path

import families
import pytest
import torch
import yaml
from adapter_kit import adapted_modules, train
from datasets import Dataset
from distributed_run import load_four_bits, wide_model
from peft import LoraConfig, get_peft_model
from step_kit import Gradients
from trainer_kit import METHODS, config, fresh, image_rows, lora, trainable, trainer_of

from trl_vpo.errors import RecipeError
from trl_vpo.models.adapters import PRESETS, preset_targets
from trl_vpo.trainers import setup

TOKEN = "hf_" + "a" * 30


@pytest.mark.parametrize("loaded", [True, False], ids=["model", "folder"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_resolved(preset, loaded, images, tmp_path):
    """For a model in memory and for one that is named; the config of the user stays as it is."""
    model, processor = fresh("Qwen2-VL")
    want = adapted_modules(get_peft_model(model, LoraConfig(r=2, target_modules=preset_targets(model, preset)[0])))
    model, _ = fresh("Qwen2-VL")
    if not loaded:
        families.write_model(tmp_path / "base", model, processor)
        model = str(tmp_path / "base")
    given = LoraConfig(r=2, target_modules=preset)
    before = copy.deepcopy(given)
    more = {"model": model, "processor": processor, "peft": None, "peft_config": given}
    trainer = trainer_of("leanpo", tmp_path, image_rows(images), **more)
    assert adapted_modules(trainer.model) == want
    assert given == before
    assert trainer.model.peft_config["default"].target_modules not in PRESETS  # what is saved needs nothing of ours


@pytest.mark.parametrize(("targets", "message"), [("langage", "Did you mean language"), ("all", "has no projector")])
def test_targets_that_match_nothing(targets, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        trainer_of("dpo", tmp_path, peft=None, peft_config=LoraConfig(target_modules=targets))


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """A folder to load a 4-bit model of, and its processor."""
    pytest.importorskip("bitsandbytes")
    model, processor = wide_model()
    return families.write_model(tmp_path_factory.mktemp("wide"), model, processor), processor


def test_small_rates_move_a_whole_adapter_on_four_bits(four_bits, images, tmp_path):
    """In bfloat16, where DPOTrainer puts it, updates of 5e-6 would leave most of it as it was."""
    folder, processor = four_bits
    more = {"processor": processor, "peft": None, "peft_config": lora(), "max_steps": 3, "learning_rate": 5e-6}
    trainer = trainer_of("dpo", tmp_path, image_rows(images), model=load_four_bits(folder), bf16=True, **more)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = torch.cat([(after[name] != p).flatten() for name, p in before.items()])
    assert moved.float().mean() > 0.95


def test_four_bit_weights_train_after_an_evaluation(four_bits, images, tmp_path):
    """bitsandbytes packs 4-bit weights for inference, in the first call without gradients, on CPUs that can; no
    gradient passes them then."""
    folder, processor = four_bits
    model, watch = load_four_bits(folder), Gradients()
    rows, more = image_rows(images), {"peft": None, "peft_config": lora(), "callbacks": [watch], "max_steps": 3}
    more |= {"model": model, "processor": processor, "eval_dataset": Dataset.from_list(rows)}
    trainer = trainer_of("dpo", tmp_path, rows, **more)
    trainer.evaluate()
    trainer.train()
    reached = [sum(bool(g.any()) for name, g in step.items() if "lora_B" in name) for step in watch.steps]
    assert reached == [len(trainable(trainer.model)) // 2] * 3


def test_four_bit_weights_that_were_packed_before(four_bits, images, tmp_path):
    folder, processor = four_bits
    model = load_four_bits(folder)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs nothing on this CPU")
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8, 24)[None])
    assert all(m.weight.quant_state.packing_format_for_cpu for m in layers)
    more = {"model": model, "processor": processor, "peft_config": lora(), "peft": None}
    with pytest.raises(ValueError, match="Load the model again"):
        trainer_of("dpo", tmp_path, image_rows(images), **more)


def options():
    return {"hub_token": TOKEN, "model_init_kwargs": {"token": TOKEN, "dtype": "float32"}}


@pytest.mark.parametrize("method", METHODS)
def test_a_config_shows_no_token(method, tmp_path):
    args = config(method, tmp_path, **options())
    shown = [repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())]
    assert [text for text in shown if TOKEN in text or "float32" not in text] == []
    assert args.hub_token == args.model_init_kwargs["token"] == TOKEN
    for copied in (copy.copy(args), copy.deepcopy(args)):  # goes on to be used
        assert copied.hub_token == copied.model_init_kwargs["token"] == TOKEN
        assert copied.learning_rate == args.learning_rate
    assert copied.model_init_kwargs is not args.model_init_kwargs


def test_which_fields_are_tokens_for_the_hub(tmp_path):
    """A new one of transformers' has to be hidden, too; see `__getstate__` in trl_vpo/trainers/config.py."""
    names = {name for name in vars(config("dpo", tmp_path)) if name.endswith("_token")}
    assert names == {"hub_token", "pad_token"}


def assert_no_token(folder, *expected):
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert set(expected) < {path.name for path in files}
    assert [path for path, content in files.items() if TOKEN.encode() in content] == []


def test_no_file_of_a_run_has_a_token(tmp_path):
    base = families.write_model(tmp_path / "base", *fresh())
    out = tmp_path / "out"
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "report_to": "tensorboard", **options()}
    trainer = trainer_of("dpo", out, model=base, processor=fresh()[1], **keys)
    trainer.train()
    trainer.save_model(out)
    trainer.create_model_card()
    assert_no_token(out, "README.md", "training_args.bin")
    assert list(out.rglob("*tfevents*"))
    saved = torch.load(out / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert type(saved) is METHODS["dpo"][0] and saved.max_steps == 1
    assert saved.model_init_kwargs == {"dtype": "float32"}
    assert trainer.args.hub_token == TOKEN  # a push needs it
    train(tmp_path / "run", hub_token=TOKEN, model_init_kwargs={"token": TOKEN}, max_steps=1)
    assert_no_token(tmp_path / "run", "run.json", "training_args.bin")


def test_full_fine_tuning_goes_on_from_a_checkpoint(images, tmp_path):
    """transformers finds no weight in a checkpoint of such a model, which it saves under the names of the Hub."""
    more = {"peft": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    straight, again = (trainer_of("leanpo", tmp_path, image_rows(images), name="Qwen2-VL", **more) for _ in range(2))
    begun = {name: p.detach().clone() for name, p in straight.model.named_parameters()}
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = [dict(trainer.model.named_parameters()) for trainer in (straight, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in begun)
    assert not all(torch.equal(ends[0][name], p) for name, p in begun.items())


def test_the_best_model_of_full_fine_tuning_is_loaded(images, tmp_path):
    rows = image_rows(images)
    more = {"peft": None, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    more |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    more |= {"eval_dataset": Dataset.from_list(rows), "metric_for_best_model": "eval_loss"}
    trainer = trainer_of("leanpo", tmp_path, rows, name="Qwen2-VL", **more)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert losses[best] == max(losses.values()) and best != 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize(("rate", "peft", "warnings"), [(None, "new", 1), (5e-6, "new", 0), (None, None, 0)])
def test_a_rate_of_full_fine_tuning_for_lora_is_named(rate, peft, warnings, tmp_path, recwarn):
    """LeanPO's default is the paper's, for full fine-tuning."""
    model, processor = fresh()
    more = {"learning_rate": rate} if rate else {}
    args = METHODS["leanpo"][0](str(tmp_path), use_cpu=True, bf16=False, report_to="none", **more)
    trainer_of("leanpo", tmp_path, model=model, processor=processor, args=args, peft=peft)
    warned = [str(w.message) for w in recwarn if "learning_rate is 5e-07" in str(w.message)]
    assert len(warned) == warnings and all("The LoRA recipes have 5e-06." in text for text in warned)


def test_the_rates_of_the_recipes_are_as_told():
    paths = list(Path("recipes").glob("*/qwen2_5_vl_3b_lora_24gb.yaml"))
    assert {"dpo", "leanpo", "rrpo", "lpoi"} <= {path.parent.name for path in paths} <= set(METHODS)
    for path in paths:
        recipe = yaml.safe_load(path.read_text())
        assert recipe["learning_rate"] == pytest.approx(setup.LORA_RATE)
