"""The article's commands, exactly as it prints them, with the name of the program changed."""
import ast
import pathlib
import re
import shlex

import pytest

from model.config import LlamaConfig
from program import flags, parse, settings
from program.model import find_config

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = {'train': ('python3 -m EasyLM.models.llama.llama_train', flags.TRAIN),
            'serve': ('python3 -m EasyLM.models.llama.llama_serve', flags.SERVE)}


def printed(golden, name: str) -> list[str]:
    """The words of a command of the article; what follows a backslash on its line is the article's comment."""
    text = (golden / f'article/{name}.txt').read_text()
    before, _ = PROGRAMS[name]
    assert text.startswith(before)
    text = text.replace(before, f'{name}.py', 1)
    return shlex.split(re.sub(r'\\ *(#.*)?$', '', text, flags=re.MULTILINE).replace('\n', ' '))


@pytest.mark.parametrize('name, count', [('train', 22), ('serve', 3)])
def test_a_printed_command_is_understood_word_for_word(golden, name, count):
    """Each flag that the command gives has the value given; all others have the default of the table."""
    words, (_, table) = printed(golden, name), PROGRAMS[name]
    config = parse.parse(words, table, '')
    given = dict(word.removeprefix('--').split('=', 1) for word in words[1:])
    assert len(given) == count
    for flag in table:
        value = config
        for part in flag.name.split('.'):
            value = value[part]
        expected = flag.default
        if flag.name in given:
            text = given.pop(flag.name)
            expected = text if flag.type is str else ast.literal_eval(text)
        assert value == expected and type(value) is type(expected), flag.name
    assert not given


def test_the_printed_training_command_means_the_article_s_run(golden):
    """OpenLLaMA 3B on mesh 1,4,2, and the optimizer that multiplies by the parameters' scale at a constant rate."""
    config = parse.parse(printed(golden, 'train'), flags.TRAIN, '')
    sizes, compute = find_config(settings.read_load(config), None), settings.read_compute(config)
    assert sizes == LlamaConfig(32000, 3200, 8640, 26, 32, max_sequence_length=2048, rms_norm_eps=1e-6)
    assert not compute.remat_block and not compute.remat_attention and not compute.remat_mlp
    hyper, accumulate = settings.read_optimizer(config, config.total_steps)
    assert hyper.multiply_by_parameter_scale and hyper.bf16_momentum and (hyper.b1, hyper.b2) == (0.9, 0.9)
    assert [float(hyper.schedule(n)) for n in (0, 184, 1845)] == [0.0, pytest.approx(2e-4), pytest.approx(2e-4)]


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of a document."""
    table = re.search(rf'^#+ {re.escape(heading)}$.*?\n((?:\|[^\n]*\n)+)', text, re.DOTALL | re.MULTILINE).group(1)
    return [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]] for line in table.splitlines()[2:]]


def assert_tests_exist(cell: str) -> None:
    """Every `test_file: test_name` of a cell is a test that exists."""
    found = re.findall(r'(test_\w+): (test_\w+)', cell)
    assert found, cell
    for file, name in found:
        assert re.search(rf'^def {name}\(', (ROOT / f'tests/{file}.py').read_text(), re.MULTILINE), (file, name)


def test_the_table_lists_the_article_s_flags_with_the_default_and_help_of_flags_py(golden):
    """All flags of both commands stand in it, each with our default, our help, and tests that exist."""
    rows = rows_of((ROOT / 'docs/EASYLM.md').read_text(), "The article's flags and requests")
    flag_rows = {row[0].strip('`').removeprefix('--'): row[1:] for row in rows if row[0].startswith('`--')}
    given = {word.removeprefix('--').split('=', 1)[0] for name in PROGRAMS for word in printed(golden, name)[1:]}
    assert set(flag_rows) == given
    known = {flag.name: flag for flag in flags.SERVE + flags.TRAIN}
    for name, (default, text, tests) in flag_rows.items():
        assert default == f'`{known[name].default!r}`' and text == known[name].help.replace('|', '\\|'), name
        assert_tests_exist(tests)


def test_the_documents_list_every_endpoint():
    """EasyLM's stand in EASYLM.md with the tests that compare, all others in SERVING.md; none is listed that is not."""
    rows = rows_of((ROOT / 'docs/EASYLM.md').read_text(), "The article's flags and requests")
    easylm = {row[0].strip('`'): row for row in rows if not row[0].startswith('`--')}
    for row in easylm.values():
        assert_tests_exist(row[-1])
    sources = ''.join((ROOT / 'serving' / name).read_text() for name in ('api.py', 'openai.py'))
    served = {'GET /'} | {f'{method.upper()} {path}'
                          for method, path in re.findall(r"@app\.(get|post)\('(/[\w/-]*)'", sources)}
    assert set(easylm) <= served and len(served) > 10
    named = set(re.findall(r'`(/[\w/.-]*)`', (ROOT / 'docs/SERVING.md').read_text()))
    assert named - {'/openapi.json'} == {row.split()[1] for row in served} - {'/', '/info'}


def test_the_flag_reference_is_what_flags_py_says():
    """docs/FLAGS.md is the output of `python -m program.parse`."""
    assert (ROOT / 'docs/FLAGS.md').read_text() == parse.reference()
