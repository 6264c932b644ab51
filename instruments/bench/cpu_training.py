"""Time training steps of ours on the CPU beside a plain loop of transformers and torch, in turns, in one run.

    python -m instruments.bench.cpu_training                     # SmolLM2-135M, float32, random weights
    python -m instruments.bench.cpu_training --loss=all --torch_python=/path/to/python --output=runs/benchmark_cpu.json
    python -m instruments.bench.cpu_training \
        --variant=ynn:--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT

Each side is a process of its own, because jax and torch each keep a pool of threads: ours is this program started with
--child, theirs is torch_loop.py beside it (extra `oracle`).  JSON lines on their stdin and stdout tell them what to
train and then to run so many steps, while the others wait.  The first turn warms up (ours compiles in it) and is not
counted; then the order of the sides turns round every turn, so that a machine that grows slower favours neither.

Both do the same work: the same records, AdamW with the gradient's norm clipped to 1, every weight updated in float32.
They must report the same number of weights and of tokens.  What still differs: ours logs accuracy and the norm of the
weights too, computes logits at the positions with loss only, and takes the mean over rows, not over tokens.

Times are the wall clock of the steps alone.  Tokens are real ones, without padding.  A ratio is our time over theirs
of the same turn: below 1, ours is faster.
"""
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from absl import flags

from data.batches import Batch
from instruments.bench import command_line
from mistake import Mistake
from model.config import MODELS, Compute, LlamaConfig, config_from_dict, config_to_dict
from model.partition import make_mesh
from model.weights import init_params
from training import step
from training.loop import put
from training.optimizer import AdamW
from training.state import init_state

ROOT = pathlib.Path(__file__).parent.parent.parent
TORCH_LOOP = ROOT / 'instruments/bench/torch_loop.py'
LOSSES = 'answer', 'all'
SHORTEST = 20  # tokens; a film review has 20 to 40
HYPER = AdamW(init_lr=1e-4, lr=1e-4, end_lr=1e-4, lr_warmup_steps=0, clip_gradient=1.0, weight_decay=1e-4)


# ---------------------------------------------------------------- what is trained

