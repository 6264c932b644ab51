"""Parts of a labelled set: a sample of it, or all of it parted into training, validation and test.

Neighbours: labelled.py (reads the set) below; prepare_data.py and evaluate.py (the programs) above.
"""
import numpy as np

from data.labelled import Example
from mistake import Mistake


def sample(examples: list[Example], *, ratio: float = 1.0, size: int = 0, seed: int = 42, stratified: bool = True,
           shuffle: bool = True) -> list[Example]:
    """A part of `examples` without repetition: `ratio` of them, or `size` of them (0: as the ratio says).

    The order is that of a permutation seeded by `seed`, or file order when not `shuffle`; the sample is the beginning
    of it.  So smaller samples are contained in larger ones of the same seed.  `stratified`: each class has its
    share of the whole, which is round(ratio * n) or `size` exactly, by largest remainder.
    """
    if not 0 < ratio <= 1:
        raise Mistake(f'sample_ratio={ratio} must be above 0 and at most 1')
    if not 0 <= size <= len(examples):
        raise Mistake(f'sample_size={size} must be between 0 (all) and {len(examples)}, the number of examples')
    if size and ratio != 1:
        raise Mistake(f'sample_ratio={ratio} and sample_size={size}: set only one of them')
    groups = [example.label if stratified else 0 for example in examples]
    counts = np.bincount(groups) if groups else np.zeros(1, int)
    quota = _shares(counts, size or int(ratio * len(examples) + 0.5))
    order = np.random.default_rng(seed).permutation(len(examples)) if shuffle else range(len(examples))
    chosen = []
    for i in order:
        if quota[groups[i]] > 0:
            quota[groups[i]] -= 1
            chosen.append(examples[i])
    if not chosen:
        raise Mistake(f'sample_ratio={ratio} of {len(examples)} examples is none; raise --sample_ratio')
    return chosen


def part(examples: list[Example], ratios: tuple[float, ...], seed: int = 42) -> list[list[Example]]:
    """`examples` in as many parts as there are ratios, which sum to 1; the order stays.

    Each class has its share of each part, by largest remainder.  Texts that differ in case and blanks only are in one
    part, with the class of the first; the largest such groups are dealt first, each to the part that lacks most.  Who
    goes where is drawn by `seed`.
    """
    groups = {}
    for i, example in enumerate(examples):
        groups.setdefault(' '.join(example.text.casefold().split()), []).append(i)
    classes = [examples[members[0]].label for members in groups.values()]
    sizes = np.array([len(members) for members in groups.values()])
    weights = np.rint(np.array(ratios) * 1_000_000)
    lacking = {label: _shares(weights, sum(sizes[np.array(classes) == label])) for label in set(classes)}
    order = np.random.default_rng(seed).permutation(len(sizes))
    members, home = list(groups.values()), np.zeros(len(examples), int)
    for group in order[np.argsort(-sizes[order], kind='stable')]:
        where = int(np.argmax(lacking[classes[group]]))
        lacking[classes[group]][where] -= sizes[group]
        home[members[group]] = where
    return [[examples[i] for i in np.flatnonzero(home == n)] for n in range(len(ratios))]


def _shares(weights: np.ndarray, size: int) -> np.ndarray:
    """`size` divided in proportion to `weights` by largest remainder, in integers: nothing is rounded."""
    weights = weights.astype(np.int64)
    shares, remainders = np.divmod(weights * size, weights.sum())
    for group in sorted(range(len(weights)), key=lambda group: -remainders[group])[:size - int(sum(shares))]:
        shares[group] += 1
    return shares
