"""Models with experts: their load-balancing loss as in `trl.DPOTrainer`, and LoRA on the experts' weights."""

import pytest
import torch
import transformers as T
import trl
from adapter_kit import recipe_of
from datasets import Dataset
from families import write_model
from peft import LoraConfig, PeftModel, get_peft_model
from step_kit import Gradients, assert_same_gradients, losses_of
from trainer_kit import (
    METHODS,
    QUIET,
    TEXT_METHODS,
    collated,
    fresh,
    image_rows,
    lora,
    shake,
    text_rows,
    trainable,
    trainer_of,
)
from trl_standins import conversations, text_standin

from trl_vpo.errors import RecipeError
from trl_vpo.forward.ranks import _joined
from trl_vpo.models.merge import merge
from trl_vpo.trainers.reference import loss_reference
from trl_vpo.training.run import run_training

VLM = "Qwen3-VL MoE"


def text_model(name="Qwen3-MoE"):
    """(model, tokenizer), with weights that are large enough for experts that are not chosen evenly."""
    torch.manual_seed(0)
    model, tokenizer = text_standin(name)
    for weight in model.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    return model, tokenizer


def text_trainer(folder, method="dpo", name="Qwen3-MoE", rows=None, **more):
    model, tokenizer = text_model(name)
    more = {"peft_config": lora(text=True), "router_aux_loss_coef": 0.1, **more}
    trainer = trainer_of(method, folder, rows or text_rows(), model=model, processor=tokenizer, peft=None, **more)
    shake(trainer.model)
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("name", "layout"), [("Qwen3-MoE", "shared"), ("Qwen3-MoE", "separate"), ("GPT-OSS", "auto")], ids=str
)
def test_the_same_as_trl(name, layout, checkpointing, tmp_path):
    """Loss, gradients of weights and routers, and the metric; GPT-OSS has padded rows on a CPU."""
    data, more = Dataset.from_list(conversations()), {"router_aux_loss_coef": 0.5, "max_steps": 1, "optim": "sgd"}
    more |= {"gradient_checkpointing": checkpointing, "eval_strategy": "steps", "eval_steps": 1, "max_length": None}
    got = []
    for kind, options in ((METHODS["dpo"], {"layout": layout}), ((trl.DPOConfig, trl.DPOTrainer), {})):
        args = kind[0](str(tmp_path), **{**QUIET, **more, **options, "per_device_train_batch_size": 4})
        init = {"train_dataset": data, "eval_dataset": data.select(range(2)), "callbacks": [kept := Gradients()]}
        (model, tokenizer), (reference, _) = text_model(name), text_model(name)
        trainer = kind[1](model, ref_model=reference, args=args, processing_class=tokenizer, **init)
        shake(trainer.model, scale=0.02)
        trainer.train()
        logged = [losses_of(trainer, key)[0] for key in ("loss", "aux_loss", "eval_loss", "eval_aux_loss")]
        got.append((kept.steps[0], torch.tensor(logged)))
    (ours, our_log), (theirs, their_log) = got
    assert any("router" in key or "mlp.gate." in key for key in ours)
    assert_same_gradients(ours, theirs)
    torch.testing.assert_close(our_log, their_log, rtol=1e-4, atol=0)  # TRL rounds its loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adds_it(method, images, tmp_path):
    """A method's own losses have no part in it: LPOI's lists are read whole, the others' pairs."""
    rows = image_rows(images, 2)
    for row in rows if method not in TEXT_METHODS else ():
        row |= {"image_list": images[:2]}
        del row["images"]
    trainer = trainer_of(method, tmp_path, rows, name=VLM, router_aux_loss_coef=0.5)
    shake(trainer.model)
    batch = collated(trainer)
    loss, scores = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    trainer.router_aux_loss_coef = 0.0
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model, batch) + 0.5 * scores.aux_loss)
    assert scores.aux_loss > 1
    assert loss_reference(trainer, batch) is None or loss_reference(trainer, batch).aux_loss is None


@pytest.mark.parametrize("layout", ["shared", "auto"])
def test_padding_rows_do_not_count(layout, images, tmp_path):
    """Neither in a packed row nor in padded rows."""
    trainer = trainer_of("dpo", tmp_path, image_rows(images, 2), name=VLM, layout=layout)
    if layout == "auto":
        trainer.scorer._pad_rows("this test wants it")
    batch = collated(trainer)
    want = trainer.concatenated_forward(trainer.model, batch).aux_loss
    batch |= {"padded": _joined(batch, trainer._padding_rows("pixel_values")), "layout": (None,)}
    torch.testing.assert_close(trainer.concatenated_forward(trainer.model, batch).aux_loss, want)


