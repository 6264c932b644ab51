"""One training step as ONE `jax.shard_map` over ('dp', 'fsdp', 'mp'): loss, gradients, accumulation, optimizer.

Before: model/llama.py, model/loss.py, training/optimizer.py.  Next: training/loop.py.

No line here reduces a gradient: `partition.gather_weight`, through which every weight enters a product, has it written
out in its transpose.  It reduce-scatters the gradient over the axis that it gathered (fsdp), and sums it over the axes
along which the weight is replicated and the data differ (dp; for a norm fsdp and mp too).  shard_map's varying-axis
tracking (check_vma, on by default) refuses the program if one of these sums were missing.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from data.batches import Batch
from model import llama, loss
from model.config import Compute, LlamaConfig
from model.lora import Lora, adapted, adapted_partitions, base_partitions
from model.partition import BATCH
from model.weights import Llama, partitions
from training import optimizer
from training.state import TrainState, state_partitions, trained_specs


def batch_loss(params: Llama, batch: Batch, config: LlamaConfig, compute: Compute):
    """Compute (loss, accuracy) of the batch, inside shard_map; logits only at the batch's loss positions."""
    h_BTM, _ = llama.hidden_states(params, batch.tokens_BT, batch.segments_BT, config, compute,
                                   positions_BT=batch.positions_BT)
    h_BPM = h_BTM
    if batch.loss_positions_BP is not None:
        h_BPM = jnp.take_along_axis(h_BTM, batch.loss_positions_BP[..., None], axis=1)
    with jax.named_scope('loss'):
        nll_BP, correct_BP = loss.token_cross_entropy(params, h_BPM, batch.targets_BP, compute)
        if batch.loss_weight_BP is not None:
            nll_BP *= batch.loss_weight_BP
        if batch.loss_share_BP is not None:
            return loss.shared_loss(nll_BP, correct_BP, batch.loss_share_BP)
        return loss.row_mean_loss(nll_BP, correct_BP, batch.loss_mask_BP, batch.row_weight_B)


def make_train_step(config: LlamaConfig, compute: Compute, hyper: optimizer.Hyperparameters, accumulate: int,
                    mesh: Mesh, lora: Lora | None = None):
    """Make the jitted `(TrainState, Batch) -> (TrainState, metrics)`; the state is donated.

    With `lora` the state's params are adapters, and the step takes the frozen base as its third argument.

    metrics: float32 scalars loss, accuracy, learning_rate (the schedule at the number of optimizer steps done, as
    EasyLM logs it), gradient_norm (of this micro-step, before clipping), param_norm (after the update).
    """
    specs = trained_specs(config, lora)

    def step(state: TrainState, batch: Batch, base: Llama | None = None):
        def trained_loss(trained):
            params = adapted(base, trained, lora, dropout_key(state, lora)) if lora else trained
            return batch_loss(params, batch, config, compute)

        (mean_loss, accuracy), grads = jax.value_and_grad(trained_loss, has_aux=True)(state.params)
        gradient_norm = optimizer.global_norm(grads, specs)
        if accumulate == 1:
            params, opt = optimizer.update(state.params, grads, state.optimizer, hyper, specs)
            state = TrainState(params, opt, state.micro_step, None)
        else:
            state = accumulated_update(state, grads, accumulate, hyper, specs)
        metrics = dict(loss=mean_loss, accuracy=accuracy, gradient_norm=gradient_norm,
                       learning_rate=hyper.schedule(state.optimizer.count),
                       param_norm=optimizer.global_norm(state.params, specs))
        return state, metrics

    state_specs = state_partitions(config, accumulate, lora)
    in_specs = (state_specs, BATCH, *([base_partitions(config, lora.base_dtype)] if lora else []))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(state_specs, PartitionSpec()))
    return jax.jit(sharded, donate_argnums=0)


def dropout_key(state: TrainState, lora: Lora) -> jax.Array | None:
    """Make the key of this micro-step's dropout masks; None without dropout."""
    if not lora.dropout:
        return None
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(lora.seed), state.optimizer.count), state.micro_step)


def accumulated_update(state: TrainState, grads, accumulate: int, hyper: optimizer.Hyperparameters,
                       specs) -> TrainState:
    """Add a micro-step's gradients to the running mean (Welford's, as optax.MultiSteps); the last one updates."""
    mean = jax.tree.map(lambda mean, g: mean + (g - mean) / (state.micro_step + 1), state.mean_gradient, grads)

    def last(_):
        params, opt = optimizer.update(state.params, mean, state.optimizer, hyper, specs)
        return TrainState(params, opt, jnp.zeros_like(state.micro_step), jax.tree.map(jnp.zeros_like, mean))

    def not_last(_):
        return TrainState(state.params, state.optimizer, state.micro_step + 1, mean)

    return lax.cond(state.micro_step == accumulate - 1, last, not_last, None)


def make_eval_step(config: LlamaConfig, compute: Compute, mesh: Mesh, lora: Lora | None = None):
    """Make the jitted `(params, Batch) -> dict(eval_loss, eval_accuracy)`; with lora params are `adapted`.

    Targets are not smoothed.
    """
    compute = dataclasses.replace(compute, label_smoothing=0.0)

    def step(params, batch):
        mean_loss, accuracy = batch_loss(params, batch, config, compute)
        return dict(eval_loss=mean_loss, eval_accuracy=accuracy)

    in_specs = (adapted_partitions(config, lora) if lora else partitions(config), BATCH)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec()))
