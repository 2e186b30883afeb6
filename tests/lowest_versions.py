"""The lowest versions that pyproject.toml promises, for pip; and whether they are in use.

    python tests/lowest_versions.py          prints NAME==VERSION for each, for `pip install -c`
    python tests/lowest_versions.py --check  fails unless this interpreter finds exactly those

`make lowest` makes an environment of them and runs tests in it. torch and torchvision keep the
versions of constraints.txt: an older torch is another download of some GB.
"""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("test",)
"""Whose requirements count, beside those of the package itself."""

NOT_LOWERED = {"torch", "torchvision"}


def lowest_versions(project: dict[str, Any]) -> dict[str, Version]:
    """Lowest version of each package that a project and its extras require, by name."""
    lowest = {}
    for requirement in _requirements(project, EXTRAS):
        name = canonicalize_name(requirement.name)
        if name in NOT_LOWERED:
            continue
        floors = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        if not floors:
            raise SystemExit(
                f"{name} of pyproject.toml has no lowest version; write {name}>=VERSION."
            )
        lowest[name] = max([*floors, *filter(None, [lowest.get(name)])])
    return lowest


def _requirements(project: dict[str, Any], extras: tuple[str, ...]) -> Iterator[Requirement]:
    """Requirements of a project with extras, of which some may name others."""
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    for requirement in map(Requirement, texts):
        if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
            without = project | {"dependencies": []}
            yield from _requirements(without, tuple(sorted(requirement.extras)))
        else:
            yield requirement


def differences(project: dict[str, Any]) -> Iterator[str]:
    """What this interpreter finds that is not the lowest version, one line each."""
    series = Version(f"{sys.version_info.major}.{sys.version_info.minor}")
    older = Version(f"{series.major}.{series.minor - 1}")
    promised = SpecifierSet(project["requires-python"])
    if series not in promised or older in promised:
        yield f"Python is {series}; use the oldest that fits requires-python {promised}."
    for name, lowest in lowest_versions(project).items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or Version(found) != lowest:
            yield f"{name} is {found}; install {name}=={lowest}."


def main() -> int:
    """Print the versions, or what differs from them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if sys.argv[1:] == ["--check"]:
        lines = list(differences(project))
    else:
        lines = [f"{name}=={lowest}" for name, lowest in sorted(lowest_versions(project).items())]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return int(bool(lines) and sys.argv[1:] == ["--check"])


if __name__ == "__main__":
    sys.exit(main())
