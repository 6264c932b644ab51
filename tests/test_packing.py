"""Several records in a row, several files in an epoch, and weights: the same examples, and the same loss."""
import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import TINY, on_mesh, one_device
from jax.sharding import PartitionSpec
from test_batches import GOLDEN, TOKENIZER, assert_same, reader, rows, sequences, write

from data.batches import Batch
from data.mixture import Mixture, drawn, quotas, split_path
from data.packing import first_fit
from data.records import RecordReader
from data.rows import RowBatches
from data.stream import PackedStream
from data.text_processor import TextProcessor
from model.config import Compute
from model.partition import make_mesh
from model.weights import init_params, partitions
from program import flags, parse, settings
from program.data import epoch_length, open_batches, read_class_weights
from training import step
from training.state import abstract_batch


def packed(source=None, **settings):
    return rows(source, **{'packed': True, 'batch_size': 4, **settings})


def examples(batch: Batch):
    """What a batch says of each example: (its tokens, ((position in it, target), ..), its share, its weights)."""
    found = []
    for b, segments in enumerate(batch.segments_BT):
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(here, np.arange(here[0], here[-1] + 1))
            if batch.positions_BT is not None:
                np.testing.assert_array_equal(batch.positions_BT[b, here], np.arange(len(here)))
            mine = (batch.loss_mask_BP[b] > 0) & np.isin(batch.loss_positions_BP[b], here)
            positions = (batch.loss_positions_BP[b][mine] - here[0]).tolist()
            targets = batch.targets_BP[b][mine].tolist()
            share = None if batch.loss_share_BP is None else batch.loss_share_BP[b][mine].sum()
            weight = None if batch.loss_weight_BP is None else set(batch.loss_weight_BP[b][mine].tolist())
            found.append((tuple(batch.tokens_BT[b, here].tolist()), tuple(zip(positions, targets, strict=True)), share,
                          weight))
    return found


def test_first_fit_by_hand():
    """Longest first, each into the first row with room; in windows, each by itself."""
    assert first_fit(np.array([3, 5, 2, 4, 6]), 6) == [[4], [1], [3, 2], [0]]
    assert first_fit(np.array([6, 1] * 1024), 7)[:2] == [[0, 1], [2, 3]]
    lengths = np.random.default_rng(0).integers(1, 129, 3000)
    placed = first_fit(lengths, 128)
    assert sorted(place for row in placed for place in row) == list(range(3000))
    assert max(lengths[row].sum() for row in placed) <= 128
    assert len(placed) < 1.05 * lengths.sum() / 128


def test_a_packed_epoch_has_every_record_once_and_whole():
    """The 60 records of the rows, in fewer and fuller rows of seq_length; positions restart, and no target is of the
    next record."""
    source, plain = packed(), rows()
    expected = Counter(row for _ in range(plain.batches_per_epoch) for row in sequences(next(plain)))
    for _ in range(2):
        batches = [next(source) for _ in range(source.batches_per_epoch)]
        found = [example for batch in batches for example in examples(batch)]
        assert Counter(example[:2] for example in found) == expected
        assert all(batch.tokens_BT.shape == (4, 128) for batch in batches) and len(source.shapes) == 1
    assert source.fill > 0.75 and 2 * len(batches) * 4 < 60 and epoch_length(source, None) == len(batches)
    for batch in batches:
        assert batch.loss_share_BP.sum() == pytest.approx(1) and not batch.loss_share_BP[batch.loss_mask_BP == 0].any()
        shares = [share for _, _, share, _ in examples(batch)]
        np.testing.assert_allclose(shares, 1 / len(shares), rtol=1e-5)


def test_packed_rows_are_shuffled_by_seed_and_epoch():
    epoch = lambda source: [next(source).tokens_BT.tolist() for _ in range(source.batches_per_epoch)]
    source = packed()
    first = epoch(source)
    assert first == epoch(packed()) != epoch(source) and first != epoch(packed(seed=7))


def test_packed_rows_resume_exactly():
    """From the JSON of the state after any batch, over the end of an epoch; never from a state of rows or stream."""
    source = packed(batch_size=2)
    for _ in range(source.batches_per_epoch + 3):
        next(source)
        resumed = packed(batch_size=2)
        resumed.restore(json.loads(json.dumps(source.state())))
        following = packed(batch_size=2)
        following.restore(source.state())
        assert_same(next(resumed), next(following))
        assert resumed.state() == following.state()
    plain = rows(batch_size=2, bucket_lengths=(128,))
    for one, other in ((source, plain), (plain, source)):
        with pytest.raises(ValueError, match='cannot continue with .*: batching was (rows|packed), now it is'):
            one.restore(other.state())


