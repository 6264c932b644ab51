"""The command line: strict types, recipes below flags, and every flag explained."""
import errno
import pathlib

import pytest

from mistake import Mistake
from model.lora import Lora
from program import flags, parse, settings
from program.assets import ASSETS
from program.flags import Flag
from serving.api import MAX_TEMPERATURE

TABLE = (Flag('a.rate', 0.5, 'a number'), Flag('a.steps', 3, 'a count'), Flag('kind', 'x', 'a choice', ('x', 'y')),
         Flag('on', False, 'a switch'), Flag('maybe', None, 'filled in later', kind=bool))
ROOT = pathlib.Path(__file__).parent.parent
TABLES = {'fetch.py': flags.ASSETS, 'prepare_data.py': flags.PREPARE, 'train.py': flags.TRAIN, 'serve.py': flags.SERVE,
          'evaluate.py': flags.EVALUATE, 'client.py': flags.CLIENT, 'convert.py': flags.CONVERT, 'plan.py': flags.PLAN}


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
    ('--a.stepz=1', r'unknown flag --a.stepz: did you mean --a.steps\?'), ('stray', "unexpected argument 'stray'"),
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
    ("{'a.rat': 1.0}", "'a.rat' is no flag of this program: did you mean --a.rate"),
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


# ---------------------------------------------------------------- ranges

ADAMW, PALM, ROWS = 'optimizer.adamw_optimizer.', 'optimizer.palm_optimizer.', 'train_dataset.json_dataset.'


@pytest.mark.parametrize('program, argument, says', [
    ('train.py', 'log_freq=0', 'log_freq=0 must be at least 1: change --log_freq, or leave it out for 50'),
    ('train.py', 'checkpointer.keep=0', 'checkpointer.keep=0 must be at least 1'),
    ('train.py', 'eval_steps=-1', 'eval_steps=-1 must be at least 0'),
    ('train.py', 'epochs=0', 'epochs=0 must be at least 1'), ('train.py', 'total_steps=-1', 'at least 0'),
    ('train.py', 'seed=4294967296', 'seed=4294967296 must be from 0 to 4294967295'),
    ('train.py', ADAMW + 'lr=0', ADAMW + 'lr=0.0 must be above 0'), ('train.py', ADAMW + 'lr=nan', 'lr=nan must be'),
    ('train.py', PALM + 'b2=1', PALM + 'b2=1.0 must be above 0 and below 1'),
    ('train.py', PALM + 'lr_warmup_steps=0', PALM + 'lr_warmup_steps=0 must be at least 1'),
    ('train.py', ADAMW + 'clip_gradient=0', ADAMW + 'clip_gradient=0.0 must be above 0'),
    ('train.py', 'optimizer.accumulate_gradient_steps=0', 'accumulate_gradient_steps=0 must be at least 1'),
    ('train.py', ROWS + 'tokenizer_processes=0', ROWS + 'tokenizer_processes=0 must be at least 1'),
    ('train.py', ROWS + 'tokenizer_parallel_chunk_size=0', 'tokenizer_parallel_chunk_size=0 must be at least 1'),
    ('train.py', ROWS + 'tokenizer_parallel_batch_size=0', 'tokenizer_parallel_batch_size=0 must be at least 1'),
    ('train.py', 'jax_distributed.num_processes=0', r'num_processes=0 must be at least 1.*leave it out$'),
    ('serve.py', 'lm_server.port=65536', 'from 0 to 65535.*leave it out for 5007'),
    ('serve.py', 'top_p=1.5', 'top_p=1.5 must be above 0 and at most 1'),
    ('evaluate.py', 'sample_tokens=0', 'sample_tokens=0 must be at least 1'),
    ('prepare_data.py', 'sample_ratio=0', 'sample_ratio=0.0 must be above 0 and at most 1'),
    ('plan.py', 'seq_length=0', 'seq_length=0 must be at least 1'),
])
def test_a_number_outside_its_range_is_refused_before_anything_loads(program, argument, says):
    """With the flag's whole name, the value, the range, and what to do."""
    with pytest.raises(Mistake, match=says):
        parse.parse([program, f'--{argument}'], TABLES[program], '')


def test_a_recipe_s_number_is_held_to_the_range_too(recipe):
    with pytest.raises(Mistake, match='log_freq=0 must be at least 1'):
        parse.parse(['train.py', recipe("{'log_freq': 0}")], flags.TRAIN, '')


