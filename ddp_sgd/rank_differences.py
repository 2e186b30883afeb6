"""Differences between ranks, in words. No torch."""

from collections.abc import Mapping, Sequence

_SHOWN = 3
"""Values, hosts and pieces of ranks that a sentence names before it counts the rest."""


def tell_apart(values: Mapping[int, str], hosts: Sequence[str]) -> str | None:
    """Say which rank has which value, unless all have the same.

    Args:
        values: Value of each rank that has one.
        hosts: Name of the host of each rank, by rank.

    Returns:
        Words such as ``0.1 on ranks 0-1 (node1) and 0.2 on rank 2 (node2)``; None: all are equal.
    """
    owners: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        owners.setdefault(value, []).append(rank)
    if len(owners) < 2:
        return None
    # The value of most ranks comes first; of equally many, that of the lowest rank.
    ordered = sorted(owners.items(), key=lambda item: (-len(item[1]), item[1][0]))
    parts = [f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in ordered[:_SHOWN]]
    if rest := sum(len(ranks) for _, ranks in ordered[_SHOWN:]):
        parts.append(f"others on {rest} more")
    return join_words(parts)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name ranks and their hosts, such as ``ranks 0-2 and 5 (node1, node2)``.

    Args:
        ranks: In rising order, at least one.
        hosts: Name of the host of each rank, by rank; empty where it is not known.
    """
    pieces = number_spans(ranks)
    shown = pieces[:_SHOWN] + ([f"{len(pieces) - _SHOWN} more"] if len(pieces) > _SHOWN else [])
    text = f"rank{'s' * (len(ranks) > 1)} {join_words(shown)}"
    names = list(dict.fromkeys(hosts[rank] for rank in ranks if hosts[rank]))
    if not names:
        return text
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{text} ({', '.join(names[:_SHOWN])}{more})"


def number_spans(ranks: Sequence[int]) -> list[str]:
    """Fold numbers in rising order into spans, such as ``0-3`` and ``7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ["-".join(map(str, span)) for span in spans]


def join_words(parts: Sequence[str]) -> str:
    """Join with commas, and ``and`` before the last."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
