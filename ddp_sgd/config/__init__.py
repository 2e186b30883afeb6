"""The run, described."""
