"""EasyLM's streaming files, made by EasyLM of August 2023, and variants of them packed here as flax packs them."""
import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest

from checkpoint.formats.easylm import NAMES, Reader, index

HEAD_DIM = 16
WEIGHTS = [(name, layer) for name in NAMES for layer in (range(2) if name.startswith('layers.') else [None])]


def stream(path):
    """[(key, array)] of a streaming file, unpacked in one go by msgpack."""
    pairs = list(msgpack.Unpacker(open(path, 'rb'), max_buffer_size=0))
    arrays = [msgpack.unpackb(msgpack.unpackb(value).data) for _, value in pairs]
    return [(key, np.frombuffer(buffer, dtype).reshape(shape))
            for (key, _), (shape, dtype, buffer) in zip(pairs, arrays, strict=True)]


def flax_array(array):
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def pack_stream(path, pairs):
    path.write_bytes(b''.join(msgpack.packb((key, msgpack.packb(value))) for key, value in pairs))
    return path


@pytest.fixture
def file(golden):
    return golden / 'easylm/streaming_params_fp32'


def test_tensors_are_those_of_the_file(file):
    """Same numbers as an independent unpacking; the head transposed; q and k the same columns in another order."""
    reader, stored = Reader(file, 'params', HEAD_DIM), {'/'.join(key): array for key, array in stream(file)}
    assert reader.names == set(stored) and len(stored) == len(WEIGHTS)
    for name, layer in WEIGHTS:
        tensor, expected = reader.tensor(name, layer), stored[reader.source(name, layer)]
        expected = expected.T if name == 'head' else expected
        assert reader.shape(name, layer) == tensor.shape == expected.shape and tensor.dtype == np.float32
        if name in ('layers.w_q', 'layers.w_k'):
            tensor, expected = np.sort(tensor, axis=1), np.sort(expected, axis=1)
        np.testing.assert_array_equal(tensor, expected)


def rotate(x_HD, position, pairs):
    """Rotary embedding of one position, written for any choice of pairs of coordinates."""
    out = x_HD.copy()
    for i, (a, b) in enumerate(pairs):
        c, s = np.cos(position * 1e4 ** (-2 * i / HEAD_DIM)), np.sin(position * 1e4 ** (-2 * i / HEAD_DIM))
        out[:, a], out[:, b] = x_HD[:, a] * c - x_HD[:, b] * s, x_HD[:, a] * s + x_HD[:, b] * c
    return out


