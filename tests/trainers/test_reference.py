"""The reference of every way to hand over a model; LeanPO has none."""

import copy
import gc
import math

import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import PeftModel, get_peft_model
from slow_kit import of_tokens, slow_kl, slow_scores
from step_kit import assert_same_gradients, gradients, losses_of, snapshot
from torch.nn import Sequential
from trainer_kit import METHODS, collated, config, fresh, image_rows, lora, shake, text_rows, trainable, trainer_of
from transformers import TrainerCallback
from transformers.models.qianfan_ocr.modeling_qianfan_ocr import QianfanOCRDropPath

LOG2 = pytest.approx(math.log(2), abs=1e-6)


def adapted(seed=3, **more):
    """A PeftModel whose adapter was trained already, and its tokenizer."""
    model, tokenizer = fresh()
    model = get_peft_model(model, lora(text=True, **more))
    shake(model, seed, scale=0.1)
    return model, tokenizer


def logps(trainer, model=None):
    with torch.no_grad():
        return trainer.concatenated_forward(model or trainer.model, collated(trainer)).logps


@pytest.mark.parametrize("method", ["dpo", "rrpo"])
def test_a_given_adapter_is_compared_with_its_frozen_copy(method, tmp_path):
    model, tokenizer = adapted()
    before = snapshot(model)
    trainer = trainer_of(method, tmp_path, model=model, processor=tokenizer, peft=None, max_steps=3, weight_decay=0.5)
    start = logps(trainer)
    with trainer.model.disable_adapter():
        assert not torch.allclose(logps(trainer), start)
    trainer.train()
    assert losses_of(trainer)[0] == LOG2
    assert torch.equal(trainer.reference_scores(collated(trainer)).logps, start)
    after = trainer.model.state_dict()
    for name, value in before.items():
        if ".default." in name:
            assert torch.equal(after[name.replace(".default.", ".ref.")], value), "the reference moved"
            assert not torch.equal(after[name], value), f"{name} did not train"
        else:
            assert torch.equal(after[name], value)
    assert trainer.model.active_adapters == ["default"]
    assert all(".default." in name for name in trainable(trainer.model))
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimized == sum(p.numel() for p in trainable(trainer.model).values())


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
def test_a_saved_given_adapter_loads_as_the_trained_one(method, tmp_path):
    model, tokenizer = adapted()
    trainer = trainer_of(method, tmp_path / "run", model=model, processor=tokenizer, peft=None)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    loaded = PeftModel.from_pretrained(fresh()[0], tmp_path / "out")
    assert list(loaded.peft_config) == ["default"]
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "ref").exists() == (method == "dpo")  # as TRL's; LeanPO has none


