"""Weights as int8: each output channel a float32 factor times whole numbers from -127 to 127.

    y[o] = f[o] a Σ_i round(x[i] / a) q[i, o],  a = max_i |x[i]| / 127,  q = round(w / f),  f[o] = max_i |w[i, o]| / 127

Activations are quantized a token at a time as they come, so that the product is one of int8 with int32 sums: exact, in
whatever order and batch it is computed.  (Per-channel weights with dynamic activations: arXiv 2004.09602.)  A quarter
of float32's bytes are read for each token; what it costs in accuracy: docs/SERVING.md.  That is how they serve; as the
frozen base of adapters they are `weight_only`: x stays as it is, since what rounds it has no gradient.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from model.config import Compute, LlamaConfig
from model.partition import DTYPES, all_gather, gather_weight, pytree
from model.weights import Llama, WeightSpec, partitions, weight_specs

Array = jax.Array
STEP = np.float32(1 / 127)  # XLA divides by a constant so, under jit alone; numpy shall find the same bits


@pytree
class Int8:
    """A quantized matrix, [..., in, out], or [out, in] of embedding and head; `x @ w` works for it as for an array."""

    values: Array  # int8
    factors: Array  # float32 [..., out]
    weight_only: bool = dataclasses.field(default=False, metadata=dict(static=True))  # widened before each product

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __rmatmul__(self, x: Array) -> Array:
        """Multiply x[..., in] with [in, out]: float32 sums scaled back, in x's dtype."""
        return self._product(x, 0).astype(x.dtype)

    def logits(self, h_BPM: Array) -> Array:
        """Multiply h with the rows of a head [V, M]: z_BPV float32."""
        return self._product(h_BPM, 1)

    def _product(self, x: Array, contracted: int) -> Array:
        x = x.astype(jnp.float32)
        factor = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True) / 127, 1e-30)
        whole = jnp.round(x / factor).astype(jnp.int8)
        sums = jax.lax.dot_general(whole, self.values, (((x.ndim - 1,), (contracted,)), ((), ())),
                                   preferred_element_type=jnp.int32)
        factors = self.factors.reshape((1,) * (x.ndim - 1) + (-1,))
        return sums.astype(jnp.float32) * factor * factors

    def rows(self, index: Array) -> Array:
        """Look up rows of an embedding [V, M]: float32."""
        return self.values[index].astype(jnp.float32) * self.factors[index][..., None]


def is_quantized(x) -> bool:
    return isinstance(x, Int8)


def gather_matrix(w: Array | Int8, rewrite: str, x: Array, compute: Compute) -> Array | Int8:
    """Gather a matrix as `gather_weight` does; a quantized one stays so, and has no gradients.  One of weights only is
    widened to the compute dtype once it is there.
    """
    if not is_quantized(w):
        return gather_weight(w, rewrite, x, compute)
    before, after = (side.split() for side in rewrite.split(' -> '))
    out = 1 if 'V/mp' not in before else 0  # [in, out], but [out, in] of embedding and head
    values = all_gather(w.values, rewrite) if before != after else w.values
    factors = w.factors if before[out] == after[out] else all_gather(w.factors, f'{before[out]} -> {after[out]}')
    if w.weight_only:
        return (values * factors[None]).astype(DTYPES[compute.dtype])
    return Int8(values, factors)


def _input_axis(spec: WeightSpec) -> int:
    """Say which axis of a matrix is summed over: the last but one of a layer's, the last of embedding and head."""
    return -2 if spec.stacked else -1


def quantize(params: Llama, config: LlamaConfig, weight_only: bool = False) -> Llama:
    """Turn matrices into Int8, norms stay as they are.  Under jit, with shardings of `quantized_partitions`.

    weight_only: those of the layers alone, as the frozen base of adapters (model/lora.py); embedding and head become
    bfloat16.
    """
    def turn(spec: WeightSpec, w):
        if spec.init == 'ones':
            return w
        if weight_only and not spec.stacked:
            return w.astype(jnp.bfloat16)
        axis, w = _input_axis(spec), w.astype(jnp.float32)
        factors = jnp.abs(w).max(axis=axis) * STEP
        whole = jnp.round(w / jnp.maximum(jnp.expand_dims(factors, axis), 1e-30)).astype(jnp.int8)
        return Int8(whole, factors, weight_only)

    return jax.tree.map(turn, weight_specs(config), params)


def rounded_columns(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn one matrix [in, out] on the host into (factors [out] float32, whole numbers [in, out] int8), the bits of
    `quantize`.
    """
    w = w.astype(np.float32, copy=False)
    factors = np.abs(np.maximum(w.max(axis=0), -w.min(axis=0))) * STEP  # |w| would be another w
    whole = w / np.maximum(factors, np.float32(1e-30))
    return factors, np.rint(whole, out=whole).astype(np.int8)


def quantized_partitions(config: LlamaConfig, weight_only: bool = False) -> Llama:
    """Build the Llama tree of PartitionSpecs of quantized weights."""
    def turn(spec: WeightSpec, partition):
        if spec.init == 'ones' or weight_only and not spec.stacked:
            return partition
        axes = list(partition)
        del axes[_input_axis(spec)]
        return Int8(partition, type(partition)(*axes), weight_only)

    return jax.tree.map(turn, weight_specs(config), partitions(config))
