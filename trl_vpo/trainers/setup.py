"""Checks and preparations before `DPOTrainer.__init__` runs."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoProcessor
from trl.trainer.utils import get_config_model_id

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.proof_rows import first_of_kinds, proof_rows
from trl_vpo.data.raw_rows import transform_of
from trl_vpo.errors import RecipeError, did_you_mean
from trl_vpo.forward.head import check_head, check_model_class
from trl_vpo.models.adapters import PRESETS, check_parameters, check_targets, loses_base, resolve_targets
from trl_vpo.models.model_size import empty_model, own_class
from trl_vpo.models.source import check_model as check_source
from trl_vpo.trainers.config import VisualPreferenceConfig

LORA_RATE, LOWEST_LORA_RATE = 5e-6, 1e-6  # of the recipes for 7B models; DPO's default, for full fine-tuning


def check_model(
    model: Any, ref_model: Any, peft_config: Any, *, needs_reference: bool, revision: str | None = None
) -> None:
    """Raise ValueError for models that would train on nothing, or whose reference is not what it seems to be."""
    if isinstance(model, str):
        check_source(model, key="model", revision=revision)
    if isinstance(ref_model, str):
        raise ValueError(
            f"ref_model is {ref_model!r}: load it, such as AutoModelForImageTextToText.from_pretrained(...)."
        )
    for module in (model, ref_model):
        if isinstance(module, nn.Module):
            base = module.get_base_model() if isinstance(module, PeftModel) else module
            check_model_class(type(base), base.config)
            check_head(module)
    configs = [peft_config] if peft_config is not None else []
    if isinstance(model, PeftModel):
        configs += list(model.peft_config.values())
        _check_given_adapter(model, ref_model)
    for config in configs:
        if isinstance(config, PromptLearningConfig):
            raise ValueError(f"{type(config).__name__} prepends virtual tokens, which moves every response. Use LoRA.")
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError("alora_invocation_tokens: PEFT looks for them once in a row of several responses.")
        # DPOTrainer begins a second adapter in a given PeftModel, whatever the method, and so changes its base again.
        if ref_model is None and (needs_reference or isinstance(model, PeftModel)) and (why := loses_base(config)):
            raise ValueError(
                f"{why}, so switching the adapter off does not give the reference. Leave that out, or give a "
                "`ref_model`. An adapter that was trained so can be merged into its base first (`trl-vpo merge`)."
            )
    if not isinstance(model, str) and peft_config is None and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "every parameter of the model is frozen; there is nothing to train. Load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or give a `peft_config`."
        )


def _check_given_adapter(model: PeftModel, ref_model: Any) -> None:
    if ref_model is None and "default" not in model.peft_config:
        raise ValueError(
            f"the model's adapter is called {model.active_adapter!r}; trl.DPOTrainer copies the one called "
            "'default' as reference. Load it without `adapter_name`."
        )
    active = model.active_adapters
    if len(active) > 1 or ("default" in model.peft_config and active != ["default"]):
        raise ValueError(
            f"the active adapters of the model are {active}; one is trained, and it is saved as the result if it is "
            "called 'default'. Call model.set_adapter('default') for that one, or load yours without `adapter_name`."
        )
    if ref_model is None and "ref" in model.peft_config:
        raise ValueError(
            "the model has an adapter called 'ref', perhaps the reference of an earlier trainer; trl.DPOTrainer makes "
            "one of that name. Call model.delete_adapter('ref') before."
        )
    biases = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    strays = [n for n in trained if not set(n.split(".")) & set(model.peft_config) and not (biases and "bias" in n)]
    if strays:
        raise ValueError(
            f"{strays[0]} and {len(strays) - 1} other weights are trained beside the adapter: they would not be saved "
            "with it, and with the adapter off they would not be the reference's. Freeze them, or name their modules "
            "in the adapter's modules_to_save."
        )
    # PEFT only warns of tensors that find no place in the model, and the adapter then trains as a new one.
    up = [p for name, p in model.named_parameters() if ".lora_B.default." in name and p.numel()]
    if up and not any(parameter.any() for parameter in up):
        warnings.warn(
            "the model's adapter is a new one: every lora_B is zero. If it was loaded from a folder, its weights "
            "found no place in this model: load it with trl_vpo.models.attach.attach_adapter(model, folder, "
            "trainable=True), which translates older names or says what does not fit.",
            stacklevel=5,
        )


def check_collator(data_collator: Any) -> None:
    """Raise ValueError for collators of TRL and transformers, which take rows of tokens and make no tree batch."""
    if getattr(data_collator, "__module__", "").split(".")[0] in ("trl", "transformers"):
        name = getattr(data_collator, "__name__", type(data_collator).__name__)
        raise ValueError(
            f"data_collator={name} pads rows of tokens; these trainers need prompts with their responses and media, "
            "which `trl_vpo.PreferenceCollator` makes. Leave it out, or give a collator that calls that one."
        )


def check_batch(batch: Any) -> Any:
    """Return a batch. Raises TypeError where the user's own collator made something else than a tree batch."""
    if not isinstance(batch, Mapping) or not {"chosen", "branch_mask"} <= set(batch):
        raise TypeError(
            f"data_collator made no tree batch, but a {type(batch).__name__}. Leave it out, or let it return what "
            "`trl_vpo.PreferenceCollator` makes of the rows."
        )
    return batch


