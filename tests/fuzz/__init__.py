"""Damaged volumes, weights and tables, each of which must end in success or in one clear line."""
