"""What a data set that cannot be used raises."""

from __future__ import annotations


class DatasetError(ValueError):
    """A data set that cannot be used; the message names the file and says what to do."""
