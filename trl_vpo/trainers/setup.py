"""What is checked and put right before `DPOTrainer.__init__` runs."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoConfig, AutoProcessor
from trl.trainer import dpo_trainer
from trl.trainer.utils import get_config_model_id

from trl_vpo.errors import RecipeError
from trl_vpo.forward.head import check_head
from trl_vpo.models.adapters import PRESETS, check_targets, loses_base, resolve_targets
from trl_vpo.models.model_size import empty_model
from trl_vpo.models.source import check_model as check_source
from trl_vpo.trainers.config import VisualPreferenceConfig

LORA_RATE, LOWEST_LORA_RATE = 5e-6, 1e-6  # of the recipes for 7B models; DPO's default, for full fine-tuning
UNCALLED = ("_compute_loss", "get_batch_loss_metrics", "dpo_loss")  # where TRL's trainers, now and before, have a loss


def check_model(
    model: Any, ref_model: Any, peft_config: Any, *, needs_reference: bool, revision: str | None = None
) -> None:
    """Refuse models that would train on nothing, or against nothing, or against something else than they seem to.

    Raises:
        ValueError: says which, and what to do.
    """
    if isinstance(model, str):
        check_source(model, key="model", revision=revision)
    for given in (model, ref_model):
        if isinstance(given, nn.Module):
            check_head(given)
    configs = [peft_config] if peft_config is not None else []
    if isinstance(model, PeftModel):
        configs += list(model.peft_config.values())
        if ref_model is None and "default" not in model.peft_config:
            raise ValueError(
                f"the model's adapter is called {model.active_adapter!r}; trl.DPOTrainer copies the one called "
                "'default' as reference. Load it without `adapter_name`."
            )
    for config in configs:
        if isinstance(config, PromptLearningConfig):
            raise ValueError(f"{type(config).__name__} prepends virtual tokens, which moves every response. Use LoRA.")
        # DPOTrainer begins a second adapter in a given PeftModel, whatever the method, and so changes its base again.
        if ref_model is None and (needs_reference or isinstance(model, PeftModel)) and (why := loses_base(config)):
            raise ValueError(
                f"{why}, so switching the adapter off does not give the reference. Leave that out, or give a "
                "`ref_model`. An adapter that was trained so can be merged into its base first (`trl-vpo merge`)."
            )
    if isinstance(model, PeftModel):
        _check_strays(model)
        _warn_of_new(model)
    if not isinstance(model, str) and peft_config is None and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "every parameter of the model is frozen; there is nothing to train. Load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or give a `peft_config`."
        )


def check_collator(data_collator: Any) -> None:
    """Refuse the collators of TRL and transformers: they take rows of tokens and make no tree batch.

    Raises:
        ValueError: names the collator.
    """
    if getattr(data_collator, "__module__", "").split(".")[0] in ("trl", "transformers"):
        name = getattr(data_collator, "__name__", type(data_collator).__name__)
        raise ValueError(
            f"data_collator={name} pads rows of tokens; these trainers need prompts with their responses and media, "
            "which `trl_vpo.PreferenceCollator` makes. Leave it out, or give a collator that calls that one."
        )


def check_hooks(kind: type, base: type) -> None:
    """Refuse a subclass whose loss would never be called.

    Raises:
        TypeError: names its method, and the one to override.
    """
    for name in UNCALLED:
        if getattr(kind, name, None) is not getattr(base, name, None):
            raise TypeError(
                f"{kind.__name__}.{name} would never be called: override `preference_loss(scores, reference, batch)`, "
                "or `compute_loss`."
            )


def _check_strays(model: PeftModel) -> None:
    """Refuse weights that train beside the adapter and are not part of it."""
    biases = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    strays = [n for n in trained if not set(n.split(".")) & set(model.peft_config) and not (biases and "bias" in n)]
    if strays:
        raise ValueError(
            f"{strays[0]} and {len(strays) - 1} other weights are trained beside the adapter: they would not be saved "
            "with it, and with the adapter off they would not be the reference's. Freeze them, or name their modules "
            "in the adapter's modules_to_save."
        )


def _warn_of_new(model: PeftModel) -> None:
    """An adapter whose tensors found no place in the model is a new one; PEFT only warns, and it trains as such."""
    up = [p for name, p in model.named_parameters() if ".lora_B.default." in name and p.numel()]
    if up and not any(parameter.any() for parameter in up):
        warnings.warn(
            "the model's adapter is a new one: every lora_B is zero. If it was loaded from a folder, its weights "
            "found no place in this model: load it with trl_vpo.models.attach.attach_adapter(model, folder, "
            "trainable=True), which translates older names or says what does not fit.",
            stacklevel=4,
        )


def low_rate(args: VisualPreferenceConfig, method: str) -> str | None:
    """What is wrong with a learning rate for LoRA; None: nothing."""
    if args.learning_rate > LOWEST_LORA_RATE:
        return None
    return (
        f"learning_rate is {args.learning_rate:g}, as in full fine-tuning: LoRA hardly learns with it. The LoRA "
        f"recipes of {method} have {LORA_RATE:g}."
    )


def keep_precision(trainer: Any) -> None:
    """Adapters of quantized models stay in float32, in which PEFT makes them.

    DPOTrainer casts them to bfloat16, where most updates of a learning rate like 5e-6 are rounded away. Under FSDP
    they stay as it makes them: all weights that it gathers together need one dtype.
    """
    model = trainer.model
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if quantized and not trainer.is_fsdp_enabled:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def spelt_out(peft_config: PeftConfig | None, model: Any, args: VisualPreferenceConfig) -> PeftConfig | None:
    """A new adapter's config with a preset of `target_modules` spelt out for the model; the given one stays as it is.

    Args:
        model: in memory, or a name or folder; its weights are not loaded.

    Raises:
        RecipeError: targets that can match nothing, or the model lacks what the preset names.
    """
    targets = getattr(peft_config, "target_modules", None)
    check_targets(targets)
    if isinstance(peft_config, LoraConfig) and not (targets or peft_config.target_parameters):
        kind = AutoConfig.from_pretrained(model, **_source(args)) if isinstance(model, str) else model.config
        if kind.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise RecipeError(
                f"LoRA needs to know what to adapt in a {kind.model_type}: set lora_target_modules (in Python "
                f"`LoraConfig(target_modules=...)`) to {', '.join(PRESETS)}, or a list of module names."
            )
    if targets not in PRESETS or isinstance(model, PeftModel):
        return peft_config
    if isinstance(model, str):
        model = empty_model(AutoConfig.from_pretrained(model, **_source(args)))
    peft_config = copy.copy(peft_config)
    resolve_targets(peft_config, model)
    return peft_config


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit weights on a CPU as they are: bitsandbytes would repack them in the first evaluation.

    Repacked weights are for inference; no gradient passes them, and nothing says so (bitsandbytes 0.50, on CPUs with
    AVX512-BF16, `Linear4bit.forward`).

    Raises:
        ValueError: that has happened already. Unpacking them does not give the weights back.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "the 4-bit weights of this model were packed for inference when it was first called on this CPU; "
                    "no gradient passes them. Load the model again, and give it to the trainer before calling it."
                )


def _source(args: VisualPreferenceConfig) -> dict[str, Any]:
    """Which files of a model's repo are loaded, and how."""
    given = args.model_init_kwargs or {}
    return {k: given[k] for k in ("revision", "token") if k in given} | {"trust_remote_code": args.trust_remote_code}


