"""Keys of precomputed log-probs: digests of all that a row's reference log-probs depend on."""

import hashlib
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import Tensor

from trl_vpo.data.chat import render_chat
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.identity import processor_identity, source_identity
from trl_vpo.errors import MediaError, RowError
from trl_vpo.files import json_digest

FORMAT = 6  # of the keys; raise it with a change to the code that changes log-probs
MEDIA_SETTINGS = (  # of the collator
    "video", "max_pixels", "media_form", "media_contrast", "num_images", "visual_prompt", "media_root",
)  # fmt: skip
# Entries of model and adapter configs that say where something came from or how it is run, not what it computes.
NO_MATTER = {"_name_or_path", "base_model_name_or_path", "transformers_version", "use_cache", "inference_mode"}
NO_MATTER |= {"pad_token_id", "bos_token_id", "eos_token_id"}


def row_key(example: dict, collator: PreferenceCollator) -> str:
    """Return the digest of a row's own content. Media files are known by path, size and time of the last change."""
    row = replace(collator, phrases=False, scores=None).read(example)
    sources = [kind for sources in row.media_list or [(row.images, row.videos)] for kind in sources]
    try:
        media = [[source_identity(source, collator.media_root, _size_and_time) for source in kind] for kind in sources]
    except MediaError as error:
        raise RowError(f"{row.name}: {error}") from error
    texts = [row.prompt, *(getattr(row, side) for side in row.sides)]
    return json_digest([texts, row.template_kwargs, row.critical_box, row.critical_span, media])


def _size_and_time(file: Path) -> list:  # st_mtime: st_ctime differs on a disk that is new with every job
    return [file.stat().st_size, file.stat().st_mtime_ns]


def context_key(trainer: Any) -> str:
    """Return the digest of what all rows share: precision, media settings, processor, reference. All ranks call it."""
    key = [None]
    if trainer.accelerator.is_main_process:
        collator = trainer.data_collator
        media = {name: repr(getattr(collator, name)) for name in MEDIA_SETTINGS}
        if type(collator) is not PreferenceCollator:  # what a subclass changes is not known: later runs compute anew
            media["subclass"] = uuid.uuid4().hex
        precision = [trainer.accelerator.mixed_precision, transformers.__version__]
        processor = [processor_identity(collator.processing_class), rendered_prompt(collator.processing_class)]
        key = [json_digest([FORMAT, precision, media, processor, _reference(trainer)])]
    return broadcast_object_list(key)[0]


def rendered_prompt(processing_class: Any) -> str | None:
    """Return a prompt as the chat template writes it now: some write the date. None: there is none, or it refuses."""
    message = {"role": "user", "content": [{"type": "text", "text": "word"}]}
    try:
        return render_chat(processing_class, [message], [], {})[0]
    except RowError:
        return None


def _reference(trainer: Any) -> list:
    """Return weights and config of the reference: `ref_model`, or the policy with its adapter off or set to "ref"."""
    model = trainer.accelerator.unwrap_model(trainer.ref_model if trainer.ref_model is not None else trainer.model)
    if not is_peft_model(model):
        return [_config(model.config.to_dict()), hash_weights(model.state_dict())]
    active = model.active_adapters if trainer.ref_model is not None else [a for a in model.peft_config if a == "ref"]
    others = set(model.peft_config) - set(active)
    base = model.get_base_model()
    # A layer with an adapter keeps its weights under another name; without, it is the plain model's.
    weights = {
        ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module")): value
        for name, value in base.state_dict().items()
        if not others & set(name.split("."))
    }
    adapters = [_config(model.peft_config[name].to_dict()) for name in active]
    return [_config(base.config.to_dict()), hash_weights(weights), *adapters]


def hash_weights(weights: dict[str, Tensor]) -> str:
    """Return a digest of every name, dtype, shape and byte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _config(value: Any) -> Any:
    """Return a config as JSON that is the same in every process: sets have no order of their own."""
    if isinstance(value, dict):
        return {str(k): _config(v) for k, v in value.items() if k not in NO_MATTER}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_config(v) for v in value] if isinstance(value, (list, tuple)) else value
