"""The command line: strict types, recipes below flags, and every flag explained."""
import pathlib

import pytest

from program import flags, parse
from program.flags import Flag

TABLE = (Flag('a.rate', 0.5, 'a number'), Flag('a.steps', 3, 'a count'), Flag('kind', 'x', 'a choice', ('x', 'y')),
         Flag('on', False, 'a switch'), Flag('maybe', None, 'filled in later', kind=bool))
ROOT = pathlib.Path(__file__).parent.parent
TABLES = {'fetch.py': flags.ASSETS, 'prepare_data.py': flags.PREPARE, 'train.py': flags.TRAIN, 'serve.py': flags.SERVE,
          'evaluate.py': flags.EVALUATE, 'convert.py': flags.CONVERT, 'plan.py': flags.PLAN}


def read(*arguments):
    return parse.parse(['program.py', *arguments], TABLE, 'What it does.')


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / 'recipe.py'

    def write(values: str) -> str:
        path.write_text(f'def get_config():\n    return {values}\n')
        return f'--config={path}'
    return write


def test_names_with_dots_nest_and_defaults_stay():
    config = read('--a.rate=1e-3', '--on=True')
    assert (config.a.rate, config.a.steps, config.kind, config.on, config.maybe) == (1e-3, 3, 'x', True, None)


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(recipe):
    config = read(recipe("{'a.rate': 2.0, 'a.steps': 7}"), '--a.steps=9')
    assert (config.a.rate, config.a.steps, config.kind) == (2.0, 9, 'x')


@pytest.mark.parametrize('argument, says', [
    ('--a.rate=fast', 'a.rate=fast'), ('--a.steps=1.5', 'a.steps=1.5'), ('--kind=z', 'one of <x|y>'),
    ('--a.stepz=1', "Unknown command line flag 'a.stepz'.*a.steps"), ('stray', "unexpected argument 'stray'"),
    ('--config=none.txt', 'must be a Python file'),
])
def test_wrong_flags_are_refused_by_name(argument, says):
    with pytest.raises(ValueError, match=says):
        read(argument)


@pytest.mark.parametrize('value', ['gs://bucket/x', 'params::gs://bucket/x'])
def test_cloud_storage_is_answered_with_the_command_that_copies_it(value):
    """Whatever flag names it, alone or behind a type; a text that only mentions such an address is none."""
    table = (Flag('where', '', 'a path'),)
    with pytest.raises(ValueError, match=r'where=.*gcloud storage cp -r gs://bucket/x'):
        parse.parse(['program.py', f'--where={value}'], table, '')
    assert parse.parse(['program.py', f'--where=see {value[-11:]}'], table, '').where


@pytest.mark.parametrize('values, says', [
    ("{'a.rat': 1.0}", "'a.rat' is no flag of this program; did you mean 'a.rate'"),
    ("{'a.rate': 1}", 'a.rate=1 must be float'), ("{'on': 'yes'}", "on='yes' must be bool"),
])
def test_a_recipe_with_an_unknown_key_or_wrong_type_is_refused(recipe, values, says):
    with pytest.raises(ValueError, match=says):
        read(recipe(values))


def test_unknown_attribute_of_the_config_is_an_error():
    with pytest.raises((AttributeError, KeyError)):
        read().a.stepz = 3


@pytest.mark.parametrize('program', TABLES)
def test_help_names_every_flag_with_default_and_text(program, capsys):
    with pytest.raises(SystemExit) as exit:
        parse.parse([program, '--help'], TABLES[program], 'What it does.')
    text = capsys.readouterr().out
    assert exit.value.code == 0 and text.startswith('What it does.')
    for flag in TABLES[program]:
        assert f'--{flag.name}=' in text and flag.help in text and f'(default {flag.default!r})' in text


@pytest.mark.parametrize('program', TABLES)
def test_no_flag_stands_twice_in_a_table(program):
    names = [flag.name for flag in flags.COMMON + TABLES[program]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('recipe', sorted(path.name for path in (ROOT / 'configs').glob('[a-z]*.py')))
def test_every_recipe_fits_train_py(recipe):
    config = parse.parse(['train.py', f'--config={ROOT / "configs" / recipe}'], flags.TRAIN, '')
    assert config.train_dataset.text_processor.fields
