"""Adapters of a low rank beside frozen matrices: LoRA (arXiv 2106.09685).  Before: weights.py; used by llama.py.

    y = x W + scale (x A) B,   A [in, R] uniform in ±1/sqrt(in),  B [R, out] zeros,   scale = alpha / R

(W, A and B as the weights' lines have them, [in, out]; alpha / sqrt(R) with rsLoRA, arXiv 2312.03732; the initial A is
PEFT's.)  Shape, sharding and initial values of A and B derive from the line of the weight they adapt: they keep its mp
and drop its fsdp, since they are small.  So A of 'N M/fsdp HD/mp' is 'N M R' and B 'N R HD/mp'.  The base has no
gradient, no optimizer state and no float32 copy; what trains is the Llama tree with Adapters in place of the targets
and None elsewhere.
"""
import dataclasses
import difflib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mistake import Mistake
from model import quantized
from model.config import Compute, LlamaConfig
from model.partition import DTYPES, gather_weight, pytree, varies
from model.quantized import Int8
from model.weights import Array, Layer, Llama, WeightSpec, abstract_params, partitions, weight_specs

TARGETS = tuple(field.name for field in dataclasses.fields(Layer) if field.metadata['init'] == 'normal')


@dataclasses.dataclass(frozen=True)
class Lora:
    """Hold what is adapted, and how.  targets: names of TARGETS.  dropout: share of x's numbers that A does not see in
    training; its masks follow from `seed`, and differ between meshes.  rslora: scale by sqrt(rank) instead of rank.
    base_dtype: how the frozen weights are kept.

    Raises Mistake for what is none of that.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ('w_q', 'w_v')
    dropout: float = 0.0
    rslora: bool = False
    base_dtype: str = 'fp32'
    seed: int = 0

    def __post_init__(self):
        for name in self.targets:
            if name not in TARGETS:
                close = difflib.get_close_matches(name, TARGETS, n=1)
                hint = f' (did you mean {close[0]}?)' if close else ''
                raise Mistake(f'lora.targets={",".join(self.targets)!r}: {name!r} is no matrix of a layer{hint}; they '
                              f'are {",".join(TARGETS)}')
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise Mistake(f'lora.targets={",".join(self.targets)!r} must name one or more of {",".join(TARGETS)}, each '
                          'once')

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@pytree
class Adapter:
    """Hold what trains of one matrix: a [N, in, R] and b [N, R, out], float32; or their specs."""

    a: Array
    b: Array


@pytree
class Adapted:
    """A matrix with its adapter, of all layers or of one; `x @ w` works for it as for an array.

    key: of dropout's masks, one a layer; None computes without.  rows_B: int32, which of several adapters each row of
    the batch has: a and b are then stacks of them, [C, in, R] and [C, R, out] of a layer; None: there is one.
    """

    base: Array | Int8
    a: Array
    b: Array
    key: Array | None = None
    rows_B: Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.base + self.delta(x)

    def delta(self, x: Array) -> Array:
        """Compute scale (x A) B, in x's dtype."""
        if self.key is not None:
            kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        if self.rows_B is not None:
            low_BTR = jnp.einsum('BTI,BIR->BTR', x, self.a[self.rows_B])
            return self.scale * jnp.einsum('BTR,BRO->BTO', low_BTR, self.b[self.rows_B])
        return self.scale * ((x @ self.a) @ self.b)


def is_adapted(x) -> bool:
    return isinstance(x, Adapted)


def gather_matrix(w: Array | Int8 | Adapted, rewrite: str, x: Array, compute: Compute) -> Array | Int8 | Adapted:
    """Gather a matrix of a layer as `gather_weight` does, for products with x; of an adapted one the base alone."""
    if not is_adapted(w):
        return quantized.gather_matrix(w, rewrite, x, compute)
    into, out = rewrite.split(' -> ')[1].split()
    key = w.key
    if key is not None:  # the devices of mp see the same x, unless they hold parts of it: then of A, too
        for axis in ('dp', 'fsdp', *varies(w.a)):
            key = jax.random.fold_in(key, lax.axis_index(axis))
    return dataclasses.replace(w, base=quantized.gather_matrix(w.base, rewrite, x, compute), key=key,
                               a=gather_weight(w.a, f'{into} R -> {into} R', x, compute),
                               b=gather_weight(w.b, f'R {out} -> R {out}', x, compute))


# ---------------------------------------------------------------- the frozen base


def base_partitions(config: LlamaConfig, dtype: str) -> Llama:
    """Build the Llama tree of PartitionSpecs of a base kept as `dtype` ('fp32', 'bf16', .., 'int8')."""
    return quantized.quantized_partitions(config, weight_only=True) if dtype == 'int8' else partitions(config)


def abstract_base(config: LlamaConfig, mesh: Mesh, dtype: str) -> Llama:
    """Build the base's Llama tree of ShapeDtypeStructs on their shardings."""
    if dtype != 'int8':
        return abstract_params(config, mesh, DTYPES[dtype])
    whole = jax.eval_shape(lambda params: quantized.quantize(params, config, weight_only=True),
                           abstract_params(config, mesh))
    return jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
                        whole, base_partitions(config, dtype))


