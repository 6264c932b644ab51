"""Count the floating point operations that a training step needs, for MFU.  Neighbour: loop.py, which logs it.

    FLOPs = 6 (layers' matrices · tokens + V M · positions with a loss) + 12 N H D Σ length²

A parameter that multiplies costs 2 FLOPs a token in the forward pass and 4 in the backward pass.  Attention costs a
token 2 · 2 H D · length a layer forward (scores, and the sum of values), twice that backward.  This is the count of
PaLM (Chowdhery et al., 2204.02311, appendix B): causal attention is not halved, nothing that remat computes again is
counted, nor is padding, the lookup of the embedding, norms or the optimizer.

A frozen matrix has no gradient of its own, so it costs 4 instead of 6; its adapter 6 for each of its parameters.

MFU = FLOPs / (seconds · what the devices do at most), at their bfloat16 peak whatever the dtype.
"""
import jax
import numpy as np

from data.batches import Batch
from model.config import LlamaConfig
from model.lora import Lora, adapter_specs
from model.weights import weight_specs


def step_flops(config: LlamaConfig, batch: Batch, lora: Lora | None = None) -> int:
    """Count the FLOPs of one step over a batch of numpy arrays, as above.

    length: of a segment, or the row's where there are no segments.  Positions with a loss: all tokens, unless the batch
    lists them; then those that count.
    """
    B, T = batch.tokens_BT.shape
    lengths = [T] * B if batch.segments_BT is None else [
        int(length) for row in batch.segments_BT for length in np.bincount(row)[1:]]
    tokens = sum(lengths)
    positions = tokens if batch.loss_positions_BP is None else int(np.count_nonzero(batch.loss_mask_BP))
    specs = jax.tree.leaves(weight_specs(config))
    matrices = sum(spec.size for spec in specs if spec.stacked and spec.init == 'normal')
    head = config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    adapters = sum(spec.size for spec in jax.tree.leaves(adapter_specs(config, lora))) if lora else 0
    return ((4 if lora else 6) * (matrices * tokens + head * positions) + 6 * adapters * tokens
            + attention * sum(length * length for length in lengths))