def test_loss_per_token_shares_by_targets():
    """Every target of a batch has the same share, in rows, packed and stream, whose other arrays stay as they were."""
    for batch in (next(rows(loss_per='token')), next(packed(loss_per='token'))):
        targets = (batch.loss_mask_BP > 0).sum()
        np.testing.assert_allclose(batch.loss_share_BP, batch.loss_mask_BP / targets, rtol=1e-6)
    sizes = dict(seq_length=16, batch_size=4)
    plain, stream = next(PackedStream(reader(), **sizes)), next(PackedStream(reader(), **sizes, loss_per='token'))
    assert_same(plain[:6], stream[:6])
    np.testing.assert_allclose(stream.loss_share_BP, plain.loss_mask_BP / plain.loss_mask_BP.sum(), rtol=1e-6)
    assert plain[6:] == (None, None, None) == next(rows())[6:]


WORDS = ['one', 'two three', 'four five six', 'a fine film', 'the end', 'seven eight nine ten', 'x', 'yes no']


@pytest.fixture
def weighted(tmp_path):
    """Eight records of unlike lengths and weights."""
    return write(tmp_path, *({'prompt': ' '.join(WORDS[:n + 1]), 'completion': f' {word}', 'w': n / 2}
                             for n, word in enumerate(WORDS)))


@pytest.mark.parametrize('mesh_dim, loss_per, weight_field', [
    ('1,1,1', 'row', 'w'), ('1,1,1', 'token', ''), ('2,2,2', 'row', '')])
