"""The engine: a trained system at work on a volume."""
