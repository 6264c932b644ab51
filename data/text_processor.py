"""Turn a JSON object into token ids with a loss mask.

`fields` says how a record becomes tokens, in the little language of EasyLM (its data.py, August 2023):

    '[question+prompt],<|eos|>,answer'     `,` separates fields, each tokenized alone, without bos or eos
      a+b     the texts of keys a and b, joined by `subfield_separator`
      <|bos|> <|eos|> <|17|>               one token, by role or by id
      {key}   base64 of raw token ids, little-endian `base64_token_dtype`
      [..]    the field carries no loss (mask 0 instead of 1)

Without `fields` a record says by its keys what it is: {"messages": [..]}, a conversation with loss on what the
assistant says (chat.py), or {"prompt": .., "completion": ..}, with loss on the completion.

Neighbours: tokenizer.py and chat.py below; records.py (files of records) and parallel.py (the same in several
processes) above.
"""
import base64
import binascii
import json
import math

import numpy as np

from data.chat import TABLE, encode_conversation, find_template, read_messages
from data.prompt import PromptTemplate
from data.tokenizer import Tokenizer
from mistake import Mistake


def parse(line: bytes) -> tuple[dict | None, str]:
    """Parse a line: (its JSON object, ''), or (None, what is wrong; '' for an empty line)."""
    if not line.strip():
        return None, ''
    try:
        example = json.loads(line.decode('utf-8').rstrip())
    except UnicodeDecodeError as error:
        return None, f'invalid UTF-8 at byte {error.start} of the line'
    except json.JSONDecodeError as error:
        return None, f'no valid JSON: {error.msg} at column {error.colno}'
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets a thousand deep
        return None, f'no valid JSON: {error}'
    if not isinstance(example, dict):
        return None, f'a record must be a JSON object, this is {type(example).__name__}'
    return example, ''