def make_records(batches: int, batch_size: int, length: int, vocab_size: int, seed: int = 0) -> list:
    """Draw random tokens [batch][row][n + 1], with n from SHORTEST (or from `length`, if that is less) to `length`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(min(SHORTEST, length), length + 1, (batches, batch_size))
    return [[rng.integers(0, vocab_size, n + 1).tolist() for n in row] for row in lengths]


def make_batch(records: list[list[int]], length: int, loss: str) -> Batch:
    """Pack the records as data/rows.py does, T = `length`: loss on the last token only ('answer'), or on 'all'."""
    B = len(records)
    P = 1 if loss == 'answer' else length
    tokens_BT, segments_BT = np.zeros((B, length), np.int32), np.zeros((B, length), np.int32)
    positions_BP, targets_BP = np.zeros((B, P), np.int32), np.zeros((B, P), np.int32)
    loss_mask_BP = np.zeros((B, P), np.float32)
    for b, tokens in enumerate(records):
        n = len(tokens) - 1
        tokens_BT[b, :n], segments_BT[b, :n] = tokens[:-1], 1
        positions = np.arange(n)[-P:]
        positions_BP[b, :len(positions)] = positions
        targets_BP[b, :len(positions)] = np.array(tokens)[positions + 1]
        loss_mask_BP[b, :len(positions)] = 1
    return Batch(tokens_BT, segments_BT, positions_BP, targets_BP, loss_mask_BP, np.ones(B, np.float32))


def make_work(config: LlamaConfig, batches: int, batch_size: int, length: int, loss: str, threads: int) -> dict:
    """Write down what a child is told first, JSON-ready."""
    return dict(config=config_to_dict(config), records=make_records(batches, batch_size, length, config.vocab_size),
                length=length, loss=loss, threads=threads, lr=HYPER.lr, betas=[HYPER.b1, HYPER.b2],
                weight_decay=HYPER.weight_decay, clip_gradient=HYPER.clip_gradient)


# ---------------------------------------------------------------- our side, a process

def child() -> None:
    """Read the work, answer {versions, parameters, tokens}; then answer each {"steps": n} by {seconds, loss}."""
    line = sys.stdin.readline()
    if not line:
        return  # the parent stopped before it began: another side could not start
    work = json.loads(line)
    config = config_from_dict(work['config'], source='--child')
    mesh = make_mesh('1,1,1', jax.devices()[:1])
    params = init_params(config, mesh, seed=0)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    state = init_state(params, config, HYPER, 1, mesh)
    train_step = step.make_train_step(config, Compute('fp32', 'reference'), HYPER, 1, mesh)
    batches = [make_batch(records, work['length'], work['loss']) for records in work['records']]
    answer(versions=dict(jax=jax.__version__), parameters=parameters,
           tokens=[int(np.count_nonzero(batch.segments_BT)) for batch in batches])
    batches = [put(batch, mesh) for batch in batches]
    for line in sys.stdin:
        began = time.perf_counter()
        for n in range(json.loads(line)['steps']):
            state, metrics = train_step(state, batches[n])
        jax.block_until_ready((state, metrics))
        answer(seconds=time.perf_counter() - began, loss=float(metrics['loss']))


def answer(**values) -> None:
    print(json.dumps(values), flush=True)


# ---------------------------------------------------------------- the parent

class Child:
    """Hold a process that answers each JSON line with one; it ends with its stdin, at the end of the `with`."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name = name
        self._process = subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # what a child that died did not read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, message: dict) -> dict:
        """Send a message, return the answer.  Raises Mistake where the child ends, or answers {"error": ...}."""
        with contextlib.suppress(BrokenPipeError):  # it ended: the empty line below says so
            self._process.stdin.write(json.dumps(message) + '\n')
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Mistake(f'{self.name}: the process ended with exit code {self._process.wait()} before it '
                             'answered; its own message stands above')
        reply = json.loads(line)
        if 'error' in reply:
            raise Mistake(f'{self.name}: {reply["error"]}')
        return reply


def take_turns(children: list[Child], work: dict, turns: int) -> tuple[dict, list[dict]]:
    """Let every child run over all batches once a turn: ({versions, parameters, tokens}, a row a turn and child).

    Raises Mistake where the children's numbers of weights or tokens differ.
    """
    known = {child.name: child.ask(work) for child in children}
    versions = {name: version for reply in known.values() for name, version in reply.pop('versions').items()}
    first = known[children[0].name]
    if any(reply != first for reply in known.values()):
        raise Mistake(f'the sides do not train the same: {known}')
    rows, steps = [], len(work['records'])
    for turn in range(turns + 1):
        for child in children if turn % 2 else children[::-1]:
            reply = child.ask(dict(steps=steps))
            row = dict(turn=turn, name=child.name, seconds_per_step=reply['seconds'] / steps,
                       tokens_per_second=sum(first['tokens']) / reply['seconds'], loss=reply['loss'])
            print(f'turn {turn}  {child.name:12}  {row["seconds_per_step"]:8.3f} s/step  '
                  f'{row["tokens_per_second"]:8.1f} tokens/s  loss {row["loss"]:.4f}'
                  + ('' if turn else '  (warm-up, not counted)'), flush=True)
            rows += [row] if turn else []
    return dict(versions=versions, **first), rows


def summarize(rows: list[dict], reference: str) -> dict[str, dict]:
    """Take medians: {name: seconds_per_step, tokens_per_second, and the turns' ratio to the reference's time}."""
    names, result = dict.fromkeys(row['name'] for row in rows), {}
    theirs = {row['turn']: row['seconds_per_step'] for row in rows if row['name'] == reference}
    for name in names:
        mine = [row for row in rows if row['name'] == name]
        ratios = [row['seconds_per_step'] / theirs[row['turn']] for row in mine]
        result[name] = dict(ratio=statistics.median(ratios), ratios=ratios) | {
            key: statistics.median(row[key] for row in mine) for key in ('seconds_per_step', 'tokens_per_second')}
    return result


