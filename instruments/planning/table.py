"""Write plans as lines: the table of plan.py, and what train.py prints before it starts.  Before: one_mesh.py."""
from instruments.planning.one_mesh import MeshPlan
from instruments.planning.units import gib, short


def sent_by_axis(wire_bytes: dict[str, int]) -> str:
    """Write 'fsdp 1.20 mp 0.31' in GB, largest first, without what is below a hundredth of all."""
    total = sum(wire_bytes.values())
    return ' '.join(f'{axis} {short(size / 1e9)}' for axis, size in
                    sorted(wire_bytes.items(), key=lambda item: -item[1]) if size >= 0.01 * total)


def summary(plan: MeshPlan) -> list[str]:
    """Write the lines that a program prints before it starts; the estimate is without the time of Pallas kernels."""
    parts = ', '.join(f'{name} {gib(size)}' for name, size in plan.parts.items() if name != 'activations')
    held = f'; {gib(plan.needed)} in all' + (f' of {gib(plan.usable)}' if plan.usable else '')
    kept = f' ({gib(plan.parts["activations"])} kept for the backward pass)' if 'activations' in plan.parts else ''
    lines = [f'  GiB a device: {parts}, temporaries {gib(plan.temporaries)}{kept}{held}']
    if plan.wire_bytes:
        lines.append(f'  GB a device sends in a step, by mesh axis: {sent_by_axis(plan.wire_bytes)}')
    if plan.estimate:
        least = max(plan.seconds, *plan.estimate.bounds.values())
        lines.append(f'  estimated, not measured: {plan.estimate.flops / 1e12:.3f} TFLOP a device, at least '
                     f'{least * 1e3:.1f} ms a step and the time of its Pallas kernels, bound by {plan.estimate.binds}')
    return lines


HEADER = ('mesh_dim', 'batch', 'weights', 'optim.', 'activ.', 'temp.', 'needed', 'of GiB', 'fits', 'GB sent by axis',
          'TFLOP', 'ms', 'bound by', 'tokens/s', 'compile')
SERVE_HEADER = (*HEADER[:3], 'cache', '', *HEADER[5:])
WIDTHS = (8, 5, 7, 6, 6, 6, 6, 6, 4, 34, 7, 9, 12, 10, 7)


def row(cells: tuple[str, ...], first: int = WIDTHS[0]) -> str:
    """Write one line of the table, of at most 160 columns where `first`, the width of mesh_dim, is as it is."""
    return ' '.join(cell.rjust(width) for cell, width in zip(cells, (first, *WIDTHS[1:]), strict=True))


def cells(plan: MeshPlan) -> tuple[str, ...]:
    """Write a plan's cells under HEADER; '-' stands for what nobody knows."""
    size = lambda value: '-' if value is None else gib(value)
    parts = [*plan.parts.values(), None, None]
    if 'base' in plan.parts:
        parts[:2] = [parts[0] + parts[1]]
    parts = parts[:3]
    times = ('-',) * 4
    if plan.estimate:
        times = (short(plan.estimate.flops / 1e12), f'{plan.seconds * 1e3:,.1f}', plan.estimate.binds,
                 f'{plan.tokens_per_second:,.0f}')
    return (plan.mesh_dim, str(plan.batch_size), *map(size, (*parts, plan.temporaries, plan.needed, plan.usable)),
            'yes' if plan.fits else 'no', sent_by_axis(plan.wire_bytes or {}) or '-', *times,
            f'{plan.compile_seconds:.0f} s')
