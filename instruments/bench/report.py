"""Write the benchmark's rows as a line, as a Markdown table and as a roofline."""
import pathlib

from instruments.tpu import chips
from mistake import Mistake


def line(row: dict) -> str:
    """Write one row for the console."""
    head = f'{row["target"]:8s} {row["shape"]:12s} {row["pass"]:8s} {row["kernel"]:12s} {tiling(row):16s}'
    if 'error' in row:
        return f'{head} does not compile: {row["error"][:80]}'
    warnings = f' {row["warnings"]}' if row.get('warnings') else ''
    return (f'{head} {row["ms"]:8.3f} ms  {row["tflops"]:6.1f} TFLOP/s {row["percent_of_peak"]:5.1f} % of peak '
            f'{row["percent_of_hbm"]:5.1f} % of HBM{warnings}')


def tiling(row: dict) -> str:
    return row['tiles'] if isinstance(row['tiles'], str) else ','.join(map(str, row['tiles']))


def in_vmem(row: dict) -> bool:
    """Say whether the kernel moves less than what must cross HBM: XLA has laid operands into VMEM before."""
    return row['method'] == 'static' and row['hbm_bytes'] < 0.9 * row['least_bytes']


def best_rows(rows: list[dict]) -> dict[tuple, dict]:
    """Find the fastest tiling of each shape, pass, target and kernel, in the order of the rows."""
    best = {}
    for row in rows:
        key = row['shape'], row['pass'], row['target'], row['kernel']
        if 'error' not in row and (key not in best or row['ms'] < best[key]['ms']):
            best[key] = row
    return best


def table(rows: list[dict]) -> str:
    """Write Markdown: for each shape, pass and chip every kernel's best row, and ours against the best other."""
    best = best_rows(rows)
    columns = ('shape', 'pass', 'chip', 'kernel', 'tiles', 'ms', 'TFLOP/s', '% of peak', '% of HBM', 'MXU', 'bound',
               'code', 'spills', 'VMEM MiB', 'ours / best other')
    lines = ['| ' + ' | '.join(columns) + ' |', '|---' * len(columns) + '|']
    for (shape, pass_, target, kernel), row in best.items():
        others = [other['ms'] for key, other in best.items() if key[:3] == (shape, pass_, target) and key[3] != 'ours']
        ratio = f'{row["ms"] / min(others):.2f}' if kernel == 'ours' and others else ''
        details = [''] * 5
        if row['method'] == 'static':
            hot = row['hot']
            details = [f'{row["mxu"]:.2f}', f'{hot["bound"]} {hot["units"][hot["bound"]]:.2f}', str(row['bundles']),
                       str(row['spills']), f'{row["vmem_bytes"] / 2**20:.1f}']
        figures = [f'{row[name]:.1f}' for name in ('tflops', 'percent_of_peak', 'percent_of_hbm')]
        cells = [shape, pass_, row['chip'], kernel, tiling(row), f'{row["ms"]:.3f}' + ' *' * in_vmem(row), *figures,
                 *details, ratio]
        lines.append('| ' + ' | '.join(cells) + ' |')
    failed = [f'{row["target"]} {row["shape"]} {row["pass"]} {row["kernel"]} {tiling(row)}'
              for row in rows if 'error' in row]
    versions = sorted({f'{row["method"]}, jax {row["jax"]}, libtpu {row["libtpu"]}' for row in best.values()})
    static = any(row['method'] == 'static' for row in best.values())
    notes = [f'Method: {"; ".join(versions)}.']
    if static:
        notes.append("Static: the time of the compiler's schedule, not a measurement (kernel_time/static_cost.py).")
    if any(map(in_vmem, best.values())):
        notes.append('\\*: XLA keeps operands of this small case in VMEM; bringing them there is not in the time.')
    notes += [f'Refused by the compiler: {"; ".join(failed)}.'] if failed else []
    return '\n'.join([*lines, '', *notes, ''])


def roofline(rows: list[dict], path: pathlib.Path) -> None:
    """Draw TFLOP/s over useful FLOPs per least byte, one panel a chip, under the chip's two roofs."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    best = best_rows(rows)
    names = list(dict.fromkeys(row['chip'] for row in best.values()))
    if not names:
        raise Mistake('there is no row to draw: every kernel was refused, or none applies to the shapes')
    figure, axes = pyplot.subplots(1, len(names), figsize=(6.5 * len(names), 5), squeeze=False)
    kernels = list(dict.fromkeys(row['kernel'] for row in best.values()))
    for name, axis in zip(names, axes[0], strict=True):
        chip = chips.CHIPS[name]
        ridge = chip.peak_flops / chip.hbm_bandwidth
        intensities = [0.5, ridge, 1e4]
        axis.loglog(intensities, [min(chip.peak_flops, x * chip.hbm_bandwidth) / 1e12 for x in intensities], 'k')
        for kernel in kernels:
            points = [row for row in best.values() if row['chip'] == name and row['kernel'] == kernel]
            axis.plot([row['flops'] / row['least_bytes'] for row in points], [row['tflops'] for row in points], 'o',
                      label=kernel, markersize=8 if kernel == 'ours' else 5, zorder=3 if kernel == 'ours' else 2)
            if kernel == kernels[0]:
                for row in points:
                    place = row['flops'] / row['least_bytes'], row['tflops']
                    axis.annotate(f'{row["shape"]} {row["pass"][:3]}', place, xytext=(6, -3), fontsize=7,
                                  textcoords='offset points')
        method = ', '.join(sorted({row['method'] for row in best.values() if row['chip'] == name}))
        axis.set(title=f'{name} ({method})', xlabel='useful FLOPs per byte of HBM traffic', ylabel='TFLOP/s')
        axis.grid(which='both', alpha=0.2)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
