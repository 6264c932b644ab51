"""From 200 chats to a model that answers /v1/chat/completions: docs/examples/chats.py, train.py, the server's parts."""
import json
import pathlib
import re
import runpy

import jax
import pytest
from fastapi.testclient import TestClient
from helpers import Asker, one_device
from test_chat import byte_tokenizer

import checkpoint
import train
from model.config import Compute
from program import flags, parse
from serving.api import Options, make_app
from serving.chat import choose_template
from serving.thread import EngineThread

ROOT = pathlib.Path(__file__).parent.parent
DATA = '--train_dataset.json_dataset.'


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp('chats') / 'train.jsonl'
    runpy.run_path(str(ROOT / 'docs/examples/chats.py'))['main'](str(path))
    return path


def arguments(chats, output, tokenizer, *more):
    return ['train.py', '--load_llama_config=debug', '--update_llama_config=dict(vocab_size=264)', '--log_freq=1',
            f'--tokenizer.vocab_file={tokenizer}', f'--logger.output_dir={output}', '--train_dataset.type=json',
            f'{DATA}path={chats}', f'{DATA}seq_length=320', f'{DATA}batch_size=8', f'{DATA}batching=packed',
            f'{DATA}loss_per=token', '--optimizer.adamw_optimizer.lr=0.003', '--optimizer.adamw_optimizer.b2=0.99',
            '--optimizer.adamw_optimizer.lr_warmup_steps=2', *more]


def test_the_example_is_the_same_200_chats(chats, tmp_path):
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    assert len(records) == 200 and {len(record['messages']) for record in records} == {3, 5}
    main = runpy.run_path(str(ROOT / 'docs/examples/chats.py'))['main']
    main(str(tmp_path / 'again.jsonl'))
    main(str(tmp_path / 'other.jsonl'), '7')
    assert (tmp_path / 'again.jsonl').read_text() == chats.read_text() != (tmp_path / 'other.jsonl').read_text()


def test_chats_train_and_are_served(chats, tmp_path, capsys):
    """A few steps of packed chats: the loss falls; the checkpoint says which template, and the server asks with the
    ids that training had before an answer, and gets a text."""
    tokenizer = byte_tokenizer(tmp_path)
    steps = '--total_steps=6', '--train_dataset.text_processor.chat_template=chatml'
    train.main(parse.parse(arguments(chats, tmp_path / 'run', tokenizer, *steps), flags.TRAIN, ''))
    said = capsys.readouterr().out
    assert "'rows': 200" in said and 'labels_train.json' not in said
    losses = [json.loads(line)['loss'] for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    source = checkpoint.open(str(tmp_path / 'run'))
    assert source.chat_template == 'chatml'
    template = choose_template('', source.chat_template, source.tokenizer, Options())
    assert template.name == 'chatml'
    jax.config.update('jax_disable_most_optimizations', True)
    try:
        asker = Asker(source.load_params(source.config, one_device()), source.config, Compute(), source.tokenizer,
                      one_device(), batch_size=2, input_length=256, seq_length=288)
        thread = EngineThread(asker.engine, queue_size=4, warm_up=())
        with TestClient(make_app(thread, asker.texts, Options(), {}, template), base_url='http://localhost') as client:
            messages = json.loads(chats.read_text().splitlines()[0])['messages'][:2]
            answer = client.post('/v1/chat/completions', json={'messages': messages, 'max_tokens': 8,
                                                               'temperature': 0}).json()
        thread.close()
    finally:
        jax.config.update('jax_disable_most_optimizations', False)
    assert answer['choices'][0]['message']['role'] == 'assistant' and answer['choices'][0]['message']['content']
    prompt = f'<|im_start|>system\n{messages[0]["content"]}<|im_end|>\n<|im_start|>user\n{messages[1]["content"]}' \
             '<|im_end|>\n<|im_start|>assistant\n'
    control = sum(prompt.count(token) * (len(token) - 1) for token in ('<|im_start|>', '<|im_end|>'))
    assert answer['usage']['prompt_tokens'] == len(prompt) - control


@pytest.mark.parametrize('more, says', [
    ((), r'train.jsonl:1: the record holds messages, and no chat template comes with the model: .*chatml\|llama-3\|'),
    (('--train_dataset.text_processor.chat_template=llama-2',), 'llama-2 needs the control tokens </s> <s>'),
    (('--train_dataset.text_processor.chat_template=own',), 'own, but no chat template comes with load_checkpoint'),
])
def test_chats_without_a_template_end_with_one_line(chats, tmp_path, monkeypatch, capsys, more, says):
    """Exit code 2, before anything is compiled."""
    monkeypatch.setattr('sys.argv', arguments(chats, tmp_path / 'run', byte_tokenizer(tmp_path), *more))
    with pytest.raises(SystemExit) as exit:
        parse.run(train.main, flags.TRAIN)
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and re.search(says, lines[-1]), lines
    assert not (tmp_path / 'run').exists()
