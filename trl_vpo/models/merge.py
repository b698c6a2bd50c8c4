"""An adapter merged into its base model: a folder that loads without PEFT."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PromptLearningConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel

from trl_vpo.data.identity import package_version
from trl_vpo.errors import AdapterError, as_user_errors
from trl_vpo.files import read_object
from trl_vpo.models.attach import attach_adapter
from trl_vpo.models.load import DTYPES
from trl_vpo.models.source import check_model, find_run_json, read_config

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
OF_TRAINING = ("method", "recipe", "recipe_path", "contents", "seed", "video_budget", "versions")  # keys of `run.json`
CARD = """\
# {name}

{base} with the adapter `{adapter}` merged into its weights, in {dtype}, by TRL-VPO {version}.{notes}

```python
from transformers import {auto}, AutoProcessor

model = {auto}.from_pretrained("{where}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{where}")
```
{training}"""


def merge(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Merge a saved adapter (LoRA, rsLoRA, DoRA, with `modules_to_save` or without) into its base model.

    Base and adapter are read from safetensors files. The arithmetic is float32, on the CPU: it takes 4 bytes of memory
    per parameter. The merged model is compared with base and adapter on a text before it is saved. `out` gets weights,
    config, generation config, processor, model card, and what the adapter's `run.json` says of its training; all or
    nothing.

    Args:
        out: folder to write; it must not exist, or be empty.
        base: folder or Hub name; None: the one that the adapter's config names, with its revision.
        dtype: of the saved weights: float32, bfloat16, float16, or auto, as the base is stored.

    Returns:
        What a user of the merged model should know, a sentence each; often nothing.

    Raises:
        AdapterError: `adapter` is none, does not fit the base, or cannot be merged; the base is quantized; `out` holds
            files.
        UserError: the base cannot be read.
    """
    adapter, out = Path(adapter), Path(out)
    if dtype not in DTYPES:
        raise AdapterError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not an empty folder. Name another one, or move it away.")
    saved = read_config(adapter)
    named = saved.get("base_model_name_or_path")
    base = base or named
    if not base:
        raise AdapterError(f"the config of {adapter} does not name its base model: give `base`.")
    revision = revision or (saved.get("revision") if base == named else None)
    check_model(base, key="base", revision=revision)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with as_user_errors(f"base {base}"):
        config = AutoConfig.from_pretrained(base, **common)
    if getattr(config, "quantization_config", None) is not None:
        raise AdapterError(
            f"the weights of {base} are quantized; an adapter cannot be merged into them without loss. Give `base` "
            "the model that they were made from."
        )
    architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    with as_user_errors(f"base {base}"):
        if any((adapter / name).is_file() for name in PROCESSOR_FILES):
            processor = AutoProcessor.from_pretrained(adapter, trust_remote_code=trust_remote_code)
        else:
            processor = AutoProcessor.from_pretrained(base, **common)
        model = architecture.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **common)
    record = _training(adapter)
    notes = _notes(record, named, base)
    model = _merged(model, adapter, config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=out.parent) as folder:
        whole = Path(folder) / out.name
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        if record:
            record["merged"] = {"adapter": adapter.resolve().name, "base": _shown(base)}  # as on the card
            text = json.dumps(record, indent=2, ensure_ascii=False)
            (whole / "run.json").write_text(text + "\n", encoding="utf-8")
        _write_card(whole, out, adapter, base, model, notes)
        os.replace(whole, out)  # takes the place of an empty folder, too
    return notes


def _merged(model: PreTrainedModel, adapter: Path, saved_as: torch.dtype) -> PreTrainedModel:
    """Return `model` with the adapter in its weights, as they are saved; it answers as base and adapter did."""
    config = PeftConfig.from_pretrained(adapter)
    if isinstance(config, PromptLearningConfig):
        raise AdapterError(
            f"{adapter} is {type(config).__name__}: it prepends virtual tokens, no weights can hold those."
        )
    stored = _digests(model, saved_as)
    adapted = attach_adapter(model, adapter, config=config)
    before = _answers(adapted)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        raise AdapterError(f"{adapter} ({config.peft_type.value}) cannot be merged: {error}") from error
    difference = (_answers(merged) - before).abs().max().item()
    if not difference <= 1e-3 * max(1.0, before.abs().max().item()):  # nan fails
        raise AdapterError(
            f"the merged model differs from base and adapter by {difference:.2g} in its logits; it was not saved. An "
            "adapter on the embeddings of a model whose LM head shares them cannot be merged."
        )
    if _digests(merged, saved_as) == stored:
        raise AdapterError(
            f"{adapter} changes no weight of its base in {saved_as}: it was not trained, or its changes are smaller "
            "than the dtype's rounding (--dtype float32 keeps them). Nothing was saved."
        )
    return merged.to(saved_as)


@torch.no_grad()
def _digests(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """A hash of each weight as it would be saved."""
    return {name: torch.hash_tensor(weight.to(dtype)).item() for name, weight in model.state_dict().items()}


@torch.no_grad()
def _answers(model: Any) -> Tensor:
    """(V,) logits behind a fixed text of ordinary tokens."""
    model.eval()
    ids = torch.arange(16).unsqueeze(0) * 7 % min(100, model.config.get_text_config().vocab_size)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()


def _training(adapter: Path) -> dict[str, Any]:
    """Return what `run.json` says of an adapter's training, without the results of its end; {} without one."""
    path = find_run_json(str(adapter))
    try:
        record = read_object(path, "recipe") if path else {}
    except ValueError as error:
        raise AdapterError(f"{path}: {error} Correct the file, or move it away.") from error
    return {key: record[key] for key in OF_TRAINING if key in record}


def _notes(record: dict[str, Any], named: str | None, base: str) -> list[str]:
    notes, recipe = [], record.get("recipe", {})
    if named and Path(named).name != Path(base).name:
        notes.append(f"The adapter names {_shown(named)} as its base; it was merged into {_shown(base)}.")
    return notes + [
        f"The adapter was trained on {bits}-bit weights and is merged into those of full precision, so answers differ "
        "a little from the ones in training."
        for bits in (4, 8)
        if recipe.get(f"load_in_{bits}bit")
    ]


def _write_card(folder: Path, out: Path, adapter: Path, base: str, model: PreTrainedModel, notes: list[str]) -> None:
    """Write `README.md`, with the adapter's own sections on its training where it has them."""
    data, training = {}, ""
    if (adapter / "README.md").is_file():
        card = ModelCard.load(adapter / "README.md", ignore_metadata_errors=True)
        data = {key: card.data.get(key) for key in ("pipeline_tag", "datasets", "tags") if card.data.get(key)}
        training = "\n" + card.text[card.text.find("## Training") :] if "## Training" in card.text else ""
    local = Path(base).exists()  # the Hub refuses what is no name of a model on it
    head = ModelCardData(base_model=None if local else base, library_name="transformers", model_name=out.name, **data)
    text = CARD.format(
        name=out.name,
        where=out.name if out.is_absolute() else out,
        base=f"`{_shown(base)}`" if local else f"[{base}](https://huggingface.co/{base})",
        adapter=adapter.resolve().name,
        dtype=str(model.dtype).removeprefix("torch."),
        version=package_version(),
        notes="".join(f" {note}" for note in notes),
        auto="AutoModelForCausalLM" if model.get_decoder() is model.base_model else "AutoModelForImageTextToText",
        training=training,
    )
    (folder / "README.md").write_text(f"---\n{head.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def _shown(model: str) -> str:
    """A model's name without folders that only this machine has."""
    return Path(model).name if Path(model).is_absolute() else model
