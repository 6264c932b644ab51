"""The network: LLaMA in pure JAX, written to run inside one `jax.shard_map` over ('dp', 'fsdp', 'mp').

    h = embedding[tokens]
    h = h + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rmsnorm(h)            N times
    h = h + W_down (silu(W_gate n) * W_up n),                 n = rmsnorm(h)
    logits = W_head rmsnorm(h)                                                          (model/loss.py)

Sources: LLaMA (arXiv 2302.13971), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467).
Letters: model/config.py; inside shard_map a suffix means the local shape.  Read next: model/loss.py, training/step.py.

Between blocks, activations are split over mp along the sequence ('B T/mp M') when T allows it, as in 2205.05198: a
block gathers them, computes its share of heads or columns, and its partial sums are reduce-scattered.  Decoding (one
token) keeps them whole and sums with psum.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from mistake import Mistake
from model import cache as kv_cache
from model.attention import attend, attend_cached
from model.config import Compute, LlamaConfig
from model.partition import all_gather, gather_weight, pytree, reduce_scatter, specs_of, weight

Array = jax.Array
DTYPES = {'fp32': jnp.float32, 'float32': jnp.float32, 'bf16': jnp.bfloat16, 'bfloat16': jnp.bfloat16,
          'fp16': jnp.float16, 'float16': jnp.float16}
REMAT_POLICIES = {  # what the backward pass finds saved of each layer, by EasyLM's names; '' keeps everything it needs
    'nothing_saveable': jax.checkpoint_policies.nothing_saveable,
    'checkpoint_dots': jax.checkpoint_policies.checkpoint_dots,
    'checkpoint_dots_with_no_batch_dims': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    'everything_saveable': jax.checkpoint_policies.everything_saveable,
}
SAVEABLE = {  # and ours, 'save:q,k,v': only the tensors of these names; elements a token and layer, on each mp device
    'attention_input': 'M',  # the gathered norm: not gathered again
    'q': 'HD/mp', 'k': 'KD/mp', 'v': 'KD/mp',  # heads, turned
    'o': 'HD/mp', 'statistics': '2 H/mp',  # of attention (log-sum-exp, float32): both, and its kernel runs once
    'middle': 'M/mp',  # h between attention and ffn: neither w_o's product nor its reduce-scatter again
    'ffn_input': 'M',
    'gate': 'F/mp', 'up': 'F/mp',
}


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


def weight_specs(config: LlamaConfig) -> Llama:
    """The Llama tree of WeightSpecs; head is None for tied embeddings."""
    specs = specs_of(Llama, config.letters)
    return Llama(**specs | dict(head=None) if config.tie_word_embeddings else specs)


def by_name(tree: Llama, config: LlamaConfig, prefix: str) -> dict:
    """Name the leaves of a tree shaped like the weights: {prefix + '.' + weight's name: leaf}, as checkpoints do."""
    specs = jax.tree.leaves(weight_specs(config))
    return {f'{prefix}.{spec.name}': leaf for spec, leaf in zip(specs, jax.tree.leaves(tree), strict=True)}


def partitions(config: LlamaConfig) -> Llama:
    """The Llama tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: spec.partition, weight_specs(config))


def abstract_params(config: LlamaConfig, mesh: Mesh) -> Llama:
    """The Llama tree of float32 ShapeDtypeStructs with shardings on `mesh`, which must divide the model."""
    check_divisible(config, mesh)
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=NamedSharding(mesh, spec.partition)),
        weight_specs(config))


def check_divisible(config: LlamaConfig, mesh: Mesh) -> None:
    """Raises Mistake naming the size and mesh axis when a weight cannot be split evenly, or a head would be cut."""
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
    """Random float32 weights, made where they live; the values depend on the seed alone, not on the mesh.

    Matrices are normal with standard deviation `initializer_range` (as EasyLM has it), norms are 1.
    """
    def init(spec, key):
        if spec.init == 'ones':
            return jnp.ones(spec.shape, jnp.float32)
        return config.initializer_range * jax.random.normal(key, spec.shape, jnp.float32)

    def init_all(key):
        specs, tree = jax.tree.flatten(weight_specs(config))
        return jax.tree.unflatten(tree, [init(spec, jax.random.fold_in(key, i)) for i, spec in enumerate(specs)])

    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    return jax.jit(init_all, out_shardings=shardings)(jax.random.key(seed))


# ---------------------------------------------------------------- forward


def hidden_states(params: Llama, tokens_BT: Array, segments_BT: Array, config: LlamaConfig, compute: Compute, *,
                  positions_BT: Array | None = None, cache: kv_cache.Cache | None = None):
    """The network up to the final norm: (h_BTM in the compute dtype, whole on every mp device; the updated cache).

    tokens, segments (0 = padding) and positions are int32 [B, T]; positions default to 0..T-1.  With a cache, the T
    tokens of row b are written to slots positions_BT[b, 0].. and attend to what the row already holds (segments are not
    used). Runs inside shard_map, on the local batch and the local shards of `params`.
    """
    B, T = tokens_BT.shape
    gather = gatherer(compute)
    split_sequence = cache is None and T % lax.axis_size('mp') == 0
    from_start = positions_BT is None
    if from_start:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    rope = rope_table(positions_BT, config)

    def attention(n_BTM, w, rope, cache, index):
        return attention_block(n_BTM, w, gather, rope, positions_BT, segments_BT, config, compute, cache, index,
                               from_start)

    def norm(h, weight_M):
        return rms_norm(h, gather(weight_M, 'M -> M', h), config)

    attention = rematerialized(attention, compute.remat_attention)
    ffn = rematerialized(lambda n_BTM, w: ffn_block(n_BTM, w, gather), compute.remat_mlp)

    def step(carry, layer_and_index):
        h, cache = carry
        w, index = layer_and_index
        with jax.named_scope('attention'):
            n_BTM = checkpoint_name(gather_sequence(norm(h, w.attention_norm), split_sequence), 'attention_input')
            partial_BTM, cache = attention(n_BTM, w, rope, cache, index)
            h = checkpoint_name(h + sum_partial(partial_BTM, split_sequence), 'middle')
        with jax.named_scope('ffn'):
            n_BTM = checkpoint_name(gather_sequence(norm(h, w.ffn_norm), split_sequence), 'ffn_input')
            h = h + sum_partial(ffn(n_BTM, w), split_sequence)
        return (h, cache), None

    h = embed(params.embedding, tokens_BT, gather, split_sequence)
    indices = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    (h, cache), _ = lax.scan(rematerialized(step, compute.remat_block), (h, cache), (params.layers, indices))
    return gather_sequence(norm(h, params.final_norm), split_sequence), cache


def gatherer(compute: Compute):
    """partition.gather_weight with the dtypes that `compute` names."""
    reduce_dtype = DTYPES[compute.reduce_gradients or compute.dtype]
    return functools.partial(gather_weight, dtype=DTYPES[compute.dtype], reduce_dtype=reduce_dtype)


def rematerialized(function, policy: str):
    """`function`, of whose insides the backward pass finds only what the policy saves."""
    return jax.checkpoint(function, policy=remat_policy(policy), prevent_cse=False) if policy else function


def remat_policy(policy: str):
    """What jax.checkpoint is told: a name of REMAT_POLICIES, or 'save:NAME,NAME' with names of SAVEABLE.

    Raises Mistake that lists them.
    """
    kind, _, names = policy.partition(':')
    if kind == 'save' and set(names.split(',')) <= set(SAVEABLE):
        return jax.checkpoint_policies.save_only_these_names(*names.split(','))
    if policy not in REMAT_POLICIES:
        raise Mistake(f'remat {policy=} is not known: one of {" ".join(REMAT_POLICIES)}, or save: and some of '
                         f'{",".join(SAVEABLE)}')
    return REMAT_POLICIES[policy]


def embed(embedding: Array, tokens_BT: Array, gather, split_sequence: bool) -> Array:
    """h_BTM, or its T/mp part: each mp device looks up the tokens of its own slice of the vocabulary."""
    embedding_VM = gather(embedding, 'V/mp M/fsdp -> V/mp M', tokens_BT)
    V = embedding_VM.shape[0]
    local_BT = tokens_BT - V * lax.axis_index('mp')
    mine_BT = (local_BT >= 0) & (local_BT < V)
    rows_BTM = jnp.where(mine_BT[..., None], embedding_VM[jnp.where(mine_BT, local_BT, 0)], 0)
    return sum_partial(rows_BTM, split_sequence)  # exactly one device holds a token's row, so the sum is that row


def attention_block(n_BTM, w: Layer, gather, rope, positions_BT, segments_BT, config, compute, cache, index,
                    from_start):
    """Attention over the local heads: partial sums of W_o's product (to be summed over mp), and the cache."""
    M, D = n_BTM.shape[2], config.head_dim
    w_q = gather(w.w_q, 'M/fsdp HD/mp -> M HD/mp', n_BTM)
    w_k, w_v = (kv_heads_of_this_device(gather(x, 'M/fsdp KD/mp -> M KD/mp', n_BTM), config) for x in (w.w_k, w.w_v))
    # an einsum to heads, not a product and a reshape: the TPU compiler then writes the kernel's layout straight away
    project = lambda w: jnp.einsum('BTM,MHD->BTHD', n_BTM, w.reshape(M, -1, D))
    q_BTHD = checkpoint_name(rotate(project(w_q), rope), 'q')
    k_BTKD = checkpoint_name(rotate(project(w_k), rope), 'k')
    v_BTKD = checkpoint_name(project(w_v), 'v')
    if cache is None:
        o_BTHD = attend(compute.attention, q_BTHD, k_BTKD, v_BTKD, segments_BT)
    else:
        cache = kv_cache.write(cache, index, positions_BT, k_BTKD, v_BTKD)
        o_BTHD = attend_cached(compute.attention, q_BTHD, k_BTKD, v_BTKD, cache, index, positions_BT, from_start)
    w_o = gather(w.w_o, 'HD/mp M/fsdp -> HD/mp M', n_BTM)
    return jnp.einsum('BTHD,HDM->BTM', o_BTHD, w_o.reshape(-1, D, M)), cache


def kv_heads_of_this_device(w_M_KD: Array, config: LlamaConfig) -> Array:
    """The columns of the key/value heads that this device's query heads read.

    With K >= mp they are its own shard.  With K < mp several devices share one head, of which each stores a piece: the
    pieces are gathered, and the shared head taken; the transpose sums the devices' gradients and gives each its piece
    back.
    """
    mp, K, D = lax.axis_size('mp'), config.num_key_value_heads, config.head_dim
    if K >= mp:
        return w_M_KD
    whole = all_gather(w_M_KD, 'M KD/mp -> M KD')
    return lax.dynamic_slice_in_dim(whole, lax.axis_index('mp') * K // mp * D, D, axis=1)


def ffn_block(n_BTM, w: Layer, gather) -> Array:
    """SwiGLU over the local columns: partial sums of W_down's product, to be summed over mp."""
    w_gate, w_up = (gather(x, 'M/fsdp F/mp -> M F/mp', n_BTM) for x in (w.w_gate, w.w_up))
    w_down = gather(w.w_down, 'F/mp M/fsdp -> F/mp M', n_BTM)
    gate_BTF, up_BTF = checkpoint_name(n_BTM @ w_gate, 'gate'), checkpoint_name(n_BTM @ w_up, 'up')
    return (jax.nn.silu(gate_BTF) * up_BTF) @ w_down


def gather_sequence(x: Array, split_sequence: bool) -> Array:
    return all_gather(x, 'B T/mp M -> B T M') if split_sequence else x


def sum_partial(x_BTM: Array, split_sequence: bool) -> Array:
    return reduce_scatter(x_BTM, 'B T M -> B T/mp M') if split_sequence else lax.psum(x_BTM, 'mp')


def rms_norm(x: Array, weight_M: Array, config: LlamaConfig) -> Array:
    """x / sqrt(mean(x²) + eps) * weight over the last of x's three dimensions: float32 inside, x's dtype out.

    weight_M: in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.rms_norm_eps)
    return x32.astype(x.dtype) * weight_M[None, None]


@functools.partial(jax.named_call, name='rope_table')
def rope_table(positions_BT: Array, config: LlamaConfig) -> tuple[Array, Array]:
    """cos and sin of position * frequency, float32 [B, T, 1, D/2].

    frequency_i = theta^(-2i/D).  With scaling (Llama 3), a wavelength that fits low_freq_factor times or less into the
    original context is stretched by `factor`, one that fits high_freq_factor times or more is kept, linear between.
    """
    D, scaling = config.head_dim, config.rope_scaling
    frequency = config.rope_theta ** (-jnp.arange(0, D, 2, dtype=jnp.float32)[None, None, None] / D)
    if scaling:
        wavelengths_in_context = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)
        keep = jnp.clip((wavelengths_in_context - scaling.low_freq_factor) /
                        (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHD: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary embedding in half-split order: coordinate i turns with i + D/2.  Float32 inside, x's dtype out."""
    cos, sin = rope
    x1, x2 = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTHD.dtype)
