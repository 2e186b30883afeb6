"""Fashion-MNIST, which Debian's package ``dataset-fashion-mnist`` brings, for the tests."""

import os
from pathlib import Path

import pytest

from ddp_sgd.data.idx import FASHION_MNIST


def require_fashion_mnist(folder=FASHION_MNIST):
    """Skip the test and say why; fail where REQUIRE_CLUSTER_TESTS is set."""
    if not Path(folder).is_dir():
        outcome = pytest.fail if os.environ.get("REQUIRE_CLUSTER_TESTS") else pytest.skip
        outcome(f"{folder} is missing: apt install dataset-fashion-mnist")
