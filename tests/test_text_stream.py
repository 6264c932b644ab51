"""Claims about serving/text_stream.py, with a byte-level BPE tokenizer and a sentencepiece one."""
import pytest

import checkpoint
from data.tokenizer import load_tokenizer
from serving.text_stream import BROKEN, TextStream

TEXTS = ['plain words .', ' a blank before', 'naïve façade — 你好，世界 🙂👩\u200d👩\u200d👧 done',
         '\n\ntwo lines\n', '🙂', 'a\u0301e\u0301', '  two  blanks ']


@pytest.fixture(scope='module', params=['bpe', 'sentencepiece'])
def tokenizer(request, golden):
    if request.param == 'sentencepiece':
        return load_tokenizer(golden / 'easylm' / 'tokenizer.model')
    return checkpoint.open(f'gguf::{request.getfixturevalue("smollm2_gguf")}').tokenizer


@pytest.mark.parametrize('text', TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(tokenizer, text):
    """Token by token: no piece holds half a character, and all together are what the tokens are decoded to at once."""
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    whole = tokenizer.decode(ids).removeprefix(' ')
    assert ''.join(pieces) == stream.text == whole
    assert not any(BROKEN in piece for piece in pieces) or BROKEN in whole


def test_bytes_that_make_no_character_are_not_waited_for_forever(tokenizer):
    """An answer of half characters alone comes out, as the tokenizer writes it."""
    ids = tokenizer.encode('🙂')[:1] * 12
    stream = TextStream(tokenizer)
    before = ''.join(stream.add(token) for token in ids)
    assert len(ids) < 12 or before
    assert before + stream.finish() == stream.text


@pytest.mark.parametrize('stop, expected', [
    (('film',), 'the '), (('e film is',), 'th'), (('never',), None), (('is gr', 'film'), 'the '), (('t',), ''),
    (('good .',), 'the film is '), (('. and more',), None)])
def test_nothing_of_a_stop_text_comes_out(tokenizer, stop, expected):
    """The text ends before the first stop text, also where it straddles tokens; what could have been the beginning of
    one, and was not, comes out."""
    ids = tokenizer.encode('the film is good .')
    whole, stream, seen = tokenizer.decode(ids), TextStream(tokenizer, stop), ''
    for token in ids:
        seen += stream.add(token)
        assert whole.startswith(seen)
        if stream.stopped:
            break
    seen += stream.finish()
    assert seen == stream.text == (whole if expected is None else expected)
    assert stream.stopped == (expected is not None)
