"""What the programs share: whether prompts begin with bos, the directory of compiled programs, flags of processes."""
import stat
from types import SimpleNamespace

import jax
import pytest

from hosts import start
from program import flags, parse, settings
from program import model as program


@pytest.mark.parametrize('given, trained, chosen', [
    (None, None, True), (None, False, False), (None, True, True), (False, None, False), (True, True, True)])
def test_bos_is_as_the_checkpoint_was_trained(given, trained, chosen):
    """Without a flag the checkpoint decides, and EasyLM's True where it says nothing."""
    assert program.choose_bos(given, SimpleNamespace(spec='some', add_bos_token=trained)) is chosen


def test_bos_against_the_checkpoint_is_refused():
    with pytest.raises(ValueError, match="add_bos_token=True, but load_checkpoint='some' was trained with False"):
        program.choose_bos(True, SimpleNamespace(spec='some', add_bos_token=False))


def test_compiled_programs_are_kept_where_only_the_user_reads(monkeypatch, tmp_path):
    """They are native code: the directory has mode 0700, also one that stood open before."""
    monkeypatch.setenv('PALLAMA_CACHE', str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / 'compiled').mkdir(mode=0o777)
    try:
        program.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'compiled')
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
    assert stat.S_IMODE((tmp_path / 'compiled').stat().st_mode) == 0o700


def distributed(*arguments):
    config = parse.parse(['serve.py', *arguments], flags.SERVE, '')
    return start.start_processes(config)


@pytest.mark.parametrize('switch', ['jax_distributed.initialize_jax_distributed', 'initialize_jax_distributed'])
def test_processes_start_as_the_flags_say(monkeypatch, switch):
    """What is given goes to jax.distributed.initialize under its names, what is not is left to JAX; with our times."""
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **values: calls.append(values))
    times = dict(initialization_timeout=start.MEETING_SECONDS, heartbeat_timeout_seconds=start.HEARTBEAT_SECONDS)
    distributed()
    distributed(f'--{switch}=True')
    distributed(f'--{switch}=True', '--jax_distributed.coordinator_address=host:1', '--jax_distributed.num_processes=1',
                '--jax_distributed.process_id=0', '--jax_distributed.local_device_ids=0,2')
    assert calls == [times, times | dict(coordinator_address='host:1', num_processes=1, process_id=0,
                                         local_device_ids=[0, 2])]


def test_flags_of_processes_that_do_nothing_or_say_nothing_are_refused(monkeypatch):
    with pytest.raises(ValueError, match='jax_distributed.num_processes has no effect without --jax_distributed.init'):
        distributed('--jax_distributed.num_processes=2')
    with pytest.raises(ValueError, match="local_device_ids='0;1' must be numbers"):
        distributed('--initialize_jax_distributed=True', '--jax_distributed.local_device_ids=0;1')
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **values: jax._src.distributed.State().initialize())
    with pytest.raises(ValueError, match='coordinator_address should be .*outside .* give --jax_distr'):
        distributed('--initialize_jax_distributed=True')


def test_a_host_of_a_slice_that_was_started_alone_is_refused(monkeypatch):
    """On one host of many JAX counts all, but nobody has called them together."""
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    with pytest.raises(ValueError, match='one of 4 hosts of a slice: start the program on all of them with --jax_dist'):
        given = parse.parse(['serve.py'], flags.SERVE, '')
        program.open_model(settings.read_load(given), settings.read_compute(given))


def test_flags_of_another_process_are_compared_by_name(monkeypatch):
    """process_id may differ; any other flag is named with both values."""
    ours = parse.parse(['serve.py', '--mesh_dim=1,1,8'], flags.SERVE, '')
    theirs = parse.parse(['serve.py', '--mesh_dim=1,2,4', '--jax_distributed.process_id=1'], flags.SERVE, '')
    sent = []
    monkeypatch.setattr(program.processes, 'exchange', lambda text: sent.append(text) or [text])
    start.refuse_other_flags(theirs)
    monkeypatch.setattr(program.processes, 'exchange', lambda text: [text, sent[0]])
    with pytest.raises(ValueError, match="mesh_dim is '1,1,8' on process 0 and '1,2,4' on process 1: start all"):
        start.refuse_other_flags(ours)
    monkeypatch.setattr(program.processes, 'exchange', lambda text: [sent[0], text])
    start.refuse_other_flags(parse.parse(['serve.py', '--mesh_dim=1,2,4'], flags.SERVE, ''))
