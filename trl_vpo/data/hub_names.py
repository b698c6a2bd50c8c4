"""Names of repositories on the Hub, looked up before anything is loaded."""

import os
import re
from functools import cache
from pathlib import Path

from huggingface_hub import constants

from trl_vpo.errors import SourceError

SECONDS = 10  # that the Hub has for an answer


def check_on_hub(
    name: str,
    *,
    key: str,
    revision: str | None = None,
    kind: str = "model",
    file: str = "config.json",
    settle: bool = True,
) -> None:
    """Refuse a name that is not on the Hub; where the Hub cannot be reached, one that is not in the cache.

    Without the Hub, what the cache has is used, and the Hub is not asked again for each file. Raises SourceError.

    Args:
        name, key, revision: as of `trl_vpo.models.source.check_model`.
        kind: of the repository: model or dataset.
        file: a file that the cache has if it has the repository. Empty: the cache is not looked into.
        settle: print that the cache is used, and work without the Hub from here on.
    """
    seen_from = f"(seen from {Path.cwd()})"
    if re.match(r"[~./\\]|\w:\\", name) or name.count("/") > 1:
        home = " ~ is not expanded: write the whole path." if name.startswith("~") else ""
        raise SourceError(f"{key}: the folder {name} does not exist {seen_from}.{home}")
    error = _ask_hub(name, kind, revision)
    if error is None:
        return
    from huggingface_hub import (  # not before a name of a path was refused: half a second
        errors,
        try_to_load_from_cache,
    )

    if isinstance(error, errors.HFValidationError):
        raise SourceError(f"{key}: {name} is neither a folder {seen_from} nor a name on the Hub.") from None
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        what = f"revision {revision} of it" if isinstance(error, errors.RevisionNotFoundError) else name
        raise SourceError(
            f"{key}: {name} is not a folder {seen_from}, and the Hub has no {what} that you may see. For a private "
            "one log in with `hf auth login`."
        ) from None
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    if file and not isinstance(try_to_load_from_cache(name, file, revision=revision, repo_type=kind), str):
        why = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {error}"
        option = " --repo-type dataset" if kind == "dataset" else ""
        raise SourceError(
            f"{key}: {name} is not a folder {seen_from} and not in the cache, and the Hub cannot be reached ({why}). "
            f"Where there is a network: `hf download {name}{option} --local-dir FOLDER`; then give the path of FOLDER."
        ) from None
    if settle and not offline and not constants.HF_HUB_OFFLINE:
        import datasets

        if os.environ.get("RANK", "0") == "0":
            print(f"trl-vpo: the Hub cannot be reached ({error}): what the cache has of {name} is used.", flush=True)
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # as the variable, set before the start


def file_of_model(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return a file of a model on the Hub, or of the cache where the Hub cannot be reached; None: there is none."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    try:
        if _ask_hub(name, "model", revision) is None:
            return Path(hf_hub_download(name, file, revision=revision))
        cached = try_to_load_from_cache(name, file, revision=revision)
    except (OSError, ValueError, errors.HfHubHTTPError):
        return None
    return Path(cached) if isinstance(cached, str) else None


@cache
def _ask_hub(name: str, kind: str, revision: str | None) -> Exception | None:
    """Return the Hub's error for a repository, asked for once; None: it has it."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except Exception as error:  # of whichever HTTP library the client stands on
        return error
    return None
