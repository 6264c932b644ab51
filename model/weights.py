"""The weights: one line each.  Before: the letters of model/config.py.  Next: model/llama.py.

`w_q: Array = weight('N M/fsdp HD/mp')` is the only place that states a weight's shape (in letters), its sharding (the
mesh axis behind the slash) and its initialiser.  Initialisation, PartitionSpecs, checkpoint names, shape checks and the
optimizer's statistics per layer derive from it.  Layers are stacked along N.
"""
import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mistake import Mistake
from model.config import LlamaConfig
from model.partition import pytree

Array = jax.Array


def weight(line: str, init: str = 'normal'):
    """Declare a weight: 'letters/axis' of each dimension, and its initialiser."""
    return dataclasses.field(metadata=dict(line=line, init=init))


@pytree
class Layer:
    attention_norm: Array = weight('N M', init='ones')
    w_q: Array = weight('N M/fsdp HD/mp')
    w_k: Array = weight('N M/fsdp KD/mp')
    w_v: Array = weight('N M/fsdp KD/mp')
    w_o: Array = weight('N HD/mp M/fsdp')
    ffn_norm: Array = weight('N M', init='ones')
    w_gate: Array = weight('N M/fsdp F/mp')
    w_up: Array = weight('N M/fsdp F/mp')
    w_down: Array = weight('N F/mp M/fsdp')


@pytree
class Llama:
    embedding: Array = weight('V/mp M/fsdp')
    layers: Layer
    final_norm: Array = weight('M', init='ones')
    head: Array | None = weight('V/mp M/fsdp')  # None when the embedding serves as head too


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight: name ('layers.w_q'), global shape, partition, init (a name of `initial`), letters of the shape.

    stacked: the leading axis counts layers, so statistics of "the matrix" are per slice of it.  A leaf to JAX.
    """

    name: str
    shape: tuple[int, ...]
    partition: PartitionSpec
    init: str
    letters: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.letters[0] == 'N'

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that split this weight; over the others it is replicated."""
        return tuple(axis for axis in self.partition if axis)


def weight_specs(config: LlamaConfig) -> Llama:
    """Read the lines: the Llama tree of WeightSpecs; head is None for tied embeddings."""
    specs = _specs_of(Llama, config.letters)
    return Llama(**specs | dict(head=None) if config.tie_word_embeddings else specs)


def _specs_of(cls, letters: dict[str, int], prefix: str = '') -> dict:
    """{field: WeightSpec, or the same for a nested class} of a class whose fields are `weight` lines."""
    specs = {}
    for field in dataclasses.fields(cls):
        if 'line' not in field.metadata:
            specs[field.name] = field.type(**_specs_of(field.type, letters, f'{prefix}{field.name}.'))
            continue
        names, axes = zip(*((dim + '/').split('/')[:2] for dim in field.metadata['line'].split()), strict=True)
        specs[field.name] = WeightSpec(prefix + field.name, tuple(letters[name] for name in names),
                                       PartitionSpec(*(axis or None for axis in axes)), field.metadata['init'], names)
    return specs


def by_name(tree: Llama, config: LlamaConfig, prefix: str) -> dict:
    """Name the leaves of a tree shaped like the weights: {prefix + '.' + weight's name: leaf}."""
    specs = jax.tree.leaves(weight_specs(config))
    return {f'{prefix}.{spec.name}': leaf for spec, leaf in zip(specs, jax.tree.leaves(tree), strict=True)}


def partitions(config: LlamaConfig) -> Llama:
    """Build the Llama tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: spec.partition, weight_specs(config))


def abstract_params(config: LlamaConfig, mesh: Mesh, dtype=jnp.float32) -> Llama:
    """Build the Llama tree of ShapeDtypeStructs with shardings on `mesh`, which must divide the model."""
    check_divisible(config, mesh)
    return abstract(weight_specs(config), mesh, dtype)


def abstract(specs, mesh: Mesh, dtype=jnp.float32):
    """Build the ShapeDtypeStructs, with shardings on `mesh`, of a tree of WeightSpecs."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=NamedSharding(mesh, spec.partition)), specs)


def check_divisible(config: LlamaConfig, mesh: Mesh) -> None:
    """Raise Mistake naming the size and mesh axis when a weight cannot be split evenly, or a head would be cut."""
    mp, heads, kv_heads = mesh.shape['mp'], config.num_attention_heads, config.num_key_value_heads
    if heads % mp or (kv_heads % mp and mp % kv_heads):
        raise Mistake(f'num_attention_heads={heads} and num_key_value_heads={kv_heads} cannot be split over {mp=}: '
                      'choose a --mesh_dim whose mp divides the query heads, and the others (or they divide it)')
    for spec in jax.tree.leaves(weight_specs(config)):
        for letter, size, axis in zip(spec.letters, spec.shape, spec.partition, strict=True):
            if axis and size % mesh.shape[axis]:
                raise Mistake(f'{spec.name}: {letter}={size} is not divisible by {axis}={mesh.shape[axis]}; '
                              'choose another --mesh_dim')


def init_params(config: LlamaConfig, mesh: Mesh, seed: int) -> Llama:
    """Make random float32 weights where they live: matrices normal with standard deviation `initializer_range` (as
    EasyLM has it), norms 1.
    """
    check_divisible(config, mesh)
    return init_weights(weight_specs(config), mesh, seed, config.initializer_range)


def init_weights(specs, mesh: Mesh, seed: int, initializer_range: float):
    """Make the float32 arrays of a tree of WeightSpecs where they live.

    A weight's values follow from the seed and its name: not from the mesh, nor from what other weights there are.
    """
    init_all = jax.jit(lambda key: jax.tree.map(lambda spec: initial(spec, key, initializer_range), specs),
                       out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec.partition), specs))
    return init_all(jax.random.key(seed))


def initial(spec: WeightSpec, key: Array, initializer_range: float) -> Array:
    """Draw one weight by its init: 'normal', 'fan_in' (uniform in ±1/sqrt(rows of the matrix)), 'ones' or 'zeros'."""
    if spec.init in ('ones', 'zeros'):
        return jnp.full(spec.shape, float(spec.init == 'ones'), jnp.float32)
    key = jax.random.fold_in(key, zlib.crc32(spec.name.encode()))
    if spec.init == 'fan_in':
        bound = 1 / math.sqrt(spec.shape[-2])
        return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)
    return initializer_range * jax.random.normal(key, spec.shape, jnp.float32)
