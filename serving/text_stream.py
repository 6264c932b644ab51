"""Turn tokens into text as they come: whole characters, and nothing of a stop text.  After: engine.py.

A token can end in the middle of a character (byte fallback, byte-level BPE), and a tokenizer can write a token in
another way behind another one.  So the text is always that of several tokens decoded together: those since the last
place where the text was whole, and the few before it that were told already.
"""
from data.tokenizer import Tokenizer

BROKEN = '\ufffd'  # what decoders write for bytes that make no character
BEFORE = 6  # tokens before a place that are decoded again with those behind it
LONGEST_CHARACTER = 8  # tokens: a character has at most 4 bytes, a byte at most one token, and a mark may join it


class TextStream:
    """Collects the tokens of one answer.

    add(id) -> text that is certain now.  finish() -> the rest.  text: all that was given out.  stopped: a stop text was
    met; the text ends before it, and no more tokens are wanted.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._whole = 0  # tokens whose text is in _decoded
        self._decoded = ''  # whole characters so far
        self._begun = False  # some text was decoded
        self.text, self.stopped = '', False

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        self._decoded += self._more(finished=False)
        return self._give(finished=False)

    def finish(self) -> str:
        self._decoded += self._more(finished=True)
        return self._give(finished=True)

    def _more(self, finished: bool) -> str:
        """Decode the tokens behind the whole ones: '' while they end in half a character."""
        first = max(0, self._whole - BEFORE)
        before = self._tokenizer.decode(self._ids[first:self._whole])
        both = self._tokenizer.decode(self._ids[first:])
        if not both.startswith(before):  # the tokens before read otherwise now: decode from the beginning
            before, both = self._tokenizer.decode(self._ids[:self._whole]), self._tokenizer.decode(self._ids)
        if both.endswith(BROKEN) and not finished and len(self._ids) - self._whole < LONGEST_CHARACTER:
            return ''
        more = both[len(before):]
        if more and not self._begun:
            # sentencepiece drops the blank that begins a text, byte-level BPE keeps it: an answer begins without it
            more, self._begun = more.removeprefix(' '), True
        self._whole = len(self._ids)
        return more

    def _give(self, finished: bool) -> str:
        """Give out what cannot be the beginning of a stop text."""
        begin = len(self.text)
        if self.stopped:
            return ''
        end = len(self._decoded)
        found = [place for stop in self._stop if (place := self._decoded.find(stop, max(0, begin - len(stop)))) >= 0]
        if found:
            end, self.stopped = min(found), True
        elif not finished:
            held = (k for stop in self._stop for k in range(min(len(stop) - 1, end), 0, -1)
                    if self._decoded.endswith(stop[:k]))
            end -= max(held, default=0)
        given = self._decoded[begin:end]
        self.text += given
        return given
