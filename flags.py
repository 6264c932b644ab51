"""Every flag of every program, once: name, default, help.  The README's table and `--help` are printed from here.

A program's table is a tuple of `Flag`s.  `run(main, TABLE)` reads the command line into a locked ConfigDict whose nesting
follows the dots of the names (`--optimizer.adamw_optimizer.lr=1e-3` is `config.optimizer.adamw_optimizer.lr`), calls
`main(config)`, and turns a caller's mistake (ValueError, OSError) into one line and exit code 2.

`--config=FILE.py` names a recipe (configs/): plain Python whose `get_config()` returns {flag name: default}.  A flag on the
command line wins over the recipe, the recipe over the table.
"""
import difflib
import importlib.util
import inspect
import sys
import traceback
from typing import Any, NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict


class Flag(NamedTuple):
    """One flag.  Its type is that of `default` (bool, int, float or str); `choices` restricts a str."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None


COMMON = (
    Flag('config', '', 'recipe with defaults for all flags: a file of configs/; a flag on the command line wins'),
    Flag('show_traceback', False, 'on an error print where it was raised, not only what it says'),
)

# ---------------------------------------------------------------- the programs' tables

ASSETS = (
    Flag('name', '', 'the asset to fetch (--list=True shows them)'),
    Flag('cache_dir', '', 'where fetched assets stand; else the environment variable PALLAMA_CACHE, else ~/.cache/pallama'),
    Flag('list', False, 'list the assets and stop'),
    Flag('verify', False, 'compare the SHA-256 of an asset that is already there, not only its sizes'),
)

# (one tuple per program stands here)

# ---------------------------------------------------------------- reading them


def parse(argv: list[str], table: tuple[Flag, ...], doc: str) -> ConfigDict:
    """The flags of `argv` (argv[0] is the program) as a locked ConfigDict.

    Raises ValueError for an unknown flag, a value of the wrong type or outside `choices`, a stray argument, and for a
    recipe with a key that is no flag.  `--help` prints `doc` and the table, and exits with 0.
    """
    table = COMMON + table
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
        raise ValueError(f'{error} (--help lists the flags)') from None
    if rest:
        raise ValueError(f'unexpected argument {rest[0]!r}: flags are written --name=value (--help lists them)')
    config = ConfigDict()
    for flag in table:
        *path, last = flag.name.split('.')
        node = config
        for part in path:
            if part not in node:
                node[part] = ConfigDict()
            node = node[part]
        node[last] = values[flag.name].value
    config.lock()
    return config


def run(main, table: tuple[Flag, ...]) -> None:
    """The body of every program's `if __name__ == '__main__'`: parse, call `main(config)`, exit.

    Exit code 0 when main returns, 2 after a caller's mistake (one line on standard error), 130 after Ctrl-C.  Other
    exceptions are faults of ours and keep their traceback.
    """
    program = sys.argv[0].rsplit('/', 1)[-1]
    try:
        main(parse(sys.argv, table, sys.modules['__main__'].__doc__))
    except (ValueError, OSError) as error:
        if '--show_traceback' in sys.argv or '--show_traceback=True' in sys.argv:
            traceback.print_exc()
        print(f'{program}: {" ".join(str(error).split())}', file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f'{program}: interrupted', file=sys.stderr)
        raise SystemExit(130) from None


def help_text(table: tuple[Flag, ...]) -> str:
    """The table as `--help` shows it: one flag a paragraph, with type, default and choices."""
    lines = []
    for flag in table:
        kind = '|'.join(flag.choices) if flag.choices else type(flag.default).__name__
        lines.append(f'  --{flag.name}={kind}  (default {flag.default!r})\n      {flag.help}')
    return '\n'.join(lines)


def _absl_flags(table) -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    for flag in table:
        common = dict(name=flag.name, default=flag.default, help=flag.help, flag_values=values)
        if flag.choices:
            absl_flags.DEFINE_enum(enum_values=list(flag.choices), **common)
        else:
            define = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float,
                      str: absl_flags.DEFINE_string}[type(flag.default)]
            define(**common)
    return values


def _apply_recipe(values: absl_flags.FlagValues, table, path: str) -> None:
    if not path.endswith('.py'):
        raise ValueError(f'config={path!r} must name a Python file with get_config(), for example configs/quickstart.py')
    with open(path, encoding='utf-8'):  # a clear "No such file" before the import machinery's own message
        spec = importlib.util.spec_from_file_location('recipe', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise ValueError(f'config={path!r} defines no get_config()')
    types = {flag.name: type(flag.default) for flag in table}
    for name, default in module.get_config().items():
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            raise ValueError(f'{path}: {name!r} is no flag of this program' +
                             (f'; did you mean {close[0]!r}?' if close else ''))
        if type(default) is not types[name]:
            raise ValueError(f'{path}: {name}={default!r} must be {types[name].__name__}')
        values.set_default(name, default)
