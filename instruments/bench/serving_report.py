"""Write the rows of the serving benchmark as a line, as medians with ranges, as tables and as a plot."""
import json
import pathlib
import statistics

JUDGE = 'transformers batch 1'
# mix -> (what it is, (column, figure, factor, digits) ..)
COLUMNS = {
    'M1': ('One stream, 128 in, 128 out', (('TTFT, ms', 'median_ttft_ms', 1, 0), ('TPOT, ms', 'median_tpot_ms', 1, 1),
                                           ('tokens/s', 'output_throughput', 1, 1), ('bandwidth, %', 'mbu', 100, 0),
                                           ('peak RSS, MB', 'peak_rss', 1e-6, 0),
                                           ('CPU s / 1000 tokens', 'cpu_seconds_per_1000_tokens', 1, 1))),
    'M2': ('So many streams', (('tokens/s', 'output_throughput', 1, 1), ('ITL p99, ms', 'p99_itl_ms', 1, 0),
                               ('TTFT p99, ms', 'p99_ttft_ms', 1, 0), ('peak RSS, MB', 'peak_rss', 1e-6, 0),
                               ('CPU s / 1000 tokens', 'cpu_seconds_per_1000_tokens', 1, 1))),
    'M3': ('Poisson at a share of the capacity; good: TTFT < 2 s and TPOT < 150 ms',
           (('requests/s', 'request_throughput', 1, 2), ('goodput', 'request_goodput', 1, 2),
            ('TTFT p99, ms', 'p99_ttft_ms', 1, 0), ('TPOT p99, ms', 'p99_tpot_ms', 1, 0))),
    'M4': ('512 shared tokens, 32 of one\'s own, 8 clients',
           (('TTFT, ms', 'median_ttft_ms', 1, 0), ('tokens/s', 'output_throughput', 1, 1),
            ('prompt tokens saved', 'cached_tokens', 1, 0))),
    'M5': ('Contexts with four endings', (('contexts/s', 'items_per_second', 1, 2),
                                          ('nats from transformers', 'max_abs_diff', 1, 6),
                                          ('same choice, %', 'same_choice', 100, 1))),
    'M6': ('Four streams and a prompt of 1,500', (('worst ITL, ms', 'worst_itl_ms', 1, 0),
                                                  ('TTFT of the long one, ms', 'long_ttft_ms', 1, 0))),
    'M7': ('Four times the capacity', (('429, %', 'refused_share', 100, 0), ('E2EL p99, ms', 'p99_e2el_ms', 1, 0),
                                       ('recovery, s', 'recovery_seconds', 1, 1),
                                       ('peak RSS, MB', 'peak_rss', 1e-6, 0))),
    'M8': ('Three of ten clients leave', (('slots leaked', 'slots_leaked', 1, 0),
                                          ('texts changed', 'changed_texts', 1, 0),
                                          ('tokens/s of the rest', 'output_throughput', 1, 1))),
    'M9': ('Start', (('ready, s', 'ready_seconds', 1, 1), ('first token, s', 'first_token_seconds', 1, 1),
                     ('compiles after ready', 'compiles_after_ready', 1, 0))),
}


def line(row: dict) -> str:
    """Write one row for the console."""
    head = f'{row["mix"]} {row["contender"]:22s} {row["point"]!s:6s} repeat {row["repeat"]}'
    if 'error' in row:
        return f'{head} FAILED: {row["error"][:200]}'
    return head + ''.join(f'  {column} {_number(row[figure] * factor, digits)}'
                          for column, figure, factor, digits in COLUMNS[row['mix']][1] if row.get(figure) is not None)


