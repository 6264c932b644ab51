"""Encode and decode text with a sentencepiece model (tokenizer.model) or a Hugging Face tokenizer.json.

Text is never anything else: '<s>' or '<|im_start|>' inside it is encoded letter by letter and never becomes the control
token, so nobody who sends a prompt can forge the beginning or end of an example.  (EasyLM's tokenizer did parse
them.)  bos and eos are added by id where records and prompts are built, never here.  Neighbours:
text_processor.py, serving and the checkpoint readers.
"""
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from mistake import Mistake


class Tokenizer:
    """Encodes text as ids and decodes ids as text.

    vocab_size: number of ids, added tokens included.  bos_token_id, eos_token_id, pad_token_id: int.
    source_bytes, file_name: its file ('tokenizer.model' or 'tokenizer.json'), for a checkpoint to carry.
    fingerprint: sha256, hex, over source_bytes and the three ids; equal fingerprints mean equal ids for every text.
    control: {control token: its id}.
    """

    def __init__(self, source_bytes: bytes, file_name: str, encode: Callable[[str], list[int]],
                 decode: Callable[[list[int]], str], vocab_size: int, bos: int, eos: int, pad: int,
                 control: dict[str, int]):
        for name, token in (('bos', bos), ('eos', eos), ('pad', pad)):
            if not 0 <= token < vocab_size:
                raise Mistake(f'{file_name}: {name} has id {token}, which is none of its {vocab_size} tokens')
        self.source_bytes, self.file_name, self.vocab_size = source_bytes, file_name, vocab_size
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad
        self.fingerprint = hashlib.sha256(source_bytes + b'\0%d,%d,%d' % (bos, eos, pad)).hexdigest()
        self._encode, self._decode, self.control = encode, decode, control
        self._control = re.compile('|'.join(map(re.escape, sorted(control, key=len, reverse=True))) or '(?!)')

    def encode(self, text: str) -> list[int]:
        """Encode `text`; neither bos nor eos is added, and no part of the text is read as a control token.

        Raises Mistake for a string that no UTF-8 can write (JSON can hold one: half a surrogate pair).
        """
        try:
            text.encode('utf-8')
        except UnicodeEncodeError as error:
            raise Mistake(f'{text[error.start]!r} is half a surrogate pair, which is no text') from None
        return self._encode(text)

    def encode_parts(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Encode texts that follow each other, (text, trusted): control tokens are read in the trusted ones alone.

        A chat template's own text is trusted, what somebody says is not.  Texts without a control token between them
        are encoded together, as one text.
        """
        ids, text = [], ''
        for part, trusted in parts:
            start = 0
            for found in self._control.finditer(part) if trusted else ():
                ids += self.encode(text + part[start:found.start()]) + [self.control[found[0]]]
                text, start = '', found.end()
            text += part[start:]
        return ids + self.encode(text)

    def decode(self, ids) -> str:
        """Decode `ids` without bos, eos, pad, and ids from vocab_size on (rows that only pad a vocabulary)."""
        dropped = {self.bos_token_id, self.eos_token_id, self.pad_token_id}
        return self._decode([i for i in map(int, ids) if i not in dropped and 0 <= i < self.vocab_size])


def load_tokenizer(path) -> Tokenizer:
    """Load the tokenizer of a file, or of a directory that holds tokenizer.json or tokenizer.model (the first found).

    bos, eos and pad of a tokenizer.json come from the files beside it: tokenizer_config.json, special_tokens_map.json,
    generation_config.json, config.json, the first that names one.  Without a pad token pad := eos: padding is masked
    everywhere.  For sentencepiece they come from the model, and pad := unk, as EasyLM has it.
    Raises Mistake for a file that is missing or unreadable, and names the token that nothing defines.
    """
    given, path = path, Path(path)
    if str(given) and path.is_dir():
        path = next((path / name for name in ('tokenizer.json', 'tokenizer.model') if (path / name).is_file()), path)
    if not str(given) or not path.is_file():
        raise Mistake(f'tokenizer.vocab_file={str(given)!r} must name a tokenizer.model (sentencepiece) or '
                      'tokenizer.json file, or a directory that holds one')
    if path.suffix != '.json':
        return _from_sentencepiece(path.read_bytes(), str(path))
    text, named, model_dir = _read_text(path), {}, path.parent
    sources = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json', 'config.json'
    for source in filter(Path.is_file, map(model_dir.joinpath, sources)):
        values = read_object(source)
        for role in ('bos', 'eos', 'pad'):
            token = values.get(f'{role}_token', values.get(f'{role}_token_id'))
            if role not in named and token is not None:
                named[role] = _first_token(token, source, role)
    named.setdefault('pad', named.get('eos'))
    for role in ('bos', 'eos'):
        if role not in named:
            raise Mistake(f'tokenizer.vocab_file={str(given)!r}: no file beside {path.name} names the {role} token; '
                          f'put "{role}_token": "..." into {model_dir / "tokenizer_config.json"}')
    return tokenizer_from_json(text, named['bos'], named['eos'], named['pad'], source=str(path))


def tokenizer_from_json(text: str, bos: int | str, eos: int | str, pad: int | str,
                        source: str = 'tokenizer.json') -> Tokenizer:
    """Make the tokenizer of a tokenizer.json's text; bos, eos and pad are ids or the tokens themselves.

    Raises Mistake, naming `source`, for a text that is no tokenizer and for a token it does not have.
    """
    try:
        import tokenizers
    except ImportError:
        raise Mistake(f'{source}: needs the tokenizers library: pip install tokenizers') from None
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the text
        raise Mistake(f'{source}: no valid tokenizer.json: {error}') from None
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    ids = []
    for role, token in (('bos', bos), ('eos', eos), ('pad', pad)):
        ids.append(inner.token_to_id(token) if isinstance(token, str) else token)
        if ids[-1] is None:
            raise Mistake(f'{source}: the {role} token {token!r} is not in its vocabulary')
    return Tokenizer(text.encode('utf-8'), 'tokenizer.json',
                     lambda text: inner.encode(text, add_special_tokens=False).ids,
                     lambda ids: inner.decode(ids, skip_special_tokens=False),
                     inner.get_vocab_size(with_added_tokens=True), *ids,
                     {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special})


def tokenizer_from_bytes(file_name: str, source_bytes: bytes, bos: int, eos: int, pad: int, source: str) -> Tokenizer:
    """Make a Tokenizer again from what checkpoints and worker processes keep of it."""
    if file_name.endswith('.json'):
        return tokenizer_from_json(source_bytes.decode('utf-8'), bos, eos, pad, source)
    return _from_sentencepiece(source_bytes, source, bos, eos, pad)


def _from_sentencepiece(source_bytes: bytes, source: str, *ids: int) -> Tokenizer:
    """`ids`: bos, eos and pad; without them the model's own, and pad := unk."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(source_bytes)
    except RuntimeError:
        raise Mistake(f'tokenizer.vocab_file={source!r} is no sentencepiece model') from None
    return Tokenizer(source_bytes, 'tokenizer.model', model.encode, model.decode, model.get_piece_size(),
                     *(ids or (model.bos_id(), model.eos_id(), model.unk_id())),
                     {model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise Mistake(f'{path}: invalid UTF-8: {error}') from None


def read_object(path: Path) -> dict:
    """Read a JSON file that holds an object.  Raises Mistake naming the file for any other."""
    try:
        values = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Mistake(f'{path}: no valid JSON: {error}') from None
    if not isinstance(values, dict):
        raise Mistake(f'{path}: must hold a JSON object')
    return values


def _first_token(token, source: Path, role: str) -> int | str:
    token = token.get('content') if isinstance(token, dict) else token
    token = token[0] if isinstance(token, list) and token else token  # config.json may list several ends
    if not isinstance(token, int | str) or isinstance(token, bool):
        raise Mistake(f'{source}: {role}_token is {token!r}, neither a token nor an id')
    return token
