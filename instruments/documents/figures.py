"""Write the tables of figures in README.md and docs/ from the committed rows in docs/figures/.

    python -m instruments.documents.figures            rewrite the blocks
    python -m instruments.documents.figures --check    only compare; exit code 1 where a document says something else

A block stands between `<!-- figures: NAME -->` and `<!-- end -->`; NAME is one of BLOCKS.  Figures are changed in the
JSON files, by the tool that makes them where it writes JSON: kernels.json holds rows of instruments.bench.attention
(rows.jsonl), plans.json and lora_plans.json rows of plan.py (--output), cpu_training.json those of
instruments.bench.cpu_training (--output), results.json and tickets.json what evaluate.py counts (`total` and `correct`
of evaluation.json), extraction.json what it measures with --task=text (`measures` and `fields`).  Each says the
command, the machine, the versions, the date and the commit; `notes` are findings in words.  easylm.json names the tests
of the article's flags and requests; default and help of a flag are those of program/flags.py.

tests/test_documents.py compares documents and rows.
"""
import functools
import json
import pathlib
import re

from absl import app, flags

from evaluation.accuracy import wilson_interval
from instruments.bench import serving_report
from instruments.bench.report import best_rows
from mistake import Mistake
from program import flags as program_flags

ROOT = pathlib.Path(__file__).parent.parent.parent
BLOCK = re.compile(r'(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
CASES = {  # names of instruments/bench/shapes.py in words
    's1': 'S1 B8 H32 T1024 D128', 's2': 'S2 the same, D100', 's3': 'S3 B4 32q/8kv T4096 D128',
    's4': 'S4 B8 9q/3kv T1024 D64', 's1_segments': 'S1, 6 examples a row', 's1_full': 'S1, not causal',
    's1_ragged': 'S1, T1025', 's3_segments': 'S3, 12 examples a row', 's3_ragged': 'S3, T4000',
    'd1': 'D1 decode B64 context 2048 32q/8kv', 'd2': 'D2 the same, contexts 64..2048',
    'd1_paged': 'D1 in pages of 128', 'd2_paged': 'D2 in pages of 128',
}


# ---------------------------------------------------------------- the tables


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return ''.join('| ' + ' | '.join(map(str, line)) + ' |\n' for line in lines)


def origin(figures: dict) -> str:
    """The line below a table: where its figures come from."""
    versions = ', '.join(f'{name} {version}' for name, version in figures['versions'].items())
    return (f'\n`{figures["command"]}`\n'
            f'{figures["machine"]}; {versions}; {figures["date"]}, commit {figures["commit"]}.\n')


def notes(figures: dict) -> str:
    return '\n' + ''.join(f'- {note}\n' for note in figures['notes'])


def results(figures: dict) -> str:
    """Accuracy with its Wilson interval."""
    rows = []
    for row in figures['rows']:
        low, high = wilson_interval(row['correct'], row['total'])
        minutes = f'{row["minutes"]:g} min' if 'minutes' in row else ''
        rows.append([row['model'], row['training'], f'{percent(row["correct"] / row["total"])} of {row["total"]:,}',
                     f'{100 * low:.2f} to {percent(high)}', minutes, f'{row["commit"]}, {row["date"]}'])
    return table(['model', 'training', 'accuracy', '95 % interval', 'training time', 'commit, date'], rows)


def extraction(figures: dict) -> str:
    """Measures of texts that are JSON, with their intervals, and how often each field is right."""
    names = list(figures['rows'][0]['fields'])
    cells = lambda held: f'{percent(held["value"])} ({" to ".join(f"{100 * end:.2f}" for end in held["interval_95"])})'
    rows = []
    for row in figures['rows']:
        measures = [cells(row['measures'][name]) for name in ('json_valid', 'field_f1', 'all_fields', 'token_f1')]
        fields = [f'{field["right"]} of {field["records"]}' for field in (row['fields'][name] for name in names)]
        rows.append([row['model'], row['training'], *measures, *fields, f'{row["commit"]}, {row["date"]}'])
    return table(['model', 'training', 'a JSON object', 'field F1', 'all fields', 'token F1',
                  *(f'`{name}`' for name in names), 'commit, date'], rows)


def percent(share: float) -> str:
    return f'{100 * share:.2f} %'


def kernels(figures: dict) -> str:
    """Ours beside the fastest shipped kernel, for each case and chip."""
    best = best_rows(figures['rows'])
    chips = list(dict.fromkeys(target for _, _, target, _ in best))
    rows = []
    for shape, pass_ in dict.fromkeys((shape, pass_) for shape, pass_, _, kernel in best if kernel == 'ours'):
        cells, code, their_code = [], [], []
        for chip in chips:
            mine, other = beside_the_best(best, shape, pass_, chip)
            cells += [f'{mine["ms"]:.3f}', f'{other["ms"]:.3f} {other["kernel"]}' if other else '',
                      f'**{mine["ms"] / other["ms"]:.2f}**' if other else '']
            code.append(thousands(mine['bundles']))
            their_code += [thousands(other['bundles'])] if other else []
        words = CASES.get(shape, shape) + ('' if shape[0] == 'd' else f', {pass_}')
        rows.append([words, *cells, ' / '.join(code) + (f' ({" / ".join(their_code)})' if their_code else '')])
    columns = [f'{chip} {name}'.strip() for chip in chips for name in ('ours', 'best shipped', 'ratio')]
    return table(['case', *columns, f'code, bundles {" / ".join(chips)} (best shipped)'], rows)


def beside_the_best(best: dict, shape: str, pass_: str, chip: str) -> tuple[dict, dict | None]:
    """Our row and the fastest row of another kernel, None where none applies."""
    others = [row for key, row in best.items() if key[:3] == (shape, pass_, chip) and key[3] != 'ours']
    return best[shape, pass_, chip, 'ours'], min(others, key=lambda row: row['ms'], default=None)


def thousands(count: int) -> str:
    return f'{count / 1000:.1f}k'


def bound(figures: dict) -> str:
    """What binds the hottest part of the kernels, where a row says it."""
    rows = [[CASES.get(row['shape'], row['shape']), row['pass'], row['target'], row['hot']['bound'],
             ', '.join(f'{unit} {busy:.2f}' for unit, busy in row['hot']['units'].items())]
            for row in figures['rows'] if 'hot' in row and row['kernel'] == 'ours']
    return table(['case', 'pass', 'chip', 'bound by', 'busy part of the unit'], rows)


def gib(size: int) -> str:
    return f'{size / 2**30:.2f}'


def seconds(row: dict) -> float:
    return row['estimate']['compute_seconds'] + row['estimate']['exposed_seconds']


def plans(figures: dict) -> str:
    """One row a mesh; meshes that do not fit come last, with what their state alone needs."""
    rows, words = [], {figures['article']: " (the article's)", figures['chosen']: ' (chosen)'}
    for row in figures['rows']:
        state = row['parts']['parameters'] + row['parts']['optimizer']
        cells = [row['mesh_dim'] + words.get(row['mesh_dim'], ''), gib(state)]
        if not row['fits']:
            rows.append([*cells, '', 'does not fit', '', '', '', '', ''])
            continue
        parts, total = row['estimate'], seconds(row)
        sent = ', '.join(f'{axis} {size / 1e9:.1f}' for axis, size in row['wire_bytes'].items())
        times = [f'{1e3 * x:.0f}' for x in (parts['compute_seconds'], parts['exposed_seconds'], total)]
        rows.append([*cells, gib(row['temporaries']), gib(row['needed']), sent, '{} + {} = {}'.format(*times),
                     ' / '.join(f'{1e3 * x:.0f}' for x in parts['bounds'].values()),
                     f'{total / max(parts["bounds"].values()):.1f}', f'{row["tokens"] / total:,.0f}'])
    return table(['mesh dp,fsdp,mp', 'weights + optimizer, GiB', 'temporaries', 'in all', 'GB sent a step, by axis',
                  'compute + waiting, ms', 'bounds: FLOPs / HBM / links, ms', 'step : largest bound', 'tokens/s'], rows)


def other_plans(figures: dict) -> str:
    """Larger models, and larger batches of the article's."""
    rows = [[row['model'], row['topology'], row['mesh_dim'], f'{row["batch_size"]} x {row["seq_length"]:,}',
             f'{gib(row["needed"])} of {gib(row["usable"])}' + ('' if row['fits'] else ': does not fit'),
             f'{seconds(row):.3g}' if row['estimate'] else '']
            for row in figures['larger'] + figures['largest']]
    return table(['model', 'slice', 'mesh', 'batch', 'GiB a device', 'seconds a step'], rows)


def lora_plans(figures: dict) -> str:
    """Adapters beside a frozen base, on the smallest slices that were tried; a row that does not fit says so."""
    rows = []
    for row in figures['rows']:
        parts = row['parts']
        verdict = f'{gib(row["needed"])} of {gib(row["usable"])}' + ('' if row['fits'] else ': does not fit')
        rows.append([row['model'], f'{row["topology"]}, {row["mesh_dim"]}',
                     f'{row["batch_size"]} x {row["seq_length"]:,}', gib(parts['base']),
                     gib(parts['adapters'] + parts['optimizer']), gib(row['temporaries']), verdict,
                     f'{seconds(row):.3g}', f'`{row["flags"]}`'])
    return table(['model', 'slice, mesh', 'batch', 'base, GiB', 'adapters + optimizer', 'temporaries', 'in all',
                  'seconds a step', 'flags'], rows)


def cpu_training(figures: dict) -> str:
    """Seconds a step beside torch; one row a run."""
    names = {'torch': 'torch', 'ours': 'ours', 'ynn': "ours with XLA's other library of products"}
    rows = [[row['run'], *(side(row['summary'][name]) for name in names)] for row in figures['rows']]
    return table(['run', *names.values()], rows)


def side(summary: dict) -> str:
    """'7.5 s (1.34)'; without the seconds where only the ratio is known."""
    known = f'{summary["seconds_per_step"]:.1f} s' if 'seconds_per_step' in summary else ''
    return known + (f' ({summary["ratio"]:.2f})' if summary['ratio'] != 1 else '')


def easylm(figures: dict) -> str:
    """The article's flags, with default and help of program/flags.py, and its requests; and what tests each."""
    known = {flag.name: flag for flag in program_flags.SERVE + program_flags.TRAIN}
    rows = []
    for row in figures['rows']:
        if 'flag' in row:
            flag = known[row['flag']]
            cells = [f'`--{flag.name}`', f'`{flag.default!r}`', flag.help.replace('|', '\\|')]
        else:
            cells = [f'`{row["request"]}`', row['easylm'], row['ours']]
        rows.append([*cells, ', '.join(row['tests'])])
    return table(['article', 'ours', '', 'tested by'], rows)


def serving_ratios(figures: dict) -> str:
    """What a server's ways of asking cost beside each other, for each dtype of the weights."""
    kinds = list(figures['rows'])
    by_name = {kind: {row['name']: row for row in figures['rows'][kind]} for kind in kinds}
    cells = lambda name, cell: [cell(by_name[kind][name]) if name in by_name[kind] else '' for kind in kinds]
    rows = [[text, *cells(name, lambda row: f'{row["ratio"]:.2f}')] for name, text in (
        ('together', '16 requests of one prompt, sent together / one request of 16'),
        ('slots', 'a prompt in a server of 16 slots / of one'),
        ('abandoned', 'a prompt just behind a client that left 32 / alone'))]
    rows += [[f'all {by_name[kinds[0]][name]["reviews"]:,} reviews through `{name}`', *cells(
        name, lambda row: f'{row["seconds"]:.0f} s, {percent(row["correct"] / row["reviews"])}')]
        for name in ('/generate', '/classify')]
    each = lambda kind: by_name[kind]["EasyLM's way"]["seconds_each"]
    rows.append(["`/generate` beside EasyLM's way (a prompt at a time, padded to 1,024)", *(
        f'{each(kinds[0]) * row["reviews"] / row["seconds"]:.0f} times as fast'
        for row in (by_name[kind]['/generate'] for kind in kinds))])
    return table(['', *kinds], rows)


def serving(figures: dict) -> str:
    """The mixes of load, each contender's medians and ranges."""
    return serving_report.tables(figures['rows']) + origin(figures) + notes(figures)


def serving_robust(figures: dict) -> str:
    """What bad bodies and a long time do to a server."""
    bad, soak = figures['rows']['bad_bodies'], figures['rows']['soak']
    memory = lambda row: ', '.join(f'{size:,.0f}' for size in row['rss_mb']) + ' MB'
    leaked = lambda row: ', '.join(str(row[f'{name}_leaked']) for name in ('slots', 'waiting', 'in_flight'))
    statuses = ', '.join(f'{status}: {count:,}' for status, count in bad['statuses'].items())
    outcomes = ', '.join(f'{name}: {count:,}' for name, count in soak['outcomes'].items())
    rows = [
        [f'bad bodies: answers to {bad["bodies"]:,} over {bad["endpoints"]} endpoints', statuses],
        ['5xx, no answer within 60 s, or a refusal that is not one line of JSON',
         f'{sum(fault["count"] for fault in bad["faults"].values()):,}'],
        ['then: `/ready`; programs compiled', f'{bad["ready_after"]}; {bad["jit_compiles_after_ready"]}'],
        ['slots, places in the line and requests still taken', leaked(bad)],
        ['resident memory before, after half of them, after all', memory(bad)],
        [f'soak: answers to {soak["requests"]:,} requests in {soak["minutes"]:.0f} minutes', outcomes],
        ['errors; programs compiled', f'{soak["errors"]}; {soak["jit_compiles_after_ready"]}'],
        ['slots, places in the line and requests still taken', leaked(soak)],
        [f'resident memory at the start, {soak["slope_minutes"]:.0f} minutes before the end, at the end', memory(soak)],
        [f'its slope over the last {soak["slope_requests"]:,} requests',
         f'{soak["mb_per_1000_requests"]:+.2f} MB for 1,000 requests']]
    return table(['', ''], rows)


def summary() -> str:
    """README's three figures of what has a document of its own."""
    best, plan, cpu = best_rows(read('kernels')['rows']), read('plans'), read('cpu_training')
    ratios = [f'{mine["ms"] / other["ms"]:.2f}' for mine, other in
              (beside_the_best(best, 's1', pass_, 'v5e') for pass_ in ('forward', 'backward'))]
    row = next(row for row in plan['rows'] if row['mesh_dim'] == plan['article'])
    beside = [run['summary'][name]['ratio'] for run in cpu['rows'] for name in ('ours', 'ynn')]
    return table(['also', 'figure', 'all of it'], [
        ['attention on v5e, forward and backward: static times, no measurement',
         f'{" and ".join(ratios)} of the best shipped kernel\'s', '[KERNELS](docs/KERNELS.md)'],
        [f"the article's step on eight v5e chips, mesh {row['mesh_dim']}: a plan, nothing was run",
         f'{gib(row["needed"])} of {gib(row["usable"])} GiB, {1e3 * seconds(row):.0f} ms a step',
         '[PLANNING](docs/PLANNING.md)'],
        ['a training step of SmolLM2-135M on 2 CPU cores, beside torch',
         f'{min(beside):.2f} to {max(beside):.2f} times its time', '[RESULTS](docs/RESULTS.md)']])


@functools.cache
def read(name: str) -> dict:
    return json.loads((ROOT / f'docs/figures/{name}.json').read_text(encoding='utf-8'))


BLOCKS = {
    'results': lambda: results(read('results')) + origin(read('results')),
    'results_notes': lambda: notes(read('results')),
    'tickets': lambda: results(read('tickets')) + origin(read('tickets')) + notes(read('tickets')),
    'extraction': lambda: extraction(read('extraction')) + origin(read('extraction')) + notes(read('extraction')),
    'summary': summary,
    'cpu_training': lambda: cpu_training(read('cpu_training')) + origin(read('cpu_training')) + notes(
        read('cpu_training')),
    'kernels': lambda: kernels(read('kernels')) + origin(read('kernels')),
    'kernels_bound': lambda: bound(read('kernels')) + notes(read('kernels')),
    'serving': lambda: serving(read('serving')),
    'plans': lambda: plans(read('plans')) + origin(read('plans')) + notes(read('plans')),
    'serving_ratios': lambda: serving_ratios(read('serving_ratios')) + origin(read('serving_ratios')) + notes(
        read('serving_ratios')),
    'serving_robust': lambda: serving_robust(read('serving_robust')) + origin(read('serving_robust')) + notes(
        read('serving_robust')),
    'easylm': lambda: easylm(read('easylm')),
    'other_plans': lambda: other_plans(read('plans')),
    'lora_plans': lambda: lora_plans(read('lora_plans')) + origin(read('lora_plans')) + notes(read('lora_plans')),
}


# ---------------------------------------------------------------- the documents


def rewritten(text: str, document: str) -> str:
    """The document with each block as the rows have it.

    Raises Mistake for a block whose name is not in BLOCKS and for one that is not closed.
    """
    def block(match: re.Match) -> str:
        begin, name, _, finish = match.groups()
        if name not in BLOCKS:
            raise Mistake(f'{document}: block {name!r} is none of {", ".join(BLOCKS)}')
        return f'{begin}{BLOCKS[name]()}{finish}'

    opened = text.count('<!-- figures: ')
    if opened != len(BLOCK.findall(text)) or opened != text.count('<!-- end -->'):
        raise Mistake(f'{document}: a block of figures is not closed with <!-- end --> on a line of its own')
    return BLOCK.sub(block, text)


def documents(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    return [root / 'README.md', *sorted(root.glob('docs/*.md'))]


def main(argv) -> None:
    if len(argv) > 1:
        raise Mistake(f'{argv[1:]=}: every argument is a flag, --name=value')
    stale = []
    for path in documents():
        text = path.read_text(encoding='utf-8')
        new = rewritten(text, path.name)
        if new != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not flags.FLAGS.check:
                path.write_text(new, encoding='utf-8')
    if flags.FLAGS.check and stale:
        raise SystemExit(f'{", ".join(stale)}: not what docs/figures says; run `make figures`')
    print('rewrote ' + ', '.join(stale) if stale else 'all blocks are what docs/figures says')


if __name__ == '__main__':
    flags.DEFINE_boolean('check', False, 'change nothing; exit code 1 where a block is not what the rows say')
    app.run(main)