def check_dataset(dataset: Any, name: str = "train") -> None:
    """Raise ValueError or TypeError for what is no dataset."""
    if dataset is None:
        raise ValueError(f"`{name}_dataset` is required")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        kind = type(dataset).__name__
        raise TypeError(f"the {name} dataset must be a `Dataset` or `IterableDataset`, got `{kind}`.")


def check_class(kind: type, base: type) -> None:
    """Raise TypeError for a subclass whose loss would never be called, or that passes for TRL's own method."""
    for name in ("_name", "_tag_names", "_paper"):
        owner = next(each for each in kind.__mro__ if name in vars(each))
        if not issubclass(owner, base):
            raise TypeError(
                f"{kind.__name__} has no `{name}` of its own: messages, tags and model card would say "
                f"{kind._name}. Set `_name`, `_tag_names` and `_paper` as the other methods do."
            )
    for name in ("_compute_loss", "get_batch_loss_metrics", "dpo_loss"):  # TRL's, now and before
        if getattr(kind, name, None) is not getattr(base, name, None):
            raise TypeError(
                f"{kind.__name__}.{name} would never be called: override `preference_loss(scores, reference, batch)`, "
                "or `compute_loss`."
            )


def check_memory(args: VisualPreferenceConfig, *, adapted: bool) -> None:
    """Raise RecipeError for ways to save memory that would fail in the first step, with an error of torch."""
    if args.activation_offloading and not torch.accelerator.is_available():
        raise RecipeError("activation_offloading: torch sees no GPU whose memory it would free. Leave it out.")
    plugin = args.deepspeed_plugin
    check_checkpointing(args, forced=adapted and plugin is not None and plugin.zero_stage == 3)


def check_checkpointing(args: VisualPreferenceConfig, *, forced: bool) -> None:
    """Raise RecipeError for `gradient_checkpointing_kwargs` that nothing takes.

    `forced`: TRL sets `use_reentrant: true`, which it does for adapters under ZeRO-3.
    """
    options, where = args.gradient_checkpointing_kwargs or {}, "gradient_checkpointing_kwargs"
    if not isinstance(options, dict):
        raise RecipeError(f"{where} is {options!r}: give a mapping, such as {{every_n_layers: 2}}.")
    takes = [name for name, p in inspect.signature(checkpoint).parameters.items() if p.kind == p.KEYWORD_ONLY]
    takes = ["every_n_layers", "offload", "selective", *takes]
    for key, value in options.items():
        if key not in takes:
            hint = did_you_mean(key, takes) or f" It takes {', '.join(takes)}."
            raise RecipeError(f"{where}: unknown key `{key}`.{hint}")
        if key == "every_n_layers" and (type(value) is not int or value < 1):
            raise RecipeError(f"{where}: every_n_layers is {value!r}: give a whole number of at least 1.")
        if key in ("offload", "selective", "use_reentrant", "preserve_rng_state") and type(value) is not bool:
            raise RecipeError(f"{where}: {key} is {value!r}: give true or false.")
    if not options.get("selective"):
        return
    if not args.gradient_checkpointing:
        raise RecipeError(f"{where}: `selective` needs gradient_checkpointing: true.")
    if forced:
        raise RecipeError(
            f"{where}: `selective` needs use_reentrant: false, which adapters cannot have under ZeRO-3. Leave "
            "`selective` out, or use ZeRO-2 or FSDP 2."
        )
    if options.get("use_reentrant"):
        raise RecipeError(f"{where}: `selective` needs use_reentrant: false. Leave `use_reentrant: true` out.")


def check_router(trainer: Any) -> None:
    """Raise ValueError for a load-balancing loss whose gradient would be missing, without a word."""
    args = trainer.args
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if trainer.aux_loss_enabled and reentrant:
        raise ValueError(
            "the load-balancing loss of the experts gets no gradient under gradient checkpointing with use_reentrant, "
            "which adapters need under ZeRO-3. Set router_aux_loss_coef to 0.0 to train without it, or use ZeRO-2, "
            "FSDP 2 or gradient_checkpointing: false."
        )


def check_divergence(trainer: Any) -> None:
    """Raise RecipeError where evaluations would find no reference to compare with."""
    if trainer.args.eval_divergence and trainer.ref_model is None and not is_peft_model(trainer.model):
        raise RecipeError(
            "eval_divergence: no reference is held in this full fine-tuning. Train an adapter, which is switched off "
            "for it, or leave eval_divergence out; DPO's methods hold one without precompute_ref_log_probs."
        )