def compared(rows: list[dict]) -> list[dict]:
    """The rows with M5's scores beside those of transformers, in place of the scores."""
    judge = next((row['scores'] for row in rows if row['contender'] == JUDGE and 'scores' in row), None)
    found = []
    for row in rows:
        row = dict(row)
        scores = row.pop('scores', None)
        if scores and judge and row['contender'] != JUDGE and len(scores) == len(judge):
            row['max_abs_diff'] = max(abs(a - b) for a, b in zip(scores, judge, strict=True))
            items = range(0, len(scores), 4)
            row['same_choice'] = sum(_best(scores[i:i + 4]) == _best(judge[i:i + 4]) for i in items) / len(items)
        found.append(row)
    return found


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def medians(rows: list[dict]) -> list[dict]:
    """A row for each contender, mix and point: {figure: [median, least, most]} over the repeats."""
    groups = {}
    for row in compared(rows):
        groups.setdefault((row['mix'], row['point'], row['contender']), []).append(row)
    found = []
    for (mix, point, contender), members in groups.items():
        good = [row for row in members if 'error' not in row]
        figures = {}
        for _, figure, _, _ in COLUMNS[mix][1]:
            if values := [row[figure] for row in good if row.get(figure) is not None]:
                figures[figure] = [statistics.median(values), min(values), max(values)]
        entry = {'mix': mix, 'point': point, 'contender': contender, 'bits': members[0]['bits'], 'repeats': len(good),
                 'failed': sum(row.get('failed', 0) for row in good), 'figures': figures,
                 'loadavg': max(row['before']['loadavg'] for row in members),
                 'read_gb_s': [pick(row[when]['read_gb_s'] for row in members for when in ('before', 'after'))
                               for pick in (min, max)]}
        if len(good) < len(members):
            entry['error'] = next(row['error'] for row in members if 'error' in row)
        found.append(entry)
    return sorted(found, key=lambda row: (row['mix'], str(type(row['point'])), row['point']))


def tables(rows: list[dict]) -> str:
    """Markdown: a table for each mix; a figure is the median, in brackets the range where the repeats differ."""
    parts = []
    for mix, (words, columns) in COLUMNS.items():
        members = [row for row in rows if row['mix'] == mix]
        if not members:
            continue
        used = [column for column in columns if any(column[1] in row['figures'] for row in members)]
        head = ['contender', 'bits', 'load', *(column[0] for column in used), 'failed']
        body = [[row['contender'], f'{row["bits"]:g}', row['point'],
                 *(_cell(row['figures'].get(figure), factor, digits) for _, figure, factor, digits in used),
                 row.get('error', row['failed'])] for row in members]
        lines = [head, ['---'] * len(head), *body]
        parts.append(f'**{mix}** {words}\n\n'
                     + ''.join('| ' + ' | '.join(map(str, cells)) + ' |\n' for cells in lines))
    return '\n'.join(parts)


def _cell(figure: list[float] | None, factor: float, digits: int) -> str:
    if figure is None:
        return ''
    middle, low, high = (_number(value * factor, digits) for value in figure)
    return middle if low == high else f'{middle} ({low} to {high})'


def _number(value: float, digits: int) -> str:
    return f'{value:,.{digits}f}'


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Output tokens a second against the number of streams, M1 and M2."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row['contender'] for row in rows):
        members = [row for row in rows if row['mix'] in ('M1', 'M2') and row['contender'] == name]
        points = sorted((row['point'], row['figures']['output_throughput']) for row in members
                        if 'output_throughput' in row['figures'])
        if points:
            axes.plot([x for x, _ in points], [y[0] for _, y in points], marker='o', label=name)
            low, high = ([y[n] for _, y in points] for n in (1, 2))
            axes.fill_between([x for x, _ in points], low, high, alpha=0.15)
    axes.set_xscale('log', base=2)
    ticks = 1, 2, 4, 8, 16
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_ylim(bottom=0)
    axes.set(xlabel='streams at once', ylabel='output tokens/s', title='128 tokens in, 128 out; median and range')
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(rows: list[dict], output: pathlib.Path, about: dict) -> None:
    """serving.json, serving.md and serving.png."""
    found = medians(rows)
    (output / 'serving.json').write_text(json.dumps({**about, 'notes': [], 'rows': found}, indent=1) + '\n',
                                         encoding='utf-8')
    (output / 'serving.md').write_text(tables(found), encoding='utf-8')
    if any(row['mix'] in ('M1', 'M2') for row in found):
        draw(found, output / 'serving.png')
    print(f'wrote {output}/serving.json, {output}/serving.md and, of M1 and M2, {output}/serving.png')
