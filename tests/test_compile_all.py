"""Our kernels pass the TPU compiler: a set that has every feature, for every chip (`make compile-tpu` does all)."""
import jax
import pytest

from instruments.bench import compile_all, shapes

ATTENTION = ('tiny_d100', 'tiny_segments', 'tiny_f32_d100')
DECODE = ('tiny_smollm2', 'tiny_paged_d100', 'tiny_int8')


@pytest.mark.libtpu
@pytest.mark.parametrize('chip', ['v4', 'v5e', 'v5p', 'v6e'])
def test_the_kernels_compile(chip):
    """Forward and backward of a head of 100, segments, grouped heads, an odd length, float32; slots, pages, int8."""
    for name in ATTENTION:
        for backward in (False, True):
            assert compile_all.compile_shape(name, shapes.ATTENTION[name], backward, chip) is None, (name, backward)
    for name in DECODE:
        assert compile_all.compile_shape(name, shapes.DECODE[name], False, chip) is None, name


@pytest.mark.libtpu
def test_what_the_compiler_refuses_is_said(monkeypatch):
    """A kernel that does not fit VMEM gives the compiler's message, and so fails the run of all."""
    def refuses(*_, **__):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: vmem')

    monkeypatch.setattr(compile_all, 'compile_for', refuses)
    assert 'vmem' in compile_all.compile_shape('tiny_gqa', shapes.ATTENTION['tiny_gqa'], False, 'v5e')
