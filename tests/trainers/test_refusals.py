"""What is refused, and the reason that is given, before anything is trained."""

import dataclasses

import pytest
import torch
import transformers as T
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trainer_kit import METHODS, TEXT_METHODS, config, fresh, image_rows, lora, text_rows, trainer_of

from trl_vpo.errors import RowError

OTHER = {  # a value that is not TRL's default, for every knob that some method refuses
    "loss_type": ["ipo"],
    "loss_weights": [0.5],
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.7,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "padding_free": True,
    "truncation_mode": "keep_end",
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 4,
    "label_smoothing": 0.1,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.9,
    "ref_model_sync_steps": 7,
    "label_smoothing_factor": 0.1,
    "include_num_input_tokens_seen": "all",
}
REFUSED = [(method, knob, reason) for method in METHODS for knob, reason in METHODS[method][0].refused.items()]


@pytest.mark.parametrize(("method", "knob", "reason"), REFUSED, ids=[f"{m}-{k}" for m, k, _ in REFUSED])
def test_knobs_without_effect_are_refused_with_the_reason(method, knob, reason, tmp_path):
    with pytest.raises(ValueError) as raised:
        config(method, tmp_path, **{knob: OTHER[knob]})
    said = str(raised.value)
    assert reason in said and knob in said and METHODS[method][0].__name__ in said
    # TRL's own default is no choice: it may be written out.
    default = next(f for f in dataclasses.fields(trl.DPOConfig) if f.name == knob)
    value = default.default if default.default is not dataclasses.MISSING else default.default_factory()
    config(method, tmp_path, **{knob: value})


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_by_length_is_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=f"'{strategy}': the length of a row is known only once it is collated"):
        config("dpo", tmp_path, train_sampling_strategy=strategy)
    assert config("dpo", tmp_path, train_sampling_strategy="sequential").train_sampling_strategy == "sequential"


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
def test_weights_trained_beside_the_adapter_are_refused(method, tmp_path):
    """They would not be in its file, and they would move the reference."""
    model, tokenizer = fresh()
    model = get_peft_model(model, lora(text=True))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight and 0 other weights are trained beside the adapter"):
        trainer_of(method, tmp_path, model=model, processor=tokenizer, peft=None)


def test_every_knob_of_trl_is_used_or_refused():
    """A new field of `trl.DPOConfig` needs a decision: does it do something here?"""
    inherited = {f.name for f in dataclasses.fields(T.TrainingArguments)}
    theirs = {f.name for f in dataclasses.fields(trl.DPOConfig)} - inherited
    used = {
        "model_init_kwargs",
        "trust_remote_code",
        "router_aux_loss_coef",
        "disable_dropout",
        "max_length",
        "pad_to_multiple_of",
        "beta",
        "activation_offloading",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "pad_token",
        "dataset_num_proc",
    }
    undecided = theirs - used - set(METHODS["dpo"][0].refused)
    assert not undecided, f"trl.DPOConfig has new knobs {sorted(undecided)}: use or refuse them in trainers/config.py"


