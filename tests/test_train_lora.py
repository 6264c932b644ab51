"""train.py with --lora.*: what it saves, how it goes on, what it says, and what it refuses."""
import json

import jax
import numpy as np
import pytest
from test_train import OPTIMIZER, easylm_flags, metrics, run

from checkpoint import native
from mistake import Mistake

LORA = ['--lora.rank=4', '--lora.targets=w_q,w_v,w_down', OPTIMIZER + 'multiply_by_parameter_scale=False']


def arrays(step: native.Step) -> dict[str, np.ndarray]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = step.restore({name: jax.ShapeDtypeStruct(*entry, sharding=device) for name, entry in step.arrays.items()})
    return {name: np.asarray(array) for name, array in found.items()}


def test_a_resumed_run_equals_an_uninterrupted_one(golden, tmp_path, capsys):
    """5 steps, stopped after 3 in the middle of an accumulation; dropout's masks are those of the step, too."""
    common = [*LORA, '--lora.dropout=0.25', '--mesh_dim=1,4,2', '--checkpointer.save_optimizer_state=True',
              '--optimizer.accumulate_gradient_steps=2', '--lora.base_dtype=bf16']
    whole = easylm_flags(golden, tmp_path / 'whole') + common
    parts = easylm_flags(golden, tmp_path / 'parts') + common
    run(*whole, '--total_steps=5')
    said = capsys.readouterr().out
    run(*parts, '--total_steps=3')
    run(*parts, '--total_steps=5', '--resume=True')
    a, b = (arrays(native.Step(tmp_path / name, 5)) for name in ('whole', 'parts'))
    assert len(a) == 4 * 6 + 2  # A and B of three matrices: params, momentum, second moment, mean gradient; counters
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a['params.layers.w_q.b'].any()
    assert ('adapters of rank 4 beside w_q,w_v,w_down, scale 2: 3,840 parameters train, 2.18% of the 176,448, which '
            'stay as they are in bf16') in said
    checkpoint = f'params::{golden}/easylm/streaming_params_fp32'
    assert f'serve it: python serve.py --load_checkpoint={checkpoint} --adapter={tmp_path}/whole' in said
    meta = native.Step(tmp_path / 'whole', 5).meta
    assert meta['lora'] == dict(rank=4, alpha=8.0, targets=['w_q', 'w_v', 'w_down'], dropout=0.25, rslora=False,
                                base_dtype='bf16', seed=42)
    assert meta['base']['spec'] == checkpoint and len(meta['base']['fingerprint']) == 64

    with pytest.raises(Mistake, match='lora.alpha=16.0, but .*step_00000005 was trained with 8.0'):
        run(*parts, '--total_steps=6', '--resume=True', '--lora.alpha=16')
    with pytest.raises(Mistake, match="holds other weights than those beside which .*params::.*_fp32"):
        run(*parts, '--total_steps=6', '--resume=True',
            f'--load_checkpoint=params::{golden}/easylm/streaming_params_trained')


def test_evaluation_on_the_way_sees_the_adapters(golden, tmp_path):
    """The loss falls on rows of the training data, which that of the frozen base would not."""
    held_out = ['--eval_steps=2', '--eval_dataset.text_processor.fields=text', '--eval_dataset.type=json',
                f'--eval_dataset.json_dataset.path={golden}/easylm/train_200.jsonl',
                '--eval_dataset.json_dataset.seq_length=128']
    run(*easylm_flags(golden, tmp_path), *LORA, *held_out, '--total_steps=6', OPTIMIZER + 'lr=0.05')
    losses = [row['eval_loss'] for row in metrics(tmp_path)]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize('wrong, says', [
    (['--lora.targets=w_q,q_proj'], "lora.targets='w_q,q_proj': 'q_proj' is no matrix of a layer"),
    (['--lora.rank=65'], 'lora.rank=65 must be at most 64, the smaller side of layers.w_q'),
    (['--lora.rank=0'], 'lora.targets=.* has no effect where lora.rank=0'),
    (['--lora.rank=-1'], 'lora.rank=-1 must be at least 0'),
    (['--load_checkpoint='], 'lora.rank=4 needs --load_checkpoint'),
    (['--checkpointer.format=easylm'], "checkpointer.format='easylm' holds no adapters"),
])
def test_what_cannot_have_adapters_is_refused_before_weights_are_read(golden, tmp_path, monkeypatch, wrong, says):
    def read(*_):
        raise AssertionError('weights were read')

    monkeypatch.setattr('checkpoint.source.Source.load_params', read)
    with pytest.raises(Mistake, match=says):
        run(*easylm_flags(golden, tmp_path), *LORA, '--total_steps=1', *wrong)
    assert not json.dumps([path.name for path in tmp_path.iterdir()]).count('step_')
