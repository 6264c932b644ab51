"""The optimizer against trajectories that EasyLM's own (optax 0.1.7) produced, and against optax where it agrees."""
import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model.weights import WeightSpec
from training import optimizer
from training.optimizer import AdamW, Palm

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


def test_palm_is_adafactor_with_its_own_schedules():
    """Ten steps against the equations in float64: lr 2 / sqrt(max(n, 4)), weight decay 3 lr²; within 1e-6."""
    hyper = Palm(lr=0.02, lr_warmup_steps=4, b1=0.8, b2=0.9, clip_gradient=1e9, weight_decay=3e-4)
    rng = np.random.default_rng(0)
    p = rng.normal(size=(8, 16))
    params = {'w': p.astype(np.float32)}
    state, m, v = optimizer.init(params, hyper), 0.0, 0.0
    for n in range(10):
        g = rng.normal(size=p.shape).astype(np.float32)
        params, state = optimizer.update(params, {'w': g}, state, hyper, plain_specs(params))
        lr, beta = 2 / np.sqrt(max(n, 4)), 1 - (n + 1) ** -0.9
        v = beta * v + (1 - beta) * np.float64(g) ** 2
        m = 0.8 * m + 0.2 * lr * g / np.sqrt(v) * np.sqrt(np.mean(p * p))
        p = p - m - 3 * lr**2 * p
        np.testing.assert_allclose(params['w'], p, rtol=0, atol=1e-6 * np.abs(p).max(), err_msg=str(n))


@pytest.mark.parametrize('hyper', [AdamW(lr_warmup_steps=0, lr_decay_steps=9, weight_decay=0.1),
                                   AdamW(lr_warmup_steps=0, lr_decay_steps=9, multiply_by_parameter_scale=True)])
def test_lower_layers_learn_at_a_part_of_the_rate(hyper):
    """d = 1/2 and three layers: the step of layers 0, 1, 2 is 1/4, 1/2, 1 of that without, of the embedding 1/8, of
    head and final norm 1; adapters ('layers.w_q.a') are layers too."""
    shapes = {'layers.w_q.a': (3, 4, 5), 'layers.ffn_norm': (3, 4), 'embedding': (6, 4), 'head': (6, 4),
              'final_norm': (4,)}
    letters = {'layers.w_q.a': ('N', 'M', 'R'), 'layers.ffn_norm': ('N', 'M')}
    specs = {name: WeightSpec(name, shape, PartitionSpec(*[None] * len(shape)), 'normal',
                              letters.get(name, ('V', 'M')[-len(shape):])) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    params, grads = ({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
                     for _ in range(2))
    steps = []
    for decay in (1.0, 0.5):
        changed = dataclasses.replace(hyper, layerwise_decay=decay)
        new, _ = optimizer.update(params, grads, optimizer.init(params, changed), changed, specs)
        steps.append({name: np.asarray(new[name] - params[name]) for name in shapes})
    layers = np.array([0.25, 0.5, 1.0])
    factors = {'layers.w_q.a': layers[:, None, None], 'layers.ffn_norm': layers[:, None], 'embedding': 0.125,
               'head': 1.0, 'final_norm': 1.0}
    for name, factor in factors.items():
        np.testing.assert_allclose(steps[1][name], factor * steps[0][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_without_a_decay_of_layers_the_program_has_no_part_of_it(monkeypatch):
    """Nor has PaLM's."""
    monkeypatch.setattr(optimizer, 'layer_factor', lambda *arguments: pytest.fail('asked'))
    params = {'w': np.ones((2, 3), np.float32)}
    for hyper in (AdamW(lr_warmup_steps=0, lr_decay_steps=9), Palm()):
        optimizer.update(params, params, optimizer.init(params, hyper), hyper, plain_specs(params))
