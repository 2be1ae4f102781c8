"""Trained systems that ship with the package."""
