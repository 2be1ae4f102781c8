"""The scale of intensities in training: half robust z-scores, as the networks see them."""

LOW, HIGH = -2.0, 3.0  # air, and the brightest a plane gets
FLUID = -0.75  # what is darker than this deep in the brain, on FLAIR, is cerebrospinal fluid
AIR_MARGIN = 0.02  # what is closer to LOW than this is air
