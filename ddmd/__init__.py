"""Lesions in brain MRI by discrepancy distribution medical diffusion."""
__version__ = "0.1.0"
