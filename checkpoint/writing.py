"""Write files so that they appear whole or not at all, with floats rounded knowingly: for all writers of formats.

Users: easylm_writer.py, huggingface_writer.py and convert.py.  (native.py keeps its own, stricter order of things.)
"""
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from mistake import Mistake

FLOATS = {'fp32': np.float32, 'bf16': ml_dtypes.bfloat16, 'fp16': np.float16}  # and EasyLM's longer names of them
FLOATS |= {np.dtype(dtype).name: dtype for dtype in FLOATS.values()}
_log = logging.getLogger(__name__)


@contextmanager
def appears_whole(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or directory to; at the end all of it is synced, then renamed.

    After an exception nothing is left, and what stood at `path` stays; what a killed process left is removed the next
    time, with a warning.  Raises Mistake if something stands at `path`, unless it may be replaced (a file only).
    """
    if path.exists() and not replace:
        raise Mistake(f'{path} exists already: nothing is written over it; choose another path, or remove it')
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(path.parent.glob(f'{glob.escape(path.name)}.tmp-*')):
        _log.warning('removing %s, left over from a write that was interrupted', leftover)
        _remove(leftover)
    temporary = path.with_name(f'{path.name}.tmp-{secrets.token_hex(4)}')
    try:
        yield temporary
        for file in [*temporary.rglob('*'), temporary]:
            sync(file)
        os.rename(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rounded(array: np.ndarray, float_dtype: str, what: str) -> np.ndarray:
    """`array` in a dtype of FLOATS, to nearest; '' and whole numbers stay as they are.

    Raises Mistake, naming `what`, for NaN and infinity, those included that only the rounding makes.
    """
    if not np.issubdtype(array.dtype, np.integer):
        with np.errstate(over='ignore'):
            array = array.astype(FLOATS[float_dtype], copy=False) if float_dtype else array
        if not np.isfinite(array).all():
            raise Mistake(f'{what} holds NaN, infinity, or a value beyond the range of {array.dtype.name}: not '
                             'written' + ('; take bf16 or fp32' if array.dtype == np.float16 else ''))
    return array
