"""Training of the three systems from a configuration."""

from ddmd.training.augmentation import Augmentation
from ddmd.training.lesion_parameters import PainterConfig
from ddmd.training.run import train

__all__ = ["Augmentation", "PainterConfig", "train"]
