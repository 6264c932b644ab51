"""The house as it is meant to stand: imports go one way, and what the README says of the tree is true."""
import ast
import pathlib
import re
import shlex

import pytest

from program import flags, parse
from program.assets import ASSETS

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = {  # room -> the rooms it may import from; programs may import everything
    'kernels': set(),
    'data': set(),
    'hosts': set(),
    'model': {'kernels'},
    'checkpoint': {'model', 'data', 'hosts'},
    'evaluation': {'data'},
    'serving': {'model', 'data', 'kernels'},
    'training': {'model', 'data'},
    # nothing imports it but programs
    'instruments': {'kernels', 'model', 'data', 'training', 'serving', 'checkpoint', 'evaluation', 'program'},
    'program': {'model', 'data', 'hosts', 'checkpoint', 'training', 'serving', 'evaluation'},
    'configs': set(),
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob('*.py') if path.stem != '__init__')
PROGRAMS = sorted(ROOT.glob('*.py'))
ENTRY_POINTS = {path.stem for path in PROGRAMS} - {'mistake'}


def imported(path: pathlib.Path) -> set[str]:
    """The first names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: relative import'
            names.add(node.module.split('.')[0])
    return names


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """A room imports itself and the rooms below it, never a program; data and evaluation do without JAX."""
    room, names = path.relative_to(ROOT).parts[0], imported(path)
    assert names & (set(ROOMS) | ENTRY_POINTS) <= ROOMS[room] | {room}
    assert room not in ('data', 'evaluation') or 'jax' not in names
    assert path != ROOT / 'training/optimizer.py' or 'llama' not in path.read_text().replace('llama.py', '')


@pytest.mark.parametrize('path', SOURCES + PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates_strings(path):
    tree = ast.parse(path.read_text())
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not imported(path) & {'pickle', 'cloudpickle', 'dill', 'shelve', 'marshal'} and not calls & {'eval', 'exec'}


DOCUMENTS = ['README.md', 'BUILD.md', *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('docs/*.md'))]
TABLES = {'prepare_data.py': flags.PREPARE, 'train.py': flags.TRAIN, 'serve.py': flags.SERVE, 'plan.py': flags.PLAN,
          'evaluate.py': flags.EVALUATE, 'fetch.py': flags.ASSETS, 'convert.py': flags.CONVERT,
          'client.py': flags.CLIENT}


@pytest.mark.parametrize('text', [*DOCUMENTS, 'quickstart.sh'])
def test_printed_commands_have_flags_that_exist(text, tmp_path, monkeypatch):
    """Every `python PROGRAM.py` of the documents and of the quickstart is understood by that program; one that leaves
    something out (…) has flags that exist."""
    monkeypatch.setenv('PALLAMA_CACHE', str(tmp_path))
    for name in ASSETS:  # as if they were fetched
        (tmp_path / name).mkdir()
    joined = (ROOT / text).read_text().replace('\\\n', ' ').replace('"$@"', '')
    found = re.findall(r'(?:python|"\$PYTHON"|\$PYTHON) (\w+\.py)((?: +(?:--|…)[^`#&\n]*)?)', joined)
    assert found or text not in ('README.md', 'BUILD.md', 'docs/EASYLM.md', 'docs/PLANNING.md', 'quickstart.sh')
    for program, arguments in found:
        known = {flag.name for flag in TABLES[program]}
        # what follows the closing quote of a command inside another one is not the program's
        words = [word.replace('$RECIPE', str(ROOT / 'configs/quickstart.py')) for word in shlex.split(
            arguments if arguments.count("'") % 2 == 0 else arguments.rsplit("'", 1)[0])]
        if '…' in words:
            words.remove('…')
            assert {word.removeprefix('--').split('=')[0] for word in words} <= known, (program, words)
        elif words != ['--help']:
            parse.parse([program, *words], TABLES[program], '')


@pytest.mark.parametrize('text', [*DOCUMENTS, 'quickstart.sh', '.ci/run'])
def test_printed_make_targets_exist(text):
    rules = re.findall(r'^([\w -]+):(?!=)', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r'(?:^|`)make ([\w-]+)', (ROOT / text).read_text(), re.MULTILINE)) <= targets


def test_the_readme_names_files_that_exist_and_every_room():
    """Every path that it names exists, every room has its line in the tree, and every program is named."""
    text = (ROOT / 'README.md').read_text()
    tree = re.search(r'## The house\n.*?```\n(.*?)```', text, re.DOTALL).group(1)
    rooms = set(re.findall(r'^(\w+)/ ', tree, re.MULTILINE))
    assert rooms == {path.parent.name for path in ROOT.glob('*/__init__.py')} == set(ROOMS)
    named = set(re.findall(r'`((?:\w+/)*\w+\.(?:py|md))`|\]\(([\w./]+)\)', text))
    missing = {name for pair in named for name in pair if name and not (ROOT / name).exists()}
    assert not missing
    assert {f'{name}.py' for name in ENTRY_POINTS} <= set(re.findall(r'`(\w+\.py)`', text))


CORE = 'model', 'kernels', 'data', 'checkpoint', 'hosts', 'evaluation', 'serving', 'training'


@pytest.mark.parametrize('room', CORE)
def test_docstrings_begin_with_what_the_code_does(room):
    """No public function, class or module of the core opens with "What ", "Of ", "With " or "The same"."""
    poor = []
    for path in sorted((ROOT / room).rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = getattr(node, 'name', '')
                if not name.startswith('_') and re.match('(What|Of|With|The same) ', ast.get_docstring(node) or ''):
                    poor.append(f'{path.relative_to(ROOT)} {name}')
    assert not poor
