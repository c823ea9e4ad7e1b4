"""The one exception that means "the user can fix this": shown as plain text, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the settings, the data or the environment; the message says what to do about it."""
