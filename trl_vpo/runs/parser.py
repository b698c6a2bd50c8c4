"""The command line's parser: argparse with the nearest valid value in its errors."""

import argparse

from trl_vpo.errors import did_you_mean
from trl_vpo.runs.secrets import scrub


class Parser(argparse.ArgumentParser):
    """argparse with examples kept as written, no abbreviations, and the nearest valid value in its errors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        super().error(scrub(message))

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            message = f"{value!r} is not one of {', '.join(action.choices)}.{did_you_mean(value, action.choices)}"
            raise argparse.ArgumentError(None, f"{action.metavar or action.dest}: {message}")
