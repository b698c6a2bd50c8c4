"""Whether a model's name leads to a model: found out before anything is loaded, and in one line."""

import json
import os
import re
from functools import cache
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

SECONDS = 10  # that the Hub has for an answer


class SourceError(ValueError):
    """A name that leads to no model, adapter or dataset that can be loaded. Says what it leads to, and what to do."""


def check_model(name: str, *, key: str = "model_name_or_path", revision: str | None = None) -> None:
    """Refuse a folder without a model that can be loaded, and a name that is neither a folder nor on the Hub.

    Where the Hub cannot be reached, what the cache has is used; no file is then asked for again and again.

    Args:
        name: a folder, or a name on the Hub.
        key: what the user gave it as.
        revision: on the Hub.

    Raises:
        SourceError: what is wrong.
    """
    if Path(name).exists():
        _check_folder(Path(name), key)
    else:
        check_on_hub(name, key=key, revision=revision)


def check_on_hub(name: str, *, key: str, revision: str | None = None, kind: str = "model", file="config.json") -> None:
    """Refuse a name that is not on the Hub, or not reachable and not in the cache.

    Args:
        name, key, revision: as of `check_model`.
        kind: of repo: model or dataset.
        file: that the cache has of it if it has it. Empty: whatever loads it looks for itself.

    Raises:
        SourceError: what is wrong.
    """
    seen_from = f"(seen from {Path.cwd()})"
    if re.match(r"[~./\\]|\w:\\", name) or name.count("/") > 1:
        home = " ~ is not expanded: write the whole path." if name.startswith("~") else ""
        raise SourceError(f"{key}: the folder {name} does not exist {seen_from}.{home}")
    error = _ask_hub(name, kind, revision)
    if isinstance(error, HFValidationError):
        raise SourceError(f"{key}: {name} is neither a folder {seen_from} nor a name on the Hub.") from None
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        what = f"revision {revision} of it" if isinstance(error, RevisionNotFoundError) else name
        raise SourceError(
            f"{key}: {name} is no folder {seen_from}, and the Hub has no {what} that you may see. For a private one "
            "log in with `hf auth login`."
        ) from None
    if error is None:
        return
    wanted_so = isinstance(error, OfflineModeIsEnabled)
    if file and not isinstance(try_to_load_from_cache(name, file, revision=revision, repo_type=kind), str):
        why = "HF_HUB_OFFLINE is set" if wanted_so else f"{type(error).__name__}: {error}"
        option = " --repo-type dataset" if kind == "dataset" else ""
        raise SourceError(
            f"{key}: {name} is no folder {seen_from} and not in the cache, and the Hub cannot be reached ({why}). "
            f"Where there is a network: `hf download {name}{option} --local-dir FOLDER`; then give the path of FOLDER."
        ) from None
    if not wanted_so and not constants.HF_HUB_OFFLINE:
        if os.environ.get("RANK", "0") == "0":
            print(f"trl-vpo: the Hub cannot be reached ({error}): what the cache has of {name} is used.", flush=True)
        # As HF_HUB_OFFLINE=1 before the start: no file is asked for six times.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@cache
def _ask_hub(name: str, kind: str, revision: str | None) -> Exception | None:
    """What the Hub says about a repo, asked once; None: it has it."""
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except Exception as error:  # of whichever HTTP library the client stands on
        return error
    return None


def _check_folder(folder: Path, key: str) -> None:
    """The files that loading needs are there, and open."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(
                f"{key}: {folder} is an adapter, not a model. Name its base; `trl-vpo merge` makes a model of both."
            )
        raise SourceError(f"{key}: {folder} is no model: it has no config.json.")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise SourceError(f"{key}: {index} cannot be read ({error}). Download it again.") from error
        gone = [shard for shard in shards if not (folder / shard).is_file()]
        if gone:
            raise SourceError(
                f"{key}: {folder} lacks {len(gone)} of the {len(shards)} files of its weights, such as {gone[0]}. "
                "Download it again."
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        has = "pickled weights alone, which can run code when they are loaded" if pickled else "no weights"
        raise SourceError(f"{key}: {folder} has {has}; models are read from .safetensors files.")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            pointer = path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs")
            why = "is a pointer of git-lfs: run `git lfs pull`" if pointer else f"is damaged or cut short ({error})"
            raise SourceError(f"{key}: {path} {why}, or download it again.") from error
