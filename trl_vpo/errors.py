"""The errors of this package. Each message says what happened, where, and what to do."""


class GenerateError(ValueError):
    """A run that cannot start or go on: its settings, its inputs or its folder. The message says what to do."""


class InputError(ValueError):
    """An input row that cannot be used; it ends in `rejected.jsonl` with this message."""


class SourceError(ValueError):
    """A name that leads to no model, adapter or dataset that can be loaded. Says what it leads to, and what to do."""
