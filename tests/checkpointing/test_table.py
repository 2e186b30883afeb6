from ddp_sgd.checkpointing.table import columns


def test_cells_stand_below_each_other():
    rows = [("name", "size", "note"), ("a", "1,000", "first"), ("longer", "2", "")]
    assert columns(rows, left=(0, 2)) == [
        "name     size  note",
        "a       1,000  first",
        "longer      2",
    ]
