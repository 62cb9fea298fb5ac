"""Random patterns, sizes and blocks for Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from saccade.where import (
    Band,
    BlockBand,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Documents,
    Full,
    GridBlocks,
    Labels,
    Neighborhood,
    Packed,
    Pattern,
    PerHead,
    Prefix,
    Sinks,
    Strided,
    Summaries,
    Window,
)

small = st.integers(1, 9)
blocks = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def documents(draw: st.DrawFn, total: int) -> Documents:
    cuts = draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=4)) - {total}
    return Documents([0, *sorted(cuts), total])


@st.composite
def ends(draw: st.DrawFn, own: int = 1) -> tuple[int | None, int | None]:
    """left and right of a band, open, on either side of the query, or on one only."""
    left, right = draw(st.none() | st.integers(-4, 6)), draw(st.none() | st.integers(-4, 6))
    return (left, right) if left is None or right is None else (left, max(right, 1 - own - left))


@st.composite
def labels(draw: st.DrawFn, total: int) -> Labels:
    """Few or many labels, ascending or not, some tokens without."""
    count = draw(st.sampled_from([2, total + 1]))
    found = draw(st.lists(st.integers(-1, count), min_size=total, max_size=total))
    found = sorted(found) if draw(st.booleans()) else found
    queries = draw(st.none() | st.lists(st.integers(-1, count), min_size=total, max_size=total + 3))
    return Labels(found, *draw(ends()), queries=queries)


def leaves(total: int) -> st.SearchStrategy[Pattern]:
    """One named pattern over `total` keys in a sequence."""
    columns = st.builds(lambda size, stride, at: Columns(size, stride, at % stride), small, small, small)
    return st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.builds(Window, small),
        st.builds(lambda both: Band(*both), ends()),
        st.builds(Prefix, small),
        st.builds(Sinks, st.integers(0, 9)),
        st.builds(Blocks, small),
        st.builds(Dilated, small, small),
        st.builds(Strided, small),
        st.builds(lambda size, both: BlockBand(size, *both), small, ends(own=0)),
        labels(total),
        columns,
        documents(total),
    )


def residues(total: int) -> st.SearchStrategy[Pattern]:
    """Classes of residues beside something else, which the order of the classes scatters."""

    def joined(modulus: int, size: int, how: str, other: Pattern) -> Pattern:
        classes = Strided(modulus) if size > 5 else Dilated(size, modulus)
        return {"or": classes | other, "both": (classes | other) & Causal(), "two": classes | other | Strided(3)}[how]

    beside = st.one_of(
        st.builds(Window, small), st.builds(lambda both: Band(*both), ends()), st.builds(Sinks, small), leaves(total)
    )
    return st.builds(joined, st.integers(2, 4), small, st.sampled_from(["or", "both", "two"]), beside)


def sequences(total: int) -> st.SearchStrategy[Pattern]:
    """Compositions of patterns over a sequence."""

    def grow(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
        both = st.builds(lambda a, b: a & b, inner, inner)
        either = st.builds(lambda a, b: a | b, inner, inner)
        within = st.sampled_from([Causal(), Window(2) | Sinks(1), Strided(2) & Causal(), Blocks(3)])
        packed = st.builds(Packed, within, documents(total))
        return st.one_of(both, either, packed)

    return residues(total) | st.recursive(leaves(total), grow, max_leaves=4)


@st.composite
def axis(draw: st.DrawFn) -> tuple[int, int, int, int, bool]:
    """(length, kernel, stride, dilation, causal) of one axis of a grid."""
    length = draw(st.integers(1, 7))
    dilation = draw(st.integers(1, length))
    kernel = draw(st.integers(1, length // dilation))
    return length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())


@st.composite
def grid_blocks(draw: st.DrawFn, grid: tuple[int, ...], dilation: tuple[int, ...]) -> GridBlocks:
    """Blocks of any size, alone, in a halo, or with their own part left out."""
    size = [draw(st.integers(1, 4)) for _ in grid]
    offset = [draw(st.integers(0, b - 1)) for b in size]
    if draw(st.booleans()):
        return GridBlocks(grid, size, 0, 0, offset, dilation)
    left = [draw(st.integers(-5, 3)) for _ in grid]
    right = [max(draw(st.integers(-5, 3)), 1 - b - a) for a, b in zip(left, size, strict=True)]
    return GridBlocks(grid, size, left, right, offset, dilation)


@st.composite
def neighborhoods(draw: st.DrawFn) -> tuple[Pattern, int]:
    """Neighbourhoods or blocks on a grid of 1-3 axes, alone or with another on that grid, and its number of tokens."""
    grid, kernel, stride, dilation, causal = zip(*draw(st.lists(axis(), min_size=1, max_size=3)), strict=True)
    pattern: Pattern = Neighborhood(grid, kernel, stride, dilation, causal)
    if draw(st.booleans()):
        pattern = draw(grid_blocks(grid, dilation))
    total = 1
    for length in grid:
        total *= length
    how = draw(st.sampled_from(["alone", "or", "and"]))
    other = draw(st.one_of(leaves(total), st.just(Neighborhood(grid, 1)), grid_blocks(grid, dilation)))
    return {"alone": pattern, "or": pattern | other, "and": pattern & other}[how], total


@st.composite
def problems(draw: st.DrawFn) -> tuple[Pattern, int, int, int]:
    """(pattern, n, m, heads)."""
    if draw(st.booleans()):
        pattern, total = draw(neighborhoods())
        n = draw(st.sampled_from([total, max(1, total // 2)]))
        return pattern, n, total, draw(st.integers(1, 2))
    m = draw(st.integers(1, 41))
    n = draw(st.integers(1, m))
    heads = draw(st.integers(1, 3))
    if draw(st.booleans()):
        other = Summaries(draw(st.integers(n, 60)), draw(small), draw(small)) | Prefix(2)
        return draw(st.sampled_from([other, Full(), Columns(2, 3, 1)])), n, draw(st.integers(1, 41)), heads
    if draw(st.booleans()):
        return draw(sequences(m)), n, m, heads
    return PerHead([draw(sequences(m)) for _ in range(heads)]), n, m, heads
