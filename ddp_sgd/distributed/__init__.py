"""Process group, collectives and data parallelism."""
