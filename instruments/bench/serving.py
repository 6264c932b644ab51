"""Load our server, llama.cpp's and transformers' generate with the same weights, one at a time, on loopback.

    python -m instruments.bench.serving --checkpoint=gguf::model.gguf --text=reviews.jsonl --output=runs/serving
    python -m instruments.bench.serving ... --contenders=ours:f32,llama-server:F32,transformers:8 --mixes=M1

Contenders: ours:f32, ours:bf16, ours:int8; llama-server:F32, :F16, :Q8_0 (--llama_server); llama_cpp:F32, :F16, :Q8_0
(--llama_python); transformers:1, transformers:8 (--torch_python).  GGUF files of each type and a Hugging Face directory
are written from the checkpoint into --output first.  Mixes: M1 to M9 (serving_mixes.py).  All get the same token ids,
greedy, with a fixed number of new tokens; EOS is ignored.

Rows are appended to OUTPUT/rows.jsonl as they finish, each with what the machine could do before and after it; the same
command goes on where they stand.  The order of the contenders turns round every repeat (ABBA).  At the end, or with
--report alone, OUTPUT/serving.json (medians and ranges: copy it to docs/figures), serving.md and serving.png.
"""
import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import signal
import subprocess
import sys

from absl import app, flags

from data.tables import rows as rows_of
from instruments.bench import serving_report
from instruments.bench.contenders import huggingface, llama, ours
from instruments.bench.contenders.contender import ROOT, Contender, Running, Settings
from instruments.bench.serving_machine import machine
from instruments.bench.serving_mixes import MIXES, Bench, capacity_of, start, warm
from mistake import Mistake

FLAGS = flags.FLAGS
DEFAULT = ('ours:f32,llama-server:F32,transformers:1,transformers:8,ours:bf16,llama-server:F16,ours:int8,'
           'llama-server:Q8_0')


def main(argv) -> None:
    if len(argv) > 1:
        raise Mistake(f'{argv[1:]=}: every argument is a flag, --name=value')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contender ends with us
    output = pathlib.Path(FLAGS.output)
    mixes = FLAGS.mixes.split(',')
    if unknown := sorted(set(mixes) - set(MIXES)):
        raise Mistake(f'mixes={FLAGS.mixes!r} names {unknown}: use a comma list of {", ".join(MIXES)}')
    output.mkdir(parents=True, exist_ok=True)
    file = output / 'rows.jsonl'
    if not FLAGS.report:
        run(output, file, mixes)
    serving_report.write(read(file), output, about(file))


def run(output: pathlib.Path, file: pathlib.Path, mixes: list[str]) -> None:
    """Run what has no row yet."""
    source, decode, weights, eos = open_checkpoint(FLAGS.checkpoint)
    contenders = [make(name, output, eos) for name in FLAGS.contenders.split(',')]
    texts = [row['text'] for _, row in rows_of(pathlib.Path(FLAGS.text))]
    bench = Bench(source('\n'.join(texts[:4000])), decode, weights, 0.0, FLAGS.minutes / 5, {}, texts)
    settings = Settings(slots=FLAGS.slots, length=FLAGS.seq_length, input_length=FLAGS.input_length,
                        threads=FLAGS.threads)
    for repeat in range(FLAGS.repeats):
        for contender in contenders[::-1] if repeat % 2 else contenders:
            done = {row['mix'] for row in read(file) if (row['contender'], row['repeat']) == (contender.name, repeat)}
            todo = [mix for mix in mixes if mix in contender.mixes and mix not in done]
            if {'M3', 'M7'} & set(todo) and 'M2' not in {*done, *todo}:
                todo = ['M2', *todo]  # their rate is a share of its throughput
            if todo:
                measure(bench, contender, settings, todo, repeat, file)


