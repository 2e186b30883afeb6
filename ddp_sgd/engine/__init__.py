"""The run: setup, training loop, evaluation, resume."""
