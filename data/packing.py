"""Put several records into one row, whole, so that little of it is padding.  After: rows.py.

First fit: of a window of records, longest first, each goes into the first row that still has room for it.
"""
import numpy as np

WINDOW = 1024  # records that are placed together


def first_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Return rows, each a list of places in `lengths`, such that the lengths of a row sum to at most `room`."""
    rows = []
    for start in range(0, len(lengths), WINDOW):
        window = lengths[start:start + WINDOW]
        free, members = np.full(len(window), room), [[] for _ in window]
        for place in np.argsort(-window, kind='stable'):
            row = np.argmax(free >= window[place])
            free[row] -= window[place]
            members[row].append(start + int(place))
        rows += [row for row in members if row]
    return rows
