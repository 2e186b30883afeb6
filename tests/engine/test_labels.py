import pytest
import torch

from ddp_sgd.engine.labels import check_labels, count_classes, listed_targets
from ddp_sgd.errors import DataError


@pytest.mark.parametrize("listed", [None, ["a", "b"], [0.5, 1.5], [[0, 1], [1, 0]], [0]])
def test_lists_of_something_else_are_left_alone(listed):
    class Named:
        targets = listed

        def __len__(self):
            return 2

    assert listed_targets(Named(), torch.tensor([0, 1]), [0, 1]) is None


class Listed:
    def __init__(self, targets, transform=None):
        self.targets, self.target_transform = targets, transform

    def __len__(self):
        return len(self.targets)


@pytest.mark.parametrize(
    ("dataset", "targets", "counts"),
    [
        (Listed([0, 1, 2]), (0, 1), True),
        (Listed(torch.tensor([0, 1, 2], dtype=torch.uint8)), (0, 1), True),
        (Listed([0, 1, 2]), (0, 0), False),
        (Listed([0, 1, 2], transform=abs), (0, 1), False),
        (Listed([0.0, 1.0]), (0, 1), False),
    ],
)
def test_a_list_counts_where_it_equals_what_was_read(dataset, targets, counts):
    listed = listed_targets(dataset, torch.tensor(targets), range(len(targets)))
    assert (listed is not None) is counts


def test_labels_need_a_score():
    check_labels(torch.tensor([0, 2]), 3, "x")
    check_labels(torch.tensor([]), 3, "x")
    with pytest.raises(DataError, match="x has labels from 0 to 3 while the model gives 3 scores"):
        check_labels(torch.tensor([0, 3]), 3, "x")


@pytest.mark.parametrize(
    ("outputs", "targets", "classes"),
    [
        (torch.zeros(4, 3), torch.zeros(4).long(), 3),
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 5, 5).long(), 3),
        (torch.zeros(4, 3), torch.zeros(4), None),
        (torch.zeros(4, 1), torch.zeros(4).long(), None),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), None),
        (torch.zeros(4, 3, 5), torch.zeros(4, 6).long(), None),
        ([torch.zeros(4, 3)], torch.zeros(4).long(), None),
    ],
)
def test_classes_follow_from_the_shapes(outputs, targets, classes):
    assert count_classes(outputs, targets) == classes
