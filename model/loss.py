"""From hidden states to logits, cross entropy and accuracy, with the vocabulary split over mp.  Before: model/llama.py.

    nll = log sum_v exp(z_v) - z_target,   z = head h          (float32 from the product on)

Logits exist only for positions that ask for them, and of those only a chunk at a time; the backward pass computes a
chunk again rather than keep it.
"""
import jax
import jax.numpy as jnp
from jax import lax

from model.llama import Array, Llama
from model.partition import all_gather

CHUNK_ELEMENTS = 1 << 26  # float32 logits of one chunk on one device: at most 256 MB


def head_weights(params: Llama, dtype) -> Array:
    """head_VM (V local to this mp device): the head, or the embedding where they are tied."""
    head = params.embedding if params.head is None else params.head
    return all_gather(head.astype(dtype), 'V/mp M/fsdp -> V/mp M')


def logits(params: Llama, h_BPM: Array) -> Array:
    """z_BPV float32, V being this mp device's slice of the vocabulary."""
    return jnp.einsum('BPM,VM->BPV', h_BPM, head_weights(params, h_BPM.dtype), preferred_element_type=jnp.float32)


def token_cross_entropy(params: Llama, h_BPM: Array, targets_BP: Array) -> tuple[Array, Array]:
    """(nll_BP float32, correct_BP bool): minus each target's log-likelihood, and whether it is the likeliest token.

    h_BPM is whole on every mp device; the results are too.  P is walked in equal chunks of at most CHUNK_ELEMENTS
    logits.
    """
    head_VM = head_weights(params, h_BPM.dtype)
    B, P, _ = h_BPM.shape
    fits = lambda n: P % n == 0 and B * P // n * head_VM.shape[0] <= CHUNK_ELEMENTS
    chunks = next(filter(fits, range(1, P)), P)
    if chunks == 1:
        return _chunk_cross_entropy(head_VM, h_BPM, targets_BP)
    split = lambda x: x.reshape(B, chunks, P // chunks, *x.shape[2:]).swapaxes(0, 1)
    one = jax.checkpoint(lambda x: _chunk_cross_entropy(head_VM, *x), prevent_cse=False)
    nll, correct = lax.map(one, (split(h_BPM), split(targets_BP)))
    return nll.swapaxes(0, 1).reshape(B, P), correct.swapaxes(0, 1).reshape(B, P)


def _chunk_cross_entropy(head_VM, h_BPM, targets_BP):
    z_BPV = jnp.einsum('BPM,VM->BPV', h_BPM, head_VM, preferred_element_type=jnp.float32)
    V = head_VM.shape[0]
    local_BP = targets_BP - V * lax.axis_index('mp')
    mine_BP = (local_BP >= 0) & (local_BP < V)
    z_target = jnp.take_along_axis(z_BPV, jnp.where(mine_BP, local_BP, 0)[..., None], axis=-1)[..., 0]
    z_target_BP = lax.psum(jnp.where(mine_BP, z_target, 0), 'mp')  # one device holds the target's logit, others add 0
    z_max_BP = lax.pmax(lax.stop_gradient(z_BPV.max(axis=-1)), 'mp')  # any shift cancels, so its gradient is zero
    total_BP = lax.psum(jnp.exp(z_BPV - z_max_BP[..., None]).sum(axis=-1), 'mp')
    return jnp.log(total_BP) + z_max_BP - z_target_BP, z_target_BP >= z_max_BP


def row_mean_loss(nll_BP, correct_BP, mask_BP, row_weight_B) -> tuple[Array, Array]:
    """(loss, accuracy) as EasyLM defines them: the mean over all devices' rows of each row's mean over its targets.

    A row without targets contributes 0 and counts (EasyLM); a row of weight 0 is padding and does not.
    Float32 scalars, equal on every device.
    """
    targets_B = jnp.maximum(mask_BP.sum(axis=-1), 1e-10)
    rows = lax.psum(row_weight_B.sum(), ('dp', 'fsdp'))
    row_mean = lambda x_BP: (x_BP * mask_BP).sum(axis=-1) / targets_B
    mean = lambda x_BP: lax.psum((row_mean(x_BP) * row_weight_B).sum(), ('dp', 'fsdp')) / rows
    return mean(nll_BP), mean(correct_BP.astype(jnp.float32))
