"""A campaign of faults against one run; see ``python -m benchmarks.soak --help``."""
