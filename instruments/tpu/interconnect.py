"""Estimate how long a collective takes on the links between chips, from where the devices of its groups stand.

Chips stand on a grid and each is linked to its neighbours; links work in both directions at once.  The model, which
knows bandwidth, distance and nothing of what a runtime does:
  - where every group is connected (a line, a ring, a block), what each device sends goes over as many links as the
    device with the fewest neighbours in its group has: 1 in a pair or a line without wrap-around (its ends), 2 in a
    ring or a square, 4 in a full torus of two dimensions;
  - where a group is scattered, its devices form a ring in the order they are listed, hops between them go along
    the first dimension first, and the link that most rings go over sets the time;
  - a permute takes as long as its most used link needs;
  - none is faster than its longest distance at HOP a link (twice that for an all-reduce).
The one comparison at hand: an all-gather of 34 MB over a line of 4 v5e chips, 560 us here, measured 680 us (both in
'How To Scale Your Model', jax-ml scaling-book, Sharding, pop quiz 2; HOP is its figure too).  One slice only.
"""
import collections
import functools
import itertools
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from instruments.tpu.chips import Chip
from instruments.tpu.collectives import Collective

HOP = 1e-6  # seconds of a hop over a link, whatever is sent

Place = tuple[int, ...]


class Network(NamedTuple):
    places: tuple[Place, ...]  # of the mesh's devices, in the mesh's order
    sides: Place
    wraps: tuple[bool, ...]  # by dimension
    chip: Chip


def network(mesh: Mesh, chip: Chip) -> Network:
    """Find the grid that a mesh's devices stand on.

    Raises:
      ValueError: the devices have no coordinates (they are no TPUs).
    """
    if not all(hasattr(device, 'coords') for device in mesh.devices.flat):
        raise ValueError(f'{mesh=} is not of TPU devices: build it over tpu.compile.devices(name)')
    places = tuple(tuple(device.coords) for device in mesh.devices.flat)
    sides = tuple(max(along) + 1 for along in zip(*places, strict=True))
    wraps = tuple(side % chip.wrap == 0 for side in sides)
    if chip.topology.count('x') == 2:  # cubes: all sides or none
        wraps = (all(wraps),) * len(sides)
    return Network(places, sides, wraps, chip)


def seconds(collective: Collective, groups: np.ndarray, net: Network) -> float:
    """Estimate the seconds of one execution on idle links; `groups` as tpu.collectives.device_groups gives them."""
    links, hops = paths(collective.kind == 'collective-permute', tuple(map(tuple, groups.tolist())), net)
    return max((2 if collective.kind == 'all-reduce' else 1) * hops * HOP,
               collective.wire_bytes / (links * net.chip.link_bandwidth))


@functools.cache
def paths(permute: bool, groups: tuple[tuple[int, ...], ...], net: Network) -> tuple[float, int]:
    """Count (links that a device sends over at once, hops between the farthest two devices of a group)."""
    members = [[net.places[device] for device in group] for group in groups]
    hops = max(distance(a, b, net) for group in members for a, b in itertools.combinations(group, 2))
    if permute:
        return 1 / most_used(members, net), hops
    if all(connected(group, net) for group in members):
        return min(neighbours(place, group, net) for group in members for place in group), hops
    return 1 / most_used([pair for group in members for pair in zip(group, group[1:] + group[:1], strict=True)],
                         net), hops


def dimensions(groups: np.ndarray, net: Network) -> tuple[int, ...]:
    """List the dimensions of the grid that a collective's traffic goes along; (-1,) within one chip."""
    members = np.array([[net.places[device] for device in group] for group in groups])
    return tuple(np.flatnonzero((members != members[:, :1]).any(axis=(0, 1))).tolist()) or (-1,)


def distance(a: Place, b: Place, net: Network) -> int:
    return sum(abs(step) for step in steps(a, b, net))


def steps(a: Place, b: Place, net: Network) -> list[int]:
    """Count the links to go in each dimension, the shorter way round; negative: downwards."""
    found = []
    for start, end, side, wraps in zip(a, b, net.sides, net.wraps, strict=True):
        step = end - start
        if wraps and abs(step) * 2 > side:
            step -= side if step > 0 else -side
        found.append(step)
    return found


def neighbours(place: Place, group: list[Place], net: Network) -> int:
    """Count the group's devices one link away, or on the same chip (v7x has two there, joined by no slower a link)."""
    return sum(distance(place, other, net) <= 1 for other in group) - 1


def connected(group: list[Place], net: Network) -> bool:
    reached, waiting = set(), [group[0]]
    while waiting:
        place = waiting.pop()
        reached.add(place)
        waiting += [other for other in group if other not in reached and distance(place, other, net) <= 1]
    return reached == set(group)


def most_used(pairs: list, net: Network) -> int:
    """Count the (source, target) pairs that go over the link that most of them go over, at least 1."""
    used = collections.Counter()
    for source, target in pairs:
        here = list(source)
        for dimension, step in enumerate(steps(source, target, net)):
            for _ in range(abs(step)):
                used[tuple(here), dimension, step > 0] += 1
                here[dimension] = (here[dimension] + (1 if step > 0 else -1)) % net.sides[dimension]
    return max(used.values(), default=1)