def test_full_fine_tuning_of_a_model_that_was_never_on_disk(tmp_path):
    trainer = trainer_of("dpo", tmp_path, peft=None, max_steps=3, learning_rate=1e-3)
    start, before = logps(trainer), snapshot(trainer.model)
    assert trainer.ref_model is not trainer.model
    trainer.train()
    assert losses_of(trainer)[0] == LOG2 and losses_of(trainer)[2] != LOG2
    assert torch.equal(trainer.reference_scores(collated(trainer)).logps, start)
    assert all(torch.equal(v, before[k]) for k, v in trainer.ref_model.state_dict().items())
    assert not any(p.requires_grad and p.grad is not None for p in trainer.ref_model.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("peft", ["new", None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_explicit_reference_is_used(kind, peft, tmp_path):
    """Also one that is an adapter itself (trained by supervision, say)."""
    other = adapted(seed=5)[0] if kind == "adapter" else fresh()[0]
    if kind == "model":
        shake(other, 9, scale=0.1)
    probe = copy.deepcopy(other)
    trainer = trainer_of("rrpo", tmp_path, peft=peft, ref_model=other)
    batch = collated(trainer)
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    policy, want = slow_scores(trainer), slow_scores(trainer, probe)
    torch.testing.assert_close(reference.logps[scores.mask], torch.cat(of_tokens(want)).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.kl[scores.mask], torch.cat(slow_kl(policy, want)), rtol=1e-3, atol=1e-5)
    trainer.train()
    assert losses_of(trainer)[0] != LOG2
    assert torch.equal(trainer.reference_scores(batch).logps, reference.logps)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Folders of saved models, with their processors."""
    folders = {}
    for name in ("text", "Qwen2-VL"):
        folders[name] = tmp_path_factory.mktemp(name)
        for part in fresh(name):
            part.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("peft", ["new", None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["text", "Qwen2-VL"])
def test_a_model_by_its_path(name, peft, on_disk, images, tmp_path):
    """Also without a processing class: it comes from the same folder."""
    rows = text_rows(4) if name == "text" else image_rows(images)
    args = config("dpo", tmp_path, max_steps=2, learning_rate=1e-3)
    init = {"peft_config": lora(text=name == "text")} if peft else {}
    trainer = METHODS["dpo"][1](str(on_disk[name]), args=args, train_dataset=Dataset.from_list(rows), **init)
    memory = trainer_of("dpo", tmp_path, rows, name=name, peft=peft, max_steps=2, learning_rate=1e-3)
    want = logps(memory)
    torch.testing.assert_close(logps(trainer), want)
    trainer.train()
    assert losses_of(trainer)[0] == LOG2
    torch.testing.assert_close(trainer.reference_scores(collated(trainer)).logps, want)
    assert (trainer.ref_model is None) == (peft is not None)


@pytest.fixture
def new_models():
    """Counts the models that came to life in this test."""
    gc.freeze()  # what was there before is not counted
    return lambda: sum(type(o) is T.Qwen2ForCausalLM for o in gc.get_objects())


@pytest.mark.parametrize("method", ["leanpo", "dpo"])
@pytest.mark.parametrize("kind", ["path", "path, lora", "memory", "memory, lora", "adapter"])
def test_leanpo_builds_and_runs_no_reference(kind, method, on_disk, tmp_path, monkeypatch, new_models):
    """Models in memory, loads from disk, parameters and forward passes are counted; DPO shows that the counts can."""
    loads, passes = [], []
    load = T.Qwen2ForCausalLM.from_pretrained.__func__
    spy = classmethod(lambda cls, *args, **kwargs: loads.append(1) or load(cls, *args, **kwargs))
    monkeypatch.setattr(T.Qwen2ForCausalLM, "from_pretrained", spy)
    model, tokenizer = adapted() if kind == "adapter" else fresh()
    size = model.num_parameters()
    if "path" in kind:
        model = str(on_disk["text"])
    gc.collect()
    before = new_models()
    peft = "new" if "lora" in kind else None
    more = {"eval_dataset": Dataset.from_list(text_rows(2)), "eval_strategy": "steps", "eval_steps": 2}
    more["layout"] = "shared"  # "auto" would compare packed with padded rows first
    trainer = trainer_of(method, tmp_path, model=model, processor=tokenizer, peft=peft, **more)
    lean, copied = method == "leanpo", method == "dpo" and kind in ("path", "memory")
    gc.collect()
    assert new_models() - before == ("path" in kind) + copied
    for counted in (trainer.model, trainer.ref_model):
        if counted is not None:
            counted.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(loads) == ("path" in kind) * (2 if copied else 1)
    assert len(passes) == 3 * (1 if lean else 2)  # two steps and one batch of evaluation
    adapter = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name and ".ref." not in name)
    grown = 1 if "lora" in kind else 1 if kind == "adapter" and not lean else 0
    assert trainer.model.num_parameters() == size + grown * adapter
    assert (trainer.ref_model is not None) == copied


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_trains_the_head_through_the_kl(tied, tmp_path):
    torch.manual_seed(0)
    tokenizer = fresh()[1]
    cfg = T.Qwen2Config(**{**fresh()[0].config.to_dict(), "tie_word_embeddings": tied})
    trainer = trainer_of("rrpo", tmp_path, model=T.Qwen2ForCausalLM(cfg), processor=tokenizer, peft=None, alpha=0.5)
    shake(trainer.model, scale=0.02)
    batch = collated(trainer)
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    got = gradients(trainer, scores.kl.sum())
    kl = slow_kl(slow_scores(trainer), slow_scores(trainer, trainer.ref_model))
    assert_same_gradients(got, gradients(trainer, sum(values.sum() for values in kl[::2])), rtol=1e-4)  # chosen


def test_a_synchronised_reference_follows_the_policy(tmp_path):
    more = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = trainer_of("dpo", tmp_path, peft=None, learning_rate=1e-3, **more)
    trainer.train()
    torch.testing.assert_close(trainer.reference_scores(collated(trainer)).logps, logps(trainer))


@pytest.mark.parametrize("peft", ["new", None], ids=["lora", "full"])
def test_a_second_training_starts_from_the_first(peft, tmp_path):
    """Two trainers on one model object, as in a notebook: the second's reference is what the first left behind."""
    first = trainer_of("dpo", tmp_path, peft=peft, learning_rate=1e-3)
    first.train()
    model = first.model.merge_and_unload() if peft else first.model
    second = trainer_of("rrpo", tmp_path, model=model, processor=fresh()[1], peft=peft, learning_rate=1e-3)
    start = logps(second)
    torch.testing.assert_close(start, logps(first) if not peft else start)
    second.train()
    assert losses_of(second)[0] == LOG2
    torch.testing.assert_close(second.reference_scores(collated(second)).logps, start)


@pytest.mark.parametrize("method", list(METHODS))
def test_dropout_is_off(method, images, tmp_path):
    """Also LoRA's: with dropout, policy and reference would differ before the first step."""
    rows = image_rows(images, critical_box=[4, 4, 30, 30])
    trainer = trainer_of(method, tmp_path, rows, name="Qwen2-VL", peft=None, peft_config=lora(lora_dropout=0.5))
    shake(trainer.model)
    trainer.model.train()
    assert torch.equal(logps(trainer), logps(trainer))


@pytest.mark.parametrize("layout", ["separate", "auto"])
@pytest.mark.parametrize("kind", ["full", "full, explicit", "lora, explicit"])
def test_bfloat16_autocast_is_the_references_too(kind, layout, tmp_path):
    """A reference with float32 weights, beside the policy: before the first step their log-probs are equal, to the
    bit, as they would not be if one of them computed in float32."""
    more = {"ref_model": fresh()[0]} if "explicit" in kind else {}
    peft = "new" if "lora" in kind else None
    trainer = trainer_of("dpo", tmp_path, layout=layout, peft=peft, bf16=True, **more)
    dtypes = set()
    layer = trainer._bare(trainer.ref_model).model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    trainer.train()
    assert trainer.scorer.layout == {"auto": "shared"}.get(layout, layout)
    assert dtypes == {torch.bfloat16} and layer.weight.dtype == torch.float32
    assert losses_of(trainer)[0] == LOG2
    for side in ("chosen", "rejected"):
        start, later = losses_of(trainer, f"displacement/{side}")
        assert start == 0 and later != 0


class TwoPasses(TrainerCallback):
    """Scores one batch in the midst of training, twice each: the reference's and the policy's sums of log-probs."""

    def __init__(self):
        self.trainer, self.reference, self.policy, self.modes = None, [], [], []

    @torch.no_grad()
    def on_step_end(self, args, state, control, **_):
        batch = collated(self.trainer)
        before = [module.training for module in self.trainer.model.modules()]
        self.reference += [self.trainer.reference_scores(batch).sums for _ in range(2)]
        self.modes.append([module.training for module in self.trainer.model.modules()] == before)
        self.policy += [self.trainer.concatenated_forward(self.trainer.model, batch).sums for _ in range(2)]


NOISE = {
    "embedding noise": ("new", {"neftune_noise_alpha": 5.0}),
    "embedding noise, given adapter": ("given", {"neftune_noise_alpha": 5.0}),
    "dropout, given adapter": ("given", {"disable_dropout": False}),
}


@pytest.mark.parametrize("off", [True, False])
def test_dropout_of_attention_is_turned_off(off, tmp_path):
    model = fresh()[0]
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # a number, as of Emu3
    model.model.layers[0].mlp = Sequential(model.model.layers[0].mlp, QianfanOCRDropPath(0.5))
    trainer = trainer_of("dpo", tmp_path, text_rows(2), model=model, max_steps=1, disable_dropout=off)
    trainer.train()
    assert (trainer.state.log_history[0]["loss"] == LOG2) == off  # of a policy that is its reference


@pytest.mark.parametrize("kind", NOISE)
def test_training_noise_does_not_reach_the_reference(kind, tmp_path):
    """NEFTune and LoRA's dropout are the policy's. The reference is the same in every pass, and as in evaluation."""
    adapter, options = NOISE[kind]
    model, tokenizer = fresh()
    config = lora(text=True, lora_dropout=0.0 if "neftune_noise_alpha" in options else 0.3)
    more = {"peft_config": config}
    if adapter == "given":
        model = get_peft_model(model, config)
        shake(model, 3, scale=0.3)
        more = {}
    more |= {"model": model, "processor": tokenizer, "peft": None, "callbacks": [watch := TwoPasses()], **options}
    watch.trainer = trainer = trainer_of("dpo", tmp_path, text_rows(4), **more)
    trainer.model.eval()
    want = trainer.reference_scores(collated(trainer)).sums
    trainer.train()
    assert len(watch.reference) == 4 and all(torch.equal(got, want) for got in watch.reference)
    assert all(watch.modes)  # the policy goes on in training mode
    for first, second in zip(watch.policy[::2], watch.policy[1::2]):  # where it is random
        assert (first - second).abs().max() > 1e-3
    trainer.model.eval()
    assert torch.equal(trainer.reference_scores(collated(trainer)).sums, want)