def read_variants(xla_flags: str, variants: list[str]) -> dict[str, str]:
    """Read the sides of ours: {name: its XLA_FLAGS}.  Raises Mistake for a variant that is not NAME:XLA_FLAGS."""
    result = dict(ours=xla_flags)
    for variant in variants:
        name, separator, value = variant.partition(':')
        if not separator or not name or name.startswith('-') or name in (*result, 'torch'):
            raise Mistake(f'--variant={variant!r} must be NAME:XLA_FLAGS, with a name of its own, not ours or torch')
        result[name] = value
    return result


def main() -> None:
    flag = flags.FLAGS
    if flag.child:
        return child()
    variants = read_variants(flag.xla_flags, flag.variant)
    config = MODELS['smollm2_135m']
    config = dataclasses.replace(config, num_hidden_layers=flag.layers or config.num_hidden_layers)
    work = make_work(config, flag.steps, flag.batch_size, flag.length, flag.loss, flag.threads)
    ours = [sys.executable, '-m', 'instruments.bench.cpu_training', '--child']
    with contextlib.ExitStack() as stack:
        start = lambda *arguments: stack.enter_context(Child(*arguments))
        children = [start('torch', [flag.torch_python, str(TORCH_LOOP)], {})]
        children += [start(name, ours, dict(JAX_PLATFORMS='cpu', XLA_FLAGS=value)) for name, value in variants.items()]
        known, rows = take_turns(children, work, flag.turns)
    summary = summarize(rows, 'torch')
    print()
    for name, row in summary.items():
        print(f'{name:12}  {row["seconds_per_step"]:8.3f} s/step  {row["tokens_per_second"]:8.1f} tokens/s  '
              f'{row["ratio"]:.3f} of the time of torch')
    versions = known['versions'] | dict(python=platform.python_version())
    print(f'medians of {flag.turns} turns of {flag.steps} steps; '
          + ', '.join(f'{name} {version}' for name, version in versions.items()))
    if flag.output:
        settings = {name: flag[name].value for name in ('steps', 'turns', 'batch_size', 'length', 'loss', 'threads')}
        result = dict(date=datetime.date.today().isoformat(), machine=f'{platform.machine()}, {os.cpu_count()} CPUs',
                      layers=config.num_hidden_layers, settings=settings, xla_flags=variants, summary=summary,
                      rows=rows, **known | dict(versions=versions))
        path = pathlib.Path(flag.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    flags.DEFINE_integer('steps', 6, 'steps a turn, each on a batch of its own', 1)
    flags.DEFINE_integer('turns', 3, 'turns that count; one more warms up', 1)
    flags.DEFINE_integer('batch_size', 16, 'rows of a batch', 1)
    flags.DEFINE_integer('length', 40, 'tokens a row is padded to', 2)
    flags.DEFINE_integer('layers', 0, "0: as many as the model has; fewer to try the program out", 0)
    flags.DEFINE_enum('loss', 'answer', LOSSES, 'loss on the last token of a record, or on all of them')
    flags.DEFINE_integer('threads', os.cpu_count(), 'of torch; XLA takes every CPU it may run on', 1)
    flags.DEFINE_string('torch_python', sys.executable, 'the interpreter that has torch and transformers')
    flags.DEFINE_string('xla_flags', '', 'XLA_FLAGS of ours, in place of those of the environment')
    flags.DEFINE_multi_string('variant', [], 'NAME:XLA_FLAGS, ours once more with other flags; may be repeated')
    flags.DEFINE_string('output', '', 'JSON file of the result; empty: none')
    flags.DEFINE_boolean('child', False, 'the program starts itself so: our side, told what to do on stdin')
    command_line.run(main)