def test_rotary_scores_do_not_change_with_the_order(file):
    """q . k with pairs (2i, 2i+1) on EasyLM's columns equals q . k with pairs (i, i + D/2) on ours."""
    reader, stored = Reader(file, 'params', HEAD_DIM), {'/'.join(key): array for key, array in stream(file)}
    x, y = np.random.default_rng(0).normal(size=(2, 64))
    interleaved = [(2 * i, 2 * i + 1) for i in range(HEAD_DIM // 2)]
    half_split = [(i, i + HEAD_DIM // 2) for i in range(HEAD_DIM // 2)]

    def scores(w_q, w_k, pairs):
        q, k = (x @ w_q).reshape(4, HEAD_DIM), (y @ w_k).reshape(4, HEAD_DIM)
        return (rotate(q, 9, pairs) * rotate(k, 3, pairs)).sum(axis=1)

    theirs = scores(*(stored[f'transformer/h/1/attention/{w}/kernel'].astype(float) for w in ('wq', 'wk')), interleaved)
    ours = scores(*(reader.tensor(name, 1).astype(float) for name in ('layers.w_q', 'layers.w_k')), half_split)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_bfloat16_file_is_the_rounded_float32_file(golden, file):
    """The bf16 file of the same run holds each float32 rounded to nearest."""
    exact, rounded = (Reader(path, 'params', HEAD_DIM) for path in (file, golden / 'easylm/streaming_params_bf16'))
    for name, layer in WEIGHTS:
        expected = exact.tensor(name, layer).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(rounded.tensor(name, layer), expected)


def test_opening_reads_no_tensor(file):
    """The index seeks over the values: opening the 700 kB file takes less memory than its largest tensor."""
    tracemalloc.start()
    reader = Reader(file, 'params', HEAD_DIM)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 640 * 64 * 4 and len(reader.names) == 21


@pytest.mark.parametrize('kind', ['trainstate_params', 'flax_params', 'chunked'])
def test_other_kinds_hold_the_same_weights(file, tmp_path, kind):
    """A train state, a flax blob, and flax's chunks of a large array give the tensors of the params file."""
    path, pairs = tmp_path / 'file', stream(file)
    if kind == 'trainstate_params':
        others = [(('step',), flax_array(np.ones(3, np.float32)))]
        pack_stream(path, others + [(('params', 'params', *key), flax_array(array)) for key, array in pairs])
    elif kind == 'chunked':
        pack_stream(path, [(key, {'__msgpack_chunked_array__': True,
                                  'shape': {str(i): n for i, n in enumerate(a.shape)},
                                  'chunks': {'0': flax_array(a.ravel()[:50]), '1': flax_array(a.ravel()[50:])}})
                           for key, a in pairs])
    else:
        tree = {}
        for key, array in pairs:
            node = tree
            for part in key[:-1]:
                node = node.setdefault(part, {})
            node[key[-1]] = flax_array(array)
        path.write_bytes(msgpack.packb({'params': tree}))
    expected = Reader(file, 'params', HEAD_DIM)
    reader = Reader(path, 'params' if kind == 'chunked' else kind, HEAD_DIM)
    assert reader.names == expected.names
    for name, layer in WEIGHTS:
        np.testing.assert_array_equal(reader.tensor(name, layer), expected.tensor(name, layer))
        assert reader.shape(name, layer) == expected.shape(name, layer)


def test_a_file_of_another_kind_is_refused_with_the_right_spelling(file, tmp_path):
    """Each message names the type that would have worked."""
    state = pack_stream(tmp_path / 'state', [(('params', 'params', *key), flax_array(a)) for key, a in stream(file)])
    blob = tmp_path / 'blob'
    blob.write_bytes(msgpack.packb({'lm_head': flax_array(np.ones(3, np.float32))}))
    for path, kind, remedy in ((state, 'params', 'trainstate_params::'), (file, 'trainstate_params', 'params::'),
                               (blob, 'params', 'flax_params::'), (file, 'flax_params', 'no array as flax writes it')):
        with pytest.raises(ValueError, match=remedy):
            Reader(path, kind, HEAD_DIM)


def test_a_directory_is_answered_with_the_file_in_it(file, tmp_path):
    """EasyLM's run directory holds pickles beside the stream: they are not opened, and a reader wants the stream."""
    (tmp_path / 'streaming_params').write_bytes(file.read_bytes())
    (tmp_path / 'metadata.pkl').write_bytes(b'no pickle at all')
    (tmp_path / 'dataset.pkl').symlink_to('/nowhere')
    with pytest.raises(ValueError, match=f'is a directory: name the file in it, such as {tmp_path}/streaming_params'):
        Reader(tmp_path, 'params', HEAD_DIM)
    assert len(Reader(tmp_path / 'streaming_params', 'params', HEAD_DIM).names) == 21


def test_truncated_file_names_the_tensor_that_is_cut(file, tmp_path):
    """One byte less than EasyLM wrote, and opening fails with the key of the last tensor."""
    path = tmp_path / 'cut'
    path.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='cut off: lm_head/kernel'):
        index(path)


@pytest.mark.parametrize('value', [msgpack.ExtType(2, flax_array(np.ones(3, np.float32)).data), 'text',
                                   msgpack.ExtType(1, b'\xc0'),
                                   msgpack.ExtType(1, msgpack.packb(((1,), 'object', b'12345678')))])
def test_values_that_are_no_plain_array_are_refused(tmp_path, value):
    """Only flax's type 1 with a float dtype is an array; anything else is an error, not an object."""
    path = pack_stream(tmp_path / 'odd', [(('lm_head', 'kernel'), value)])
    with pytest.raises(ValueError, match='array'):
        Reader(path, 'params', HEAD_DIM).tensor('head', None)
