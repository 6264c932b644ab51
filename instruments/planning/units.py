"""Write numbers of a plan in few characters."""


def gib(size: float) -> str:
    """Write bytes in GiB: 15.75, 0.031."""
    return short(size / 2**30)


def short(value: float) -> str:
    """Write a number with about three digits: 1,234.50, 0.123, 0.0042."""
    return f'{value:,.2f}' if value >= 1 or not value else f'{value:.3f}' if value >= 0.1 else f'{value:.2g}'
