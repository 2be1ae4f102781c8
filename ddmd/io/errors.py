"""The error of an input that cannot be used."""


class VolumeError(ValueError):
    """A volume that cannot be used; the message names the file and says what to do."""
