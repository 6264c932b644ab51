"""The state of a run, and its trees of shardings, shapes and names.  Next: training/step.py."""
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.batches import Batch
from model import weights
from model.config import LlamaConfig
from model.lora import Lora, adapter_specs
from model.partition import BATCH, pytree
from training import optimizer


@pytree
class TrainState:
    """Everything a run needs to go on: weights, optimizer state, and the mean gradient of the micro-steps so far.

    params: what trains, all weights or the adapters beside a frozen base (model/lora.py).  micro_step: int32,
    micro-steps since the last update; mean_gradient: tree like params, or None without accumulation.
    """

    params: weights.Llama
    optimizer: optimizer.OptimizerState
    micro_step: jax.Array
    mean_gradient: weights.Llama | None


def trained_specs(config: LlamaConfig, lora: Lora | None) -> weights.Llama:
    """Build the tree of WeightSpecs of what trains."""
    return adapter_specs(config, lora) if lora else weights.weight_specs(config)


def state_partitions(config: LlamaConfig, accumulate: int, lora: Lora | None = None) -> TrainState:
    """Build the TrainState tree of PartitionSpecs: optimizer state lies where its weight lies."""
    like_weights = jax.tree.map(lambda spec: spec.partition, trained_specs(config, lora))
    scalar = PartitionSpec()
    return TrainState(like_weights, optimizer.OptimizerState(scalar, like_weights, like_weights), scalar,
                      like_weights if accumulate > 1 else None)


def init_state(params: weights.Llama, config: LlamaConfig, hyper: optimizer.Hyperparameters, accumulate: int,
               mesh: Mesh, lora: Lora | None = None) -> TrainState:
    """Make a fresh TrainState around `params`, which are donated to it."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_partitions(config, accumulate, lora))

    fresh = lambda params: _fresh(params, hyper, accumulate)
    return jax.jit(fresh, out_shardings=shardings, donate_argnums=0)(params)


def _fresh(params: weights.Llama, hyper: optimizer.Hyperparameters, accumulate: int) -> TrainState:
    mean_gradient = jax.tree.map(jnp.zeros_like, params) if accumulate > 1 else None
    return TrainState(params, optimizer.init(params, hyper), jnp.zeros((), jnp.int32), mean_gradient)


def abstract_state(config: LlamaConfig, hyper: optimizer.Hyperparameters, accumulate: int, mesh: Mesh,
                   lora: Lora | None = None) -> TrainState:
    """Build the TrainState tree of ShapeDtypeStructs on their shardings: to compile for, to restore into."""
    weights.check_divisible(config, mesh)
    params = weights.abstract(trained_specs(config, lora), mesh)
    state = jax.eval_shape(lambda params: _fresh(params, hyper, accumulate), params)
    return jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
                        state, state_partitions(config, accumulate, lora))


def abstract_batch(mesh: Mesh, B: int, T: int, P: int | None = None, segments: bool = False) -> Batch:
    """Build a Batch of ShapeDtypeStructs: B rows of T tokens, P loss positions a row (None: all), segments or none."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype, sharding=NamedSharding(mesh, BATCH))
    targets = T if P is None else P
    return Batch(array(jnp.int32, T), array(jnp.int32, T) if segments else None,
                 None if P is None else array(jnp.int32, P), array(jnp.int32, targets), array(jnp.float32, targets),
                 array(jnp.float32))


# ---------------------------------------------------------------- by the names that checkpoints use


def to_arrays(state: TrainState, config: LlamaConfig, lora: Lora | None = None) -> dict[str, jax.Array]:
    """Name a state's arrays: params.*, momentum.*, second_moment.*, optimizer.count, optimizer.micro_step, and with
    accumulation mean_gradient.*
    """
    return dict(zip(_names(state, config, lora), jax.tree.leaves(state), strict=True))


def from_arrays(arrays: dict[str, jax.Array], like: TrainState, config: LlamaConfig,
                lora: Lora | None = None) -> TrainState:
    """Build the state whose `to_arrays` these are; `like` has its structure."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _names(like, config, lora)])


def _names(state: TrainState, config: LlamaConfig, lora: Lora | None) -> list[str]:
    """List the names of the state's leaves, in their order."""
    tree = lambda prefix: jax.tree.map(lambda spec: f'{prefix}.{spec.name}', trained_specs(config, lora))
    opt = optimizer.OptimizerState('optimizer.count', tree('momentum'), tree('second_moment'))
    mean_gradient = None if state.mean_gradient is None else tree('mean_gradient')
    return jax.tree.leaves(TrainState(tree('params'), opt, 'optimizer.micro_step', mean_gradient))
