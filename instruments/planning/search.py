"""Choose among meshes: which divide a model, which is best, what to try next, how large a batch may be.

Before: one_mesh.py.
"""
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from instruments.planning.one_mesh import MeshPlan, Setting, mesh_dim_of
from model.config import LlamaConfig
from model.lora import Lora
from model.partition import AXES, DTYPES, check_rows, factorizations, make_mesh, rows_unit
from model.weights import check_divisible

LEAST_MEMORY = 'nothing_saveable'
TIE = 0.03  # estimates closer than this say nothing: the mesh that needs less memory is taken


def valid_meshes(config: LlamaConfig, devices: int, batch_size: int) -> tuple[list[str], dict[str, str]]:
    """List the factorizations that divide model and batch, and the others: {mesh_dim: why not}."""
    valid, invalid = [], {}
    for mesh_dim in factorizations(devices):
        mesh = AbstractMesh(tuple(int(size) for size in mesh_dim.split(',')), AXES)
        try:
            check_divisible(config, mesh)
            check_rows(batch_size, mesh, 'batch_size')
        except ValueError as error:
            invalid[mesh_dim] = str(error)
        else:
            valid.append(mesh_dim)
    return valid, invalid


def choose(plans: list[MeshPlan]) -> MeshPlan | None:
    """Take the plan that fits and is estimated fastest; of those within TIE of it, the one that needs least memory."""
    fitting = [plan for plan in plans if plan.fits and plan.estimate]
    if not fitting:
        return None
    fastest = min(plan.seconds for plan in fitting)
    return min((plan for plan in fitting if plan.seconds <= (1 + TIE) * fastest), key=lambda plan: plan.needed)


def alternatives(setting: Setting, batch_size: int) -> Iterator[tuple[Setting, int]]:
    """Yield (setting, batch size) of runs that need less memory for the same optimizer steps, nearest first.

    The same mesh keeping less for the backward pass; other meshes, as they are and keeping less; smaller batches with
    more accumulation.  After these all the same again for adapters beside a frozen base, of bfloat16 and then of int8.
    """
    for own in (setting, *with_lighter_base(setting)):
        for other, rows in of_less_memory(own, batch_size):
            if (other, rows) != (setting, batch_size):
                yield other, rows


def with_lighter_base(setting: Setting) -> list[Setting]:
    """List the settings of adapters whose base takes fewer bytes than the weights of `setting`: of the adapters that it
    has, or of rank 16.
    """
    size = lambda dtype: 1 if dtype == 'int8' else jnp.dtype(DTYPES[dtype]).itemsize
    config = setting.config
    rank = min(16, config.num_key_value_heads * config.head_dim)  # no adapter has a higher one than its matrix
    lora = setting.lora or Lora(rank, alpha=2.0 * rank)
    return [setting._replace(lora=dataclasses.replace(lora, base_dtype=dtype)) for dtype in ('bf16', 'int8')
            if size(dtype) < size(lora.base_dtype)]


def of_less_memory(setting: Setting, batch_size: int) -> Iterator[tuple[Setting, int]]:
    """Yield (setting, batch size) as it is, then on other meshes, keeping less, and with smaller batches."""
    less = dataclasses.replace(setting.compute, remat_block=LEAST_MEMORY, remat_attention='', remat_mlp='')
    devices = sorted(setting.mesh.devices.flat, key=lambda device: device.id)
    here = mesh_dim_of(setting.mesh)
    meshes = {setting.mesh_dim: setting.mesh} | {
        mesh_dim: make_mesh(mesh_dim, devices) for mesh_dim in
        sorted(valid_meshes(setting.config, len(devices), len(devices))[0],
               key=lambda other: (distance(here, other), other.split(',')[2])) if mesh_dim != here}
    computes = [setting.compute] if setting.compute == less else [setting.compute, less]
    for part in (1, *(2**n for n in range(1, batch_size.bit_length()))):
        if batch_size % part:
            return
        accumulate, rows = setting.accumulate * part, batch_size // part
        for compute in computes if part == 1 else [less]:
            for mesh_dim, mesh in meshes.items():
                other = setting._replace(compute=compute, accumulate=accumulate, mesh=mesh, mesh_dim=mesh_dim)
                if rows % rows_unit(mesh) == 0:
                    yield other, rows


def distance(a: str, b: str) -> float:
    """Count the doublings of an axis between two --mesh_dim."""
    return sum(abs(math.log2(int(m) / int(n))) for m, n in zip(a.split(','), b.split(','), strict=True))


def largest_batch(try_batch: Callable[[int], MeshPlan], unit: int) -> MeshPlan | None:
    """Find the plan of the largest multiple of `unit` rows that fits; None when `unit` rows do not.

    Memory is nearly linear in the rows, and a refusal says what was needed: so the next size to try is where the line
    through the two nearest crosses the limit; after six of those, every other time it is the double, or the middle.
    """
    tried: dict[int, MeshPlan] = {}

    def attempt(count: int) -> bool:
        tried[count] = try_batch(count * unit)
        return tried[count].fits

    if not attempt(1):
        return None
    fitting, too_large = 1, None
    while too_large is None or too_large - fitting > 1:
        count = crossing(tried) if len(tried) > 1 else 2
        doubtful = len(tried) >= 6 and len(tried) % 2 == 0
        if too_large is None:
            count = min(max(count, 2 * fitting if doubtful else fitting + 1), 64 * fitting)
        elif doubtful or not fitting < count < too_large:
            count = (fitting + too_large) // 2
        if attempt(count):
            fitting = count
        else:
            too_large = count
    return tried[fitting]


def crossing(tried: dict[int, MeshPlan]) -> int:
    """Estimate the largest count below the limit, on the line through the two counts whose need is nearest to it."""
    known = sorted((abs(plan.needed - plan.usable), count) for count, plan in tried.items() if plan.needed)[:2]
    (a, b), limit = sorted(count for _, count in known), next(iter(tried.values())).usable
    slope = (tried[b].needed - tried[a].needed) / (b - a)
    return int(a + (limit - tried[a].needed) / slope) if slope > 0 else 8 * b
