"""The names of models: which folder or Hub model one leads to, found out before anything is loaded."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trl_vpo.data.hub_names import check_on_hub, file_of_model
from trl_vpo.errors import AdapterError, SourceError

CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")  # a folder in the Hub's cache


def hub_name(model: str) -> str | None:
    """Return what a folder in the Hub's cache is called on the Hub; None: it is no such folder."""
    cached = CACHED.search(model)
    return cached[1].replace("--", "/", 1) if cached else None


def short_name(model: str) -> str:
    """Return a model's name without folder or owner, in lower case; the same for the Hub, its cache and a copy."""
    return re.split(r"[/\\]", (hub_name(model) or model).rstrip("/\\"))[-1].lower()


def find_run_json(name: str, revision: str | None = None) -> Path | None:
    """Return the `run.json` of a trained model or adapter; None if there is none.

    It lies in its folder, in that of the training of a checkpoint, or on the Hub.
    """
    folder = Path(name).absolute()
    if folder.is_dir():
        places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
        return next((path for place in places if (path := place / "run.json").exists()), None)
    return file_of_model(name, "run.json", revision)


def check_adapter(name: str, *, key: str, settle: bool = True) -> None:
    """Raise AdapterError for a folder that is no adapter, SourceError for a name that is not on the Hub either."""
    if Path(name).is_dir():
        read_config(Path(name))
    else:
        check_on_hub(name, key=key, file="adapter_config.json", settle=settle)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `adapter_config.json` of a saved adapter whose weights are a safetensors file.

    Raises AdapterError, also for an adapter that needs a base that was not saved.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "Name the output_dir of a LoRA training, or one of its checkpoints."
        if checkpoints := [file.parent for file in folder.glob("checkpoint-*/adapter_config.json")]:
            newest = max(checkpoints, key=lambda path: (len(path.name), path.name))  # by the step
            remedy = f"Name {newest}; `trainer.save_model()` after the training saves the result into its output_dir."
        raise AdapterError(
            f"{folder} is not an adapter: its adapter_config.json cannot be read ({error}). {remedy}"
        ) from error
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = ", ".join(path.name for path in sorted(folder.glob("adapter_model.*")))
        has = f"only {pickled}, which can run code when it is loaded" if pickled else "no weights"
        raise AdapterError(f"{folder} has {has}; adapters are read from adapter_model.safetensors.")
    if str(config.get("init_lora_weights")).lower() == "lora_ga":
        raise AdapterError(
            f"{folder} began with init_lora_weights='lora_ga', which changed the base's weights by gradients that are "
            "not saved: on the base as it is stored, the adapter is another model than the one that was trained."
        )
    return config


def check_model(
    name: str, *, key: str = "model_name_or_path", revision: str | None = None, settle: bool = True
) -> None:
    """Raise SourceError for a name that is neither a model's folder nor on the Hub; `key` is the option that gave it.

    A folder has all files that loading needs, and each can be opened. `settle` is that of `check_on_hub`.
    """
    folder = Path(name)
    if not folder.exists():
        return check_on_hub(name, key=key, revision=revision, settle=settle)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(
                f"{key}: {folder} is an adapter, not a model. Name its base; `trl-vpo merge` makes a model of both."
            )
        raise SourceError(f"{key}: {folder} is not a model: it has no config.json.")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise SourceError(f"{key}: {index} cannot be read ({error}). Download it again.") from error
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise SourceError(
                f"{key}: {folder} lacks {len(missing)} of the {len(shards)} files of its weights, such as "
                f"{missing[0]}. Download it again."
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        contents = "pickled weights alone, which can run code when they are loaded" if pickled else "no weights"
        raise SourceError(f"{key}: {folder} has {contents}; models are read from .safetensors files.")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            pointer = path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs")
            why = "is a pointer of git-lfs: run `git lfs pull`" if pointer else f"is damaged or cut short ({error})"
            raise SourceError(f"{key}: {path} {why}, or download it again.") from error
