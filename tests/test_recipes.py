"""Every recipe of configs/ trains: train.py opens the data and the model that it names, at a small size, for a step."""
import json
import pathlib

import pytest

import train
from program import flags, parse

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted(path for path in ROOT.glob('configs/*.py') if path.stem != '__init__')


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_step_on_a_small_set(golden, tmp_path, recipe):
    """With its own kind of data, fields, batching, mesh and optimizer; given are a model of two layers, the records
    (with every field that prepare_data.py writes), the tokenizer and the number of steps."""
    texts = [json.loads(line)['text'] for line in (golden / 'easylm/train_200.jsonl').read_text().splitlines()]
    parts = [text.rpartition(':') for text in texts]
    records = [dict(text=''.join(part), prompt=part[0] + part[1], answer=part[2]) for part in parts]
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    given = dict(config=recipe, load_llama_config='debug', update_llama_config='dict(vocab_size=640)', total_steps=1)
    given |= {'tokenizer.vocab_file': golden / 'easylm/tokenizer.model', 'logger.output_dir': tmp_path / 'run',
              'train_dataset.json_dataset.path': tmp_path / 'train.jsonl',
              'optimizer.adamw_optimizer.lr_warmup_steps': 0, 'log_freq': 1}
    train.main(parse.parse(['train.py', *(f'--{name}={value}' for name, value in given.items())], flags.TRAIN, ''))
    row, = (json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines())
    assert row['step'] == 0 and 5 < row['loss'] < 8  # about log 640 = 6.46
    assert (tmp_path / 'run/step_00000001').is_dir()
