"""Refusals, with the reason, before anything is trained."""

import dataclasses
import math

import pytest
import transformers as T
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trainer_kit import METHODS, config, fresh, image_rows, lora, text_rows, trainer_of

from trl_vpo.errors import RowError
from trl_vpo.trainers.base import VisualPreferenceTrainer

OTHER = {  # a value that is not TRL's default, for every option that some method refuses
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
    "beta": 0.3,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.9,
    "ref_model_sync_steps": 7,
    "label_smoothing_factor": 0.1,
    "include_num_input_tokens_seen": "all",
}
REFUSED = [(method, option, reason) for method in METHODS for option, reason in METHODS[method][0].refused.items()]


@pytest.mark.parametrize(("method", "option", "reason"), REFUSED, ids=[f"{m}-{o}" for m, o, _ in REFUSED])
def test_options_without_effect(method, option, reason, tmp_path):
    with pytest.raises(ValueError) as raised:
        config(method, tmp_path, **{option: OTHER[option]})
    assert all(part in str(raised.value) for part in (reason, option, METHODS[method][0].__name__))
    # TRL's own default is no choice: it may be written out.
    default = next(f for f in dataclasses.fields(trl.DPOConfig) if f.name == option)
    value = default.default if default.default is not dataclasses.MISSING else default.default_factory()
    config(method, tmp_path, **{option: value})


USED = "model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout max_length pad_to_multiple_of beta "
USED += "activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_log_probs "
USED += "precompute_ref_batch_size pad_token dataset_num_proc loss_type loss_weights label_smoothing ld_alpha "
USED += "f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau"


def test_every_option_of_trl_is_used_or_refused():
    """A new field of `trl.DPOConfig` needs a decision: does it do something here?"""
    inherited = {f.name for f in dataclasses.fields(T.TrainingArguments)}
    theirs = {f.name for f in dataclasses.fields(trl.DPOConfig)} - inherited
    undecided = theirs - set(USED.split()) - set(METHODS["dpo"][0].refused)
    assert not undecided, f"trl.DPOConfig has new fields {sorted(undecided)}: use or refuse them in trainers/config.py"


RATES = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon")
UNCOLLATED = "the length of a row is known only once it is collated"


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("dpo", {"check_media": "maybe"}, "header, decode, off"),
        ("dpo", {"on_bad_media": "ignore"}, "error, skip"),
        ("lpoi", {"num_images": 1}, "num_images is 1: give at least 2"),
        ("lpoi", {"num_images": 2.5}, "num_images is 2.5: give a whole number"),
        ("lpoi", {"num_images": math.nan}, "num_images is nan: give a finite number"),
        ("rrpo", {"num_frames": 0}, "num_frames"),
        ("rrpo", {"num_frames": 8.0}, "num_frames is 8.0: give a whole number"),
        ("rrpo", {"max_pixels": 1e5}, "max_pixels is 100000.0: give a whole number"),
        *(("dpo", {key: math.nan}, f"{key} is nan: give a finite") for key in RATES),
        *(("dpo", {key: math.inf}, f"{key} is inf: give a finite") for key in RATES),
        ("dpo", {"weight_decay": -0.1}, "weight_decay is -0.1: give at least 0"),
        ("rrpo", {"fps": -1.0}, "fps"),
        ("rrpo", {"video_start": 5.0, "video_end": 2.0}, "video_"),
        ("leanpo", {"label_smoothing": -0.1}, "label_smoothing is -0.1: give at least 0 and below 1"),
        ("leanpo", {"label_smoothing": 1.0}, "label_smoothing is 1.0: give at least 0 and below 1"),
        ("dpo", {"beta": 0.0}, "beta is 0.0: give a number above 0"),
        ("rrpo", {"alpha": math.nan}, "alpha is nan: give a finite number"),
        ("tdpo", {"variant": "tdpo1", "alpha": 0.3}, "alpha=0.3 does nothing with variant tdpo1"),
        ("ddpo", {"phrase_weight": -1.0}, "phrase_weight is -1.0: give at least 0"),
        ("mdpo", {"conditional_weight": -1.0}, "conditional_weight is -1.0: give at least 0"),
        ("dpo", {"train_sampling_strategy": "group_by_length"}, f"'group_by_length': {UNCOLLATED}"),
        ("dpo", {"train_sampling_strategy": "batch_rebalance"}, f"'batch_rebalance': {UNCOLLATED}"),
        ("dpo", {"include_for_metrics": ["inputs"]}, "include_for_metrics"),
        ("dpo", {"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ("dpo", {"accelerator_config": {"even_batches": False}}, "even_batches"),
    ],
)
def test_values_that_make_no_sense(method, values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(method, tmp_path, **values)


def test_one_process_takes_one_of_several_gpus(tmp_path):
    args = config("dpo", tmp_path, per_device_train_batch_size=2)
    args._n_gpu = 4  # as transformers finds them
    assert args.n_gpu == 1 and args.train_batch_size == 2
    args._n_gpu = 0
    assert args.n_gpu == 0


@pytest.mark.parametrize("method", METHODS)
def test_another_methods_config(method, tmp_path):
    other = "rrpo" if method != "rrpo" else "dpo"
    with pytest.raises(TypeError, match=f"needs a {METHODS[method][0].__name__}, got a {METHODS[other][0].__name__}"):
        trainer_of(method, tmp_path, args=config(other, tmp_path))
    with pytest.raises(TypeError, match="got a DPOConfig"):
        trainer_of(method, tmp_path, args=trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True))


