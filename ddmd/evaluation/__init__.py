"""Detections compared with annotators' masks."""
