"""Every recipe of configs/ goes through train.py's own opening of data and model; what a data set does not say."""
import json
import pathlib

import pytest

import train
from checkpoint import native
from program import flags, parse, settings
from program.data import open_batches, read_template

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted(path.name for path in (ROOT / 'configs').glob('[a-z]*.py'))


def records(path: pathlib.Path, count: int) -> pathlib.Path:
    """Write `count` records as prepare_data.py does, without labels_NAME.json."""
    rows = [dict(text=f'[Text]: film {n}\n[Sentiment]: Positive', prompt=f'[Text]: film {n}\n[Sentiment]:',
                 answer=' Positive') for n in range(count)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def run(golden, tmp_path, recipe: str, count: int, *arguments) -> None:
    """Start train.py with a recipe, the debug model, a tiny tokenizer and `count` records."""
    small = ['--load_llama_config=debug', '--update_llama_config=dict(vocab_size=640)',
             f'--tokenizer.vocab_file={golden}/easylm/tokenizer.model', f'--logger.output_dir={tmp_path}/run',
             f'--train_dataset.json_dataset.path={records(tmp_path / "train.jsonl", count)}']
    train.main(parse.parse(['train.py', f'--config={ROOT}/configs/{recipe}', *small, *arguments], flags.TRAIN, ''))


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_trains_a_step(golden, tmp_path, recipe):
    """Its data set is read, its mesh and optimizer are built, one step runs and is saved."""
    run(golden, tmp_path, recipe, 400, '--total_steps=1', '--train_dataset.json_dataset.seq_length=64',
        '--optimizer.adamw_optimizer.lr_warmup_steps=0')  # a recipe's own warmup is longer than a step
    assert native.Step(tmp_path / 'run').number == 1


def test_the_quickstart_s_recipe_trains_fifty_rows(golden, tmp_path):
    """4 batches of 16: the warmup is a part of the run, so none is too short for it; the run can be resumed."""
    run(golden, tmp_path, 'quickstart.py', 50)
    step = native.Step(tmp_path / 'run')
    assert step.number == 4 and 'optimizer.count' in step.arrays


def options(*arguments):
    return parse.parse(['train.py', *arguments], flags.TRAIN, '')


def test_the_warmup_is_a_part_of_the_run_s_optimizer_steps():
    """A tenth of 64 steps is 6; of 531 steps, 4 accumulated, 13; without the ratio lr_warmup_steps counts."""
    ratio = '--optimizer.adamw_optimizer.lr_warmup_ratio=0.1'
    decay = '--optimizer.adamw_optimizer.lr_decay_steps=0'
    assert settings.read_optimizer(options(ratio, decay), 64)[0].lr_warmup_steps == 6
    hyper, accumulate = settings.read_optimizer(options(ratio, decay, '--optimizer.accumulate_gradient_steps=4'), 531)
    assert (hyper.lr_warmup_steps, hyper.lr_decay_steps, accumulate) == (13, 132, 4)
    assert settings.read_optimizer(options(), 64)[0].lr_warmup_steps == 2000


def test_eval_dataset_takes_from_train_dataset_what_it_does_not_say():
    """Type, fields, lengths and batching come over; its place, and where to begin in it, do not."""
    given = options('--train_dataset.type=json', '--train_dataset.text_processor.fields=[prompt],answer',
                    '--train_dataset.text_processor.add_bos_token=False', '--train_dataset.json_dataset.path=a.jsonl',
                    '--train_dataset.json_dataset.seq_length=128', '--train_dataset.json_dataset.batching=rows',
                    '--train_dataset.json_dataset.start_seek_loc=7', '--eval_dataset.json_dataset.batch_size=4')
    trained, held_out = (settings.read_dataset(given, name) for name in ('train_dataset', 'eval_dataset'))
    assert held_out.type == 'json' and held_out.text_processor == trained.text_processor
    expected = trained.rows | dict(path='', start_seek_loc=0, batch_size=4)
    assert held_out.rows == expected and None not in held_out.rows.values()


def test_a_data_set_s_mistake_names_the_data_set(golden):
    """Fields that eval_dataset says twice, and the path that it does not take over."""
    given = options('--train_dataset.type=json', '--eval_dataset.json_dataset.path=x',
                    '--eval_dataset.text_processor.fields=a', '--eval_dataset.text_processor.fields_from_example=b')
    doubled = settings.read_dataset(given, 'eval_dataset')
    mesh = type('Mesh', (), dict(shape=dict(dp=1, fsdp=1, mp=1)))
    with pytest.raises(ValueError, match="^eval_dataset: fields='a'"):
        open_batches(doubled, None, mesh, 0)
    pathless = settings.read_dataset(options('--train_dataset.type=json'), 'eval_dataset')
    with pytest.raises(ValueError, match='^eval_dataset.json_dataset.path is empty'):
        open_batches(pathless, None, mesh, 0)


def test_records_without_their_labels_are_warned_of(tmp_path, capsys):
    """A NAME.jsonl that was moved without labels_NAME.json would make a checkpoint that knows no labels."""
    path = records(tmp_path / 'moved.jsonl', 1)
    dataset = settings.read_dataset(options('--train_dataset.type=json', f'--train_dataset.json_dataset.path={path}',
                                            '--train_dataset.text_processor.fields=text'), 'train_dataset')
    assert read_template(dataset) is None
    assert f'WARNING: {tmp_path}/labels_moved.json is not there' in capsys.readouterr().out
