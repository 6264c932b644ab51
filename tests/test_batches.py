"""Claims about data/batches.py.

batches_N.npz are the first 12 batches that EasyLM of August 2023 made of records.jsonl under the flags of
batches_N.json; train_curve.json holds its reader's place at each of 40 steps of training on train_200.jsonl.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.batches import PackedStream, Rows, default_buckets
from data.records import RecordReader, TextProcessor
from data.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / 'golden' / 'easylm'
TOKENIZER = load_tokenizer(GOLDEN / 'tokenizer.model')


def reader(path=GOLDEN / 'records.jsonl', skip_bad_lines=True, **text):
    return RecordReader(path, TextProcessor(TOKENIZER, **(text or {'fields': 'text'})), skip_bad_lines=skip_bad_lines)


def rows(source=None, **settings):
    settings = {'seq_length': 128, 'batch_size': 8, 'progress': False, **settings}
    return Rows(source or reader(fields='[prompt],answer'), **settings)


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
            assert batch.loss_positions_BP is None and batch.segments_BT.all() and batch.row_weight_B.all()


def test_place_in_the_file_is_easylms_on_40_steps():
    """Byte offset, line and tokens of every step of EasyLM's training run."""
    stream = PackedStream(reader(GOLDEN / 'train_200.jsonl'), seq_length=128, batch_size=8)
    steps = json.loads((GOLDEN / 'train_curve.json').read_text())
    assert len(steps) == 40
    for step in steps:
        next(stream)
        assert stream.metrics == {name: step[name] for name in stream.metrics}


@pytest.mark.parametrize('seq_length, batch_size', [(64, 4), (7, 1), (128, 8)])
def test_packed_stream_resumes_exactly(seq_length, batch_size):
    """From the JSON of the state before any batch, a fresh stream gives that batch, and then has the same state."""
    sizes = {'seq_length': seq_length, 'batch_size': batch_size}
    stream = PackedStream(reader(), **sizes)
    for _ in range(20):
        resumed = PackedStream(reader(), **sizes)
        resumed.restore(json.loads(json.dumps(stream.state())))
        assert_same(next(resumed), next(stream))
        assert resumed.metrics == stream.metrics and resumed.state() == stream.state()
        assert len(json.dumps(stream.state())) < 1000


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
    assert stream.metrics == {'dataset_file_loc': len(lines[0] + lines[1]), 'dataset_example_index': 1,
                              'dataset_total_tokens': 1008}


def test_packed_stream_refuses_a_file_without_records(tmp_path):
    """... instead of reading it for ever."""
    for examples in ([], [{'other': 'x'}]):
        with pytest.raises(ValueError, match='no usable record'):
            next(PackedStream(reader(write(tmp_path, *examples)), seq_length=8, batch_size=1))


def test_state_of_other_data_is_refused(tmp_path):
    """A file of the same size with other words, other fields, another batch size of rows: the text says which."""
    state = PackedStream(reader(), seq_length=8, batch_size=1).state()
    with pytest.raises(ValueError, match='text_processor was'):
        PackedStream(reader(fields='answer'), seq_length=8, batch_size=1).restore(state)
    path = tmp_path / 'same_size.jsonl'
    path.write_bytes((GOLDEN / 'records.jsonl').read_bytes().replace(b'fine', b'dull').replace(b'never', b'often'))
    with pytest.raises(ValueError, match='records was'):
        PackedStream(reader(path), seq_length=8, batch_size=1).restore(state)
    for other in ({'batch_size': 4}, {'seed': 1}, {'source': reader(fields='prompt')}):
        with pytest.raises(ValueError, match='cannot continue'):
            rows(**other).restore(rows().state())


# Rows


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
        assert source.metrics == resumed.metrics


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
    ({'batch_size': 0}, 'batch_size=0'), ({'seq_length': 0}, 'seq_length=0'), ({'too_long': 'cut'}, "too_long='cut'"),
    ({'bucket_lengths': (64, 32, 128)}, 'bucket_lengths='), ({'bucket_lengths': (32, 64)}, 'bucket_lengths='),
])
def test_settings_without_sense_are_refused(settings, message):
    """By name and value."""
    with pytest.raises(ValueError, match=message):
        rows(**settings)
