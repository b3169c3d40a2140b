"""The one kind of error whose message is written for the person at the keyboard."""

from __future__ import annotations


class VLMError(Exception):
    """Something the user can put right: the message names the file (or value) and the fix.

    The command line prints it as one line and exits with 1; the server never shows it to a client
    unless the subclass carries a `code` that the API documents.
    """


class ConfigError(VLMError):
    """A recipe, option or configuration value that cannot be used."""


class DataError(VLMError):
    """A data set file that is missing, malformed or inconsistent."""


class NoPartError(DataError):
    """A part that a source does not have: nothing is wrong, there is only nothing to read."""


class WeightsError(VLMError):
    """Frozen weights or an adapter that are missing, damaged or not the ones asked for."""
