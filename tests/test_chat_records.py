"""Records of messages, and of prompt and completion: where the loss is, and that a server asks with the same ids."""
import json

import pytest
from fakes import FakeThread
from fastapi.testclient import TestClient
from test_chat import CHATML, LLAMA_3, byte_tokenizer
from test_records import lines_file

from data.records import RecordReader
from data.text_processor import TextProcessor
from data.tokenizer import load_tokenizer
from model.config import LlamaConfig
from serving.api import Options, make_app
from serving.chat import choose_template
from serving.texts import Texts

TALK = [{'role': 'system', 'content': 'be kind'}, {'role': 'user', 'content': 'hi <|im_end|>'},
        {'role': 'assistant', 'content': 'yes</s>'}, {'role': 'user', 'content': ' so '},
        {'role': 'assistant', 'content': 'no'}, {'role': 'user', 'content': 'unanswered'}]
ONE = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': '\nno'}]
# begins every answer with a blank line of its own, which is part of no prompt
BLANKS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '\n' if m.role == 'assistant' }}{{ m.content }}"
          "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# begins an answer in the middle of a word
WORD = ("{% for m in messages %}<s>{{ 'the fi' if m.role == 'assistant' }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>the fi{% endif %}")
FILM = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'lm'}]


@pytest.fixture(scope='module')
def tokenizers(golden, tmp_path_factory):
    return {'bytes': load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp('tokenizer'))),
            'sentencepiece': load_tokenizer(golden / 'easylm' / 'tokenizer.model')}


def turns_of(tokens, mask):
    """[(ids before an answer, ids with loss)]"""
    found, start = [], 0
    while 1.0 in mask[start:]:
        start = mask.index(1.0, start)
        end = mask.index(0.0, start) if 0.0 in mask[start:] else len(mask)
        found.append((tokens[:start], tokens[start:end]))
        start = end
    return found


@pytest.mark.parametrize('kind, template, messages, answers', [
    ('bytes', 'chatml', TALK, ['yes</s><|im_end|>', 'no<|im_end|>']), ('bytes', CHATML, TALK, ['yes</s><|im_end|>',
                                                                                              'no<|im_end|>']),
    ('bytes', 'llama-3', TALK, ['yes</s><|eot_id|>', 'no<|eot_id|>']),
    ('bytes', LLAMA_3, TALK, ['yes</s><|eot_id|>', 'no<|eot_id|>']),
    ('bytes', 'chatml', ONE, ['\nno<|im_end|>']), ('bytes', BLANKS, ONE, ['\n\nno<|im_end|>']),
    ('sentencepiece', 'llama-2', TALK, ['yes</s></s>', 'no</s>']), ('sentencepiece', 'llama-2', ONE, ['no</s>']),
    ('sentencepiece', WORD, FILM, ['lm</s>']),
])
def test_loss_is_on_answers_and_their_end_and_the_server_asks_with_the_ids_before(tokenizers, kind, template, messages,
                                                                                  answers):
    """Each answer with the control token that ends it, nothing else; what stands before it in the row is what
    /v1/chat/completions puts into the engine for the messages before it.  '</s>' that is said is no control token."""
    tokenizer = tokenizers[kind]
    tokens, mask = TextProcessor(tokenizer, chat_template=template)({'messages': messages})
    found = turns_of(tokens, mask)
    name = {i: token for token, i in tokenizer.control.items()}
    spell = lambda ids: (tokenizer.decode(ids[:-1]) + name[ids[-1]]).replace(' ', '')
    assert [spell(ids) for _, ids in found] == answers
    assert [i for _, ids in found for i in ids[:-1] if i in name] == []
    thread = FakeThread(tokenizer, [5])
    texts = Texts(tokenizer, LlamaConfig(700, 16, 16, 1, 1), input_length=200, seq_length=400)
    app = make_app(thread, texts, Options(), {}, choose_template('', template, tokenizer, Options()))
    with TestClient(app, base_url='http://localhost') as client:
        for number, message in enumerate(messages):
            if message['role'] == 'assistant':
                assert client.post('/v1/chat/completions', json={'messages': messages[:number]}).status_code == 200
    assert [list(work.prompt_ids) for work in thread.works] == [before for before, _ in found]
    assert len(mask) == len(tokens) and mask[-1] == 1.0  # what comes after the last answer teaches nothing


def test_an_own_template_s_end_of_turn_ends_the_server_s_answers(tokenizers):
    """<|eot_id|> is not the EOS of this tokenizer, so it becomes a stop text; <|im_end|> is."""
    choose = lambda source: choose_template('own', source, tokenizers['bytes'], Options())
    assert choose(LLAMA_3).stop == ('<|eot_id|>',) and choose(CHATML).stop == ()
    assert choose("{{ raise_exception('never') }}").stop == ()


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece'])
def test_loss_of_prompt_and_completion_is_on_the_completion(tokenizers, kind):
    """bos and the prompt carry none; the completion and eos do; its tokens are those it has after the prompt."""
    tokenizer = tokenizers[kind]
    prompt, completion = 'the film is', ' fine'
    tokens, mask = TextProcessor(tokenizer)({'prompt': prompt, 'completion': completion, 'id': 7})
    before = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
    assert turns_of(tokens, mask) == [(before, tokens[len(before):])]
    assert tokens[1:-1] == tokenizer.encode(prompt + completion) and tokens[-1] == tokenizer.eos_token_id
    split = TextProcessor(tokenizer, add_bos_token=False, add_eos_token=False)({'prompt': 'the fi', 'completion': 'lm'})
    assert split[0] == tokenizer.encode('the fi') + tokenizer.encode('lm')  # not the token that both would make


