"""AdamW as the article ran it: one straight function on trees, float32 arithmetic on bfloat16 momentum.

Two optimizers share `optimizer.adamw_optimizer.*`, as in EasyLM (optimizers.py) over optax 0.1.7; n = 0, 1, ... counts
optimizer steps, t = n + 1:

  both        g = g * min(1, clip / |g|)        |g| over all weights          lr = schedule(n)

  AdamW (Loshchilov & Hutter, 1711.05101)       multiply_by_parameter_scale = False
              m = b1 m + (1 - b1) g             m̂ = m / (1 - b1^t)
              v = b2 v + (1 - b2) g²            v̂ = v / (1 - b2^t)
              p = p - lr (m̂ / (sqrt(v̂) + 1e-8) + weight_decay p)

  Adafactor without factoring (Shazeer & Stern, 1804.04235)      multiply_by_parameter_scale = True
              v = β v + (1 - β) (g² + 1e-30)    β = 1 - t^(-b2): b2 is an exponent here, and no bias is left to correct
              u = lr g / sqrt(v) * max(RMS(p), 1e-3)            RMS of one layer's matrix, before the update
              m = b1 m + (1 - b1) u             the average is over updates that already hold the learning rate
              p = p - m - lr weight_decay p

`optimizer.palm_optimizer.*` is the second one with the schedules of PaLM (Chowdhery et al., 2204.02311, section 5):

              lr = (lr / 0.01) / sqrt(max(n, warmup))         p = p - m - (weight_decay / 1e-4) lr² p

With layerwise_decay d, every lr above (in the weight decay too) is times a power of d for each weight: d^(N-1-i) for
layer i of N, d^N for the embedding (tied to the head or not), 1 for final norm and head (ELECTRA, 2003.10555).

With bf16_momentum, m is stored rounded to bfloat16 but used unrounded; b1 is rounded to bfloat16 (0.9 -> 0.8984375)
while its product with m is not (that is what XLA makes of optax's expression).  All weights decay, norms and embeddings
too.

Inside shard_map a leaf is a local shard: |g| and RMS(p) sum over the mesh axes that split the leaf, and count a
replicated leaf once.  Next: training/step.py.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mistake import Mistake
from model.partition import pytree
from model.weights import WeightSpec

f32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Hyperparameters, named and defaulted as EasyLM's `optimizer.adamw_optimizer.*` flags."""

    init_lr: float = 0.0
    lr: float = 0.01
    end_lr: float = 0.001
    lr_warmup_steps: int = 2000
    lr_decay_steps: int = 500000
    b1: float = 0.9
    b2: float = 0.95
    clip_gradient: float = 1.0
    weight_decay: float = 1e-4
    bf16_momentum: bool = False
    multiply_by_parameter_scale: bool = False
    layerwise_decay: float = 1.0

    def __post_init__(self):
        if self.lr_decay_steps <= self.lr_warmup_steps:
            raise Mistake(f'optimizer.adamw_optimizer.lr_decay_steps={self.lr_decay_steps} must '
                             f'exceed lr_warmup_steps={self.lr_warmup_steps}: it counts from step 0, warmup included')

    def schedule(self, n: jax.Array) -> jax.Array:
        """Compute the learning rate of step n: linear from init_lr to lr, then a cosine that ends at lr_decay_steps."""
        n, warmup = f32(n), self.lr_warmup_steps
        rising = (self.init_lr - self.lr) * (1 - n / max(warmup, 1)) + self.lr
        progress = jnp.minimum(n - warmup, self.lr_decay_steps - warmup) / (self.lr_decay_steps - warmup)
        end = self.end_lr / self.lr
        falling = self.lr * ((1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress)) + end)
        return jnp.where(n < warmup, rising, falling)

    def decay(self, n: jax.Array) -> jax.Array:
        """Compute the part of a weight that step n takes away."""
        return self.schedule(n) * self.weight_decay


@dataclasses.dataclass(frozen=True)
class Palm:
    """Hyperparameters, named and defaulted as EasyLM's `optimizer.palm_optimizer.*` flags."""

    lr: float = 0.01
    lr_warmup_steps: int = 10000
    b1: float = 0.9
    b2: float = 0.99
    clip_gradient: float = 1.0
    weight_decay: float = 1e-4
    bf16_momentum: bool = False
    multiply_by_parameter_scale = True  # no flag: it always does
    layerwise_decay = 1.0  # no flag: EasyLM's PaLM has none

    def schedule(self, n: jax.Array) -> jax.Array:
        """Compute the learning rate of optimizer step n: constant for the warmup, then falling as 1 / sqrt(n)."""
        return self.lr / 0.01 * lax.rsqrt(jnp.maximum(f32(n), self.lr_warmup_steps))

    def decay(self, n: jax.Array) -> jax.Array:
        """Compute the part of a weight that step n takes away."""
        return self.weight_decay / 1e-4 * self.schedule(n) ** 2


