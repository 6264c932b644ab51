"""Estimate the time of the attention kernels in a planned step.  Before: one_mesh.py, kernel_time/static_times.py."""
from data.batches import Batch
from instruments.kernel_time.static_times import flash_times
from instruments.planning.one_mesh import Setting
from instruments.tpu.chips import Chip
from model.partition import DTYPES, rows_unit


def kernel_times(setting: Setting, batch: Batch, chip: Chip) -> dict[str, float]:
    """Time the attention kernels, 'forward' and 'backward', in seconds at the shapes of one device.

    Those shapes differ only with the size of mp: so many pairs of times are compiled for, each once a process.
    """
    rows, length = batch.tokens_BT.shape
    sizes, mp = setting.config, setting.mesh.shape['mp']
    return flash_times(chip.name, B=rows // rows_unit(setting.mesh), T=length, H=sizes.num_attention_heads // mp,
                       K=max(1, sizes.num_key_value_heads // mp), D=sizes.head_dim,
                       dtype=DTYPES[setting.compute.dtype].__name__, segments=int(batch.segments_BT is not None))