def test_packed_rows_have_the_loss_and_gradients_of_rows(weighted, mesh_dim, loss_per, weight_field):
    """The same eight examples, one a row and in four packed rows: loss, accuracy and every gradient to 1e-5; the loss
    is the sum over examples of weight * mean / 8, or of weight * nll / targets."""
    config = dataclasses.replace(TINY, vocab_size=640, num_hidden_layers=1, initializer_range=0.1)  # attention matters
    mesh = one_device() if mesh_dim == '1,1,1' else make_mesh(mesh_dim)
    params = init_params(config, mesh, 3)
    source = lambda: RecordReader(weighted, TextProcessor(TOKENIZER, weight_field=weight_field))
    sizes = dict(loss_per=loss_per, progress=False)
    apart = RowBatches(source(), seq_length=64, bucket_lengths=(64,), batch_size=8, **sizes)
    together = RowBatches(source(), seq_length=128, batch_size=4, packed=True, **sizes)
    assert apart.batches_per_epoch == together.batches_per_epoch == 1
    run = on_mesh(jax.value_and_grad(lambda params, batch: step.batch_loss(params, batch, config, Compute()),
                                     has_aux=True), config, mesh, ((PartitionSpec(), PartitionSpec()),
                                                                   partitions(config)))
    one, other = next(apart), next(together)
    assert (other.segments_BT.max(axis=1) > 1).any()
    (value, accuracy), grads = jax.device_get(run(params, one))
    (packed_value, packed_accuracy), packed_grads = jax.device_get(run(params, other))
    np.testing.assert_allclose([packed_value, packed_accuracy], [value, accuracy], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
    for change in (dict(positions_BT=3 * other.positions_BT), dict(segments_BT=np.minimum(other.segments_BT, 1))):
        changed = run(params, other._replace(**change))[0][0]  # both matter: of positions only differences do
        assert abs(changed / value - 1) > 1e-4, change
    if weight_field and loss_per == 'row':
        losses = []
        for b in range(8):
            weights = np.zeros_like(one.loss_weight_BP)
            weights[b] = 8
            losses.append(run(params, one._replace(loss_weight_BP=weights))[0][0])
        np.testing.assert_allclose(value, np.mean(one.loss_weight_BP[:, 0] * np.array(losses)), rtol=1e-5)
        assert sorted(one.loss_weight_BP[:, 0].tolist()) == [n / 2 for n in range(8)]


def test_weights_stand_at_the_tokens_of_their_records(weighted):
    """In rows, packed and stream."""
    source = lambda: RecordReader(weighted, TextProcessor(TOKENIZER, weight_field='w'))
    weight_of = {tuple(record.tokens[:-1]): record.weight for record in source().records()}
    for batches in (rows(source()), packed(source())):
        assert {tokens: weight for tokens, _, _, weight in examples(next(batches))} == {
            tokens: {weight} for tokens, weight in weight_of.items()}
    records = list(source().records())
    stream = PackedStream(source(), seq_length=30, batch_size=2)
    expected = 3 * [record.weight for record in records for _ in record.tokens]
    for start in (0, 60, 120, 180):
        np.testing.assert_allclose(next(stream).loss_weight_BP.ravel(), expected[start + 1:start + 61])
    state, nameless = rows(source()).state(), TextProcessor(TOKENIZER, weight_field='n')
    weighted.write_text(weighted.read_text().replace('"w": 1.5', '"w": 2.5'))
    with pytest.raises(ValueError, match='cannot continue .*rows_sha256'):
        rows(source()).restore(state)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: weight_field='n' must hold a number"):
        rows(RecordReader(weighted, nameless))


# ---------------------------------------------------------------- several files


def test_a_path_may_name_several_files_with_weights(tmp_path):
    """A file's own name wins; each of several has a weight above 0."""
    read = lambda text: split_path(text, 'f')
    odd = tmp_path / 'a:1,b:2'
    odd.write_text('')
    assert read(str(odd)) == [(str(odd), 1.0)] and read('a.jsonl') == [('a.jsonl', 1.0)]
    assert read('a.jsonl:0.7, b:c.jsonl:3') == [('a.jsonl', 0.7), ('b:c.jsonl', 3.0)]
    for wrong in ('a,b', 'a:1,b', 'a:1,b:0', 'a:1,b:-1', 'a:1,b:x', 'a:1,b:nan', 'a:1,b:inf', 'a:1,'):
        with pytest.raises(ValueError, match='^f.path=.*each has a weight above 0: a.jsonl:0.7,b.jsonl:0.3'):
            read(wrong)
    with pytest.raises(ValueError, match='names a file twice'):
        read('a:1,a:2')


def test_shares_are_whole_rows_and_passes_are_whole_files():
    """The largest remainders get what is left; draws go through a file before any row comes again."""
    assert quotas([60, 200], [0.7, 0.3]) == [182, 78] and quotas([1, 1, 1], [1, 1, 1]) == [1, 1, 1]
    assert quotas([10, 1], [1, 1000]) == [0, 11]
    draws = drawn(10, 0, 35, 42, 0, True)
    assert all(sorted(draws[start:start + 10]) == list(range(10)) for start in (0, 10, 20))
    parts = drawn(10, 0, 13, 42, 0, True), drawn(10, 13, 22, 42, 0, True)
    np.testing.assert_array_equal(np.concatenate(parts), draws)
    assert draws[:10].tolist() != draws[10:20].tolist() != drawn(10, 0, 10, 42, 1, True).tolist()
    assert drawn(3, 2, 4, 42, 0, False).tolist() == [2, 0, 1, 2]


def mixture(*weights, **settings):
    readers = [reader(fields='[prompt],answer'), reader(GOLDEN / 'train_200.jsonl', fields='text')]
    return rows(Mixture('both', readers, list(weights)), seq_length=128, **settings)


@pytest.mark.parametrize('kind', [False, True])
def test_an_epoch_draws_of_each_file_by_its_weight(kind):
    """Rows of the two files, told apart by their tokens, in each of three epochs; the state says how many were."""
    source = mixture(3, 1, packed=kind)
    first = {tuple(record.tokens[:-1]) for record in reader(fields='[prompt],answer').records()}
    small, large = source.files
    total = small['rows'] + large['rows']
    assert small['epoch'] == round(total * 3 / 4) and small['epoch'] + large['epoch'] == total
    assert kind or (small['rows'], large['rows']) == (60, 200)
    for epoch in (1, 2, 3):
        drawn_now = Counter()
        for _ in range(source.batches_per_epoch):
            batch = next(source)
            row = lambda b, batch=batch: tuple(batch.tokens_BT[b][batch.segments_BT[b] == 1].tolist())
            drawn_now.update(row(b) in first for b in np.flatnonzero(batch.row_weight_B))
        assert drawn_now[True] == small['epoch']
        assert [file['drawn'] for file in source.state()['files']] == [epoch * small['epoch'], epoch * large['epoch']]


def test_no_row_of_a_file_comes_again_before_all_have_come():
    """Half of 260 rows an epoch: of the 200 rows every one comes in two epochs, 60 of them twice."""
    source, seen = mixture(1, 1), Counter()
    for _ in range(2 * source.batches_per_epoch):
        before = source.batch if source.batch < source.batches_per_epoch else 0
        next(source)
        seen.update(row for row in source._plan[before] if row >= 60)
    assert source.files[1]['epoch'] == 130 and sorted(Counter(seen.values()).items()) == [(1, 140), (2, 60)]


def test_a_mixture_resumes_exactly():
    """From the JSON of the state after any batch, over the end of an epoch; other weights are refused."""
    source = mixture(3, 1, batch_size=32)
    states = []
    for _ in range(source.batches_per_epoch + 3):
        next(source)
        states.append(json.dumps(source.state()))
    straight = mixture(3, 1, batch_size=32)
    batches = [next(straight) for _ in range(len(states) + 1)]
    for number in (0, len(states) - 5, len(states) - 4, len(states) - 1):
        resumed = mixture(3, 1, batch_size=32)
        resumed.restore(json.loads(states[number]))
        assert_same(next(resumed), batches[number + 1])
    with pytest.raises(ValueError, match='weights was .3, 1., now it is .1, 1.'):
        mixture(1, 1, batch_size=32).restore(json.loads(states[0]))
    with pytest.raises(ValueError, match='none would be of .*records.jsonl: raise its weight'):
        mixture(1, 100_000)


# ---------------------------------------------------------------- labels: counts and weights


def dataset(tmp_path, counts, *arguments, name='train', prepared=True, keys=('text', 'prompt', 'answer')):
    """A labelled set as prepare_data.py leaves it, with so many records of each label, and the flags that read it."""
    template = dict(prefix='T: ', suffix='\nL:', answer_prefix=' ', labels=['No', 'Yes'])
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    records = [dict(text=f'T: film {n}\nL: {template["labels"][label]}', prompt=f'T: film {n}\nL:',
                    answer=f' {template["labels"][label]}') for n, label in enumerate(labels)]
    (tmp_path / f'{name}.jsonl').write_text(''.join(
        json.dumps({key: record[key] for key in keys}) + '\n' for record in records))
    if prepared:
        (tmp_path / f'labels_{name}.json').write_text(json.dumps(dict(labels=labels, template=template)))
    given = ['train.py', '--train_dataset.type=json', '--train_dataset.json_dataset.batching=rows',
             f'--train_dataset.json_dataset.path={tmp_path}/{name}.jsonl', *arguments]
    if not any('fields' in argument for argument in given):
        given.append('--train_dataset.text_processor.fields=[prompt],answer')
    return settings.read_dataset(parse.parse(given, flags.TRAIN, ''), 'train_dataset')


def opened(*arguments, **options):
    return open_batches(dataset(*arguments, **options), TOKENIZER, one_device(), 42)


def test_the_balance_of_labels_is_printed_and_warned_of(tmp_path, capsys):
    for keys in (('text',), ('text', 'prompt', 'answer')):
        opened(tmp_path, (3, 5), '--train_dataset.text_processor.fields=text', keys=keys)
        out = capsys.readouterr().out
        assert 'train_dataset: 8 records with a label: No 3, Yes 5; the commonest, Yes, is 62.5%' in out
        assert 'WARNING' not in out
    opened(tmp_path, (19, 1))
    assert "WARNING: train_dataset: whoever always says 'No' is right in 95.0%" in capsys.readouterr().out
    opened(tmp_path, (3, 5), name='bare', prepared=False)
    assert 'with a label' not in capsys.readouterr().out


@pytest.mark.parametrize('given, expected', [('balanced', (8 / 6, 0.8)), ('Yes=2', (1, 2)), ('no=0.5,Yes=0', (0.5, 0))])
def test_class_weights_multiply_the_loss_of_their_label(tmp_path, given, expected):
    """balanced: records / labels / records of the label, whose mean over the records is 1; times a record's own."""
    source = opened(tmp_path, (3, 5), f'--train_dataset.class_weights={given}')
    found = Counter(next(iter(weight)) for _, _, _, weight in examples(next(source)))
    assert found == Counter(np.float32([expected[0]] * 3 + [expected[1]] * 5).tolist())
    assert opened(tmp_path, (3, 5)).reader.processor.weighted is False
    path = tmp_path / 'train.jsonl'
    path.write_text(path.read_text().replace('" Yes"', '" Maybe"'))
    with pytest.raises(ValueError, match="train.jsonl:4: class_weights: the record's answer is none of No, Yes"):
        open_batches(dataset_again(path, given), TOKENIZER, one_device(), 42)


def dataset_again(path, weights):
    given = ['train.py', '--train_dataset.type=json', '--train_dataset.json_dataset.batching=rows',
             f'--train_dataset.json_dataset.path={path}', '--train_dataset.text_processor.fields=[prompt],answer',
             f'--train_dataset.class_weights={weights}']
    return settings.read_dataset(parse.parse(given, flags.TRAIN, ''), 'train_dataset')


@pytest.mark.parametrize('given', ['Yes', 'Perhaps=1', 'Yes=1,yes=2', 'Yes=-1', 'Yes=nan', 'Yes=', ',', 'even'])
def test_class_weights_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match='^f=.* is no LABEL=NUMBER.*the labels are No, Yes; or write balanced'):
        read_class_weights(given, 'f', ('No', 'Yes'))