def load_processing_class(model: Any, args: VisualPreferenceConfig) -> Any:
    """The processor (or tokenizer) that lies beside a model."""
    path = model if isinstance(model, str) else get_config_model_id(model.config)
    if not path:
        raise ValueError(
            "the model was not loaded from anywhere, so nor can its processor be: give `processing_class`."
        )
    return AutoProcessor.from_pretrained(path, **_source(args))


def set_pad_token(processing_class: Any, args: VisualPreferenceConfig) -> None:
    """The tokenizer's own, or the deprecated `pad_token` of the config, or the end of sequence, as in TRL."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token={token!r} is not a token of {type(tokenizer).__name__}.")
    tokenizer.pad_token = token


def copies_reference(model: Any, args: VisualPreferenceConfig, peft_config: Any) -> bool:
    """Full fine-tuning of a model in memory. Sharded weights (ZeRO-3) can only be loaded again from their path."""
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    return not (isinstance(model, str) or is_peft_model(model) or peft_config is not None or sharded)


def sharding(trainer: Any) -> str | None:
    """ "fsdp" or "zero3": what gathers weights where they are needed. None: every process holds the whole model."""
    if trainer.is_fsdp_enabled:
        return "fsdp"
    plugin = trainer.args.deepspeed_plugin
    return "zero3" if trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3 else None


def wrap_layers_that_exist(trainer: Any) -> None:
    """FSDP: of the layers that the model's class names as units, those that the model has.

    CLIP names layers of its text encoder, too, which a LLaVA does not have, and accelerate refuses to go without them.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in trainer.model.modules()}
        plugin.transformer_cls_names_to_wrap = [n for n in trainer.model._no_split_modules or [] if n in there]


@contextlib.contextmanager
def whole_weights(trainer: Any) -> Iterator[None]:
    """While a result is saved: under FSDP with SHARDED_STATE_DICT, transformers would silently save nothing."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    kind = plugin and plugin.state_dict_type
    if plugin:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if plugin:
            plugin.set_state_dict_type(kind)


@contextlib.contextmanager
def precompute_later(args: VisualPreferenceConfig) -> Iterator[None]:
    """While `DPOTrainer.__init__` runs: it cannot precompute for visual rows; we do it afterwards, for all rows."""
    wanted, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    try:
        yield
    finally:
        args.precompute_ref_log_probs = wanted


@contextlib.contextmanager
def no_reference(policy_by_name: bool) -> Iterator[None]:
    """While `DPOTrainer.__init__` runs: the second copy of the model that it loads as reference is not loaded."""
    load = dpo_trainer.create_model_from_path
    loads = [load] if policy_by_name else []  # the first load is then the policy's

    def create_model_from_path(*args, **kwargs):
        return loads.pop()(*args, **kwargs) if loads else None

    dpo_trainer.create_model_from_path = create_model_from_path
    try:
        yield
    finally:
        dpo_trainer.create_model_from_path = load