def measure(bench: Bench, contender: Contender, settings: Settings, mixes: list[str], repeat: int,
            file: pathlib.Path) -> None:
    """The mixes of one contender; a fault of it is a row with its words, and the next mix begins with a new process."""
    with contextlib.ExitStack() as stack:
        up = None
        for mix in sorted(mixes):
            before = machine()
            bench.read_gb_s = before['read_gb_s']
            if mix in ('M3', 'M7'):
                batch = [row for row in read(file) if (row['contender'], row['repeat'], row['mix']) == (
                    contender.name, repeat, 'M2') and 'total_token_throughput' in row]
                if not batch:
                    continue
                bench.capacity[contender.name] = capacity_of(batch)
            try:
                if mix in ('M4', 'M9'):
                    stack.close()  # one at a time
                    up = None
                    found = start(bench, contender, settings) if mix == 'M9' else both(bench, contender, settings)
                else:
                    if up is None:
                        up = stack.enter_context(Running(contender, settings))
                        warm(bench, up)
                    found = MIXES[mix](bench, up)
            except (Mistake, OSError, IndexError) as error:
                found = [{'point': '', 'error': f'{type(error).__name__}: {error}'}]
                stack.close()
                up = None
            after = machine()
            with file.open('a', encoding='utf-8') as rows:
                for row in found:
                    row = {'contender': contender.name, 'bits': contender.bits, 'mix': mix, 'repeat': repeat, **row,
                           'minutes': FLAGS.minutes, 'before': before, 'after': after, 'commit': commit(),
                           'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}
                    rows.write(json.dumps(row) + '\n')
                    print(serving_report.line(row), flush=True)


def both(bench: Bench, contender: Contender, settings: Settings) -> list[dict]:
    """M4 with reuse and without."""
    found = []
    for reuse in (True, False):
        with Running(contender, Settings(**{**vars(settings), 'reuse': reuse})) as running:
            warm(bench, running)
            found += MIXES['M4'](bench, running)
    return found


# ---------------------------------------------------------------- what the flags say


def open_checkpoint(spec: str):
    """(text to ids, ids to text, number of weights, id of EOS) of a checkpoint."""
    import checkpoint
    from model.weights import weight_specs
    opened = checkpoint.open(spec)
    import jax
    count = sum(each.size for each in jax.tree.leaves(weight_specs(opened.config)))
    tokenizer = opened.tokenizer
    return tokenizer.encode, tokenizer.decode, count, opened.config.eos_token_id


def make(name: str, output: pathlib.Path, eos: int) -> Contender:
    """The contender of a name; files that it needs are written first."""
    kind, _, what = name.partition(':')
    if kind == 'ours' and what in ours.BITS:
        return ours.contender(what, FLAGS.checkpoint)
    if kind in ('llama-server', 'llama_cpp') and what in llama.TYPES:
        if not FLAGS.checkpoint.startswith('gguf::'):
            raise Mistake(f'checkpoint={FLAGS.checkpoint!r}: llama.cpp reads files written from a gguf:: checkpoint')
        flag, program = ('llama_server', FLAGS.llama_server) if kind == 'llama-server' else (
            'llama_python', FLAGS.llama_python)
        if not pathlib.Path(program).is_file():
            raise Mistake(f'{flag}={program!r} must be the program for contenders={name!r}: build llama.cpp, or leave '
                          'that contender out')
        file = str(llama.write(FLAGS.checkpoint.removeprefix('gguf::'), what, output / f'{what}.gguf').resolve())
        return llama.server(what, program, file) if kind == 'llama-server' else llama.python_server(
            what, program, file, eos)
    if kind == 'transformers' and what.isdigit() and int(what) > 0:
        directory = output / 'huggingface'
        if not directory.exists():
            subprocess.run([sys.executable, 'convert.py', f'--load_checkpoint={FLAGS.checkpoint}', '--format=hf',
                            f'--output={directory.resolve()}'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return huggingface.contender(FLAGS.torch_python, str(directory.resolve()), int(what))
    raise Mistake(f'contenders={FLAGS.contenders!r}: {name!r} is none of ours:{"|".join(ours.BITS)}, '
                  f'llama-server:{"|".join(llama.TYPES)}, llama_cpp:{"|".join(llama.TYPES)}, transformers:BATCH')


def read(file: pathlib.Path) -> list[dict]:
    """The rows so far; a last line that was cut off is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding='utf-8').split('\n')
    if lines[-1]:
        file.write_text('\n'.join([*lines[:-1], '']), encoding='utf-8')
    return [json.loads(line) for line in lines[:-1]]


def about(file: pathlib.Path) -> dict:
    """Command, machine, versions, date and commit, as every file of docs/figures says them."""
    rows = read(file)
    if not rows:
        raise Mistake(f'output={FLAGS.output!r} holds no rows yet: run without --report')
    cpu = rows[-1]['before']
    return {'command': 'make bench-serve', 'machine': f'{cpu["cores"]} cores of {cpu["cpu"]}, loopback',
            'versions': {name: importlib.metadata.version(name) for name in ('jax',)},
            'date': rows[-1]['date'][:10], 'commit': ', '.join(dict.fromkeys(row['commit'] for row in rows))}


def commit() -> str:
    found = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or 'unknown'


if __name__ == '__main__':
    flags.DEFINE_string('checkpoint', '', 'the weights: gguf::PATH')
    flags.DEFINE_string('text', '', 'JSON lines with `text`, from which prompts are cut')
    flags.DEFINE_string('contenders', DEFAULT, 'comma list, in the order in which they run')
    flags.DEFINE_string('mixes', ','.join(MIXES), 'comma list of M1 .. M9')
    flags.DEFINE_float('minutes', 5.0, 'of a rate of M3; the other mixes shrink with it', 0.05)
    flags.DEFINE_integer('repeats', 2, 'of everything, in turned order', 1)
    flags.DEFINE_integer('slots', 8, 'requests that run at once', 1)
    flags.DEFINE_integer('threads', 2, 'of llama.cpp and torch; XLA takes every CPU it may run on', 1)
    flags.DEFINE_integer('input_length', 1536, 'longest prompt', 64)
    flags.DEFINE_integer('seq_length', 1792, 'longest prompt with its answer', 128)
    flags.DEFINE_string('llama_server', 'llama-server', "llama.cpp's server, a path")
    flags.DEFINE_string('llama_python', sys.executable, 'the interpreter that has llama_cpp')
    flags.DEFINE_string('torch_python', sys.executable, 'the interpreter that has torch and transformers')
    flags.DEFINE_string('output', 'runs/serving', 'directory of the rows and the report')
    flags.DEFINE_boolean('report', False, 'only write the report of the rows that are there')
    try:
        app.run(main)
    except Mistake as error:
        raise SystemExit(f'serving: {error}') from None