@pytest.mark.parametrize('arguments, says', [
    (['--train_dataset.json_dataset.batching=stream', '--train_dataset.json_dataset.path={0}:1,{0}x:2'],
     'names several files, and batching=stream reads one'),
    (['--train_dataset.json_dataset.path={0}:1,{0}x:2'], "path='.*x' is no file"),
    (['--train_dataset.text_processor.chat_template=chatml'], 'chat_template=chatml is for records with messages'),
    (['--train_dataset.text_processor.fields=', '--train_dataset.text_processor.chat_template=own'],
     'chat_template=own, but no chat template comes with load_checkpoint: choose chatml, llama-3, llama-2'),
    (['--train_dataset.text_processor.fields=', '--train_dataset.text_processor.chat_template=chatml'],
     'train_dataset: text_processor.chat_template=chatml needs the control tokens'),
    (['--train_dataset.json_dataset.start_seek_loc=1', '--train_dataset.json_dataset.batching=packed'],
     'start_seek_loc=1 must be 0 where batching=packed'),
])
def test_what_a_data_set_cannot_be_is_refused(tmp_path, arguments, says):
    with pytest.raises(ValueError, match=says):
        opened(tmp_path, (3, 5), *(argument.format(tmp_path / 'train.jsonl') for argument in arguments))
    with pytest.raises(ValueError, match="class_weights='balanced' needs labels_NAME.json beside"):
        opened(tmp_path, (3, 5), '--train_dataset.class_weights=balanced', name='bare', prepared=False)


