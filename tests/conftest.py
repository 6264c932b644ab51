"""Eight virtual CPU devices for every test, set before JAX is imported; and where the tests find their evidence."""
import importlib.util
import os
import pathlib
import sys

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import pytest

from instruments.tpu import compile as tpu_compile
from program import assets

jax.config.update('jax_numpy_rank_promotion', 'raise')
if importlib.util.find_spec('libtpu'):
    tpu_compile.prepare(schedules=True)  # before any test of the session loads libtpu

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
    """tests/golden: numbers that other systems produced (tests/README.md says by which)."""
    return GOLDEN


@pytest.fixture(scope='session')
def smollm2_gguf() -> pathlib.Path:
    """The real model of the quickstart, which `make test` fetches first."""
    path = assets.cache_directory() / 'smollm2-135m-instruct' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
    if not path.is_file():
        pytest.skip('the model is not there: python fetch.py --name=smollm2-135m-instruct')
    return path