def test_accumulated_steps_weigh_pairs(tmp_path):
    """A step of two pairs and one is the mean over its pairs, each with its own micro-batch's loss."""
    more = {"gradient_accumulation_steps": 2, "max_steps": 1, "train_sampling_strategy": "sequential", "optim": "sgd"}
    trainer = text_trainer(tmp_path, rows=text_rows(3), learning_rate=1e-9, **more)
    trainer.train()
    trainer.model.eval()
    parts = [trainer.data_collator([trainer.train_dataset[i] for i in part]) for part in ((0, 1), (2,))]
    aux = [trainer.concatenated_forward(trainer.model, part).aux_loss.item() for part in parts]
    assert aux[0] != pytest.approx(aux[1], rel=1e-3)
    assert losses_of(trainer, "aux_loss") == [pytest.approx((2 * aux[0] + aux[1]) / 3, rel=1e-5)]


def test_reentrant_checkpointing_is_refused(tmp_path):
    """Its layers run without gradients: the routers' logits would have none."""
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"use_reentrant.*Set router_aux_loss_coef to 0\.0"):
        text_trainer(tmp_path, **more)
    text_trainer(tmp_path, router_aux_loss_coef=0.0, max_steps=1, **more).train()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), *fresh(VLM))


def test_a_recipe_adapts_the_experts(base, tmp_path):
    """Beside a preset; what is saved is the adapter, for PEFT alone and for `trl-vpo merge`."""
    keys = {"model_name_or_path": base, "lora_target_parameters": EXPERTS, "learning_rate": 0.1}
    path, method = recipe_of(tmp_path / "out", **keys)
    model = run_training(method, ["--config", str(path)]).model.eval()
    experts = {name: p for name, p in trainable(model).items() if ".experts." in name and "lora_B" in name}
    assert len(experts) == 4 and all(p.any() for p in experts.values())
    saved = PeftModel.from_pretrained(T.AutoModelForImageTextToText.from_pretrained(base), tmp_path / "out")
    merge(tmp_path / "out", tmp_path / "merged")
    merged = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    ids = {"input_ids": torch.arange(10, 30)[None]}
    with torch.no_grad():
        want, got, whole = (m(**ids).logits for m in (model, saved, merged))
        with saved.disable_adapter():
            assert (saved(**ids).logits - want).abs().max() > 0.01
    assert torch.equal(got, want)
    torch.testing.assert_close(whole, want)


def test_a_given_adapter_of_experts_is_the_reference(base, tmp_path):
    def model():
        return T.AutoModelForImageTextToText.from_pretrained(base)

    adapter = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS))
    shake(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    given = PeftModel.from_pretrained(model(), tmp_path / "adapter", is_trainable=True)
    trainer = trainer_of("dpo", tmp_path / "out", model=given, processor=fresh(VLM)[1], peft=None)
    batch = collated(trainer, 2)
    trainer.scorer.add_model(adapter.get_base_model())
    want = trainer.concatenated_forward(adapter.get_base_model(), batch).logps
    torch.testing.assert_close(trainer.reference_scores(batch).logps, want)
    trainer.train()
    torch.testing.assert_close(trainer.reference_scores(batch).logps, want)
    assert (trainer.concatenated_forward(trainer.model, batch).logps - want).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout: PEFT .* Set lora_dropout: 0\.0, or"),
        (
            {"lora_dropout": 0.1, "use_dora": True},
            r"lora_dropout and use_dora: .* 0\.0, use_dora: false",
        ),
    ],
    ids=["dropout", "dropout and DoRA"],
)
def test_what_peft_cannot_do_to_parameters(options, remedy, base, tmp_path):
    """In a recipe it is said before data are looked for, in Python before the model is loaded."""
    path, method = recipe_of(tmp_path, model_name_or_path=base, lora_target_parameters=EXPERTS, **options)
    with pytest.raises(RecipeError, match=remedy):
        run_training(method, ["--config", str(path), "--dataset_name", "is/missing"])
    config = LoraConfig(target_modules="language", target_parameters=EXPERTS, **options)
    with pytest.raises(RecipeError, match=remedy):
        trainer_of("dpo", tmp_path, model=base, processor=fresh(VLM)[1], peft=None, peft_config=config)
