import pytest

from ddp_sgd.rank_differences import join_words, name_ranks, name_values, number_spans

HOSTS = ["node1", "node1", "node2", "node2", "node3", "node4", "node5"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({0: "a", 1: "a"}, None),
        ({}, None),
        ({0: "0.1", 2: "0.2"}, "0.1 on rank 0 (node1) and 0.2 on rank 2 (node2)"),
        (
            {0: "b", 1: "a", 2: "a", 3: "a"},
            "a on ranks 1-3 (node1, node2) and b on rank 0 (node1)",
        ),
        (
            {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"},
            "a on rank 0 (node1), b on rank 1 (node1), c on rank 2 (node2) and others on 2 more",
        ),
    ],
)
def test_values_are_told_apart(values, words):
    assert name_values(values, HOSTS) == words


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([4], "rank 4 (node3)"),
        ([0, 1, 3], "ranks 0-1 and 3 (node1, node2)"),
        ([0, 2, 4, 6], "ranks 0, 2, 4 and 1 more (node1, node2, node3 and 1 more)"),
    ],
)
def test_ranks_are_named_with_their_hosts(ranks, words):
    assert name_ranks(ranks, HOSTS) == words


def test_a_host_that_is_not_known_is_not_named():
    assert name_ranks([0, 1], ["", ""]) == "ranks 0-1"
    assert name_ranks([0, 1], ["", "node2"]) == "ranks 0-1 (node2)"


def test_spans():
    assert number_spans([0, 1, 2, 5, 7, 8]) == ["0-2", "5", "7-8"]
    assert number_spans([]) == []


def test_words_are_joined():
    assert [join_words(list(text)) for text in ("", "a", "ab", "abc")] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip
