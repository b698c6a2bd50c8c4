"""The errors of this package. Each message says what happened, where, and what to do."""


class UserError(ValueError):
    """Something that a user can correct. The command line shows its message without a traceback."""


class AdapterError(UserError):
    """An adapter that cannot be read or merged. The message says why, and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be gone on from. Says which, and what is wrong with it."""


class DatasetError(UserError):
    """A dataset, a split or a line that is not there or cannot be read. The message says where and what to do."""


class EvaluateError(UserError):
    """An evaluation that cannot start or go on. The message says what to do."""


class GenerateError(UserError):
    """A run that cannot start or go on: its settings, its inputs or its folder. The message says what to do."""


class HubError(UserError):
    """The Hub will not take the model of this run, however often it is tried. Says why, and what to do."""


class ImportFormatError(UserError):
    """A record that cannot be imported. The message names the file, the place in it, the field and the remedy."""


class InputError(UserError):
    """An input row that cannot be used; it ends in `rejected.jsonl` with this message."""


class JudgeError(UserError):
    """A reply that cannot be used. The message says why, as the judge is told when it is asked again."""


class MediaError(UserError):
    """An image or a video that cannot be used. The message says what happened, which file, and what to do.

    It is built from one string, because torch's DataLoader raises a worker's exception again as ``exc_type(message)``.
    """


class NonFiniteLossError(UserError, RuntimeError):
    """The loss, or the weights after a step, became nan or infinite. Names the rows; nothing is saved."""


class OutputDirError(UserError, OSError):
    """A folder that cannot take the results of a run. Says which, why, and what to do."""


class PhraseError(UserError):
    """Phrases that cannot be used. The message says which span or tag, what is wrong with it and what to do.

    It does not name the row: the caller does. Built from one string, so that it survives a data-loader worker.
    """


class PlotError(UserError):
    """A folder that is not a run, a run that logged nothing, or a figure that cannot be written."""


class RecipeError(UserError):
    """A recipe or option that cannot be used. Raised before a model or dataset is loaded."""


class RowError(UserError):
    """A row that cannot be trained on. The message names the row, what is wrong with it and what to do.

    Built from one string, so that it survives being raised in a data-loader worker.
    """


class SaveError(UserError, OSError):
    """A checkpoint or model could not be written. Says where, why, and which checkpoint is left."""


class SourceError(UserError):
    """A name that leads to no model, adapter or dataset that can be loaded. Says what it leads to, and what to do."""