Hyperparameters = AdamW | Palm


@pytree
class OptimizerState:
    """count: optimizer steps done, int32; momentum (f32 or bf16) and second_moment (f32): trees like the weights."""

    count: jax.Array
    momentum: object
    second_moment: object


def init(params, hyper: Hyperparameters) -> OptimizerState:
    """Make the state before the first step: zeros."""
    momentum_dtype = jnp.bfloat16 if hyper.bf16_momentum else f32
    return OptimizerState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros_like(p, momentum_dtype), params),
                          jax.tree.map(jnp.zeros_like, params))


@jax.named_scope('optimizer')
def update(params, grads, state: OptimizerState, hyper: Hyperparameters, specs):
    """Do one optimizer step: (new params, new state).  All trees have the leaves of `specs`."""
    t, scheduled, decayed = f32(state.count + 1), hyper.schedule(state.count), hyper.decay(state.count)
    layers = max((spec.shape[0] for spec in jax.tree.leaves(specs) if spec.stacked), default=0)
    norm = global_norm(grads, specs)
    b1 = f32(jnp.bfloat16(hyper.b1)) if hyper.bf16_momentum else hyper.b1

    def leaf(p, g, m, v, spec: WeightSpec):
        lr, decay = scheduled, decayed
        if hyper.layerwise_decay != 1:
            factor = layer_factor(spec, layers, hyper.layerwise_decay)
            lr, decay = lr * factor, decay * factor
        g = jnp.where(norm < hyper.clip_gradient, g, g / norm * hyper.clip_gradient)
        if hyper.multiply_by_parameter_scale:
            beta = 1 - t ** -hyper.b2
            v = beta * v + (1 - beta) * (g * g + 1e-30)
            u = lr * (g * lax.rsqrt(v)) * jnp.maximum(root_mean_square(p, spec), 1e-3)
            m = b1 * f32(m) + (1 - hyper.b1) * u
            step = m + decay * p
        else:
            m = b1 * f32(m) + (1 - hyper.b1) * g
            v = hyper.b2 * v + (1 - hyper.b2) * g * g
            u = m / (1 - hyper.b1 ** t) / (jnp.sqrt(v / (1 - hyper.b2 ** t)) + 1e-8)
            step = lr * u + decay * p
        return p - step, m.astype(jnp.bfloat16 if hyper.bf16_momentum else f32), v

    trees = map(jax.tree.leaves, (params, grads, state.momentum, state.second_moment))
    p, m, v = zip(*(leaf(*arrays) for arrays in zip(*trees, jax.tree.leaves(specs), strict=True)), strict=True)
    unflatten = jax.tree.structure(params).unflatten
    return unflatten(p), OptimizerState(state.count + 1, unflatten(m), unflatten(v))


def layer_factor(spec: WeightSpec, layers: int, decay: float) -> np.ndarray | float:
    """Compute the factor of a weight's learning rate; of a stacked one for each layer, to broadcast against it."""
    if spec.stacked:
        powers = np.arange(layers - 1, -1, -1).reshape(-1, *[1] * (len(spec.shape) - 1))
        return np.float32(decay ** powers)
    return decay ** layers if spec.name == 'embedding' else 1.0


def global_norm(tree, specs) -> jax.Array:
    """Compute sqrt of the sum of squares over all devices, each weight once; one psum for each distinct set of axes."""
    by_axes: dict[tuple, list] = {}
    for x, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        by_axes.setdefault(spec.axes, []).append(jnp.sum(x * x))
    return jnp.sqrt(sum(lax.psum(sum(squares), axes) if axes else sum(squares) for axes, squares in by_axes.items()))


def root_mean_square(p, spec: WeightSpec) -> jax.Array:
    """Compute the RMS of the whole matrix, per layer where layers are stacked, shaped to broadcast against p."""
    dimensions = tuple(range(spec.stacked, p.ndim))
    squares = jnp.sum(p * p, axis=dimensions, keepdims=True)
    if spec.axes:
        squares = lax.psum(squares, spec.axes)
    return jnp.sqrt(squares / math.prod(spec.shape[spec.stacked:]))
