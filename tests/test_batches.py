"""Claims about data/batches.py, data/stream.py and data/rows.py.

batches_N.npz are the first 12 batches that EasyLM of August 2023 made of records.jsonl under the flags of
batches_N.json; train_curve.json holds its reader's place at each of 40 steps of training on train_200.jsonl.
"""
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import batches
from data.batches import read_dataset_state
from data.records import RecordReader
from data.rows import BY_HAND, RowBatches, default_buckets, refuse_beginning
from data.stream import PackedStream
from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer
from program.data import epoch_length

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'
TOKENIZER = load_tokenizer(GOLDEN / 'tokenizer.model')


def reader(path=GOLDEN / 'records.jsonl', skip_bad_lines=True, processes=1, **text):
    return RecordReader(path, TextProcessor(TOKENIZER, **(text or {'fields': 'text'})), skip_bad_lines=skip_bad_lines,
                        processes=processes, chunk_size=5, batch_size=20)


def rows(source=None, **settings):
    settings = {'seq_length': 128, 'batch_size': 8, 'progress': False, **settings}
    return RowBatches(source or reader(fields='[prompt],answer'), **settings)


def write(tmp_path, *examples):
    path = tmp_path / 'data.jsonl'
    path.write_text(''.join(json.dumps(example) + '\n' for example in examples))
    return path


def sequences(batch):
    """What a batch says of each row of weight 1: (its input tokens, {position: target})."""
    found = []
    for b in np.flatnonzero(batch.row_weight_B):
        tokens, counts = batch.tokens_BT[b][batch.segments_BT[b] > 0], batch.loss_mask_BP[b] > 0
        positions, targets = batch.loss_positions_BP[b][counts], batch.targets_BP[b][counts]
        found.append((tuple(tokens.tolist()), tuple(zip(positions.tolist(), targets.tolist(), strict=True))))
    return found


def place(source):
    """Its metrics without the two of the clock."""
    return {name: value for name, value in source.metrics.items() if not name.endswith('_tps')}


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))


# PackedStream


@pytest.mark.parametrize('case', range(6))
def test_packed_stream_equals_easylm(case):
    """Inputs, targets and masks of 12 batches are EasyLM's, token for token, past a bad line and the file's end."""
    flags = json.loads((GOLDEN / f'batches_{case}.json').read_text())
    stream = PackedStream(reader(**flags['text_processor']), **flags['json_dataset'])
    with np.load(GOLDEN / f'batches_{case}.npz') as golden:
        for step, tokens_after in enumerate(flags['tokens_after']):
            batch = next(stream)
            np.testing.assert_array_equal(batch.tokens_BT, golden['input_tokens'][step])
            np.testing.assert_array_equal(batch.targets_BP, golden['target_tokens'][step])
            np.testing.assert_array_equal(batch.loss_mask_BP, golden['loss_masks'][step])
            assert stream.metrics['dataset_total_tokens'] == tokens_after
            assert batch.loss_positions_BP is None and batch.segments_BT is None and batch.row_weight_B.all()


