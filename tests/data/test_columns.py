import pytest

from ddp_sgd.data import Columns
from ddp_sgd.errors import DataError

ROWS = [{"image": number, "label": -number, "file": "x"} for number in range(4)]


def test_rows_become_pairs():
    data = Columns(ROWS, input="image", target="label")
    assert len(data) == 4
    assert data[2] == (2, -2)


def test_the_transform_sees_inputs_only():
    assert Columns(ROWS, "image", "label", transform=lambda x: 10 * x)[3] == (30, -3)


def test_a_missing_column_is_named_with_those_that_exist():
    with pytest.raises(
        DataError, match="column digit is not in image, label, file; name one of those"
    ):
        Columns(ROWS, "digit", "label")[0]
