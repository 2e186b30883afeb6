"""Checkpoints: written atomically, verified before they are read, and safe to load."""
