"""Claims about data/huggingface.py, on a local directory of JSON lines: nothing is asked of the hub."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.huggingface import HuggingfaceReader
from data.records import RecordReader
from data.rows import RowBatches
from data.stream import PackedStream
from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer

datasets = pytest.importorskip('datasets')

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'
PROCESSOR = TextProcessor(load_tokenizer(GOLDEN / 'tokenizer.model'), fields='text')
TEXTS = [json.loads(line)['text'] for line in (GOLDEN / 'train_200.jsonl').read_text().splitlines()[:40]]
BAD = 7  # the example whose text is null
TEXTS[BAD] = None


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    """What the library keeps goes to a directory of the tests, and nothing goes over the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        patch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """train (40 examples, one bad) as parquet and jsonl, in two directories."""
    folder = tmp_path_factory.mktemp('sets')
    for kind in ('jsonl', 'parquet'):
        (folder / kind).mkdir()
    (folder / 'jsonl' / 'train.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS))
    datasets.Dataset.from_dict({'text': TEXTS}).to_parquet(folder / 'parquet' / 'train.parquet')
    return folder


def open_reader(path, streaming=False, skip=True, **settings):
    return HuggingfaceReader(str(path), '', 'train', streaming, PROCESSOR, skip_bad_lines=skip, **settings)


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
@pytest.mark.parametrize('streaming', [False, True])
def test_stream_equals_that_of_the_same_json_lines(folder, kind, streaming):
    """Batches, bad record included, and the index are those of json_dataset; there is no byte."""
    stream = PackedStream(open_reader(folder / kind, streaming), seq_length=32, batch_size=4)
    lines = RecordReader(folder / 'jsonl' / 'train.jsonl', PROCESSOR, skip_bad_lines=True)
    for batch, expected, _ in zip(stream, from_file := PackedStream(lines, seq_length=32, batch_size=4), range(30),
                                  strict=False):
        assert_same(batch, expected)
        names = 'dataset_example_index', 'dataset_total_tokens'
        assert [stream.metrics[name] for name in names] == [from_file.metrics[name] for name in names]
    assert stream.reader.skipped_lines == lines.skipped_lines > 1 and 'dataset_file_loc' not in stream.metrics


@pytest.mark.parametrize('streaming', [False, True])
def test_resumes_exactly(folder, streaming):
    """From the JSON of the state at random batches of three passes, in mid-example and beyond the bad one."""
    stream = PackedStream(open_reader(folder / 'jsonl', streaming), seq_length=19, batch_size=3)
    resumed = PackedStream(open_reader(folder / 'jsonl', streaming), seq_length=19, batch_size=3)
    cuts = set(np.random.default_rng(3).choice(100, size=12, replace=False).tolist())
    for step in range(100):
        state = json.loads(json.dumps(stream.state()))
        batch = next(stream)
        if step in cuts:
            resumed.restore(state)
            assert_same(next(resumed), batch)
            assert resumed.state() == stream.state()
    assert stream.reader.skipped_lines >= 2


def test_a_set_smaller_than_a_batch_goes_on_over_its_passes(tmp_path):
    """Where EasyLM would read it for ever; and a set without a usable example is refused."""
    (tmp_path / 'train.jsonl').write_text('{"text": "a fine film"}\n')
    tokens = PROCESSOR({'text': 'a fine film'})[0]
    stream = PackedStream(open_reader(tmp_path), seq_length=40, batch_size=2)
    assert next(stream).tokens_BT.ravel().tolist() == (tokens * 80)[:80]
    (tmp_path / 'train.jsonl').write_text('{"text": 5}\n')
    with pytest.raises(ValueError, match='no usable record'):
        next(PackedStream(open_reader(tmp_path), seq_length=4, batch_size=1))


def test_bad_example_is_refused_with_its_index(folder):
    """... and with the flag that skips it, by a stream and by rows; skipped, it is counted."""
    for batches in (lambda reader: next(PackedStream(reader, seq_length=512, batch_size=4)),
                    lambda reader: RowBatches(reader, seq_length=512, batch_size=4, progress=False)):
        with pytest.raises(ValueError, match=r"jsonl\[7\]: field 'text' must be text, this is NoneType "
                                             r'\(--train_dataset\.huggingface_dataset\.skip_bad_lines=True'):
            batches(open_reader(folder / 'jsonl', skip=False))
    counts = RowBatches(open_reader(folder / 'jsonl'), seq_length=512, batch_size=4, progress=False).counts
    assert counts == {'rows': 39, 'truncated': 0, 'dropped': 0, 'skipped_lines': 1}


def test_other_data_is_not_continued(folder, tmp_path):
    """Another set, or a changed example in the same place, is noticed; a place beyond the end too."""
    (tmp_path / 'train.jsonl').write_bytes((folder / 'jsonl' / 'train.jsonl').read_bytes())
    stream = PackedStream(open_reader(tmp_path), seq_length=8, batch_size=1)
    state = stream.state()
    with pytest.raises(ValueError, match='example 41 is beyond the end .* has 40'):
        stream.restore(state | {'start': 41})
    with pytest.raises(ValueError, match='records was'):
        PackedStream(open_reader(folder / 'jsonl'), seq_length=8, batch_size=1).restore(state)
    changed = (folder / 'jsonl' / 'train.jsonl').read_text().replace('young', 'fresh')
    (tmp_path / 'train.jsonl').write_text(changed)
    with pytest.raises(ValueError, match='records was'):
        PackedStream(open_reader(tmp_path), seq_length=8, batch_size=1).restore(state)


def test_identity_outlives_the_process_and_the_date_of_the_file(folder, tmp_path):
    """A run resumed tomorrow, of files that were copied back, names the same set."""
    path = folder / 'parquet'
    ours = open_reader(path).identity()
    (path / 'train.parquet').touch()
    assert open_reader(path).identity() == ours
    program = ('import json, sys; from data.huggingface import HuggingfaceReader as R; '
               "print(json.dumps(R(sys.argv[1], '', 'train', False, None).identity()))")
    printed = subprocess.run([sys.executable, '-c', program, str(path)], capture_output=True, text=True, check=True,
                             cwd=Path(__file__).parent.parent, env=os.environ | {'HF_HOME': str(tmp_path)}).stdout
    assert json.loads(printed.splitlines()[-1]) == ours


@pytest.mark.parametrize('path, name, split, message', [
    ('{folder}/none', '', 'train', 'cannot be loaded'), ('{folder}/jsonl', '', 'validation', 'Unknown split'),
    ('{folder}/jsonl', 'en', 'train', "name='en' .*not found"), ('', '', 'train', 'must both be given'),
    ('{folder}/jsonl', '', '', 'must both be given'), ('nobody/such_a_set', '', 'train', 'the network'),
])
def test_set_that_cannot_be_loaded_names_its_flags(folder, path, name, split, message):
    """No such directory, split or configuration, nothing given, a hub that does not answer."""
    with pytest.raises(ValueError, match=message) as caught:
        HuggingfaceReader(path.format(folder=folder), name, split, False, PROCESSOR,
                          flag='eval_dataset.huggingface_dataset')
    assert str(caught.value).startswith('eval_dataset.huggingface_dataset: path=')


def test_missing_library_names_the_extra(monkeypatch):
    """pip install -e '.[huggingface]'."""
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[huggingface\]'"):
        open_reader('anything')