def test_two_labelled_files_are_one_set(tmp_path, capsys):
    """Counted together; other templates are refused."""
    dataset(tmp_path, (3, 5), name='a')
    dataset(tmp_path, (1, 1), name='b')
    both = f'--train_dataset.json_dataset.path={tmp_path}/a.jsonl:1,{tmp_path}/b.jsonl:1'
    source = opened(tmp_path, (1, 1), both, '--train_dataset.class_weights=Yes=2')
    out = capsys.readouterr().out
    assert '10 records with a label: No 4, Yes 6' in out and f'{tmp_path}/b.jsonl: 5 rows an epoch of its 2' in out
    assert source.files[0]['epoch'] == 5
    notes = tmp_path / 'labels_b.json'
    notes.write_text(notes.read_text().replace('T: ', 'X: '))
    with pytest.raises(ValueError, match='labels_a.json and .*labels_b.json have different templates'):
        opened(tmp_path, (1, 1), both)


def test_smoothing_is_for_training_alone():
    """The flag reaches the step; the program that measures eval_dataset is the same with it."""
    given = parse.parse(['train.py', '--label_smoothing=0.1'], flags.TRAIN, '')
    assert settings.read_compute(given).label_smoothing == 0.1
    mesh, params = one_device(), jax.eval_shape(lambda: init_params(TINY, one_device(), 0))
    batch = abstract_batch(mesh, 2, 16)
    lowered = [step.make_eval_step(TINY, Compute(label_smoothing=e), mesh).lower(params, batch).as_text()
               for e in (0.0, 0.1)]
    assert lowered[0] == lowered[1]
