"""From hidden states to logits, cross entropy and accuracy, with the vocabulary split over mp.  Before: model/llama.py.

    z = head h,   lse = log sum_v exp(z_v),   nll = lse - z_target               (float32 from the product on)
    dz = (exp(z - lse) - onehot(target)) dnll,   dh = headᵀ dz,   dhead = dz hᵀ

With label smoothing e the target is 1 - e of itself and e / V of every token (arXiv 1512.00567):

    nll = lse - (1 - e) z_target - e mean_v z_v,   dz = (exp(z - lse) - (1 - e) onehot(target) - e / V) dnll

Logits exist only for positions that ask for them, and of those only for a chunk of the vocabulary at a time: the
forward pass keeps a running maximum and sum, the backward pass, written out below, keeps lse alone and computes a
chunk's logits again.  (Vocabulary over devices: Megatron-LM, arXiv 1909.08053; running sum: 1805.02867.)
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from model.config import Compute
from model.partition import all_gather, varies, varying
from model.quantized import Int8, gather_matrix, is_quantized
from model.weights import Array, Llama

NARROW_CHUNKS = 16  # of the vocabulary, where the head is cast as it is used
CHUNK_ELEMENTS = 1 << 25  # float32 logits of one chunk on one device: 128 MB


def logits(params: Llama, h_BPM: Array) -> Array:
    """Compute z_BPV float32, V being this mp device's slice of the vocabulary."""
    head = _head(params)
    if is_quantized(head) or head.dtype == h_BPM.dtype or head.shape[0] % NARROW_CHUNKS:
        return _logits(_whole_head(params, h_BPM), h_BPM)
    # a server's bfloat16 weights in float32 computing: cast in the processor's cache, part after part of the vocabulary
    head_VM = all_gather(head, 'V/mp M/fsdp -> V/mp M')
    _, z_NBPC = lax.scan(lambda _, rows_CM: (None, _logits(rows_CM.astype(h_BPM.dtype), h_BPM)), None,
                         head_VM.reshape(NARROW_CHUNKS, -1, head_VM.shape[1]))
    return z_NBPC.transpose(1, 2, 0, 3).reshape(*h_BPM.shape[:2], -1)


def token_cross_entropy(params: Llama, h_BPM: Array, targets_BP: Array, compute: Compute) -> tuple[Array, Array]:
    """Compute (nll_BP float32, correct_BP bool): minus each target's log-likelihood, and whether it is the likeliest.

    h_BPM is whole on every mp device; the results are too.  The targets are smoothed by compute.label_smoothing.
    """
    head_VM = gather_matrix(_head(params), 'V/mp M/fsdp -> V/mp M', h_BPM, compute)
    h_BPM = varying(h_BPM, ('mp',))  # the gradients of h are summed over mp
    return cross_entropy(head_VM, h_BPM, targets_BP, compute.label_smoothing)


def _head(params: Llama) -> Array:
    return params.embedding if params.head is None else params.head


def _whole_head(params: Llama, h_BPM: Array) -> Array | Int8:
    """Gather this mp device's rows of the head, in h's dtype or quantized; no gradients."""
    head = _head(params)
    if is_quantized(head):
        return gather_matrix(head, 'V/mp M/fsdp -> V/mp M', h_BPM, Compute())
    return all_gather(head.astype(h_BPM.dtype), 'V/mp M/fsdp -> V/mp M')