# ---------------------------------------------------------------- trees


def adapter_specs(config: LlamaConfig, lora: Lora) -> Llama:
    """Derive the Llama tree of the adapters' WeightSpecs ('layers.w_q.a') from those of the weights; else None.

    Raises Mistake for a rank above that of a matrix.
    """
    specs = weight_specs(config)

    def adapter(spec: WeightSpec) -> Adapter | None:
        if spec.name.removeprefix('layers.') not in lora.targets:
            return None
        (n, i, o), (N, into, out) = spec.shape, spec.letters
        if lora.rank > min(i, o):
            raise Mistake(f'lora.rank={lora.rank} must be at most {min(i, o)}, the smaller side of {spec.name}, where '
                          'an adapter is as large as the matrix: lower it, or train without --lora.rank')
        _, split_in, split_out = (axis if axis == 'mp' else None for axis in spec.partition)
        return Adapter(
            WeightSpec(f'{spec.name}.a', (n, i, lora.rank), PartitionSpec(None, split_in, None), 'fan_in',
                       (N, into, 'R')),
            WeightSpec(f'{spec.name}.b', (n, lora.rank, o), PartitionSpec(None, None, split_out), 'zeros',
                       (N, 'R', out)))

    layers = Layer(**{field.name: adapter(getattr(specs.layers, field.name)) for field in dataclasses.fields(Layer)})
    return Llama(embedding=None, layers=layers, final_norm=None, head=None)


def adapted(base: Llama, adapters: Llama, lora: Lora, key: Array | None = None) -> Llama:
    """Join the weights and their adapters into what the network computes with; nothing is copied.

    key: of dropout, in training.
    """
    def join(name: str):
        weight, adapter = getattr(base.layers, name), getattr(adapters.layers, name)
        if adapter is None:
            return weight
        keys = None
        if key is not None and lora.dropout > 0:
            keys = jax.random.split(jax.random.fold_in(key, TARGETS.index(name)), adapter.a.shape[0])
        return Adapted(weight, adapter.a, adapter.b, keys, None, lora.scale, lora.dropout)

    layers = Layer(**{field.name: join(field.name) for field in dataclasses.fields(Layer)})
    return dataclasses.replace(base, layers=layers)


def adapted_partitions(config: LlamaConfig, lora: Lora) -> Llama:
    """Build the tree of PartitionSpecs of what `adapted` joins without a key."""
    adapters = jax.tree.map(lambda spec: spec.partition, adapter_specs(config, lora))
    return adapted(base_partitions(config, lora.base_dtype), adapters, lora)


def stacked(many: list[tuple[Llama, Lora]], config: LlamaConfig, mesh: Mesh) -> tuple[Llama, Lora]:
    """Join adapters of one base, whose rows in a batch then choose theirs (`with_rows`): (stacks, their Lora).

    Adapter 0 adapts nothing; those given are 1, 2, ..  A stack is [N, C, in, R] with the highest rank of all; lower
    ones are filled up with zeros, and each one's scale is multiplied into its B.
    """
    lora = Lora(rank := max(lora.rank for _, lora in many), rank,
                tuple(name for name in TARGETS if any(name in lora.targets for _, lora in many)))
    specs = adapter_specs(config, lora)

    def stack(name: str) -> Adapter | None:
        if (spec := getattr(specs.layers, name)) is None:
            return None
        a, b = (np.zeros((one.shape[0], len(many) + 1, *one.shape[1:]), np.float32) for one in (spec.a, spec.b))
        for i, (adapters, its) in enumerate(many, 1):
            if (one := getattr(adapters.layers, name)) is not None:
                a[:, i, :, :its.rank], b[:, i, :its.rank] = np.asarray(one.a), its.scale * np.asarray(one.b)
        lies = getattr(stacked_partitions(config, lora).layers, name)
        return Adapter(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((a, lies.a), (b, lies.b))))

    layers = Layer(**{field.name: stack(field.name) for field in dataclasses.fields(Layer)})
    return Llama(embedding=None, layers=layers, final_norm=None, head=None), lora


def stacked_partitions(config: LlamaConfig, lora: Lora) -> Llama:
    """Build the tree of PartitionSpecs of stacks: one dimension more than an adapter, not split."""
    return jax.tree.map(lambda spec: PartitionSpec(None, None, *spec.partition[1:]), adapter_specs(config, lora))


def with_rows(params: Llama, rows_B: Array) -> Llama:
    """Say which adapter each row of a batch has; params: `adapted` by stacks, or by none, which change nothing."""
    def say(w):
        return dataclasses.replace(w, rows_B=jnp.broadcast_to(rows_B, (w.a.shape[0], *rows_B.shape))
                                   ) if is_adapted(w) and w.a.ndim == 4 else w

    layers = Layer(**{field.name: say(getattr(params.layers, field.name)) for field in dataclasses.fields(Layer)})
    return dataclasses.replace(params, layers=layers)
