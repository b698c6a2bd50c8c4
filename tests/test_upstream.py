"""The names inside TRL, transformers, accelerate and peft that this package leans on, and what it expects of them.

Most are not public. When an upgrade moves one, the message says what moved and which file of ours has to follow.
"""

import dataclasses
import importlib
import inspect
import re

import pytest
import torch
from trainer_kit import fresh, trainer_of
from upstream_names import (
    ATTENTION,
    BASE,
    CALLED,
    CARD,
    COLLATOR,
    COMPAT,
    CONFIG,
    FINGERPRINT,
    KL,
    LOGS,
    RESUME,
    SCORING,
    SOURCES,
)

import trl_vpo.trainers.base as base


def find(path):
    """The object behind a dotted path."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            target = getattr(target, name)
        return target
    raise AttributeError(path)


def absent(path, *lines):
    """Those that the source of a function or class does not have."""
    source = inspect.getsource(find(path))
    return [line for line in lines if line not in source]


@pytest.mark.parametrize(("path", "parameters", "user"), CALLED, ids=[path for path, *_ in CALLED])
def test_what_is_called_is_there(path, parameters, user):
    try:
        called = find(path)
    except AttributeError:
        pytest.fail(f"{path} is gone or has moved; {user} uses it.")
    if parameters is ...:
        return
    got = [name for name, p in inspect.signature(called).parameters.items() if p.kind is not p.VAR_KEYWORD]
    if got[: len(parameters)] != parameters:
        pytest.fail(f"{path} now takes {got}; {user} calls it with {parameters}.")


@pytest.mark.parametrize(("path", "lines", "user"), SOURCES, ids=[path for path, *_ in SOURCES])
def test_what_a_source_says(path, lines, user):
    if path.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    missing = absent(path, *lines)
    assert not missing, f"{path} has no {missing} any more; see {user}."


def test_the_trainers_signature_is_dpo_trainers():
    """Changing the class name and the config is all that a user of `trl.DPOTrainer` does."""
    theirs = list(inspect.signature(find("trl.DPOTrainer.__init__")).parameters)
    ours = list(inspect.signature(base.VisualPreferenceTrainer.__init__).parameters)
    assert ours == theirs, f"trl.DPOTrainer.__init__ now takes {theirs}; bring {BASE} in line."


KERNELS = [
    (
        "trl.kernels.ChunkedLogProbFunction",
        SCORING,
        "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
        5,
    ),
    (
        "trl.kernels.chunked_divergence.ChunkedDivergenceFunction",
        KL,
        "student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
        "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping",
        2,
    ),
]


@pytest.mark.parametrize(("path", "user", "parameters", "outputs"), KERNELS, ids=[path for path, *_ in KERNELS])
def test_the_kernels_take_and_give_what_we_think(path, user, parameters, outputs):
    """They take their arguments by position, so an order that changes would be silent. (What they compute is compared
    with plain torch in tests/forward/test_scoring.py.)"""
    forward = find(path).forward
    got = list(inspect.signature(forward).parameters)[1:]
    assert got == parameters.split(), f"{path} now takes {got}; {user} passes {parameters.split()} by position."
    given = str(inspect.signature(forward).return_annotation)
    count = given.count("torch.Tensor")
    assert count == outputs, f"{path} now gives {given}; {user} unpacks {outputs} tensors."


def test_the_names_of_the_log_prob_kernels_outputs():
    from trl.kernels import chunked_logprob

    known = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    got = chunked_logprob.OPTIONAL_OUTPUTS
    assert got == known, f"ChunkedLogProbFunction now gives log_probs and {got}; {SCORING} unpacks {known}."


def test_where_dpo_trainer_loads_the_reference():
    """LeanPO keeps `DPOTrainer.__init__` from loading a reference: its second call of `create_model_from_path`."""
    source = inspect.getsource(find("trl.DPOTrainer.__init__"))
    calls = re.findall(r"(\S+) = create_model_from_path\(", source)
    assert calls == ["model", "self.ref_model"], (
        f"DPOTrainer.__init__ now loads {calls} through create_model_from_path; `without_reference_model` in {COMPAT} "
        "expects the policy (where it is given by name) and then the reference."
    )
    other = re.findall(r"\b(create_reference_model|from_pretrained|deepcopy)\(", source)
    assert other == ["from_pretrained"], f"{other} in DPOTrainer.__init__: see `without_reference_model` in {COMPAT}."


def test_how_peft_names_the_weights_under_an_adapter():
    """An adapter of the policy does not change what the reference is: its weights are hashed without it."""
    from peft import get_peft_model
    from trainer_kit import lora

    model, _ = fresh()
    plain = set(model.state_dict())
    peft = get_peft_model(model, lora(text=True, modules_to_save=["lm_head"], use_dora=True))
    names = [name.split(".") for name in peft.get_base_model().state_dict() if "default" not in name.split(".")]
    bare = {".".join(part for part in name if part not in ("base_layer", "original_module")) for name in names}
    assert bare == plain, (
        f"PEFT names weights {sorted(bare ^ plain)} otherwise now; see `_reference` in {FINGERPRINT}."
    )


ATTRIBUTES = {  # of a trainer after `DPOTrainer.__init__`
    "_metrics": dict,
    "_total_train_tokens": int,
    "_is_vision_dataset": bool,
    "precompute_ref_logps": bool,
    "_signature_columns": list,
    "_tokenizer": object,
    "aux_loss_enabled": bool,
    "beta": float,
    "accelerator": object,
    "maybe_activation_offload_context": object,
}


def test_the_attributes_that_dpo_trainer_sets(tmp_path):
    import trl
    from datasets import Dataset
    from trainer_kit import QUIET, lora, text_rows

    model, tokenizer = fresh()
    more = {"processing_class": tokenizer, "peft_config": lora(text=True)}
    data = Dataset.from_list(text_rows(2))
    trainer = trl.DPOTrainer(model, args=trl.DPOConfig(str(tmp_path), **QUIET), train_dataset=data, **more)
    trainer.get_train_dataloader()
    for name, kind in ATTRIBUTES.items():
        assert hasattr(trainer, name), f"DPOTrainer no longer sets `{name}`; {BASE} reads or overrides it."
        assert isinstance(getattr(trainer, name), kind), f"DPOTrainer.{name} is now {type(getattr(trainer, name))}."
    assert set(trainer._metrics) == {"train", "eval"}, f"DPOTrainer._metrics has new modes; see `log` in {LOGS}."
    for name in ("_tag_names", "_name", "_paper"):
        assert hasattr(trl.DPOTrainer, name), f"DPOTrainer has no `{name}`; every trainer and {CARD} set or read it."
    assert set(trl.DPOTrainer._paper) == {"title", "id", "citation"}


def test_the_averages_are_ready_when_trainer_logs():
    """`log` merges `_metrics`; every rank passes the two places that fill it, and then one may log alone."""
    source = inspect.getsource(find("trl.DPOTrainer.log"))
    assert "self._metrics[mode]" in source and "logs.update(metrics)" in source, f"see `_average_training` in {LOGS}."
    calls = {name: inspect.getsource(find(f"transformers.Trainer.{name}")).count("self.log(")
             for name in ("_maybe_log_save_evaluate", "_finalize_training", "_run_epoch")}  # fmt: skip
    assert calls == {"_maybe_log_save_evaluate": 1, "_finalize_training": 1, "_run_epoch": 0}, f"{calls}, see {LOGS}"


def test_the_options_that_are_refused_are_still_trls():
    from trl_vpo import LeanPOConfig, RRPOConfig

    fields = {f.name for f in dataclasses.fields(find("trl.DPOConfig"))}
    missing = (set(LeanPOConfig.refused) | set(RRPOConfig.refused)) - fields
    assert not missing, f"trl.DPOConfig has no {sorted(missing)} any more; drop them from REFUSED in {CONFIG}."


def test_video_metadata():
    from transformers.video_utils import VideoMetadata

    used = {"total_num_frames", "fps", "frames_indices", "duration", "height", "width", "video_backend"}
    missing = used - {f.name for f in dataclasses.fields(VideoMetadata)}
    assert not missing, f"transformers' VideoMetadata has no {sorted(missing)} any more; {COLLATOR} gives them."


def test_peft_hands_unknown_arguments_to_the_model(tmp_path):
    """The request travels as `score=` through PeftModel (with and without a task type), and accelerate's wrapper."""
    from trainer_kit import collated, lora

    for task in (None, "CAUSAL_LM"):
        trainer = trainer_of("dpo", tmp_path, peft=None, peft_config=lora(text=True, task_type=task))
        seen, model = [], trainer.model.get_base_model()
        forward = model.forward
        model.forward = lambda *args, forward=forward, into=seen, **kw: (
            into.append(kw.get("score")) or forward(*args, **kw)
        )
        with torch.no_grad():
            trainer.concatenated_forward(trainer.model, collated(trainer))
        assert seen and all(request is not None for request in seen), (
            f"PeftModel({task}) no longer passes unknown keyword arguments on; `attach_scoring` in {SCORING} needs it."
        )