class TextProcessor:
    """Turns an example into (token ids, loss mask), as the `fields` language says.

    `fields_from_example` names a key of the example that holds the fields string instead.  `prepend_text` goes before
    the first field, if that is text.  bos gets mask 0, eos mask 1.  chat_template: a name of chat.TABLE or a text of
    Jinja, for records of messages; it brings its own bos and eos.  weight_field: the key of a record's weight.
    class_weights: {'template': PromptTemplate.to_dict, 'weights': one for each label}.  Raises Mistake for settings
    that make no sense and, when called, for an example that does not fit them, naming the field; the caller adds the
    line.
    """

    def __init__(self, tokenizer: Tokenizer, fields: str = '', fields_from_example: str = '',
                 subfield_separator: str = ' ', prepend_text: str = '', add_bos_token: bool = True,
                 add_eos_token: bool = True, base64_token_dtype: str = 'i4', chat_template: str = '',
                 weight_field: str = '', class_weights: dict | None = None):
        if fields and fields_from_example:
            raise Mistake(f'{fields=} and {fields_from_example=}: set one of text_processor.fields and '
                          "text_processor.fields_from_example, for example fields='[prompt],answer'; or none, for "
                          'records with "messages" or with "prompt" and "completion"')
        try:
            self.base64_dtype = np.dtype(base64_token_dtype).newbyteorder('<')
        except TypeError:
            raise Mistake(f'{base64_token_dtype=} is no numpy dtype; use i4, i8, u2 or u4') from None
        if self.base64_dtype.kind not in 'iu':
            raise Mistake(f'{base64_token_dtype=} must be an integer dtype: i4, i8, u2 or u4')
        self.settings = dict(fields=fields, fields_from_example=fields_from_example,
                             subfield_separator=subfield_separator, prepend_text=prepend_text,
                             add_bos_token=add_bos_token, add_eos_token=add_eos_token,
                             base64_token_dtype=base64_token_dtype, tokenizer=tokenizer.fingerprint)
        later = dict(chat_template=chat_template, weight_field=weight_field, class_weights=class_weights)
        self.settings |= {name: value for name, value in later.items() if value}  # older states do not have them
        self.tokenizer, self.subfield_separator, self.prepend_text = tokenizer, subfield_separator, prepend_text
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self.fields, self.fields_from_example = fields, fields_from_example
        self.chat_template, self.weight_field = chat_template, weight_field
        self.chat = find_template(chat_template, tokenizer, 'text_processor.chat_template') if chat_template else None
        self._labels = class_weights and PromptTemplate.from_dict(class_weights['template'])
        self._class_weights = class_weights and class_weights['weights']
        self.weighted = bool(weight_field or class_weights)

    def __call__(self, example: dict) -> tuple[list[int], list[float]]:
        if not self.fields and not self.fields_from_example:
            return self._by_keys(example)
        tokens, loss_mask = [], []
        if self.add_bos_token:
            tokens.append(self.tokenizer.bos_token_id)
            loss_mask.append(0.0)
        fields = _text(example, self.fields_from_example) if self.fields_from_example else self.fields
        for number, field in enumerate(fields.split(',')):
            masked = field.startswith('[') and field.endswith(']')
            field_tokens = self._field(example, field[1:-1] if masked else field, number == 0, masked)
            tokens += field_tokens
            loss_mask += [0.0 if masked else 1.0] * len(field_tokens)
        if self.add_eos_token:
            tokens.append(self.tokenizer.eos_token_id)
            loss_mask.append(1.0)
        return tokens, loss_mask

    def weight(self, example: dict) -> float:
        """Return the factor of the example's part of the loss: that of its field times that of its label, else 1."""
        weight = 1.0
        if self.weight_field:
            weight = example.get(self.weight_field)
            if type(weight) not in (int, float) or not 0 <= weight < math.inf:
                raise Mistake(f'weight_field={self.weight_field!r} must hold a number from 0 on, this is '
                              f'{weight!r:.40}')
        if self._labels:
            label = self._labels.label_of(example)
            if label is None:
                raise Mistake(f'class_weights: the record\'s answer is none of {", ".join(self._labels.labels)}')
            weight *= self._class_weights[label]
        return float(weight)

    def _by_keys(self, example: dict) -> tuple[list[int], list[float]]:
        chat, completes = 'messages' in example, {'prompt', 'completion'} <= example.keys()
        if chat == completes:
            raise Mistake(f'the record has {"both" if chat else "neither"} "messages" {"and" if chat else "nor"} '
                          '"prompt" and "completion"; it must be one of the two, or text_processor.fields must say '
                          f'what of it to read (it has {", ".join(map(repr, example)) or "no keys"})')
        if completes:
            return self._completion(self.prepend_text + _text(example, 'prompt'), _text(example, 'completion'))
        if self.prepend_text:
            raise Mistake(f'prepend_text={self.prepend_text!r} does not go with messages: write a system message')
        if self.chat is None:
            raise Mistake('the record holds messages, and no chat template comes with the model: choose one with '
                          f'--train_dataset.text_processor.chat_template={"|".join(TABLE)}')
        return encode_conversation(read_messages(example['messages']), self.chat, self.tokenizer)

    def _completion(self, prompt: str, completion: str) -> tuple[list[int], list[float]]:
        if not completion.strip():
            raise Mistake("field='completion' is blank, so it has nothing to learn from")
        before, tokens = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + completion)
        if tokens[:len(before)] != before:  # they would be joined where the completion begins
            tokens = before + self.tokenizer.encode(completion)
        bos = [self.tokenizer.bos_token_id] * self.add_bos_token
        eos = [self.tokenizer.eos_token_id] * self.add_eos_token
        masked = len(bos) + len(before)
        return bos + tokens + eos, [0.0] * masked + [1.0] * (len(tokens) - len(before) + len(eos))

    def _field(self, example: dict, field: str, first: bool, masked: bool) -> list[int]:
        if field.startswith('<|') and field.endswith('|>'):
            return self._known(field, [self._special(field)])
        if field.startswith('{') and field.endswith('}'):
            try:
                raw = base64.b64decode(_text(example, field[1:-1]), validate=True)
            except binascii.Error as error:
                raise Mistake(f'{field=} is not base64: {error}') from None
            if len(raw) % self.base64_dtype.itemsize:
                raise Mistake(f'{field=} holds {len(raw)} bytes, no multiple of base64_token_dtype '
                              f'{self.base64_dtype.str}')
            return self._known(field, np.frombuffer(raw, self.base64_dtype).tolist())
        text = self.subfield_separator.join(_text(example, key) for key in field.split('+'))
        if not masked and not text.strip():
            raise Mistake(f'{field=} is blank, so it has nothing to learn from')
        return self.tokenizer.encode(self.prepend_text + text if first else text)

    def _special(self, field: str) -> int:
        name, roles = field[2:-2], {'bos': self.tokenizer.bos_token_id, 'eos': self.tokenizer.eos_token_id}
        if name not in roles and not (name.isascii() and name.isdigit()):
            raise Mistake(f'{field=} is no token: write <|bos|>, <|eos|> or an id like <|17|>')
        return roles[name] if name in roles else int(name)

    def _known(self, field: str, tokens: list[int]) -> list[int]:
        for token in tokens:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise Mistake(f'{field=} holds token id {token}; the tokenizer has {self.tokenizer.vocab_size}')
        return tokens


def _text(example: dict, key: str) -> str:
    if key not in example:
        raise Mistake(f'field {key!r} is missing; the record has {", ".join(map(repr, example)) or "no keys"}')
    value = example[key]
    if not isinstance(value, str):
        raise Mistake(f'field {key!r} must be text, this is {type(value).__name__}')
    return value


def tokenize(processor: TextProcessor, line: bytes) -> tuple[list[int] | None, list[float] | None, float, str]:
    """Tokenize a line: (token ids, loss mask, weight, ''), or (None, None, 1, what is wrong; '' for an empty line)."""
    example, problem = parse(line)
    if example is None:
        return None, None, 1.0, problem
    try:
        return *processor(example), processor.weight(example), ''
    except ValueError as error:
        return None, None, 1.0, str(error)