def adapted(prompt=None, **more):
    return get_peft_model(fresh()[0], prompt or lora(text=True), **more)


def with_more(*active, name="b"):
    model = adapted()
    model.add_adapter(name, lora(text=True))
    model.base_model.set_adapter(list(active))
    return {"model": model}


def with_trained_embeddings():
    model = adapted()
    model.get_input_embeddings().weight.requires_grad_(True)
    return {"model": model}


def for_inference(folder):
    """`PeftModel.from_pretrained` freezes the adapter unless told otherwise: nothing would train."""
    adapted().save_pretrained(folder / "adapter")
    return {"model": PeftModel.from_pretrained(fresh()[0], folder / "adapter")}


def bert(folder):
    """The name of a model that fills gaps."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    T.BertForMaskedLM(T.BertConfig(vocab_size=64, **sizes)).save_pretrained(folder / "bert")
    return {"model": str(folder / "bert")}


PROMPTS = [kind(task_type="CAUSAL_LM", num_virtual_tokens=4) for kind in (PromptTuningConfig, PrefixTuningConfig)]
VIRTUAL = r"virtual tokens.*LoRA"
MODELS = {  # method, arguments made in a folder, message
    "weights beside the adapter": (
        "dpo leanpo",
        lambda _: with_trained_embeddings(),
        r"embed_tokens\.weight and 0 other weights are trained beside the adapter",
    ),
    "an adapter for inference": ("dpo leanpo", for_inference, "is_trainable=True"),
    "an adapter's own name": ("dpo", lambda _: {"model": adapted(adapter_name="mine")}, "'mine'.*'default'"),
    "another one is active": ("dpo leanpo", lambda _: with_more("b"), r"are \['b'\].*set_adapter\('default'\)"),
    "two are active": ("dpo leanpo", lambda _: with_more("default", "b"), r"are \['default', 'b'\]"),
    "one called ref": ("dpo leanpo", lambda _: with_more("default", name="ref"), r"delete_adapter\('ref'\)"),
    "two adapters": ("dpo", lambda _: {"model": adapted(), "peft_config": lora(text=True)}, "PeftModel"),
    "prompts": ("dpo", lambda _: {"peft_config": PROMPTS[0]}, VIRTUAL),
    "given prompts": ("dpo", lambda _: {"model": adapted(PROMPTS[0])}, VIRTUAL),
    "prefixes": ("dpo", lambda _: {"peft_config": PROMPTS[1]}, VIRTUAL),
    "given prefixes": ("dpo", lambda _: {"model": adapted(PROMPTS[1])}, VIRTUAL),
    "nothing to train": ("dpo", lambda _: {"model": fresh()[0].requires_grad_(False)}, "frozen"),
    "a reference of LeanPO": ("leanpo", lambda _: {"ref_model": fresh()[0]}, "LeanPO has no reference model"),
    "the name of a reference": ("dpo", lambda _: {"ref_model": "org/reference"}, "'org/reference': load it"),
    "no text": ("leanpo", bert, "BertForMaskedLM is not supported: it generates no text"),
    "a name that is nowhere": (
        "leanpo",
        lambda _: {"peft_config": LoraConfig(target_modules=["q_proj", "q_prj"])},
        "has nothing to adapt that is called q_prj",
    ),
    "a pad token": ("dpo", lambda _: {"pad_token": "<|nothing|>"}, r"'<\|nothing\|>' is not a token"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_trained(kind, tmp_path):
    methods, make, message = MODELS[kind]
    for method in methods.split():
        with pytest.raises(ValueError, match=message):
            trainer_of(method, tmp_path, **{"processor": fresh()[1], "peft": None, **make(tmp_path)})


def test_a_new_adapter_on_a_frozen_model_is_trained(tmp_path):
    trainer_of("dpo", tmp_path, model=fresh()[0].requires_grad_(False), processor=fresh()[1])


def test_targets_that_peft_does_not_know(images, tmp_path):
    with pytest.raises(ValueError, match=r"what to adapt in a qwen2_vl: set lora_target_modules .* language"):
        trainer_of("dpo", tmp_path, image_rows(images), name="Qwen2-VL", peft_config=LoraConfig(), peft=None)


def test_a_load_balancing_loss_without_experts(tmp_path):
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef` is set to 0\.1 but .* is not a Mixture-of-Experts"):
        trainer_of("dpo", tmp_path, router_aux_loss_coef=0.1)


def test_resuming_with_a_reference_that_moved(tmp_path):
    """Checkpoints do not hold it. A run from the start is fine."""
    more = {"sync_ref_model": True, "ref_model_sync_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of("dpo", tmp_path, peft=None, **more).train(resume_from_checkpoint=False)
    for checkpoint in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"sync_ref_model.*checkpoints do not hold it.*Start a new run"):
            trainer_of("dpo", tmp_path, peft=None, **more).train(resume_from_checkpoint=checkpoint)


def test_datasets_that_are_none(tmp_path):
    model, tokenizer = fresh()
    given = {"args": config("dpo", tmp_path), "processing_class": tokenizer}
    rows = Dataset.from_list(text_rows())
    for data, error, message in (
        (None, ValueError, "train_dataset"),
        (text_rows(), TypeError, "`Dataset` or `IterableDataset`"),
        (DatasetDict({"train": rows}), TypeError, "`Dataset` or `IterableDataset`"),
        (rows.select([]), ValueError, "no rows"),
    ):
        with pytest.raises(error, match=message):
            METHODS["dpo"][1](model, train_dataset=data, **given)
    with pytest.raises(ValueError, match="give `processing_class`"):  # the model has no name to load one by
        METHODS["dpo"][1](model, args=given["args"], train_dataset=rows)


def test_pictures_for_a_text_model(images, tmp_path):
    with pytest.raises(RowError, match="tokenizer of a text model"):
        trainer_of("dpo", tmp_path, image_rows(images))


def test_a_loss_that_would_never_be_called(tmp_path):
    class Mine(METHODS["dpo"][1]):
        def _compute_loss(self, model, inputs, return_outputs):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"Mine\._compute_loss would never be called: override `preference_loss"):
        Mine(fresh()[0], args=config("dpo", tmp_path), train_dataset=Dataset.from_list(text_rows()))


def test_a_method_without_a_name_of_its_own(tmp_path):
    """It would pass for DPO in messages and on its model card."""

    class Nameless(VisualPreferenceTrainer):
        config_class = METHODS["dpo"][0]

    with pytest.raises(TypeError, match="Nameless has no `_name` of its own"):
        trainer_of("dpo", tmp_path, kind=Nameless)


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


@pytest.mark.parametrize("made", [[], None, {"input_ids": []}], ids=["list", "None", "dict"])
def test_a_collator_that_makes_no_tree_batch(made, tmp_path):
    rows = Dataset.from_list(text_rows(2))
    trainer = trainer_of("dpo", tmp_path, data_collator=lambda rows: made, eval_dataset=rows)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(TypeError, match=r"made no tree batch, but a .*`trl_vpo\.PreferenceCollator`"):
            run()
