"""Files that data sets open at their first read; with loader processes in tests/models."""

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Subset

from ddp_sgd.data.dataset_checks import OpenFiles


class Lazy:
    """Opens a file, and fills caches, at the first read."""

    def __init__(self, path):
        self.path = path
        self.file = None

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if self.file is None:
            self.file = self.path.open("rb")
            self.small = {"a": 1}
            self.large = np.zeros(10**6)
            self.handle = self.file
        return self.file.read(1), index


WRAPPERS = {
    "itself": lambda dataset: dataset,
    "subset": lambda dataset: Subset(dataset, [0, 1]),
    "concatenation": lambda dataset: ConcatDataset([dataset, dataset]),
    "subset of a subset": lambda dataset: Subset(Subset(dataset, [0, 1]), [0]),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_are_closed_and_caches_kept(name, tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    dataset = Lazy(tmp_path / "x")
    wrapped = WRAPPERS[name](dataset)
    files = OpenFiles(wrapped, None)
    assert wrapped[0] == (b"a", 0)
    file, large = dataset.file, dataset.large
    files.close()
    assert dataset.file is None
    assert not hasattr(dataset, "handle")
    assert dataset.large is large
    assert dataset.small == {"a": 1}
    file.close()
    assert wrapped[0] == (b"a", 0)  # opened again
    dataset.file.close()


def test_what_was_open_before_stays_open(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    dataset = Lazy(tmp_path / "x")
    dataset[0]
    files = OpenFiles(dataset)
    files.close()
    assert dataset[0] == (b"b", 0)
    dataset.file.close()