def test_label_smoothing_is_leanpos(tmp_path):
    assert config("leanpo", tmp_path, label_smoothing=0.3).label_smoothing == 0.3
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
            config("leanpo", tmp_path, label_smoothing=wrong)


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("dpo", {"check_media": "maybe"}, "header, decode, off"),
        ("dpo", {"on_bad_media": "ignore"}, "error, skip"),
        ("lpoi", {"num_images": 1}, "at least two images"),
        ("rrpo", {"num_frames": 0}, "num_frames"),
        ("rrpo", {"fps": -1.0}, "fps"),
        ("rrpo", {"video_start": 5.0, "video_end": 2.0}, "video_"),
    ],
)
def test_values_that_make_no_sense(method, wrong, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config(method, tmp_path, **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_another_methods_config(method, tmp_path):
    other = "rrpo" if method != "rrpo" else "dpo"
    with pytest.raises(TypeError, match=f"needs a {METHODS[method][0].__name__}, got a {METHODS[other][0].__name__}"):
        trainer_of(method, tmp_path, args=config(other, tmp_path))
    with pytest.raises(TypeError, match="got a DPOConfig"):
        trainer_of(method, tmp_path, args=trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True))


def test_leanpo_takes_no_reference(tmp_path):
    with pytest.raises(ValueError, match="LeanPO has no reference model"):
        trainer_of("leanpo", tmp_path, ref_model=fresh()[0])


@pytest.mark.parametrize("given", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(kind, given, tmp_path):
    model, tokenizer = fresh()
    prompt = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    if given:
        model, prompt = get_peft_model(model, prompt), None
    with pytest.raises(ValueError, match=r"virtual tokens.*LoRA"):
        trainer_of("dpo", tmp_path, model=model, processor=tokenizer, peft=None, peft_config=prompt)


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_an_adapter_on_the_lm_head(method, tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        trainer_of(method, tmp_path, peft=None, peft_config=lora(target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
def test_an_adapter_that_was_loaded_for_inference(method, tmp_path):
    """`PeftModel.from_pretrained` freezes the adapter unless told otherwise: nothing would train."""
    model, tokenizer = fresh()
    get_peft_model(model, lora(text=True)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(fresh()[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_of(method, tmp_path, model=model, processor=tokenizer, peft=None)


def test_an_adapter_with_a_name_of_its_own(tmp_path):
    model, tokenizer = fresh()
    model = get_peft_model(model, lora(text=True), adapter_name="mine")
    with pytest.raises(ValueError, match="default"):
        trainer_of("dpo", tmp_path, model=model, processor=tokenizer, peft=None)


def test_two_adapters_at_once(tmp_path):
    model, tokenizer = fresh()
    model = get_peft_model(model, lora(text=True))
    with pytest.raises(ValueError, match="PeftModel"):
        trainer_of("dpo", tmp_path, model=model, processor=tokenizer)


def test_datasets_that_are_none(tmp_path):
    model, tokenizer = fresh()
    args = config("dpo", tmp_path)
    trainer = METHODS["dpo"][1]
    with pytest.raises(ValueError, match="train_dataset"):
        trainer(model, args=args, processing_class=tokenizer)
    for wrong in (text_rows(), DatasetDict({"train": Dataset.from_list(text_rows())})):
        with pytest.raises(TypeError, match="`Dataset` or `IterableDataset`"):
            trainer(model, args=args, processing_class=tokenizer, train_dataset=wrong)
    with pytest.raises(ValueError, match="no rows"):
        trainer(model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(text_rows()).select([]))


def test_a_model_without_a_name_needs_a_processing_class(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        METHODS["dpo"][1](fresh()[0], args=config("dpo", tmp_path), train_dataset=Dataset.from_list(text_rows()))


def test_pictures_for_a_text_model(images, tmp_path):
    with pytest.raises(RowError, match="vision-language"):
        trainer_of("dpo", tmp_path, image_rows(images))


def test_the_load_balancing_loss_of_experts(tmp_path):
    tokenizer = fresh()[1]
    tiny = {**fresh()[0].config.to_dict(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    known = set(T.Qwen3MoeConfig().to_dict()) - {"model_type", "layer_types"}
    tiny = {k: v for k, v in tiny.items() if k in known}
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.0"):
        model = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**tiny))
        trainer_of("dpo", tmp_path, model=model, processor=tokenizer, peft=None)
    model = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**tiny))
    trainer_of("dpo", tmp_path, model=model, processor=tokenizer, peft=None, router_aux_loss_coef=0.0).train()


def test_inputs_for_compute_metrics(tmp_path):
    with pytest.raises(ValueError, match="include_for_metrics"):
        config("dpo", tmp_path, include_for_metrics=["inputs"])


@pytest.mark.parametrize("knob", [{"dispatch_batches": True}, {"even_batches": False}])
def test_how_accelerate_must_not_deal_out_batches(knob, tmp_path):
    with pytest.raises(ValueError, match=next(iter(knob))):
        config("dpo", tmp_path, accelerator_config=knob)


def test_a_pad_token_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"'<\|nothing\|>' is not a token"):
        trainer_of("dpo", tmp_path, pad_token="<|nothing|>")


def test_a_model_with_nothing_to_train(tmp_path):
    model, tokenizer = fresh()
    with pytest.raises(ValueError, match="frozen"):
        trainer_of("dpo", tmp_path, model=model.requires_grad_(False), processor=tokenizer, peft=None)
    trainer_of("dpo", tmp_path, model=model, processor=tokenizer)  # a new adapter on a frozen model is well


def test_resuming_with_a_reference_that_moved(tmp_path):
    """Checkpoints do not hold it. A run from the start is well."""
    more = {"sync_ref_model": True, "ref_model_sync_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of("dpo", tmp_path, peft=None, **more)
    trainer.train(resume_from_checkpoint=False)
    for checkpoint in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"sync_ref_model.*checkpoints do not hold it.*Start anew"):
            trainer_of("dpo", tmp_path, peft=None, **more).train(resume_from_checkpoint=checkpoint)


def test_a_loss_that_would_never_be_called(tmp_path):
    class Mine(METHODS["dpo"][1]):
        def _compute_loss(self, model, inputs, return_outputs):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"Mine\._compute_loss would never be called: override `preference_loss"):
        Mine(fresh()[0], args=config("dpo", tmp_path), train_dataset=Dataset.from_list(text_rows()))


def test_targets_that_peft_does_not_know(images, tmp_path):
    with pytest.raises(ValueError, match=r"what to adapt in a qwen2_vl: set lora_target_modules .* language"):
        trainer_of("dpo", tmp_path, image_rows(images), name="Qwen2-VL", peft_config=LoraConfig(), peft=None)


def test_a_collator_around_ours_trains(tmp_path):
    """It is the user's own function: rows are checked as the method's collator would take them."""
    ours, seen = METHODS["dpo"][1].make_collator(fresh()[1], config("dpo", tmp_path)), []

    def collate(rows):
        seen.extend(rows)
        return ours(rows)

    trainer = trainer_of("dpo", tmp_path, data_collator=collate)
    assert trainer.train().training_loss > 0
    assert len(seen) >= 4
    with pytest.raises(RowError, match="max_length=4"):
        trainer_of("dpo", tmp_path, data_collator=collate, max_length=4)
