"""The errors of this package. Each message says what happened, where, and what to do.

Everything that a user can correct is a `UserError`; the command line shows its message without a traceback. What
libraries raise is turned into one where it arises, by `as_user_errors`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that a user can correct.

    Built from one string, so that it survives a data-loader worker: torch raises it again as `type(error)(message)`.
    """

    exit_code = 1  # of the command line


class RecipeError(UserError):
    """A recipe or option that cannot be used. Raised before a model or dataset is loaded."""

    exit_code = 2


class SourceError(UserError):
    """A name that leads to no model, adapter or dataset that can be loaded. Says what it leads to."""


# --- data -----------------------------------------------------------------------------------------------------------


class DatasetError(UserError):
    """A dataset, a split or a line that is missing or cannot be read."""


class ImportFormatError(UserError):
    """A record that cannot be imported. Names the file, the place in it and the field."""


class RowError(UserError):
    """A row that cannot be trained on. Names the row."""


class PhraseError(UserError):
    """Phrases that cannot be used. Names the span or tag; the caller names the row."""


class MediaError(UserError):
    """An image or a video that cannot be used. Names the file."""


# --- training -------------------------------------------------------------------------------------------------------


class AdapterError(UserError):
    """An adapter that cannot be read, attached or merged."""


class NonFiniteLossError(UserError, RuntimeError):
    """The loss, or the weights after a step, became nan or infinite. Names the rows; nothing is saved."""


class OutputDirError(UserError, OSError):
    """A folder that cannot take the results of a run."""


class CheckpointError(UserError):
    """A checkpoint that training cannot continue from."""


class SaveError(UserError, OSError):
    """A checkpoint or model that could not be written. Says which checkpoint is left."""


class HubError(UserError):
    """The Hub refuses this run's model; retrying does not help."""


# --- models, runs, generation, evaluation, reports -------------------------------------------------------------------


class ModelError(UserError):
    """A model, local or behind a server, that cannot be loaded or asked."""


class RunError(UserError):
    """The folder, settings or inputs of a run of generation or evaluation that cannot be used."""


class GenerateError(UserError):
    """A run of generation that cannot start, or that gave no row."""


class EvaluateError(UserError):
    """An evaluation that cannot start or continue."""


class InputError(UserError):
    """An input row that cannot be used; it ends in `rejected.jsonl` with this message."""


class JudgeError(UserError):
    """A judge's reply that cannot be used. The message is what the judge is told when it is asked again."""


class PlotError(UserError):
    """A folder that is not a run, a run that logged nothing, or a figure that cannot be written."""


# --- helpers --------------------------------------------------------------------------------------------------------


DISK_WORDS = ("PytorchStreamWriter", "inline_container", "os error")


@contextmanager
def as_user_errors(
    where: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
) -> Iterator[None]:
    """Turn what libraries raise about settings, files and missing packages into `UserError`.

    Put it around the calls in which a `ValueError`, `OSError` or `ImportError` is about what the user set, named or
    stored: loading a model, reading a dataset, writing a result.

    Args:
        where: what the message begins with, such as the name of what is loaded.
        kinds: the errors that are turned; those of disks always are.

    Raises:
        UserError: in place of those errors; a `UserError` passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, kinds) and not is_disk_error(error):
            raise
        raise UserError(f"{where}: {error}" if where else str(error) or type(error).__name__) from error


def is_disk_error(error: Exception) -> bool:
    """Tell whether a file could not be written or read; torch, safetensors and tokenizers raise no `OSError` then."""
    return isinstance(error, OSError) or any(word in str(error) for word in DISK_WORDS)


def did_you_mean(word: str, valid: Iterable[str], prefix: str = "") -> str:
    """Return ` Did you mean ...?`, or nothing where no valid word is near."""
    close = difflib.get_close_matches(str(word).lower(), list(valid), n=3)
    return f" Did you mean {' or '.join(prefix + c for c in close)}?" if close else ""