def test_an_epoch_of_a_stream_is_one_pass_over_its_tokens():
    """What comes after so many tokens is what came at first, in the same order; counting them moves nothing."""
    new = lambda: PackedStream(reader(), seq_length=16, batch_size=4)
    stream = new()
    count, records = stream.pass_tokens(), list(reader().records())
    assert count == sum(len(record.tokens) for record in records) and count % 64
    assert stream.state() == new().state() and not stream.reader.skipped_lines and not stream.reader.problems
    tokens = np.concatenate([next(stream).tokens_BT.ravel() for _ in range(2 * count // 64)])
    np.testing.assert_array_equal(tokens[:len(tokens) - count], tokens[count:])
    dataset = SimpleNamespace(name='train_dataset', flag='train_dataset.json_dataset', rows={})
    assert epoch_length(new(), dataset) == Fraction(count, 64)
    assert epoch_length(rows(), dataset) == rows().batches_per_epoch
    dataset.rows['streaming'] = True
    with pytest.raises(ValueError, match='json_dataset.streaming=True: how long an epoch .* give --total_steps'):
        epoch_length(new(), dataset)


def test_place_in_the_file_is_easylms_on_40_steps():
    """Byte offset, line and tokens of every step of EasyLM's training run."""
    stream = PackedStream(reader(GOLDEN / 'train_200.jsonl'), seq_length=128, batch_size=8)
    steps = json.loads((GOLDEN / 'train_curve.json').read_text())
    assert len(steps) == 40
    for step in steps:
        next(stream)
        assert place(stream) == {name: step[name] for name in step if name.startswith('dataset_')}


@pytest.mark.parametrize('seq_length, batch_size', [(64, 4), (7, 1), (128, 8)])
def test_packed_stream_resumes_exactly(seq_length, batch_size):
    """From the JSON of the state before any batch, a fresh stream gives that batch, and then has the same state."""
    sizes = {'seq_length': seq_length, 'batch_size': batch_size}
    stream = PackedStream(reader(), **sizes)
    for _ in range(20):
        resumed = PackedStream(reader(), **sizes)
        resumed.restore(json.loads(json.dumps(stream.state())))
        assert_same(next(resumed), next(stream))
        assert place(resumed) == place(stream) and resumed.state() == stream.state()
        assert len(json.dumps(stream.state())) < 1000


def test_packed_stream_resumes_exactly_with_any_number_of_processes(tmp_path):
    """A stream with two processes over a file of good, bad and empty lines: at random cuts in more than two passes,
    saved with one number of processes and resumed with the other, the next batches and states are the same, the count
    of skipped lines among them; all passes and resumptions are served by the same processes.
    """
    rng, lines = np.random.default_rng(7), (GOLDEN / 'train_200.jsonl').read_bytes().splitlines()[:90]
    for place_in_file in sorted(rng.integers(90, size=25), reverse=True):
        lines.insert(place_in_file, (b'{"text": 5}', b'{broken', b'', b'{"other": "x"}')[rng.integers(4)])
    path = tmp_path / 'mixed.jsonl'
    path.write_bytes(b'\n'.join(lines))
    two, pids = reader(path, processes=2), set()
    for seq_length, batch_size in ((16, 4), (7, 3), (61, 5)):
        sizes = {'seq_length': seq_length, 'batch_size': batch_size}
        straight = PackedStream(reader(path), **sizes)
        states, expected = [straight.state()], []
        while straight.reader.skipped_lines < 45 or len(expected) < 4:
            expected.append(next(straight))
            states.append(straight.state())
        parallel, two.skipped_lines = PackedStream(two, **sizes), 0
        for batch, state in zip(expected, states[1:], strict=True):
            assert_same(next(parallel), batch)
            assert parallel.state() == state
        for cut in rng.integers(len(expected) - 3, size=6):
            for source in (two, reader(path)):
                resumed = PackedStream(source, **sizes)
                resumed.restore(json.loads(json.dumps(states[cut])))
                for batch, state in zip(expected[cut:cut + 3], states[cut + 1:], strict=False):
                    assert_same(next(resumed), batch)
                    assert resumed.state() == state
        pids.add(tuple(process.pid for process in two._workers._processes))
    two.close()
    assert len(pids) == 1


def test_a_batch_waits_for_one_token_more_than_it_needs(tmp_path):
    """With exactly C + 1 tokens at hand EasyLM reads one more record first; seen in the place, not in the tokens."""
    path = write(tmp_path, {'text': 'one'}, {'text': 'two'})
    count = len(reader(path).processor({'text': 'one'})[0]) - 1
    stream = PackedStream(reader(path), seq_length=count, batch_size=1)
    next(stream)
    assert stream.metrics['dataset_example_index'] == 1


def test_packed_stream_may_begin_elsewhere_by_hand():
    """start_seek_loc and the two counters set the beginning, as EasyLM's flags of that name do."""
    lines = (GOLDEN / 'train_200.jsonl').read_bytes().splitlines(keepends=True)
    stream = PackedStream(reader(GOLDEN / 'train_200.jsonl'), seq_length=8, batch_size=1, start_seek_loc=len(lines[0]),
                          example_index_at_start=1, tokens_count_at_start=1000)
    tokens = reader(GOLDEN / 'train_200.jsonl').processor(json.loads(lines[1]))[0]
    assert next(stream).tokens_BT[0].tolist() == tokens[:8]
    assert place(stream) == {'dataset_file_loc': len(lines[0] + lines[1]), 'dataset_example_index': 1,
                             'dataset_total_tokens': 1008}


def test_packed_stream_begins_where_a_line_does(tmp_path):
    """A byte in the middle of a line is refused with the byte where the next begins, one beyond the end with the size;
    the very end is a beginning: that of the next pass, as with EasyLM.
    """
    path = tmp_path / 'three.jsonl'
    path.write_bytes(b'{"text": "a"}\n{"text": "bb"}\n{"text": "ccc"}')
    begin = lambda byte: PackedStream(reader(path), seq_length=2, batch_size=1, start_seek_loc=byte)
    for byte in range(44):
        if byte in (0, 14, 29, 44):
            continue
        with pytest.raises(ValueError, match=f'start_seek_loc={byte} is in the middle of a line .* byte '
                                             f'{min(end for end in (14, 29, 44) if end > byte)}'):
            begin(byte)
    with pytest.raises(ValueError, match='start_seek_loc=45 is beyond the end .* 44 bytes'):
        begin(45)
    assert [next(begin(byte)).targets_BP[0].tolist() for byte in (0, 14, 29, 44)] == [
        reader(path).processor({'text': text})[0][1:3] for text in ('a', 'bb', 'ccc', 'a')]


@pytest.mark.parametrize('name', BY_HAND)
def test_beginning_by_hand_is_for_streams(name):
    """Rows, which are shuffled, refuse every number but 0; a set from the hub has no such flags."""
    zeros = dict.fromkeys(BY_HAND, 0)
    refuse_beginning(zeros, 'train_dataset.json_dataset')
    refuse_beginning({}, 'train_dataset.huggingface_dataset')
    with pytest.raises(ValueError, match=f'^train_dataset.json_dataset.{name}=1 .*batching=stream'):
        refuse_beginning(zeros | {name: 1}, 'train_dataset.json_dataset')


@pytest.mark.parametrize('kind', ['stream', 'rows'])
def test_throughput(kind, monkeypatch):
    """With batches that take 1, 2, 3, .. seconds: all tokens over all the time, and those of the last two batches over
    the time that these took.  There is no figure before the second batch: until then nothing was trained on.
    """
    window = {'throughput_average_window_size': 2}
    source = PackedStream(reader(), seq_length=8, batch_size=4, **window) if kind == 'stream' else rows(**window)
    assert 'dataset_average_tps' not in source.metrics
    clock, counts = iter([0, 1, 3, 6, 10]), []
    monkeypatch.setattr(batches, 'perf_counter', lambda: next(clock))
    for seconds, seconds_of_two in ((1, 1), (3, 3), (6, 5), (10, 7)):
        before = source.total_tokens
        next(source)
        counts.append(source.total_tokens - before)
        if len(counts) < 2:
            assert not [name for name in source.metrics if name.endswith('_tps')]
            continue
        assert source.metrics['dataset_accumulated_tps'] == round(sum(counts) / seconds, 1)
        assert source.metrics['dataset_average_tps'] == round(sum(counts[-2:]) / seconds_of_two, 1)


@pytest.mark.parametrize('change, message', [
    ({'start': '0'}, "start='0'"), ({'index': -1}, 'index=-1'), ({'dropped': None}, 'dropped=None'),
    ({'skipped_lines': True}, 'skipped_lines=True'), ({'total_tokens': 1.0}, 'total_tokens=1.0'),
    ({'source': None}, 'source=None'), ({'start': 1}, 'middle of a line'), ({'start': 10**9}, 'beyond the end'),
    ({'dropped': 10**6}, 'no record .* more than 1000000 tokens'), ({'epoch': 1}, 'batching=rows'),
])
def test_damaged_state_of_a_stream_is_refused(change, message):
    """Wrong type, negative number, place that is none, more tokens gone than the record has, a state of rows."""
    stream = PackedStream(reader(), seq_length=8, batch_size=1)
    next(stream)
    stream.restore(stream.state())
    with pytest.raises(ValueError, match=message):
        stream.restore(stream.state() | change)


@pytest.mark.parametrize('change, message', [
    ({'epoch': '0'}, "epoch='0'"), ({'batch': -1}, 'batch=-1'), ({'batch': 9}, 'batch=9 of 8'),
    ({'source': []}, r'source=\[\]'),
])
def test_damaged_state_of_rows_is_refused(change, message):
    """The same for rows."""
    source = rows()
    with pytest.raises(ValueError, match=message):
        source.restore(source.state() | change)
    for other, message in ((None, 'state is None'), (STATE, 'batching=stream')):
        with pytest.raises(ValueError, match=message):
            source.restore(other)


def test_state_file(tmp_path):
    """What a run writes is read back, and begins the stream where it was."""
    path, stream = tmp_path / 'dataset.json', PackedStream(reader(), seq_length=8, batch_size=4)
    next(stream)
    written = {'state': stream.state(), 'dataset': {'json_dataset': {'seq_length': 8}}}
    path.write_text(json.dumps(written))
    assert read_dataset_state(str(path)) == written
    path.write_text(json.dumps(written | {'state': rows().state()}))
    assert read_dataset_state(str(path))['state'] == rows().state()


STATE = {'start': 0, 'index': 0, 'dropped': 0, 'skipped_lines': 0, 'total_tokens': 0, 'source': {}}


@pytest.mark.parametrize('content, message', [
    (b'{"state": ', 'no valid JSON'), (b'\xff', 'no valid JSON'), (b'[1]', 'must hold'),
    (json.dumps({'state': STATE}), 'must hold'), (json.dumps({'state': 1, 'dataset': {}}), 'must hold'),
    (json.dumps({'state': STATE | {'start': -5}, 'dataset': {}}), 'start=-5'),
    (json.dumps({'state': {'epoch': 0, 'batch': 1.5}, 'dataset': {}}), 'batch=1.5'),
    (b'\x80\x04\x95', 'pickles are never read'),
])
def test_state_file_that_is_none_is_refused(tmp_path, content, message):
    """Cut off, of other content, with numbers that are none, pickled; the text names the flag and the file."""
    path = tmp_path / 'dataset.json'
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_dataset_state(str(path))
    assert f'load_dataset_state={str(path)!r}' in str(caught.value)


def test_pickled_state_is_not_read(tmp_path):
    """EasyLM's dataset.pkl: the text names the flags that take its numbers."""
    (tmp_path / 'dataset.pkl').write_bytes(b'cos\nsystem\n')
    with pytest.raises(ValueError, match='start_seek_loc=.*dataset_file_loc.*tokens_count_at_start'):
        read_dataset_state(str(tmp_path / 'dataset.pkl'))
    with pytest.raises(ValueError, match='is no file'):
        read_dataset_state(str(tmp_path / 'none.json'))


# Rows


def test_rows_of_two_processes_are_those_of_one():
    """The same batches and counts, and no process stays once the set is tokenized."""
    two = reader(processes=2, fields='[prompt],answer')
    started = []
    two._outcomes, outcomes = lambda lines: started.append(two) or outcomes(lines), two._outcomes
    source, alone = rows(two), rows()
    assert started and two._workers is None and source.counts == alone.counts
    for _ in range(source.batches_per_epoch):
        assert_same(next(source), next(alone))


def test_an_epoch_has_every_record_once():
    """60 records in ceil(60 / 8) batches, in each of three epochs, each with its own tokens and targets."""
    source = rows()
    expected = Counter()
    for record in reader(fields='[prompt],answer').records():
        targets = tuple((t, record.tokens[t + 1]) for t in range(len(record.tokens) - 1) if record.loss_mask[t + 1])
        expected[tuple(record.tokens[:-1]), targets] += 1
    assert source.batches_per_epoch == 8
    for _ in range(3):
        assert Counter(row for _ in range(8) for row in sequences(next(source))) == expected


def test_shapes_are_few_and_known_before():
    """All batches of five epochs have one of `shapes`: P follows from T, and T is a bucket."""
    source = rows(batch_size=4)
    seen = set()
    for _ in range(5 * source.batches_per_epoch):
        batch = next(source)
        seen.add((batch.tokens_BT.shape[1], batch.targets_BP.shape[1]))
        assert batch.tokens_BT.shape[0] == batch.targets_BP.shape[0] == 4
    assert seen <= set(source.shapes) and len(source.shapes) <= len(default_buckets(128))
    assert len({length for length, _ in source.shapes}) == len(source.shapes)


def test_every_row_fits_the_targets_of_a_longer_bucket(tmp_path):
    """A short row with 20 targets fills up a batch of long rows with 5: P covers both, and P is never above T."""
    many = {'prompt': 'a', 'answer': 'one two three four'}
    few = {'prompt': 'one two three four five six seven eight nine ten', 'answer': 'a'}
    source = rows(reader(write(tmp_path, many, few), fields='[prompt],answer'), batch_size=2, bucket_lengths=(24, 128))
    assert len(sequences(next(source))) == 2 and len(source.shapes) == 2
    assert all(width <= length for length, width in rows(reader(), batch_size=2).shapes)


def test_default_buckets():
    """Multiples of 16 up to seq_length itself."""
    assert default_buckets(128) == (32, 40, 48, 56, 64, 80, 96, 112, 128)
    assert len(default_buckets(1024)) == 21
    assert default_buckets(20) == (20,) and default_buckets(100) == (32, 40, 48, 56, 64, 80, 96, 100)


def test_padding_has_no_weight():
    """Padding positions have segment 0 and come last; rows that fill the last batch up have neither loss nor weight."""
    source = rows()
    filling = 0
    for _ in range(source.batches_per_epoch):
        batch = next(source)
        assert (np.diff(batch.segments_BT, axis=1) <= 0).all() and set(batch.segments_BT.ravel()) <= {0, 1}
        empty = batch.row_weight_B == 0
        filling += empty.sum()
        assert not batch.segments_BT[empty].any() and not batch.loss_mask_BP[empty].any()
        assert (batch.loss_mask_BP[~empty].sum(1) > 0).all()
        assert (batch.tokens_BT[batch.segments_BT == 0] == TOKENIZER.pad_token_id).all()
        assert not batch.loss_positions_BP[batch.loss_mask_BP == 0].any()
    assert filling == 8 * 8 - 60


def test_order_follows_from_seed_and_epoch():
    """Same seed, same batches; another seed or the next epoch, others; without shuffle, file order within a length."""
    def epoch(source):
        return [sequences(next(source)) for _ in range(source.batches_per_epoch)]

    source = rows()
    first, second = epoch(source), epoch(source)
    assert first == epoch(rows()) and first != second and first != epoch(rows(seed=7))
    assert source.metrics['dataset_epoch'] == 1
    lengths = [next(source).tokens_BT.shape[1] for _ in range(source.batches_per_epoch)]
    assert lengths != sorted(lengths)
    plain = rows(shuffle=False, bucket_lengths=(128,))
    in_file_order = [tuple(record.tokens[:-1]) for record in reader(fields='[prompt],answer').records()]
    assert [row[0] for batch in epoch(plain) for row in batch] == in_file_order


def test_rows_resume_exactly():
    """From the JSON of the state after any batch, over the end of an epoch."""
    source = rows()
    for _ in range(11):
        next(source)
        resumed = rows()
        resumed.restore(json.loads(json.dumps(source.state())))
    for _ in range(10):
        assert_same(next(source), next(resumed))
        assert place(source) == place(resumed)


def test_little_is_padding():
    """train_200.jsonl (23 to 76 tokens) in batches of 8: more than three quarters of the positions are tokens."""
    source = rows(reader(GOLDEN / 'train_200.jsonl'))
    batches = [next(source) for _ in range(source.batches_per_epoch)]
    fill = sum((b.segments_BT > 0).sum() for b in batches) / sum(b.segments_BT.size for b in batches)
    assert fill == source.fill > 0.75


LONG = {'prompt': 'one two three four five six seven', 'answer': ' Positive'}
SHORT = {'prompt': 'one', 'answer': ' Negative'}


def test_too_long_record_is_refused_by_default(tmp_path):
    """With its place, its length and the two flags that help."""
    path = write(tmp_path, SHORT, LONG)
    with pytest.raises(ValueError, match=r'data\.jsonl:2: \d+ tokens do not fit .*seq_length=24') as caught:
        rows(reader(path, fields='[prompt],answer'), seq_length=24)
    assert '--train_dataset.json_dataset.too_long=truncate' in str(caught.value)


def test_truncation_keeps_bos_and_answer(tmp_path):
    """The tokens after bos go until seq_length + 1 are left; the answer and its loss stay; it is counted."""
    source = rows(reader(write(tmp_path, SHORT, LONG), fields='[prompt],answer'), seq_length=24, too_long='truncate',
                  shuffle=False, batch_size=2)
    tokens, _ = reader(fields='[prompt],answer').processor(LONG)
    inputs, targets = sequences(next(source))[1]
    assert inputs == (1, *tokens[-24:-1]) and len(inputs) == 24
    answer = (*TOKENIZER.encode(' Positive'), 2)
    assert tuple(target for _, target in targets) == answer and targets[0][0] == 24 - len(answer)
    assert source.counts == {'rows': 2, 'truncated': 1, 'dropped': 0, 'skipped_lines': 0}


def test_answer_that_does_not_fit_is_never_cut(tmp_path):
    """Truncation takes from the prompt only."""
    path = write(tmp_path, {'prompt': 'one', 'answer': LONG['prompt']})
    with pytest.raises(ValueError, match=r'data\.jsonl:1: the part with loss alone does not fit'):
        rows(reader(path, fields='[prompt],answer'), seq_length=12, too_long='truncate')


def test_dropped_records_are_counted(tmp_path):
    """too_long='drop' leaves the others; when none is left, that is an error."""
    path = write(tmp_path, SHORT, LONG)
    source = rows(reader(path, fields='[prompt],answer'), seq_length=24, too_long='drop', batch_size=2)
    assert source.counts == {'rows': 1, 'truncated': 0, 'dropped': 1, 'skipped_lines': 0}
    with pytest.raises(ValueError, match='no usable record'):
        rows(reader(path, fields='[prompt],answer'), seq_length=4, too_long='drop')


def test_record_without_target_is_a_bad_line(tmp_path):
    """It would divide by zero targets: refused with its place, or skipped and counted."""
    path = write(tmp_path, {**SHORT, 'fields': '[prompt],answer'}, {**SHORT, 'fields': '[prompt]'})
    text = {'fields_from_example': 'fields', 'add_eos_token': False}
    with pytest.raises(ValueError, match=r'data\.jsonl:2: no token of the record carries loss'):
        rows(reader(path, skip_bad_lines=False, **text))
    assert rows(reader(path, **text)).counts == {'rows': 1, 'truncated': 0, 'dropped': 0, 'skipped_lines': 1}


@pytest.mark.parametrize('settings, message', [
    ({'seq_length': 0}, 'seq_length=0'),
    ({'bucket_lengths': (64, 32, 128)}, 'bucket_lengths='), ({'bucket_lengths': (32, 64)}, 'bucket_lengths='),
])
def test_settings_without_sense_are_refused(settings, message):
    """By name and value."""
    with pytest.raises(ValueError, match=message):
        rows(**settings)