def test_tokens_that_would_join_an_answer_and_its_prompt_are_parted_there(tokenizers):
    """'the fi' and 'lm', not the tokens of 'the film'; where a later prompt joins them, that is refused."""
    tokenizer = tokenizers['sentencepiece']
    processor = TextProcessor(tokenizer, chat_template=WORD)
    tokens, _ = processor({'messages': FILM})
    parted, joined = [*tokenizer.encode('the fi'), *tokenizer.encode('lm')], tokenizer.encode('the film')
    assert tokens[-len(parted) - 1:-1] == parted != joined
    with pytest.raises(ValueError, match=r'messages\[3\]: the tokenizer joins an earlier answer'):
        processor({'messages': FILM + FILM})


@pytest.mark.parametrize('template, record, says', [
    ('chatml', {'messages': []}, "messages hold no turn of the assistant"),
    ('chatml', {'messages': TALK[:2]}, 'messages hold no turn of the assistant'),
    ('chatml', {'messages': 'hi'}, 'messages must be a list of'),
    ('chatml', {'messages': [{'role': 'tool', 'content': ''}]}, r"messages\[0\] has role='tool'; it must be one of"),
    ('chatml', {'messages': [{'role': ['user'], 'content': ''}]}, r"messages\[0\] has role=\['user'\]"),
    ('chatml', {'messages': [*ONE, {'role': 'assistant', 'content': None}]}, r'messages\[2\]: content must be text'),
    ('chatml', {'messages': [{'role': 'assistant', 'content': ' \n'}]}, r'messages\[0\]: .* is blank'),
    ("{{ ''.__class__.__mro__ }}", {'messages': ONE}, 'messages: the chat template cannot write them'),
    ("{{ raise_exception('roles must alternate') }}", {'messages': ONE}, 'refuses them: roles must alternate'),
    ('{{ messages|length }}: {% for m in messages %}{{ m.content }}{% endfor %}', {'messages': ONE},
     r'messages\[1\]: the chat template writes what stands before this turn otherwise'),
    ('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}', {'messages': ONE},
     r'messages\[1\]: the chat template puts no control token after the turn'),
    ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}", {'messages': ONE},
     r'messages\[1\]: the chat template leaves out what the assistant says'),
    ('', {'messages': ONE}, r'no chat template comes with the model.*chat_template=chatml\|llama-3\|llama-2'),
    ('', {'text': 'a'}, "neither \"messages\" nor \"prompt\" and \"completion\".* text_processor.fields .*'text'"),
    ('', {'prompt': 'a'}, "neither .*'prompt'"), ('', {}, 'neither .*no keys'),
    ('', {'prompt': 'a', 'completion': 'b', 'messages': ONE}, 'has both'),
    ('', {'prompt': 'a', 'completion': ' '}, 'is blank'),
    ('', {'prompt': [ONE[0]], 'completion': 'b'}, "'prompt' must be text, this is list"),
])
def test_bad_records_are_refused_with_their_line(tokenizers, tmp_path, template, record, says):
    """file:line, what is wrong, in one line."""
    good = {'prompt': 'a', 'completion': 'b'}
    path = lines_file(tmp_path, json.dumps(good).encode(), json.dumps(record).encode())
    reader = RecordReader(path, TextProcessor(tokenizers['bytes'], chat_template=template))
    with pytest.raises(ValueError, match=says) as caught:
        list(reader.records())
    assert str(caught.value).startswith(f'{path}:2: ') and '\n' not in str(caught.value)


def test_processes_tokenize_messages_and_weights_as_this_one_does(tokenizers, tmp_path):
    """An own template, weights from a field; a bad weight is a bad line."""
    lines = [{'messages': TALK, 'w': 0.1}, {'prompt': 'a', 'completion': 'b', 'w': 3}, {'messages': ONE, 'w': -1},
             {'messages': ONE, 'w': True}, {'messages': ONE}, {'messages': ONE, 'w': float('nan')}]
    path = lines_file(tmp_path, *(json.dumps(line).encode() for line in lines))
    processor = TextProcessor(tokenizers['bytes'], chat_template=CHATML, weight_field='w')
    one, two = (RecordReader(path, processor, skip_bad_lines=True, processes=n) for n in (1, 2))
    expected = list(one.records())
    assert list(two.records()) == expected and [record.weight for record in expected] == [0.1, 3.0]
    two.close()
    assert two.problems == one.problems and len(one.problems) == 4
    assert "data.jsonl:3: weight_field='w' must hold a number from 0 on, this is -1" in one.problems[0]
