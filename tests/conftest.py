"""The files that take longest come first, so that no worker is left with one at the end."""

LONGEST = ("slurm/test_jobs.py", "slurm/test_scripts.py", "network/test_two_hosts.py")


def pytest_collection_modifyitems(items):
    def turn(item):
        is_named = [item.path.as_posix().endswith(name) for name in LONGEST]
        return is_named.index(True) if any(is_named) else len(LONGEST)

    items.sort(key=turn)
