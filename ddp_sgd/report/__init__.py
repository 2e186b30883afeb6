"""Logging: journal, console, W&B, TensorBoard, and the run folder."""
