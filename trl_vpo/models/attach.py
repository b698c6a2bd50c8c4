"""A saved adapter around its base model, with every tensor of the file in its place."""

import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from trl_vpo.errors import AdapterError
from trl_vpo.models.adapters import saved_names

PREFIX = "base_model.model."  # of the names in an adapter's file
SHOWN = 3  # names in a message


def attach_adapter(
    model: PreTrainedModel,
    path: Path | str,
    *,
    config: PeftConfig | None = None,
    name: str = "default",
    wrapped: PeftModel | None = None,
    trainable: bool = False,
) -> PeftModel:
    """Load an adapter, by folder or Hub name, into a model, or beside others into the `wrapped` of an earlier call.

    Names that a module had in an older transformers are translated, as transformers does for the base's own weights.
    PEFT does so for some model types only, and loads what fits with a warning about the rest. A `trainable` one can
    be given to a trainer as its model.

    Raises:
        AdapterError: tensors of the file have no place in the model, or the other way round; shapes differ; a tensor
            is not finite; PEFT does not take the name, or the adapter beside the others.
    """
    misfit = f"adapter {path} does not fit {model.config._name_or_path or type(model).__name__}"
    try:
        config = config or PeftConfig.from_pretrained(str(path))
        config.inference_mode = not trainable
        weights = load_peft_weights(str(path), device="cpu")
        for key, tensor in weights.items():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise AdapterError(
                    f"adapter {path}: {key} holds values that are not finite. Use an earlier checkpoint."
                )
        _translate_patterns(config, model)
        parts = [key for key, _ in model.named_parameters()]
        if wrapped is None:
            wrapped = PeftModel(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        with _own_tokens_only(), warnings.catch_warnings():
            own = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False).keys()
            if any(name in key.split(".") for key in [*parts, *own]):  # PEFT goes by parts of keys
                raise AdapterError(
                    f"the adapter name {name!r} is what a part of the model is called: give another one."
                )
            mapping = _key_mapping(wrapped, set(own), set(weights), misfit)
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error here
            loaded = wrapped.load_adapter(
                str(path), name, is_trainable=trainable, torch_device=str(model.device), key_mapping=mapping
            )
    except AdapterError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch lists every tensor
        raise AdapterError(f"{misfit}: {first}") from error
    missing = [key for key in loaded.missing_keys if name in key.split(".")]  # PEFT takes it for a part of any word
    _refuse_strays(missing, loaded.unexpected_keys, misfit)
    adapted = [n.removeprefix(PREFIX) for n, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)]
    for pattern in getattr(config, "alpha_pattern", None) or {}:  # left out, the scaling would not be that of training
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
            raise AdapterError(f"{misfit}: its alpha_pattern names {pattern}, which is not an adapted module.")
    return wrapped


def check_checkpoint(model: PeftModel, folder: Path) -> None:
    """Raise AdapterError for an adapter's checkpoint whose tensors are not those of the adapter that is trained."""
    own = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False).keys()
    saved = saved_names(folder)
    strange = saved - own - model.state_dict().keys()  # PEFT saves adapted embeddings with their base
    _refuse_strays(own - saved, strange, f"the adapter in {folder} does not fit the one in training")


def _own_tokens_only() -> AbstractContextManager:
    """Ask a module with trained tokens only for adapters that train some, as PEFT asks other modules.

    PEFT asks it for every adapter, and raises KeyError for one without `trainable_token_indices` beside one that has
    them. To be deleted once both methods look at `_adapters`, as those of `peft.utils.ModulesToSaveWrapper` do.
    """

    def only_own(method: Callable) -> Callable:
        return lambda self, name, *args: method(self, name, *args) if name in self._adapters else {}

    names = ("adapter_state_dict", "adapter_state_dict_load_map")
    own = {name: only_own(getattr(TrainableTokensWrapper, name)) for name in names}
    return patch.multiple(TrainableTokensWrapper, **own)


def _key_mapping(wrapped: PeftModel, own: set[str], saved: set[str], misfit: str) -> dict[str, str]:
    """Return patterns of names in the file and what the model calls them, where that differs."""
    mapping, translate = {}, translator(wrapped.get_base_model())
    for key in saved - own:
        if not key.startswith(PREFIX):
            raise AdapterError(f"{misfit}: the name {key} does not begin with {PREFIX}, as names that PEFT saves do.")
        old = key.removeprefix(PREFIX)
        new = translate(old)
        if PREFIX + new in own - saved:
            mapping[f"^{re.escape(old)}$"] = new.replace("\\", r"\\")
    return mapping


def translator(model: PreTrainedModel) -> Callable[[str], str]:
    """Return a function from what an older transformers called a module or weight to its name today."""
    renamings = [t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)


def _translate_patterns(config: PeftConfig, model: PreTrainedModel) -> None:
    """Translate targets, ranks and alphas of single modules, which go by the modules' names, too."""
    names, translate = {name for name, _ in model.named_modules()}, translator(model)

    def today(old: str) -> str:
        return new if old not in names and (new := translate(old)) in names else old

    if isinstance(targets := getattr(config, "target_modules", None), (set, list)):
        config.target_modules = {today(old) for old in targets}
    for field in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, field, None):
            setattr(config, field, {today(old): value for old, value in pattern.items()})


def _refuse_strays(missing: Iterable[str], unexpected: Iterable[str], misfit: str) -> None:
    for names, what in ((sorted(unexpected), "have no place in the model"), (sorted(missing), "are not in the file")):
        if names:
            more = " and others" if len(names) > SHOWN else ""
            raise AdapterError(
                f"{misfit}: {len(names)} weights {what}: {', '.join(names[:SHOWN])}{more}. Name the model that the "
                "adapter was trained on; what another version of transformers saved can be merged with that version."
            )
