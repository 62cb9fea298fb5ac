"""Numbers as people read them, for the console, the report and the axes of its charts."""

from __future__ import annotations


def seconds(value: float) -> str:
    """
    >>> seconds(0.0123), seconds(4.2e-5), seconds(12.0)
    ('12.3 ms', '42 µs', '12 s')
    """
    return _scaled(value, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def nbytes(value: float) -> str:
    """
    >>> nbytes(3 * 2**20), nbytes(1536), nbytes(12)
    ('3 MiB', '1.5 KiB', '12 B')
    """
    return _scaled(value, (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)))


def tokens(value: float) -> str:
    """Powers of 1024 in k.

    >>> tokens(8192), tokens(1000), tokens(2304)
    ('8k', '1000', '2304')
    """
    whole = round(value)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def times(value: float) -> str:
    """A ratio.

    >>> times(3.14159), times(123.4), times(0.5)
    ('3.1×', '123×', '0.5×')
    """
    return f"{_short(value)}×"


def error(value: float) -> str:
    """A relative error.

    >>> error(0.0), error(0.123), error(4.56e-7)
    ('0', '0.12', '4.6e-07')
    """
    return "0" if value == 0 else f"{value:.2g}"


def share(value: float) -> str:
    """A fraction as a percentage.

    >>> share(0.0634), share(1.0), share(0.0004)
    ('6.3 %', '100 %', '0.04 %')
    """
    return f"{_short(100 * value)} %"


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    name, size = next((unit for unit in units if abs(value) >= 0.9995 * unit[1]), units[-1])
    return f"{_short(value / size)} {name}"


def _short(value: float) -> str:
    """Two figures below ten, three from ten on, no trailing zeros."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    text = f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"
    return text.removesuffix(".0")
