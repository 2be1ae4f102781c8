"""Training of the three systems from a configuration."""

from ddmd.training.run import train

__all__ = ["train"]
