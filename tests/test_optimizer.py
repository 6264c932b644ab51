"""The optimizer against trajectories that EasyLM's own (optax 0.1.7) produced, and against optax where it agrees."""
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model.partition import WeightSpec
from training import optimizer
from training.optimizer import AdamW

CASES = ('adamw_f32', 'adamw_bf16', 'param_scale_f32', 'param_scale_bf16', 'param_scale_bf16_accumulate2')


def plain_specs(params, *axes):
    """Specs of unstacked weights, dimension i of each split over axes[i]."""
    return {name: WeightSpec(name, p.shape, PartitionSpec(*axes[:p.ndim]), 'normal', ('M', 'F')[:p.ndim])
            for name, p in params.items()}


def load(golden, case):
    flags = json.loads((golden / f'easylm/optimizer_{case}.json').read_text())
    hyper = AdamW(**dict(clip_gradient=flags['clip_gradient'], init_lr=flags['init_lr']) | flags['adamw_optimizer'])
    arrays = dict(np.load(golden / f'easylm/optimizer_{case}.npz'))
    tree = lambda prefix: {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    return hyper, flags, tree


@pytest.mark.parametrize('case', CASES)
def test_trajectory_equals_easylm(golden, case):
    """After each of 20 steps every parameter is within 1e-6 of the largest |parameter| of EasyLM's trajectory."""
    hyper, flags, tree = load(golden, case)
    params, every = tree('init/'), flags['accumulate_gradient_steps']
    state, specs, mean = optimizer.init(params, hyper), plain_specs(params), None
    update = jax.jit(lambda p, g, s: optimizer.update(p, g, s, hyper, specs))
    for n in range(flags['steps']):
        grads = tree(f'grad/{n}/')
        mean = grads if n % every == 0 else jax.tree.map(lambda m, g, k=n % every + 1: m + (g - m) / k, mean, grads)
        if n % every == every - 1:
            params, state = update(params, mean, state)
        for name, expected in tree(f'param/{n}/').items():
            bound = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=bound, err_msg=f'{name} after step {n}')
