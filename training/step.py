"""One training step as ONE `jax.shard_map` over ('dp', 'fsdp', 'mp'): loss, gradients, accumulation, optimizer.

Before: model/llama.py, model/loss.py, training/optimizer.py.  After: training/loop.py.

No line here reduces a gradient, because the network's own collectives do, transposed: a weight split over fsdp is
all-gathered before use, so its gradient comes back reduce-scattered; a weight that is replicated over an axis enters
the computation through JAX's implicit replicated -> varying cast (`lax.pcast`), whose transpose is the psum over that
axis.  shard_map's varying-axis tracking (check_vma, on by default) refuses the program if any of them were missing.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.batches import Batch
from model import llama, loss
from model.config import Compute, LlamaConfig
from model.partition import BATCH, pytree
from training import optimizer


@pytree
class TrainState:
    """Everything a run needs to go on: weights, optimizer state, and the mean gradient of the micro-steps so far.

    micro_step: int32, micro-steps since the last update; mean_gradient: tree like the weights, or None without
    accumulation.
    """

    params: llama.Llama
    optimizer: optimizer.OptimizerState
    micro_step: jax.Array
    mean_gradient: object


def state_partitions(config: LlamaConfig, accumulate: int) -> TrainState:
    """The TrainState tree of PartitionSpecs: optimizer state lies where its weight lies."""
    weights, scalar = llama.partitions(config), PartitionSpec()
    return TrainState(weights, optimizer.OptimizerState(scalar, weights, weights), scalar,
                      weights if accumulate > 1 else None)


def init_state(params: llama.Llama, config: LlamaConfig, hyper: optimizer.Hyperparameters, accumulate: int,
               mesh: Mesh) -> TrainState:
    """A fresh TrainState around `params` (which it takes over: they are donated)."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_partitions(config, accumulate))

    fresh = lambda params: _fresh(params, hyper, accumulate)
    return jax.jit(fresh, out_shardings=shardings, donate_argnums=0)(params)


def _fresh(params: llama.Llama, hyper: optimizer.Hyperparameters, accumulate: int) -> TrainState:
    mean_gradient = jax.tree.map(jnp.zeros_like, params) if accumulate > 1 else None
    return TrainState(params, optimizer.init(params, hyper), jnp.zeros((), jnp.int32), mean_gradient)


def abstract_state(config: LlamaConfig, hyper: optimizer.Hyperparameters, accumulate: int, mesh: Mesh) -> TrainState:
    """The TrainState tree of ShapeDtypeStructs on their shardings: to compile for, to restore into."""
    state = jax.eval_shape(lambda params: _fresh(params, hyper, accumulate), llama.abstract_params(config, mesh))
    return jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
                        state, state_partitions(config, accumulate))


def abstract_batch(mesh: Mesh, B: int, T: int, P: int | None = None, segments: bool = False) -> Batch:
    """A Batch of ShapeDtypeStructs: B rows of T tokens, P loss positions a row (None: every one), segments or none."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype, sharding=NamedSharding(mesh, BATCH))
    targets = T if P is None else P
    return Batch(array(jnp.int32, T), array(jnp.int32, T) if segments else None,
                 None if P is None else array(jnp.int32, P), array(jnp.int32, targets), array(jnp.float32, targets),
                 array(jnp.float32))


def batch_loss(params: llama.Llama, batch: Batch, config: LlamaConfig, compute: Compute):
    """(loss, accuracy) of the batch, inside shard_map; logits only at the batch's loss positions."""
    h_BTM, _ = llama.hidden_states(params, batch.tokens_BT, batch.segments_BT, config, compute)
    h_BPM = h_BTM
    if batch.loss_positions_BP is not None:
        h_BPM = jnp.take_along_axis(h_BTM, batch.loss_positions_BP[..., None], axis=1)
    nll_BP, correct_BP = loss.token_cross_entropy(params, h_BPM, batch.targets_BP, compute)
    return loss.row_mean_loss(nll_BP, correct_BP, batch.loss_mask_BP, batch.row_weight_B)


def make_train_step(config: LlamaConfig, compute: Compute, hyper: optimizer.Hyperparameters, accumulate: int,
                    mesh: Mesh):
    """The jitted `(TrainState, Batch) -> (TrainState, metrics)`; the state is donated.

    metrics: float32 scalars loss, accuracy, learning_rate (the schedule at the number of optimizer steps done, as
    EasyLM logs it), gradient_norm (of this micro-step, before clipping), param_norm (after the update).
    """
    specs = llama.weight_specs(config)

    def step(state: TrainState, batch: Batch):
        grad = jax.value_and_grad(batch_loss, has_aux=True)
        (mean_loss, accuracy), grads = grad(state.params, batch, config, compute)
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

    state_specs = state_partitions(config, accumulate)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(state_specs, BATCH), out_specs=(state_specs, PartitionSpec()))
    return jax.jit(sharded, donate_argnums=0)


def accumulated_update(state: TrainState, grads, accumulate: int, hyper: optimizer.Hyperparameters,
                       specs) -> TrainState:
    """Adds a micro-step's gradients to the running mean (Welford's, as optax.MultiSteps); the last one updates."""
    mean = jax.tree.map(lambda mean, g: mean + (g - mean) / (state.micro_step + 1), state.mean_gradient, grads)

    def last(_):
        params, opt = optimizer.update(state.params, mean, state.optimizer, hyper, specs)
        return TrainState(params, opt, jnp.zeros_like(state.micro_step), jax.tree.map(jnp.zeros_like, mean))

    def not_last(_):
        return TrainState(state.params, state.optimizer, state.micro_step + 1, mean)

    return lax.cond(state.micro_step == accumulate - 1, last, not_last, None)


def make_eval_step(config: LlamaConfig, compute: Compute, mesh: Mesh):
    """The jitted `(params, Batch) -> dict(eval_loss, eval_accuracy)`."""
    def step(params, batch):
        mean_loss, accuracy = batch_loss(params, batch, config, compute)
        return dict(eval_loss=mean_loss, eval_accuracy=accuracy)

    in_specs = (llama.partitions(config), BATCH)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec()))
