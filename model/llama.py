"""The network: LLaMA in pure JAX, written to run inside one `jax.shard_map` over ('dp', 'fsdp', 'mp').

    h = embedding[tokens]
    h = h + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rmsnorm(h)            N times
    h = h + W_down (silu(W_gate n) * W_up n),                 n = rmsnorm(h)
    logits = W_head rmsnorm(h)                                                          (model/loss.py)

Sources: LLaMA (arXiv 2302.13971), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467).
Inside shard_map a suffix means the local shape (letters: model/config.py).  Before: weights.py; next: loss.py.

Between blocks, activations are split over mp along the sequence ('B T/mp M') when T allows it, as in 2205.05198: a
block gathers them, computes its share of heads or columns, and its partial sums are reduce-scattered.  Decoding (one
token) keeps them whole and sums with psum.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels.few_rows import as_many
from model import cache as kv_cache
from model.attention import attend, attend_cached
from model.config import Compute, LlamaConfig
from model.lora import Adapted, gather_matrix, is_adapted
from model.partition import DTYPES, all_gather, gather_weight, pytree, reduce_scatter, static
from model.quantized import Int8, is_quantized
from model.remat import rematerialized
from model.weights import Array, Layer, Llama


@pytree
class Pass:
    """Holds what all layers of one forward pass share.

    rope: cos and sin, `rope_table`.  positions_BT, segments_BT: int32 (segments None: one a row).  rows_B: which row of
    the cache each row of the batch is (None: its number).  split_sequence: activations between blocks are 'B T/mp M',
    not 'B T M'.  from_start: the tokens are the first T of their rows.
    """

    rope: tuple[Array, Array]
    positions_BT: Array
    segments_BT: Array | None
    rows_B: Array | None
    config: LlamaConfig = static()
    compute: Compute = static()
    split_sequence: bool = static()
    from_start: bool = static()


def hidden_states(params: Llama, tokens_BT: Array, segments_BT: Array | None, config: LlamaConfig, compute: Compute, *,
                  positions_BT: Array | None = None, cache: kv_cache.Cache | None = None,
                  rows_B: Array | None = None):
    """Compute the network up to the final norm: (h_BTM in the compute dtype, whole on every mp device; updated cache).

    tokens, segments (0 = padding) and positions are int32 [B, T]; positions default to 0..T-1.  With a cache, the T
    tokens of row b are written into its row rows_B[b] (None: b) from place positions_BT[b, 0] on, and attend to what
    that row holds then (segments are not used); rows may repeat, with tokens that follow each other.  Runs inside
    shard_map, on the local batch and the local shards of `params`.
    """
    B, T = tokens_BT.shape
    from_start = positions_BT is None
    if from_start:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    run = Pass(rope_table(positions_BT, config), positions_BT, segments_BT, rows_B, config, compute,
               split_sequence=cache is None and T % lax.axis_size('mp') == 0, from_start=from_start)

    def step(carry, weights_and_index):
        return layer(*carry, *weights_and_index, run), None

    h = embed(params.embedding, tokens_BT, run)
    indices = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    (h, cache), _ = lax.scan(rematerialized(step, compute.remat_block), (h, cache), (params.layers, indices))
    return gather_sequence(rms_norm(h, params.final_norm, run), run), cache


def layer(h: Array, cache: kv_cache.Cache | None, w: Layer, index: Array, run: Pass):
    """Add attention and ffn of layer `index` to the residual stream h, 'B T/mp M' or 'B T M': (h, cache)."""
    with jax.named_scope('attention'):
        n_BTM = checkpoint_name(gather_sequence(rms_norm(h, w.attention_norm, run), run), 'attention_input')
        attention_of = rematerialized(attention, run.compute.remat_attention)
        partial_BTM, cache = attention_of(n_BTM, w, cache, index, run)
        h = checkpoint_name(h + sum_partial(partial_BTM, run), 'middle')
    with jax.named_scope('ffn'):
        n_BTM = checkpoint_name(gather_sequence(rms_norm(h, w.ffn_norm, run), run), 'ffn_input')
        partial_BTM = rematerialized(ffn, run.compute.remat_mlp)(n_BTM, w, run)
        return h + sum_partial(partial_BTM, run), cache


def attention(n_BTM: Array, w: Layer, cache: kv_cache.Cache | None, index: Array, run: Pass):
    """Attend over the local heads: (partial sums of W_o's product, to be summed over mp; the cache)."""
    D = run.config.head_dim
    w_q = gather_matrix(w.w_q, 'M/fsdp HD/mp -> M HD/mp', n_BTM, run.compute)
    w_k, w_v = (kv_heads_of_this_device(gather_matrix(x, 'M/fsdp KD/mp -> M KD/mp', n_BTM, run.compute), run.config)
                for x in (w.w_k, w.w_v))
    with jax.named_scope('qkv'):  # einsums to heads: the TPU compiler then writes the kernel's layout straight away
        q_BTHD, k_BTKD, v_BTKD = to_heads(n_BTM, w_q, D), to_heads(n_BTM, w_k, D), to_heads(n_BTM, w_v, D)
        v_BTKD = checkpoint_name(v_BTKD, 'v')
    with jax.named_scope('rope'):
        q_BTHD, k_BTKD = checkpoint_name(rotate(q_BTHD, run.rope), 'q'), checkpoint_name(rotate(k_BTKD, run.rope), 'k')
    if cache is None:
        o_BTHD = attend(run.compute.attention, q_BTHD, k_BTKD, v_BTKD, run.segments_BT)
    else:
        cache = kv_cache.write(cache, index, run.rows_B, run.positions_BT[:, 0], k_BTKD, v_BTKD)
        o_BTHD = attend_cached(run.compute.attention, q_BTHD, k_BTKD, v_BTKD, cache, index, run.rows_B,
                               run.positions_BT, run.from_start)
    w_o = gather_matrix(w.w_o, 'HD/mp M/fsdp -> HD/mp M', n_BTM, run.compute)
    with jax.named_scope('out'):
        return from_heads(o_BTHD, w_o), cache


def to_heads(n_BTM: Array, w: Array | Int8 | Adapted, D: int) -> Array:
    """Multiply with a weight whose columns are heads side by side: [B, T, heads, D]."""
    if is_adapted(w):
        return to_heads(n_BTM, w.base, D) + w.delta(n_BTM).reshape(*n_BTM.shape[:2], -1, D)
    if is_quantized(w):
        return (n_BTM @ w).reshape(*n_BTM.shape[:2], -1, D)
    return jnp.einsum('BTM,MHD->BTHD', n_BTM, w.reshape(n_BTM.shape[2], -1, D))


def from_heads(o_BTHD: Array, w: Array | Int8 | Adapted) -> Array:
    """Multiply with a weight whose rows are heads one under the other: [B, T, M]."""
    if is_adapted(w):
        return from_heads(o_BTHD, w.base) + w.delta(o_BTHD.reshape(*o_BTHD.shape[:2], -1))
    if is_quantized(w):
        return o_BTHD.reshape(*o_BTHD.shape[:2], -1) @ w
    return jnp.einsum('BTHD,HDM->BTM', o_BTHD, w.reshape(*o_BTHD.shape[2:], -1))


def ffn(n_BTM: Array, w: Layer, run: Pass) -> Array:
    """Compute SwiGLU over the local columns: partial sums of W_down's product, to be summed over mp."""
    w_gate, w_up = (gather_matrix(x, 'M/fsdp F/mp -> M F/mp', n_BTM, run.compute) for x in (w.w_gate, w.w_up))
    w_down = gather_matrix(w.w_down, 'F/mp M/fsdp -> F/mp M', n_BTM, run.compute)
    with jax.named_scope('gate_up'):
        gate_BTF, up_BTF = checkpoint_name(n_BTM @ w_gate, 'gate'), checkpoint_name(n_BTM @ w_up, 'up')
    with jax.named_scope('down'):
        return (jax.nn.silu(gate_BTF) * up_BTF) @ w_down


def embed(embedding: Array, tokens_BT: Array, run: Pass) -> Array:
    """Look up tokens, each mp device those of its own slice of the vocabulary: h_BTM, or its T/mp part."""
    dtype = DTYPES[run.compute.dtype]
    # a server's bfloat16 weights in float32 computing: a few rows are cast, not the table
    narrow = not is_quantized(embedding) and embedding.dtype.itemsize < jnp.dtype(dtype).itemsize
    embedding_VM = gather_matrix(embedding, 'V/mp M/fsdp -> V/mp M', tokens_BT,
                                 dataclasses.replace(run.compute, dtype='bf16') if narrow else run.compute)
    V = embedding_VM.shape[0]
    local_BT = tokens_BT - V * lax.axis_index('mp')
    mine_BT = (local_BT >= 0) & (local_BT < V)
    local_BT = jnp.where(mine_BT, local_BT, 0)
    rows_BTM = embedding_VM.rows(local_BT) if is_quantized(embedding_VM) else embedding_VM[local_BT]
    rows_BTM = jnp.where(mine_BT[..., None], rows_BTM.astype(dtype), 0)
    return sum_partial(rows_BTM, run)  # exactly one device holds a token's row, so the sum is that row


def kv_heads_of_this_device(w_M_KD: Array | Int8 | Adapted, config: LlamaConfig) -> Array | Int8 | Adapted:
    """Take the columns of the key/value heads that this device's query heads read.

    With K >= mp they are its own shard.  With K < mp several devices share one head, of which each stores a piece: the
    pieces are gathered, and the shared head taken; the transpose sums the devices' gradients and gives each its piece
    back.
    """
    mp, K, D = lax.axis_size('mp'), config.num_key_value_heads, config.head_dim
    if K >= mp:
        return w_M_KD
    if is_adapted(w_M_KD):
        base, b = (kv_heads_of_this_device(x, config) for x in (w_M_KD.base, w_M_KD.b))
        return dataclasses.replace(w_M_KD, base=base, b=b)

    def take(x):
        whole = lax.all_gather(x, 'mp', axis=x.ndim - 1, tiled=True)
        return lax.dynamic_slice_in_dim(whole, lax.axis_index('mp') * K // mp * D, D, axis=x.ndim - 1)

    return jax.tree.map(take, w_M_KD)


def gather_sequence(x: Array, run: Pass) -> Array:
    """All-gather T over mp before a block, where activations are split."""
    return all_gather(x, 'B T/mp M -> B T M') if run.split_sequence else x


def sum_partial(x_BTM: Array, run: Pass) -> Array:
    """Sum a block's partial results over mp, each device keeping its part of T where activations are split."""
    return reduce_scatter(x_BTM, 'B T M -> B T/mp M') if run.split_sequence else lax.psum(x_BTM, 'mp')


def rms_norm(x: Array, weight_M: Array, run: Pass) -> Array:
    """Compute x / sqrt(mean(x²) + eps) * weight over x's last dimension: float32 inside, x's dtype out."""
    weight_M = gather_weight(weight_M, 'M -> M', x, run.compute)

    def normalized(x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + run.config.rms_norm_eps)
        return x32.astype(x.dtype)

    return (as_many(normalized, x) if x.shape[1] == 1 else normalized(x)) * weight_M[None, None]


@functools.partial(jax.named_call, name='rope_table')
def rope_table(positions_BT: Array, config: LlamaConfig) -> tuple[Array, Array]:
    """Compute cos and sin of position * frequency, float32 [B, T, 1, D/2].

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
    """Turn coordinate i with i + D/2 (rotary embedding, half-split order): float32 inside, x's dtype out."""
    cos, sin = rope
    x1, x2 = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTHD.dtype)
