"""The command line and a recipe, read into a locked ConfigDict; `--help`; docs/FLAGS.md.

`run(main, TABLE)` reads the command line by a table of flags.py into a ConfigDict whose nesting follows the dots of
the names (`--optimizer.adamw_optimizer.lr=1e-3` is `config.optimizer.adamw_optimizer.lr`), calls `main(config)`, and
turns the user's mistake (Mistake, OSError) into one line and exit code 2.

`--config=FILE.py` names a recipe (configs/): plain Python whose `get_config()` returns {flag name: default}.  A flag on
the command line wins over the recipe, the recipe over the table.
"""
import ast
import contextlib
import difflib
import errno
import functools
import importlib.util
import inspect
import os
import re
import sys
import traceback
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import ConfigDict

from mistake import Mistake
from program import flags
from program.assets import ASSETS, cache_directory
from program.flags import Flag

ONLY = "flags of EasyLM's that we do not follow: only the default is accepted"


def parse(argv: list[str], table: tuple[Flag, ...], doc: str) -> ConfigDict:
    """Read the flags of `argv` (argv[0] is the program) into a locked ConfigDict.

    Paths come with `~` expanded and with the names of assets replaced by where they stand in the cache.  Raises Mistake
    for an unknown flag, a value of the wrong type or outside the flag's choices or range, an asset that is not fetched,
    a stray argument, and for a recipe with a key that is no flag.  `--help` prints `doc` and the table, `--help=WORD`
    the flags that have WORD in their name or help; both exit with 0.
    """
    table = flags.COMMON + table
    for argument in argv[1:]:
        if argument in ('-h', '--help') or argument.startswith('--help='):
            about = argument.partition('=')[2]
            text = help_about(about, table) if about else f'{inspect.cleandoc(doc)}\n\n{help_text(table)}'
            with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
                print(text, flush=True)
            raise SystemExit(0)
    values = _absl_flags(table)
    try:
        values(argv, known_only=True)  # a first look, only to learn --config
        if values['config'].value:
            _apply_recipe(values, table, os.path.expanduser(values['config'].value))
        values.unparse_flags()
        rest = values(argv)[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise Mistake(f'unknown flag --{error.flagname}{_did_you_mean(error.flagname, table)} (--help lists the most '
                      'used, --help=WORD those about WORD)') from None
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
        node[last] = _checked(flag, values[flag.name].value)
    config.lock()
    return config


def run(main, table: tuple[Flag, ...]) -> None:
    """Be the body of a program's `if __name__ == '__main__'`: parse, call `main(config)`, exit.

    Exit code 0 when main returns, 2 after the user's mistake (one line on standard error, with --show_traceback the
    traceback before it), 1 after numbers that are not finite, 130 after Ctrl-C.  Other exceptions are faults of the
    code and keep their traceback.
    """
    program, config = sys.argv[0].rsplit('/', 1)[-1], None
    try:
        config = parse(sys.argv, table, sys.modules['__main__'].__doc__)
        main(config)
    except (Mistake, OSError) as error:
        if _shows_traceback(config):
            traceback.print_exc()
        text = _file_error(error, config, table) if isinstance(error, OSError) else str(error)
        print(f'{program}: {" ".join(text.split())}', file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f'{program}: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f'{program}: interrupted', file=sys.stderr)
        raise SystemExit(130) from None


def value_of(config: ConfigDict, name: str):
    """The value of the flag `name`, dots and all."""
    return functools.reduce(lambda node, part: node[part], name.split('.'), config)


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


# ---------------------------------------------------------------- values


def _checked(flag: Flag, value):
    """The value, its path expanded.  Raises Mistake for one that the flag's table line does not allow."""
    if isinstance(value, str) and re.search('(^|::)gs://', value):
        url = value.rpartition('::')[2]
        raise Mistake(f'{flag.name}={value!r}: cloud storage is not read or written; copy it first (gcloud storage cp '
                      f'-r {url} .) and give the local path')
    if flag.only and value != flag.default:
        raise Mistake(f'{flag.name}={value!r} must stay {flag.default!r}: {flag.only}')
    if flag.range and value is not None and not flag.in_range(value):
        default = '' if flag.default is None else f' for {flag.default!r}'
        raise Mistake(f'{flag.name}={value!r} must be {flag.range}: change --{flag.name}, or leave it out{default}')
    return _expanded(flag, value) if flag.path and value else value


def _expanded(flag: Flag, value: str) -> str:
    """The path with its `~` expanded, or where the asset of that name stands, as `fetch.py --list=True` says to use it.

    A file or directory of that name in the working directory goes before the asset.
    """
    if flag.path == 'asset' and value in ASSETS and not os.path.exists(value):
        directory, use = cache_directory() / value, f'--{flag.name}='
        if not directory.exists():
            raise Mistake(f'{flag.name}={value!r} is not fetched: python fetch.py --name={value}')
        how = ASSETS[value].use
        return how.removeprefix(use).split()[0].format(path=directory) if how.startswith(use) else str(directory)
    kind, separator, path = value.rpartition('::')
    return kind + separator + os.path.expanduser(path)


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
            raise Mistake(f'{path}: {name!r} is no flag of this program{_did_you_mean(name, table)}')
        if type(default) is not types[name]:
            raise Mistake(f'{path}: {name}={default!r} must be {types[name].__name__}')
        values.set_default(name, default)


def _did_you_mean(name: str, table) -> str:
    """Flags that may be meant: of the same last part, or a name or a help text like it."""
    last = {flag.name: flag.name.rpartition('.')[2] for flag in table}
    word = name.rpartition('.')[2]
    same = difflib.get_close_matches(word, last.values(), n=1)
    found = (difflib.get_close_matches(name, last, n=1, cutoff=0.9) or [known for known in last if last[known] in same]
             or difflib.get_close_matches(name, last, n=1)
             or [flag.name for flag in table if word.replace('_', ' ') in flag.help])
    return f': did you mean {" or ".join(f"--{known}" for known in found[:3])}?' if found else ''


# ---------------------------------------------------------------- errors


def _shows_traceback(config: ConfigDict | None) -> bool:
    """Whether --show_traceback is set, on the command line or, once that was understood (`config`), in the recipe."""
    if config is not None:
        return config.show_traceback
    values = _absl_flags(flags.COMMON)
    with contextlib.suppress(absl_flags.Error):
        values(sys.argv, known_only=True)
    return values['show_traceback'].value


def _file_error(error: OSError, config: ConfigDict | None, table) -> str:
    """The file, what went wrong, and the flag that led there: the one whose path the file lies at or below.

    The system names no file when a write does not fit; then every flag that says where to write is named.
    """
    full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    if config is None or not full and (error.filename is None or error.strerror is None):
        return str(error)
    given = {flag: value for flag in table if flag.path and (value := value_of(config, flag.name))}
    if full:
        return ' '.join([error.strerror, *(f'(--{flag.name}={value})' for flag, value in given.items()
                                           if flag.path == 'write')])
    file = os.path.abspath(os.fsdecode(error.filename))
    above = [flag for flag, value in given.items()
             if (file + os.sep).startswith(os.path.join(os.path.abspath(value.rpartition('::')[2]), ''))]
    return f'{os.fsdecode(error.filename)}: {error.strerror}' + ''.join(
        f' (--{flag.name}={given[flag]})' for flag in above)


# ---------------------------------------------------------------- --help and docs/FLAGS.md


def help_text(table: tuple[Flag, ...]) -> str:
    """The table as `--help` shows it: the flags that most people use, then the others by what they are about."""
    known = {flag.name: flag for flag in table}
    groups = {heading: [] for heading in ('most used', *flags.GROUPS, 'more', ONLY)}
    groups['most used'] = [known.pop(name) for name in flags.MOST_USED if name in known]
    for flag in known.values():
        fits = (heading for heading, begins in flags.GROUPS.items() if flag.name.startswith(begins))
        groups[ONLY if flag.only else next(fits, 'more')].append(flag)
    return f'{len(table)} flags, written --name=value; --help=WORD shows those about WORD' + ''.join(
        '\n'.join([f'\n\n{heading}', *map(_paragraph, members)]) for heading, members in groups.items() if members)


def help_about(word: str, table: tuple[Flag, ...]) -> str:
    """The flags that have `word` in their name or help, in either case."""
    found = [flag for flag in table if word.lower() in f'{flag.name} {flag.help}'.lower()]
    return '\n'.join(map(_paragraph, found)) or f'no flag has {word!r} in its name or help (--help lists all)'


def _paragraph(flag: Flag) -> str:
    kind = '|'.join(flag.choices) if flag.choices else flag.type.__name__
    if flag.path:
        kind = 'path|asset' if flag.path == 'asset' else 'path'
    only = f' (only {flag.default!r}: {flag.only})' if flag.only else ''
    return f'  --{flag.name}={kind} {flag.range}'.rstrip() + f'  (default {flag.default!r})\n      {flag.help}{only}'


def reference() -> str:
    """docs/FLAGS.md: the flags of all programs as Markdown tables."""
    lines = ['# Flags', '', 'Written by `python -m program.parse > docs/FLAGS.md`. Every program understands '
             '`--config=FILE.py`, `--show_traceback`, `--help` and `--help=WORD` too. A path may begin with `~`; where '
             'an asset is said, the name of one of `python fetch.py --list=True` does for the path.', '']
    tables = {'train.py': flags.TRAIN, 'plan.py': flags.PLAN, 'serve.py': flags.SERVE, 'evaluate.py': flags.EVALUATE,
              'client.py': flags.CLIENT, 'prepare_data.py': flags.PREPARE, 'convert.py': flags.CONVERT,
              'fetch.py': flags.ASSETS}
    for program, table in tables.items():
        lines += [f'## {program}', '| flag | default | meaning |', '|---|---|---|']
        for flag in table:
            choices = f' ({", ".join(repr(choice) for choice in flag.choices)})' if flag.choices else ''
            only = f' **Only this value**: {flag.only}.' if flag.only else ''
            limits = [flag.range, {'asset': 'a path or an asset'}.get(flag.path, flag.path and 'a path')]
            limits = ''.join(f' ({limit})' for limit in limits if limit)
            text = f'{flag.help}{choices}{limits}{only}'.replace('|', '\\|')
            lines.append(f'| `--{flag.name}` | `{flag.default!r}` | {text} |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(reference(), end='')
