"""What the programs share: whether prompts begin with bos, and the private directory of compiled programs."""
import stat

import jax
import pytest
from ml_collections import ConfigDict

import wiring


@pytest.mark.parametrize('given, trained, chosen', [
    (None, None, True), (None, False, False), (None, True, True), (False, None, False), (True, True, True)])
def test_bos_is_as_the_checkpoint_was_trained(monkeypatch, given, trained, chosen):
    """Without a flag the checkpoint decides, and EasyLM's True where it says nothing."""
    monkeypatch.setattr(wiring.load, 'read_add_bos_token', lambda spec: trained)
    assert wiring.choose_bos(ConfigDict(dict(add_bos_token=given, load_checkpoint='some'))) is chosen


def test_bos_against_the_checkpoint_is_refused(monkeypatch):
    monkeypatch.setattr(wiring.load, 'read_add_bos_token', lambda spec: False)
    with pytest.raises(ValueError, match="add_bos_token=True, but load_checkpoint='some' was trained with False"):
        wiring.choose_bos(ConfigDict(dict(add_bos_token=True, load_checkpoint='some')))


def test_compiled_programs_are_kept_where_only_the_user_reads(monkeypatch, tmp_path):
    """They are native code: the directory has mode 0700, also one that stood open before."""
    monkeypatch.setenv('PALLAMA_CACHE', str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / 'compiled').mkdir(mode=0o777)
    try:
        wiring.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'compiled')
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
    assert stat.S_IMODE((tmp_path / 'compiled').stat().st_mode) == 0o700