def _logits(head_VM, h_BPM):
    if is_quantized(head_VM):
        return head_VM.logits(h_BPM)
    return jnp.einsum('BPM,VM->BPV', h_BPM, head_VM, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(head_VM: Array, h_BPM: Array, targets_BP: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
    """Compute `token_cross_entropy` from this device's rows of the head."""
    return cross_entropy_forward(head_VM, h_BPM, targets_BP, smoothing)[0]


def cross_entropy_forward(head_VM, h_BPM, targets_BP, smoothing):
    """Run the forward pass: ((nll_BP, correct_BP), what the backward pass keeps)."""
    local_BP = targets_BP - head_VM.shape[0] * lax.axis_index('mp')  # counted from this device's first row

    def chunk(carry, rows_CM, first, seen):
        max_BP, total_BP, z_target_BP, *z_sum_BP = carry  # the last only where it is wanted
        C = rows_CM.shape[0]
        z_BPC = jnp.where(jnp.arange(C)[None, None] >= seen, _logits(rows_CM, h_BPM), -jnp.inf)
        new_max_BP = jnp.maximum(max_BP, z_BPC.max(axis=-1))
        total_BP = total_BP * jnp.exp(max_BP - new_max_BP) + jnp.exp(z_BPC - new_max_BP[..., None]).sum(axis=-1)
        index_BP = local_BP - first
        mine_BP = (index_BP >= seen) & (index_BP < C)
        found_BP = jnp.take_along_axis(z_BPC, jnp.where(mine_BP, index_BP, 0)[..., None], axis=-1)[..., 0]
        if smoothing:
            z_sum_BP = [z_sum_BP[0] + jnp.where(jnp.arange(C)[None, None] >= seen, z_BPC, 0).sum(axis=-1)]
        return new_max_BP, total_BP, jnp.where(mine_BP, found_BP, z_target_BP), *z_sum_BP

    zero_BP = varying(jnp.zeros(targets_BP.shape, jnp.float32), varies(h_BPM))
    max_BP, total_BP, z_target_BP, *z_sum_BP = _over_chunks(
        chunk, (zero_BP - jnp.inf, zero_BP, zero_BP, *[zero_BP] * bool(smoothing)), head_VM, zero_BP.size)
    z_max_BP = lax.pmax(max_BP, 'mp')
    lse_BP = jnp.log(lax.psum(total_BP * jnp.exp(max_BP - z_max_BP), 'mp')) + z_max_BP
    z_target_BP = lax.psum(z_target_BP, 'mp')  # one device holds the target's logit, the others add 0
    nll_BP, correct_BP = lse_BP - z_target_BP, z_target_BP >= z_max_BP
    if smoothing:
        z_mean_BP = lax.psum(z_sum_BP[0], 'mp') / (head_VM.shape[0] * lax.axis_size('mp'))
        nll_BP += smoothing * (z_target_BP - z_mean_BP)
    return (nll_BP, correct_BP), (head_VM, h_BPM, local_BP, lse_BP)


def cross_entropy_backward(smoothing, saved, gradients):
    """Run the backward pass: gradients of head_VM and h_BPM, from logits computed again."""
    head_VM, h_BPM, local_BP, lse_BP = saved
    dnll_BP, _ = gradients

    def chunk(carry, rows_CM, first, seen):
        dhead_VM, dh_BPM = carry
        C = rows_CM.shape[0]
        target_BPC = jax.nn.one_hot(local_BP - first, C)  # all zeros where it is another chunk's
        if smoothing:
            target_BPC = (1 - smoothing) * target_BPC + smoothing / (head_VM.shape[0] * lax.axis_size('mp'))
        dz_BPC = (jnp.exp(_logits(rows_CM, h_BPM) - lse_BP[..., None]) - target_BPC) * dnll_BP[..., None]
        dz_BPC = dz_BPC.astype(h_BPM.dtype)
        dhead_CM = jnp.einsum('BPC,BPM->CM', dz_BPC, h_BPM)
        rows_CM = jnp.where(jnp.arange(C)[:, None] >= seen, rows_CM, 0)
        dh_BPM += jnp.einsum('BPC,CM->BPM', dz_BPC, rows_CM, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(dhead_VM, dhead_CM, first, axis=0), dh_BPM

    zeros = jnp.zeros_like(head_VM), jnp.zeros_like(h_BPM, jnp.float32)
    dhead_VM, dh_BPM = _over_chunks(chunk, zeros, head_VM, local_BP.size)
    return dhead_VM, dh_BPM.astype(h_BPM.dtype), None


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)


def _over_chunks(chunk, carry, head_VM, positions: int):
    """Run carry = chunk(carry, rows_CM, first, seen) over the head, C rows at a time, C * positions <= CHUNK_ELEMENTS.

    first: number of the first row; seen: how many of these rows the previous chunk already covered (the last chunk
    begins early, to be as long as the others).
    """
    V = head_VM.shape[0]
    count = -(-V * positions // CHUNK_ELEMENTS)
    size = -(-V // count)
    if count == 1:
        return chunk(carry, head_VM, 0, 0)

    def body(i, carry):
        first = jnp.minimum(i * size, V - size)
        rows_CM = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size), head_VM)
        return chunk(carry, rows_CM, first, i * size - first)

    return lax.fori_loop(0, count, body, carry)


def row_mean_loss(nll_BP, correct_BP, mask_BP, row_weight_B) -> tuple[Array, Array]:
    """Average to EasyLM's (loss, accuracy): the mean over all devices' rows of each row's mean over its targets.

    A row without targets contributes 0 and counts (EasyLM); a row of weight 0 is padding and does not.
    Float32 scalars, equal on every device.
    """
    targets_B = jnp.maximum(mask_BP.sum(axis=-1), 1e-10)
    rows = lax.psum(row_weight_B.sum(), ('dp', 'fsdp'))
    row_mean = lambda x_BP: (x_BP * mask_BP).sum(axis=-1) / targets_B
    mean = lambda x_BP: lax.psum((row_mean(x_BP) * row_weight_B).sum(), ('dp', 'fsdp')) / rows
    return mean(nll_BP), mean(correct_BP.astype(jnp.float32))


def shared_loss(nll_BP, correct_BP, share_BP) -> tuple[Array, Array]:
    """Sum to (loss, accuracy) by each target's share in the mean, over all devices' rows; scalars as above."""
    mean = lambda x_BP: lax.psum((x_BP * share_BP).sum(), ('dp', 'fsdp'))
    return mean(nll_BP), mean(correct_BP.astype(jnp.float32))
