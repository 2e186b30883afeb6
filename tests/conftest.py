"""The file that takes longest comes first, so that no worker is left with it at the end."""

LONGEST = "slurm/test_jobs.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
