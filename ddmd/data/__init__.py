"""Data sets and the phantom."""