@pytest.mark.parametrize('program', TABLES)
def test_every_number_has_a_range_in_which_its_default_lies(program):
    """All but the two ids that are always the tokenizer's, and numbers of EasyLM's that are refused in any case."""
    for flag in TABLES[program]:
        if flag.type in (int, float) and not flag.only:
            assert flag.range or flag.name in ('llama.bos_token_id', 'llama.eos_token_id'), flag.name
            assert flag.default is None or flag.in_range(flag.default), flag.name


def test_the_bounds_of_a_range_are_as_they_say():
    """least and most are allowed themselves, above and below are not."""
    closed, half = Flag('a', 1, '', least=1, most=3), Flag('b', 0.5, '', above=0, below=1)
    assert [closed.in_range(value) for value in (0, 1, 3, 4)] == [False, True, True, False]
    assert [half.in_range(value) for value in (0.0, 0.1, 0.9, 1.0)] == [False, True, True, False]
    assert (closed.range, half.range) == ('from 1 to 3', 'above 0 and below 1')


def test_the_hottest_default_temperature_is_that_of_a_request():
    assert next(flag.most for flag in flags.SERVE if flag.name == 'lm_server.default_temperature') == MAX_TEMPERATURE


# ---------------------------------------------------------------- paths and assets

GGUF = 'smollm2-135m-instruct'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, an empty working directory and a home of one's own."""
    for name in ('cache', 'work', 'home'):
        (tmp_path / name).mkdir()
    monkeypatch.setenv('PALLAMA_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'cache'


@pytest.mark.parametrize('program, name', [(program, flag.name) for program, table in TABLES.items()
                                           for flag in table if flag.path])
def test_a_tilde_is_the_home_directory_wherever_a_path_is(cache, program, name):
    """At the beginning of a path and behind TYPE::, and nowhere else."""
    home = str(cache.parent / 'home')
    for given, means in (('~/x', f'{home}/x'), ('gguf::~/x', f'gguf::{home}/x'), ('x/~/y', 'x/~/y')):
        config = parse.parse([program, f'--{name}={given}'], TABLES[program], '')
        assert parse.value_of(config, name) == means


def test_a_tilde_in_the_path_of_a_recipe_is_expanded(cache):
    (cache.parent / 'home/recipe.py').write_text("def get_config():\n    return {'load_checkpoint': '~/model'}\n")
    config = parse.parse(['train.py', '--config=~/recipe.py'], flags.TRAIN, '')
    assert config.load_checkpoint == f'{cache.parent}/home/model'


@pytest.mark.parametrize('program, argument, means', [
    ('evaluate.py', 'input=rotten_tomatoes', '{}/rotten_tomatoes'),
    ('prepare_data.py', 'input=rotten_tomatoes-original', '{}/rotten_tomatoes-original'),
    ('train.py', f'load_checkpoint={GGUF}', f'gguf::{{}}/{GGUF}/SmolLM2-135M-Instruct.Q4_1.gguf'),
    ('serve.py', 'load_checkpoint=smollm2-135m', 'hf::{}/smollm2-135m'),
    ('train.py', 'tokenizer.vocab_file=open_llama_3b_v2', '{}/open_llama_3b_v2'),
])
def test_the_name_of_an_asset_is_understood_where_a_path_is(cache, program, argument, means):
    """As `fetch.py --list=True` says to use it; until it is fetched the command that fetches it is named."""
    name, _, asset = argument.partition('=')
    with pytest.raises(Mistake, match=f'{name}={asset!r} is not fetched: python fetch.py --name={asset}$'):
        parse.parse([program, f'--{argument}'], TABLES[program], '')
    (cache / asset).mkdir()
    config = parse.parse([program, f'--{argument}'], TABLES[program], '')
    assert parse.value_of(config, name) == means.format(cache)


def test_a_file_of_an_asset_s_name_goes_before_the_asset(cache):
    """And what is written is never an asset."""
    (cache / 'rotten_tomatoes').mkdir()
    pathlib.Path('rotten_tomatoes').mkdir()
    config = parse.parse(['prepare_data.py', '--input=rotten_tomatoes', '--output=smollm2-135m'], flags.PREPARE, '')
    assert (config.input, config.output) == ('rotten_tomatoes', 'smollm2-135m')


@pytest.mark.parametrize('name', ASSETS)
def test_what_fetch_says_of_an_asset_s_use_is_a_flag_that_takes_its_name(cache, name):
    """The flag of each asset's `use` line, given its name, means that line."""
    (cache / name).mkdir()
    flag, _, path = ASSETS[name].use.removeprefix('--').split()[0].partition('=')
    config = parse.parse(['evaluate.py', f'--{flag}={name}'], flags.EVALUATE, '')
    assert config[flag] == path.format(path=cache / name)


# ---------------------------------------------------------------- help


def printed_help(capsys, program, argument):
    with pytest.raises(SystemExit) as exit:
        parse.parse([program, argument], TABLES[program], 'What it does.')
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('program', TABLES)
def test_help_begins_with_what_most_people_use_and_names_each_flag_once(capsys, program):
    """About a dozen, --config first; what we do not follow of EasyLM's comes last."""
    text = printed_help(capsys, program, '--help')
    names = [line.split('=')[0].removeprefix('  --') for line in text.splitlines() if line.startswith('  --')]
    assert sorted(names) == sorted(flag.name for flag in flags.COMMON + TABLES[program])
    most = text.split('\n\n')[2].splitlines()
    used = [line.split('=')[0].removeprefix('  --') for line in most if line.startswith('  --')]
    assert most[0] == 'most used' and 3 <= len(used) <= 15 and used[0] == 'config'
    assert used == [name for name in flags.MOST_USED if name in used]
    refused = [flag.name for flag in TABLES[program] if flag.only]
    assert names[len(names) - len(refused):] == refused


def test_help_is_grouped_and_shows_ranges(capsys):
    text = printed_help(capsys, 'train.py', '--help')
    assert '\n\nseveral hosts\n  --jax_distributed.initialize_jax_distributed=bool  (default False)\n' in text
    assert '\n  --log_freq=int at least 1  (default 50)\n' in text and '--load_checkpoint=path|asset' in text


def test_every_name_among_the_most_used_is_a_flag():
    known = {flag.name for table in TABLES.values() for flag in flags.COMMON + table}
    assert set(flags.MOST_USED) <= known


@pytest.mark.parametrize('word', ['warmup', 'WARMUP', 'learning rate'])
def test_help_about_a_word_shows_only_flags_that_have_it(capsys, word):
    """In their name or in their text, in either case."""
    text = printed_help(capsys, 'train.py', f'--help={word}')
    names = {line.split('=')[0].removeprefix('  --') for line in text.splitlines() if line.startswith('  --')}
    assert names == {flag.name for flag in flags.TRAIN if word.lower() in (flag.name + ' ' + flag.help).lower()}
    assert 3 < len(names) < 10 and 'What it does.' not in text
    assert printed_help(capsys, 'train.py', '--help=xyzzy').startswith("no flag has 'xyzzy'")


@pytest.mark.parametrize('given, meant', [
    ('lr', '--optimizer.adamw_optimizer.lr or --optimizer.palm_optimizer.lr?'),
    ('output_dirr', '--logger.output_dir?'), ('optimizer.adamw_optimizr.lr', '--optimizer.adamw_optimizer.lr?'),
    ('learning_rate', '--optimizer.adamw_optimizer.init_lr or --optimizer.adamw_optimizer.lr or ')])
def test_an_unknown_flag_is_answered_with_those_of_its_last_part_or_meaning(given, meant):
    with pytest.raises(Mistake) as error:
        parse.parse(['train.py', f'--{given}=1'], flags.TRAIN, '')
    assert str(error.value).startswith(f'unknown flag --{given}: did you mean {meant}')


# ---------------------------------------------------------------- ends


def ended(capsys, monkeypatch, raised, *arguments, table=TABLE):
    """(exit code, lines on standard error) of a program whose main raises `raised`."""
    def main(config):
        raise raised
    monkeypatch.setattr('sys.argv', ['/x/program.py', *arguments])
    with pytest.raises(SystemExit) as exit:
        parse.run(main, table)
    return exit.value.code, capsys.readouterr().err.splitlines()


def test_a_mistake_is_one_line_and_every_other_error_keeps_its_traceback(capsys, monkeypatch):
    """Exit code 2 for a Mistake, 1 for numbers that are not finite, 130 for Ctrl-C; a ValueError is a fault of ours."""
    assert ended(capsys, monkeypatch, Mistake('a=1 is\nwrong')) == (2, ['program.py: a=1 is wrong'])
    assert ended(capsys, monkeypatch, FloatingPointError('step 3')) == (1, ['program.py: step 3'])
    assert ended(capsys, monkeypatch, KeyboardInterrupt()) == (130, ['program.py: interrupted'])
    with pytest.raises(ValueError, match='shapes'):
        ended(capsys, monkeypatch, ValueError('shapes'))


@pytest.mark.parametrize('spelled', ['--show_traceback', '--show_traceback=true', '--show_traceback=1', 'recipe'])
def test_the_traceback_is_shown_however_the_flag_is_spelled(capsys, monkeypatch, recipe, spelled):
    argument = recipe("{'show_traceback': True}") if spelled == 'recipe' else spelled
    code, lines = ended(capsys, monkeypatch, Mistake('a=1'), argument)
    assert code == 2 and lines[0].startswith('Traceback') and lines[-1] == 'program.py: a=1'


@pytest.mark.parametrize('value, shown', [('true', True), ('1', True), ('False', False)])
def test_the_traceback_of_a_mistake_in_the_flags_themselves(capsys, monkeypatch, value, shown):
    _, lines = ended(capsys, monkeypatch, None, f'--show_traceback={value}', '--a.steps=x')
    assert lines[-1].startswith('program.py: flag --a.steps=x') and (lines[0].startswith('Traceback')) == shown


def test_an_error_of_a_file_names_the_file_and_the_flag_that_led_there(capsys, monkeypatch, tmp_path):
    """The system's own message names the file alone, and on a full disk nothing."""
    monkeypatch.chdir(tmp_path)
    table = (Flag('out.dir', '', '', path='write'), Flag('input', '', '', path='read'), Flag('other', '', ''))
    arguments = '--out.dir=runs/a', '--input=gguf::runs/in', '--other=runs/a'
    denied = PermissionError(errno.EACCES, 'Permission denied', 'runs/a/step_1')
    assert ended(capsys, monkeypatch, denied, *arguments, table=table) == (
        2, ['program.py: runs/a/step_1: Permission denied (--out.dir=runs/a)'])
    missing = FileNotFoundError(errno.ENOENT, 'No such file or directory', str(tmp_path / 'runs/in'))
    assert ended(capsys, monkeypatch, missing, *arguments, table=table)[1] == [
        f'program.py: {tmp_path}/runs/in: No such file or directory (--input=gguf::runs/in)']
    full = OSError(errno.ENOSPC, 'No space left on device')
    assert ended(capsys, monkeypatch, full, *arguments, table=table)[1] == [
        'program.py: No space left on device (--out.dir=runs/a)']
    unrelated = OSError(errno.ENOENT, 'No such file or directory', 'runs/ab')
    assert ended(capsys, monkeypatch, unrelated, *arguments, table=table)[1] == [
        'program.py: runs/ab: No such file or directory']
    assert ended(capsys, monkeypatch, ConnectionError('no answer'), *arguments, table=table)[1] == [
        'program.py: no answer']


# ---------------------------------------------------------------- adapters


def lora(*arguments):
    config = parse.parse(['train.py', *arguments], flags.TRAIN, '')
    return settings.read_lora(config, settings.read_compute(config))


def test_the_flags_of_adapters_are_read_once():
    """None without a rank; alpha is twice the rank, the base as the products are, the seed the run's, unless said."""
    assert lora() is None
    assert lora('--lora.rank=16', '--dtype=bf16', '--seed=3') == Lora(16, 32.0, base_dtype='bf16', seed=3)
    assert lora('--lora.rank=4', '--lora.alpha=2', '--lora.targets=w_down, w_q', '--lora.base_dtype=int8',
                '--lora.rslora', '--lora.dropout=0.1') == Lora(4, 2.0, ('w_down', 'w_q'), 0.1, True, 'int8', 42)


@pytest.mark.parametrize('arguments, says', [
    (['--lora.targets=w_q,w_qq', '--lora.rank=4'], r"'w_qq' is no matrix of a layer \(did you mean w_q\?\)"),
    (['--lora.base_dtype=int8'], "lora.base_dtype='int8' has no effect where lora.rank=0"),
    (['--lora.rank=-1'], 'lora.rank=-1 must be at least 0'), (['--lora.dropout=1'], 'lora.dropout=1.0 must be'),
])
def test_wrong_flags_of_adapters_are_refused(arguments, says):
    with pytest.raises(Mistake, match=says):
        lora(*arguments)