def check_recomputing(trainer: Any) -> None:
    """Raise RecipeError where recomputed layers would get wrong gradients, in transformers, too."""
    options = trainer.args.gradient_checkpointing_kwargs or {}
    shared = getattr(trainer.model.config.get_text_config(), "num_kv_shared_layers", 0)
    if trainer.args.gradient_checkpointing and options.get("use_reentrant") and shared:
        raise RecipeError(
            f"gradient_checkpointing: {shared} layers of this model share keys and values with others, and the "
            "gradients of these are lost with use_reentrant: true. Set gradient_checkpointing_kwargs: "
            "{use_reentrant: false}, or gradient_checkpointing: false. Adapters under ZeRO-3 force it to be true: use "
            "ZeRO-2 or FSDP 2."
        )


def low_rate(args: VisualPreferenceConfig) -> str | None:
    """Return a warning about a learning rate that is too low for LoRA, or None."""
    if args.learning_rate > LOWEST_LORA_RATE:
        return None
    return (
        f"learning_rate is {args.learning_rate:g}, as in full fine-tuning: LoRA hardly learns with it. The LoRA "
        f"recipes have {LORA_RATE:g}."
    )


def warn_of_low_rate(trainer: Any) -> None:
    """Warn whoever made the trainer of such a rate."""
    warning = low_rate(trainer.args) if is_peft_model(trainer.model) else None
    if warning and trainer.accelerator.is_main_process:
        warnings.warn(warning, stacklevel=4)


def check_named_class(model: Any, args: VisualPreferenceConfig) -> None:
    """Raise ModelError for the name of a model that does not write responses behind prompts."""
    if isinstance(model, str):
        own_class(AutoConfig.from_pretrained(model, **_source(args)))


def resolve_target_modules(peft_config: PeftConfig | None, model: Any, args: VisualPreferenceConfig) -> Any:
    """Return a new adapter's config with a preset of `target_modules` resolved for the model; the given one stays.

    Weights of a model that is given by name are not loaded. Raises RecipeError for targets that match
    nothing, or that PEFT cannot adapt as told.
    """
    targets = getattr(peft_config, "target_modules", None)
    check_targets(targets)
    check_parameters(peft_config)
    if isinstance(peft_config, LoraConfig) and not (targets or peft_config.target_parameters):
        config = AutoConfig.from_pretrained(model, **_source(args)) if isinstance(model, str) else model.config
        if config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise RecipeError(
                f"LoRA needs to know what to adapt in a {config.model_type}: set lora_target_modules (in Python "
                f"`LoraConfig(target_modules=...)`) to {', '.join(PRESETS)}, or a list of module names."
            )
    if targets not in PRESETS or isinstance(model, PeftModel):
        return peft_config
    if isinstance(model, str):
        model = empty_model(AutoConfig.from_pretrained(model, **_source(args)))
    peft_config = copy.copy(peft_config)
    resolve_targets(peft_config, model)
    return peft_config


def load_processing_class(model: Any, args: VisualPreferenceConfig) -> Any:
    """Load the processor (or tokenizer) that lies beside a model."""
    path = model if isinstance(model, str) else get_config_model_id(model.config)
    if not path:
        raise ValueError(
            "the model was not loaded from anywhere, so neither can its processor be: give `processing_class`."
        )
    return AutoProcessor.from_pretrained(path, **_source(args))


def _source(args: VisualPreferenceConfig) -> dict[str, Any]:
    kwargs = args.model_init_kwargs or {}
    return {k: kwargs[k] for k in ("revision", "token") if k in kwargs} | {"trust_remote_code": args.trust_remote_code}


def set_pad_token(processing_class: Any, args: VisualPreferenceConfig) -> None:
    """Set the deprecated `pad_token` of the config, else the tokenizer's own, else the end of sequence, as in TRL."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token={token!r} is not a token of {type(tokenizer).__name__}.")
    tokenizer.pad_token = token


def copies_reference(model: Any, args: VisualPreferenceConfig, peft_config: Any) -> bool:
    """Tell whether the reference is a copy of the model: in full fine-tuning of a model in memory."""
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3  # is loaded from its path
    return not (isinstance(model, str) or is_peft_model(model) or peft_config is not None or sharded)


def sharding(trainer: Any) -> str | None:
    """Return "fsdp" or "zero3" where weights are gathered when needed; None: every process holds the whole model."""
    if trainer.is_fsdp_enabled:
        return "fsdp"
    plugin = trainer.args.deepspeed_plugin
    return "zero3" if trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3 else None


def add_proof_rows(trainer: Any, datasets: list[Any]) -> None:
    """Let the scorer prove the model on a row of each kind in new datasets, before its next call.

    What only reading all rows would tell (streams, transforms) comes with the batches instead, from the collator.
    """
    collator, scorer = trainer.data_collator, trainer.scorer
    if not isinstance(collator, PreferenceCollator):  # of the user's own
        collator = trainer.make_collator(trainer.processing_class, trainer.args)
    collator.proven = {*scorer.proven, *(row.kind for row in scorer.to_prove)}
    for dataset in datasets:
        if isinstance(dataset, Dataset) and (rows := first_of_kinds(dataset, collator)):
            scorer.to_prove += proof_rows(collator, rows)
    if all(isinstance(dataset, Dataset) and not transform_of(dataset) for dataset in trainer._prepared):
        collator.proven = None