def test_the_counters_that_go_on_after_an_interruption():
    """They are set to zero, then `on_train_begin` may put them right, and then training counts on."""
    source = inspect.getsource(find("transformers.Trainer._inner_training_loop"))
    zeroed = (
        "self._initial_global_step = self.state.global_step",
        "self._tr_loss = torch.tensor(0.0",
        "self._total_loss_scalar = 0.0",
        "self._globalstep_last_logged = self.state.global_step",
    )
    begin, epoch = (source.find(f"callback_handler.{name}(") for name in ("on_train_begin", "on_epoch_begin"))
    assert 0 < begin < epoch, f"Trainer no longer calls on_train_begin before on_epoch_begin; see `Guard` in {RESUME}."
    late = [line for line in zeroed if not 0 < source.find(line) < begin]
    assert not late, f"Trainer has no {late} before on_train_begin any more; see `Guard.on_train_begin` in {RESUME}."
    used = ("self._total_loss_scalar += self._tr_loss.item()", "self.state.global_step - self._initial_global_step")
    missing = absent("transformers.Trainer._finalize_training", *used)
    assert not missing, f"Trainer._finalize_training has no {missing} any more; see `_counters` in {RESUME}."


def test_how_an_attention_function_is_found():
    """By the name in the config, in a table whose entries may be replaced; eager attention is the default there."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, eager_attention_forward

    from trl_vpo.forward.attention import _eager

    try:
        ALL_ATTENTION_FUNCTIONS["eager"] = mine = lambda *args: args
        assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager_attention_forward) is mine, ATTENTION
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
    assert _eager(Qwen2Attention) is eager_attention_forward, ATTENTION
