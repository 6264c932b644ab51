"""The command line and a recipe, read into a locked ConfigDict; `--help`; docs/FLAGS.md.

`run(main, TABLE)` reads the command line by a table of flags.py into a ConfigDict whose nesting follows the dots of
the names (`--optimizer.adamw_optimizer.lr=1e-3` is `config.optimizer.adamw_optimizer.lr`), calls `main(config)`, and
turns the user's mistake (Mistake, OSError) into one line and exit code 2.

`--config=FILE.py` names a recipe (configs/): plain Python whose `get_config()` returns {flag name: default}.  A flag on
the command line wins over the recipe, the recipe over the table.
"""
import ast
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import ConfigDict

from mistake import Mistake
from program import flags
from program.flags import Flag


def parse(argv: list[str], table: tuple[Flag, ...], doc: str) -> ConfigDict:
    """The flags of `argv` (argv[0] is the program) as a locked ConfigDict.

    Raises Mistake for an unknown flag, a value of the wrong type or outside `choices`, a stray argument, and for a
    recipe with a key that is no flag.  `--help` prints `doc` and the table, and exits with 0.
    """
    table = flags.COMMON + table
    if '--help' in argv[1:] or '-h' in argv[1:]:
        print(inspect.cleandoc(doc) + '\n\n' + help_text(table))
        raise SystemExit(0)
    values = _absl_flags(table)
    try:
        values(argv, known_only=True)  # a first look, only to learn --config
        if values['config'].value:
            _apply_recipe(values, table, values['config'].value)
        values.unparse_flags()
        rest = values(argv)[1:]
    except absl_flags.Error as error:
        raise Mistake(f'{error} (--help lists the flags)') from None
    if rest:
        raise Mistake(f'unexpected argument {rest[0]!r}: flags are written --name=value (--help lists them)')
    config = ConfigDict()
    for flag in table:
        *path, last = flag.name.split('.')
        node = config
        for part in path:
            if part not in node:
                node[part] = ConfigDict()
            node = node[part]
        node[last] = values[flag.name].value
        if isinstance(node[last], str) and re.search('(^|::)gs://', node[last]):
            url = node[last].rpartition('::')[2]
            raise Mistake(f'{flag.name}={node[last]!r}: cloud storage is not read or written; copy it first (gcloud '
                             f'storage cp -r {url} .) and give the local path')
        if flag.only and node[last] != flag.default:
            raise Mistake(f'{flag.name}={node[last]!r} must stay {flag.default!r}: {flag.only}')
    config.lock()
    return config


def run(main, table: tuple[Flag, ...]) -> None:
    """The body of every program's `if __name__ == '__main__'`: parse, call `main(config)`, exit.

    Exit code 0 when main returns, 2 after a caller's mistake (one line on standard error), 1 after numbers that are not
    finite, 130 after Ctrl-C.  Other exceptions are faults of ours and keep their traceback.
    """
    program = sys.argv[0].rsplit('/', 1)[-1]
    try:
        main(parse(sys.argv, table, sys.modules['__main__'].__doc__))
    except (Mistake, OSError) as error:
        if '--show_traceback' in sys.argv or '--show_traceback=True' in sys.argv:
            traceback.print_exc()
        print(f'{program}: {" ".join(str(error).split())}', file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f'{program}: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f'{program}: interrupted', file=sys.stderr)
        raise SystemExit(130) from None


def literals(name: str, text: str) -> dict:
    """`dict(a=1, b='x')` or `{'a': 1, 'b': 'x'}` as a dict; the text is parsed, never evaluated.

    Raises Mistake, naming flag `name`, for anything that is not keys with literal values.
    """
    try:
        node = ast.parse(text.strip() or '{}', mode='eval').body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
            node = ast.Dict([ast.Constant(pair.arg) for pair in node.keywords], [pair.value for pair in node.keywords])
        values = ast.literal_eval(node)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise Mistake(f"{name}={text!r} must be names with literal values: dict(max_sequence_length=4096)")
    return values


def help_text(table: tuple[Flag, ...]) -> str:
    """The table as `--help` shows it: one flag a paragraph, with type, default and choices."""
    lines = []
    for flag in table:
        kind = '|'.join(flag.choices) if flag.choices else flag.type.__name__
        only = f' (only {flag.default!r}: {flag.only})' if flag.only else ''
        lines.append(f'  --{flag.name}={kind}  (default {flag.default!r})\n      {flag.help}{only}')
    return '\n'.join(lines)


def _absl_flags(table) -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    for flag in table:
        common = dict(name=flag.name, default=flag.default, help=flag.help, flag_values=values)
        if flag.choices:
            absl_flags.DEFINE_enum(enum_values=list(flag.choices), **common)
        else:
            define = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float,
                      str: absl_flags.DEFINE_string}[flag.type]
            define(**common)
    return values


def _apply_recipe(values: absl_flags.FlagValues, table, path: str) -> None:
    if not path.endswith('.py'):
        raise Mistake(f'config={path!r} must be a Python file with get_config(), for example configs/quickstart.py')
    if not Path(path).is_file():
        raise Mistake(f'config={path!r} does not exist: give a recipe of configs/, or leave --config out')
    spec = importlib.util.spec_from_file_location('recipe', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise Mistake(f'config={path!r} defines no get_config()')
    types = {flag.name: flag.type for flag in table}
    means = {name: flag.name for flag in table for name in flag.recipe}
    elsewhere = {flag.name for flag in flags.TRAIN} if means else set()
    for name, default in module.get_config().items():
        name = means.get(name, name)
        if name in elsewhere - set(types):
            continue
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            raise Mistake(f'{path}: {name!r} is no flag of this program' +
                             (f'; did you mean {close[0]!r}?' if close else ''))
        if type(default) is not types[name]:
            raise Mistake(f'{path}: {name}={default!r} must be {types[name].__name__}')
        values.set_default(name, default)


def reference() -> str:
    """docs/FLAGS.md: the flags of all programs as Markdown tables."""
    lines = ['# Flags', '', 'Written by `python -m program.parse > docs/FLAGS.md`. Every program understands '
             '`--config=FILE.py` and `--show_traceback` too.', '']
    tables = {'train.py': flags.TRAIN, 'plan.py': flags.PLAN, 'serve.py': flags.SERVE, 'evaluate.py': flags.EVALUATE,
              'prepare_data.py': flags.PREPARE, 'convert.py': flags.CONVERT, 'fetch.py': flags.ASSETS}
    for program, table in tables.items():
        lines += [f'## {program}', '| flag | default | meaning |', '|---|---|---|']
        for flag in table:
            choices = f' ({", ".join(repr(choice) for choice in flag.choices)})' if flag.choices else ''
            only = f' **Only this value**: {flag.only}.' if flag.only else ''
            text = f'{flag.help}{choices}{only}'.replace('|', '\\|')
            lines.append(f'| `--{flag.name}` | `{flag.default!r}` | {text} |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(reference(), end='')
