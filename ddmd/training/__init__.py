"""Training of the three systems from a configuration."""

from ddmd.training.painting import Augmentation, LesionPainter, PainterConfig
from ddmd.training.run import train

__all__ = ["Augmentation", "LesionPainter", "PainterConfig", "train"]
