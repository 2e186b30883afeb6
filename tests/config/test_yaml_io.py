import math
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ddp_sgd.config.yaml_io import (
    MAX_BYTES,
    MAX_DEPTH,
    read_value,
    read_words,
    read_yaml,
    read_yaml_file,
    write_yaml,
)
from ddp_sgd.errors import ConfigError

TRAPS = ["on", "yes", "no", "1:30", "2020-01-01", "1_000", "1e-3", "010", "0o10", "0x1F", ".5"]
TRAPS += ["", "~", "null", "true", "<<", "=", "-", "- a", "a: b", "#", ".nan", "-.inf", "\u0085"]

text = st.sampled_from(TRAPS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffe\uffff")
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
plain_data = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(text.filter(bool), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("Null", None),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("010", 10),
        ("-010", -10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+4", 4),
        ("1e-3", 0.001),
        ("1E5", 100_000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("+.INF", math.inf),
        ("nan", "nan"),
        ("1e", "1e"),
        ("'1e-3'", "1e-3"),
        ('"010"', "010"),
        ("torch.float32", "torch.float32"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
        ("{on: 1, 'x': &a [2], y: *a}", {"on": 1, "x": [2], "y": [2]}),
        ("&a k", "k"),
        ("%YAML 1.1\n---\non", "on"),
        ("\ufeffa: 1", {"a": 1}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("a: 1\t# one\nb: 2\t", {"a": 1, "b": 2}),
    ],
)
def test_values_are_what_they_look_like(written, value):
    read = read_yaml(written, "x")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "written",
    ["3 #4", "#", "a #", "'a' #3", "[a] #3", "{a: 1} #3", "a: 1 #3", "- a #3", "--- a", "&x a",
     "a\n b", "a\n# b", "é\U0001f600 #"],
)  # fmt: skip
def test_a_value_that_yaml_would_shorten_is_text(written):
    assert read_value(written, "x") == written


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("", None),
        (" 3 ", 3),
        ("a#3", "a#3"),
        ("'a #3'", "a #3"),
        ("\ufeffé\U0001f600", "é\U0001f600"),
        ("[a, 'b #3']", ["a", "b #3"]),
        ("{a: [1]}", {"a": [1]}),
        ("a: ", {"a": None}),
        ("- a", ["a"]),
        ("a: 1 # one\nb: 2 # two\n", {"a": 1, "b": 2}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_other_values_are_yaml(written, value):
    assert read_value(written, "x") == value


@given(plain_data)
def test_any_value_can_be_written_as_one(value):
    assert read_value(write_yaml(value, on_one_line=True).removesuffix("...\n"), "x") == value


@given(text)
def test_words_are_kept(words):
    is_quoted = len(words) > 1 and words[0] == words[-1] and words[0] in "'\""
    if is_quoted or any(ord(char) < 32 or 126 < ord(char) < 160 for char in words):
        return
    assert read_words(words, "x", may_be_null=False) == words
    doubled = words.replace("'", "''")
    if "\n" not in words:
        assert read_words(f"'{doubled}'", "x", may_be_null=False) == words


def test_words_that_are_too_many():
    with pytest.raises(ConfigError, match="x is larger than 1 MiB"):
        read_words("a" * (MAX_BYTES + 1), "x", may_be_null=True)


def test_nan_is_a_number():
    assert math.isnan(read_yaml(".NaN", "x"))


def test_an_alias_is_a_copy():
    read = read_yaml("a: &x [1]\nb: *x", "x")
    read["a"].append(2)
    assert read["b"] == [1]


def test_an_anchor_may_be_used_again():
    assert read_yaml("[&x 1, *x, &x 2, *x]", "x") == [1, 1, 2, 2]


def test_levels_are_counted_with_those_of_aliases():
    inner = MAX_DEPTH // 2
    half = f"{'[' * inner}1{']' * inner}"
    read = read_yaml(f"[&x {half}, {'[' * (inner - 1)}*x{']' * (inner - 1)}]", "x")
    assert str(read).count("[") == 2 * MAX_DEPTH - inner
    with pytest.raises(ConfigError, match="x line 2 nests deeper than 64 levels; flatten it."):
        read_yaml(f"[&x {half},\n {'[' * inner}*x{']' * inner}]", "x")
    with pytest.raises(ConfigError, match="x line 1 nests deeper than 64 levels; flatten it."):
        read_yaml(f"{'[' * (MAX_DEPTH + 1)}1{']' * (MAX_DEPTH + 1)}", "x")


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", None)])
def test_both_parsers_of_pyyaml_give_the_same(loader, monkeypatch):
    if loader is None:
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr("ddp_sgd.config.yaml_io._PARSER", loader)
    read = read_yaml("a: [010, 'on', &x {b: ~}]\nc: *x\n", "x")
    assert read == {"a": [10, "on", {"b": None}], "c": {"b": None}}


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml line 3 repeats the key a of line 1; keep one of the two."),
        ("1: 2", 'f.yaml line 1 has a key 1 that is not text; put it in quotes, such as "1".'),
        ("true: 2", "line 1 has a key True that is not text"),
        ("? [a]\n: 3", "line 1 has a key that is not text"),
        ("~: 3", "line 1 has a key that is not text"),
        ("a: &k 3\n*k : 3", "line 2 has a key 3 that is not text"),
        ("a: !!python/object:os.x {}", "line 1 has the tag !!python/object:os.x; write plain data"),
        ("a: !!int 3", "line 1 has the tag !!int; "),
        ("a: ! 3", "line 1 has the tag !; "),
        ("a: 1\n---\nb: 2", "line 2 starts a second document; keep one document"),
        ("a: &x [*x]", "line 1 uses *x inside &x; write the value out."),
        ("a:\n  - *d", "line 2 uses *d; define &d above it."),
        ("<<: {a: 3}", "line 1 has the merge key <<; write the keys out"),
        ("[" * 100_000, "line 1 nests deeper than 64 levels; flatten it."),
        ("{a: " * 3_000, "line 1 nests deeper than 64 levels; flatten it."),
        ("- " * 5_000, "line 1 nests deeper than 64 levels; flatten it."),
        (LAUGHS, "line 5 makes more than 100000 values, aliases expanded; write less."),
        ("a: b\nc: \x00", "f.yaml line 2 holds the character '\\x00'; remove it"),
        ("a: \ud800", "line 1 holds the character '\\ud800'; remove it"),
        ("\n" * MAX_BYTES + "a", "f.yaml is larger than 1 MiB; keep data out"),
        ("a: " + "9" * 5_000, "line 1 holds a number of more than 1000 digits; shorten it."),
        ("a: 0x" + "f" * 5_000, "line 1 holds a number of more than 1000 digits; shorten it."),
        ("a: 1\nb: [1,\n", "f.yaml line 3 is not YAML ("),
        ("[", "f.yaml line 1 is not YAML ("),
        ("a: @x", "check its brackets, quotes, colons and indentation."),
        ("a: 1\n\tb: 3", "f.yaml line 2 is not YAML ("),
        ("a: 'x", "f.yaml line 1 is not YAML ("),
    ],
)
def test_faults_name_file_line_and_remedy(written, message):
    with pytest.raises(ConfigError) as caught:
        read_yaml(written, "f.yaml")
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@given(st.text())
def test_any_text_is_read_or_refused(written):
    try:
        read_yaml(written, "x")
    except ConfigError as error:
        assert str(error).startswith("x ")  # noqa: PT017


@given(plain_data)
def test_what_is_written_is_read_back(data):
    assert read_yaml(write_yaml(data), "x") == data


def test_tuples_are_written_as_lists_and_shared_objects_twice():
    shared = [1]
    assert write_yaml({"a": (1, 2), "b": shared, "c": shared}) == "a: [1, 2]\nb: [1]\nc: [1]\n"


def test_mappings_on_one_line():
    data = {"a": [{"b": None}, [1, "on"]], "c": {}}
    written = write_yaml(data, on_one_line=True)
    assert written.count("\n") == 1
    assert read_yaml(written, "x") == data


def test_text_that_is_a_number_too_long_to_read_is_quoted():
    assert read_yaml(write_yaml("9" * 5_000), "x") == "9" * 5_000


def test_an_object_cannot_be_written():
    with pytest.raises(ConfigError, match="an object of type complex; use text, numbers"):
        write_yaml({"a": 1j})


def test_a_file_is_read_and_an_empty_one_is_an_empty_mapping(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\n")
    assert read_yaml_file(file) == {"a": 1}
    file.write_text("# nothing\n")
    assert read_yaml_file(str(file)) == {}


def test_a_pipe_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"a: 1")
    os.close(writer)
    try:
        assert read_yaml_file(f"/dev/fd/{reader}") == {"a": 1}
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", "line 1 is a list, not a mapping; write lines of the form `key: value`."),
        (b"text", "line 1 is a single value, not a mapping; "),
        (b"a: 1\nb: \xff", "line 2 is not UTF-8; save the file as UTF-8."),
        (b"#" * (MAX_BYTES + 1), "is larger than 1 MiB; "),
        (b"a: 1\na: 2", "line 2 repeats the key a of line 1; "),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml_file(file)
    assert str(caught.value).startswith(f"{file} {message}")


def test_a_missing_file_has_a_neighbour(tmp_path):
    (tmp_path / "digits.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        read_yaml_file(tmp_path / "digit.yaml")
    assert str(caught.value).endswith(f"does not exist; did you mean {tmp_path}/digits.yaml?")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zzz", "zzz does not exist; name a YAML file that does."),
        ("no/folder.yaml", "folder.yaml does not exist; name a YAML file that does."),
        ("", "is a folder; name a YAML file in it."),
        ("a\0b", "cannot be read (embedded null byte); name a readable file."),
    ],
)
def test_what_is_not_a_file_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigError) as caught:
        read_yaml_file(f"{tmp_path}/{name}")
    assert message in str(caught.value)
