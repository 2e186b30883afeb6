from ddp_sgd.text import columns, first_line


def test_cells_stand_below_each_other():
    rows = [("name", "size", "note"), ("a", "1,000", "first"), ("longer", "2", "")]
    assert columns(rows, left=(0, 2)) == [
        "name     size  note",
        "a       1,000  first",
        "longer      2",
    ]


def test_an_error_without_a_message_is_its_class():
    assert first_line(ValueError("\n of the kernel \nand more")) == "of the kernel "
    assert first_line(ValueError(" ")) == "ValueError"
