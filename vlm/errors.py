"""The one kind of error whose message is written for the person at the keyboard."""

from __future__ import annotations

from typing import ClassVar


class VLMError(Exception):
    """Something the user can put right: the message names the file (or value) and the fix.

    The command line prints it as one line and exits with `exit_code`; the server never shows it to a
    client unless the subclass carries a `code` that the API documents.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(VLMError):
    """A recipe, option or configuration value that cannot be used."""


class UsageError(ConfigError):
    """A command line that no state of the machine could make right: a name that no task, split, recipe or
    data set has, or a value outside what an option takes. The command exits as argparse does."""

    exit_code = 2


class DataError(VLMError):
    """A data set file that is missing, malformed or inconsistent."""


class NoPartError(DataError):
    """A part that a source does not have: nothing is wrong, there is only nothing to read."""


class WeightsError(VLMError):
    """Frozen weights or an adapter that are missing, damaged or not the ones asked for."""
