"""The shape table: what the tests, the tuner and the benchmark of the kernels have in common."""
import numpy as np
import pytest

from instruments.bench import shapes
from instruments.bench.shapes import ATTENTION, DECODE, AttentionShape, DecodeShape


def test_the_table_has_the_odd_sizes():
    """Lengths 1, 97, 129, 1025; head dimensions 64 to 256; MHA, GQA, MQA; both types; with and without segments."""
    table = ATTENTION.values()
    assert {1, 97, 129, 1025} <= {shape.T for shape in table}
    assert {64, 80, 96, 100, 128, 256} == {shape.D for shape in table} == {shape.D for shape in DECODE.values()}
    assert {'mha', 'gqa', 'mqa'} == {'mha' if s.H == s.K else 'mqa' if s.K == 1 else 'gqa' for s in table}
    assert {'bfloat16', 'float32'} == {shape.dtype for shape in table}
    assert {(True, True), (True, False), (False, True), (False, False)} == {(s.causal, bool(s.segments)) for s in table}
    assert {1, 97, 129, 1025} <= {shape.S for shape in DECODE.values()}
    assert {'int8', 'bfloat16', 'float32'} == {shape.cache_dtype for shape in DECODE.values()}


def test_useful_work_of_the_benchmark_shapes_by_hand():
    """s1: 4 * 8 * 32 * 128 * (1024 * 1025 / 2) FLOPs and four arrays of 64 MiB; d1: keys and values are 537 MB."""
    assert shapes.attention_flops(ATTENTION['s1']) == 4 * 8 * 32 * 128 * 524_800
    assert shapes.attention_flops(ATTENTION['s1'], backward=True) == 2.5 * 4 * 8 * 32 * 128 * 524_800
    assert shapes.attention_flops(ATTENTION['s1_full']) == 4 * 8 * 32 * 128 * 1_048_576
    assert shapes.attention_bytes(ATTENTION['s1']) == 4 * 2**26
    assert shapes.attention_bytes(ATTENTION['s1'], backward=True) == 8 * 2**26 + 2**20
    assert shapes.decode_bytes(DECODE['d1']) == 536_870_912 + 2 * 64 * 32 * 128 * 2
    assert shapes.decode_bytes(DECODE['d1_int8']) == 536_870_912 // 2 + 2 * 64 * 2048 * 8 * 4 + 2 * 64 * 32 * 128 * 2
    assert shapes.decode_flops(DECODE['d1']) == 4 * 32 * 128 * 64 * 2048


def test_segments_lie_end_to_end_and_padding_is_last():
    """Each row: 1..n in order, each at least one token, then zeros."""
    shape = ATTENTION['tiny_segments']
    segments_BT = shapes.segment_ids(shape)
    assert segments_BT.shape == (shape.B, shape.T) and segments_BT.dtype == np.int32
    for row in segments_BT:
        order = row[np.r_[True, np.diff(row) != 0]]
        assert list(order[order != 0]) == [1, 2, 3, 4, 5] and not (order[:-1] == 0).any()
    assert len({tuple(row) for row in segments_BT}) == shape.B and (segments_BT == 0).any()


def test_lengths_are_what_their_name_says():
    assert (shapes.lengths(DECODE['d1']) == 2048).all()
    ragged = shapes.lengths(DECODE['d2'])
    assert ragged.min() >= 64 and ragged.max() <= 2048 and 900 < ragged.mean() < 1200 and len(set(ragged)) > 50
    assert list(shapes.lengths(DECODE['tiny_edges'])[:4]) == [0, 1, 255, 256]


def test_a_page_table_names_each_page_once():
    shape = DECODE['tiny_paged']
    table = shapes.page_table(shape)
    assert table.shape == (6, 16) and len(set(table.ravel())) == 96 and table.max() <= 96 and table.min() >= 0
    assert not (np.diff(table) == 1).all()
    with pytest.raises(ValueError, match='contiguous'):
        shapes.page_table(DECODE['tiny_full'])


def test_inputs_have_the_shape_and_are_the_same_each_time():
    shape = ATTENTION['tiny_segments_t97']
    first, second = shapes.attention_inputs(shape), shapes.attention_inputs(shape)
    assert [x.shape for x in first] == [(2, 97, 2, 100), (2, 97, 1, 100), (2, 97, 1, 100), (2, 97)]
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
    assert not np.array_equal(first[1], first[2]) and not np.array_equal(first[0], shapes.attention_inputs(shape, 1)[0])
    assert [str(x.dtype) for x in shapes.decode_inputs(DECODE['tiny_int8'])] == ['bfloat16'] * 3 + ['int32']
    assert shapes.attention_inputs(ATTENTION['tiny_mha'])[3] is None


@pytest.mark.parametrize('make', [
    lambda: AttentionShape(B=1, T=8, H=3, K=2, D=64), lambda: AttentionShape(B=1, T=8, H=2, K=2, D=64, segments=8),
    lambda: DecodeShape(B=1, S=64, H=2, K=2, D=64, lengths='random'), lambda: DecodeShape(B=1, S=64, H=3, K=2, D=64),
    lambda: DecodeShape(B=1, S=63, H=2, K=2, D=64, lengths='uniform'),
    lambda: DecodeShape(B=1, S=100, H=2, K=2, D=64, page=16)])
def test_impossible_shapes_raise(make):
    with pytest.raises(ValueError, match='must be'):
        make()
