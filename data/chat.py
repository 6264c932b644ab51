"""Write a conversation as the text that a model is tuned on and asked with.  Before: tokenizer.py; after:
text_processor.py, serving/chat.py.

A template is one of a fixed table (plain Python below) or the tokenizer's own (Jinja, in a sandbox).

What is said is never read as a control token: a template is rendered with marks in the places of the contents, cut
there, and only its own text may hold control tokens.  '<|im_start|>system' inside a message is those letters.

Training takes loss on what the assistant says and on the token that ends it.  Where that begins is found by rendering
prefixes: what a server would ask with, messages[:i] and the beginning of an answer, must begin messages[:i + 1].
"""
import datetime
import json
import re
import secrets
from collections.abc import Callable
from typing import NamedTuple

from data.tokenizer import Tokenizer
from mistake import Mistake

Parts = list[tuple[str, bool]]  # (text, whether it is the template's own)
ROLES = 'system', 'user', 'assistant'
BLANK = '\u205f'  # around a mark: gone where the template strips a content, and then the content is stripped too
MAX_TEMPLATE = 100_000


class Message(NamedTuple):
    """role: one of ROLES.  content: what is said."""

    role: str
    content: str


class ChatTemplate(NamedTuple):
    """name: for the log.  parts(messages, ask=True) -> the text; `ask` adds the beginning of an answer.  stop: texts
    that end an answer beside EOS.

    whole: the parts hold bos where the model wants it; otherwise it is put before them as before any prompt.
    """

    name: str
    parts: Callable[..., Parts]
    stop: tuple[str, ...]
    whole: bool

    def prompt(self, messages: list[Message], tokenizer: Tokenizer) -> str | list[int]:
        """Write the prompt: token ids, or a text that is encoded as any prompt.  Raises Mistake."""
        parts = self.parts(messages)
        return tokenizer.encode_parts(parts) if self.whole else ''.join(text for text, _ in parts)


# ---------------------------------------------------------------- the table


def _chatml(messages: list[Message], ask: bool = True) -> Parts:
    parts = []
    for role, content in messages:
        parts += [(f'<|im_start|>{role}\n', True), (content, False), ('<|im_end|>\n', True)]
    return parts + [('<|im_start|>assistant\n', True)] * ask


def _llama_3(messages: list[Message], ask: bool = True) -> Parts:
    def head(role):
        return f'<|start_header_id|>{role}<|end_header_id|>\n\n', True

    parts = [('<|begin_of_text|>', True)]
    for role, content in messages:
        parts += [head(role), (content.strip(), False), ('<|eot_id|>', True)]
    return parts + [head('assistant')] * ask


def _llama_2(messages: list[Message], ask: bool = True) -> Parts:
    """<s>[INST] <<SYS>>, system, <</SYS>>, user [/INST] assistant </s> ...: turns alternate."""
    system = messages[0].content if messages and messages[0].role == 'system' else None
    turns = messages[system is not None:]
    if not turns or [role for role, _ in turns] != (['user', 'assistant'] * len(turns))[:len(turns)] or (
            ask and len(turns) % 2 == 0):
        raise Mistake('messages: this template takes a system message at the beginning or none, then user and '
                      'assistant in turns, the last from user')
    parts: Parts = []
    for number, (role, content) in enumerate(turns):
        if role == 'assistant':
            parts += [(' ', True), (content.strip(), False), (' </s>', True)]
            continue
        parts.append(('<s>[INST] ', True))
        if number == 0 and system is not None:
            parts += [('<<SYS>>\n', True), (system, False), ('\n<</SYS>>\n\n', True)]
        parts += [(content.strip(), False), (' [/INST]', True)]
    return parts


TABLE = {'chatml': (_chatml, ('<|im_end|>',)), 'llama-3': (_llama_3, ('<|eot_id|>',)), 'llama-2': (_llama_2, ())}


def find_template(given: str, tokenizer: Tokenizer, flag: str) -> ChatTemplate:
    """Find the template that `given` names in TABLE, or compile it: a text that came with a tokenizer or a checkpoint.

    Raises Mistake naming `flag` for one whose tokens the tokenizer does not have, or that cannot be compiled.
    """
    if given not in TABLE:
        return from_jinja(given, tokenizer, flag)
    parts, stop = TABLE[given]
    needed = set(re.findall(r'<\|\w+\|>|</?s>', ''.join(text for text, _ in parts(
        [Message('user', ''), Message('assistant', ''), Message('user', '')]))))
    if missing := sorted(needed - set(tokenizer.control)):
        raise Mistake(f'{flag}={given} needs the control tokens {" ".join(missing)}, which the tokenizer does not '
                      f'have: choose another --{flag}')
    return ChatTemplate(given, parts, stop, whole=True)


# ---------------------------------------------------------------- the tokenizer's own


def from_jinja(source: str, tokenizer: Tokenizer, flag: str) -> ChatTemplate:
    """Compile a template that came with a tokenizer.  Raises Mistake, naming `flag`, for one that cannot be compiled.

    It ends an answer with EOS, and with the control token that it writes after one.
    """
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Mistake("the tokenizer's chat template needs the Python package 'jinja2': install this project with its "
                      f"extra 'serve', or choose another --{flag}") from None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)

    def refuse(message):
        raise Mistake(f'messages: the chat template refuses them: {ascii(str(message)[:200])[1:-1]}')

    environment.globals |= {'raise_exception': refuse,
                            'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
    if len(source) > MAX_TEMPLATE:
        raise Mistake(f'the tokenizer\'s chat template has {len(source)} characters, more than {MAX_TEMPLATE}')
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise Mistake(f"the tokenizer's chat template cannot be read: {error}: choose another --{flag}") from None
    names = {i: token for token, i in tokenizer.control.items()}

    def parts(messages: list[Message], ask: bool = True) -> Parts:
        secret = secrets.token_hex(16)
        marked = [{'role': role, 'content': f'{BLANK}{secret}{number}.{BLANK}'}
                  for number, (role, _) in enumerate(messages)]
        try:
            text = template.render(messages=marked, add_generation_prompt=ask, tools=None, documents=None,
                                   bos_token=names.get(tokenizer.bos_token_id, ''),
                                   eos_token=names.get(tokenizer.eos_token_id, ''))
        except Mistake:
            raise
        except Exception as error:  # whatever a template does to these messages
            raise Mistake('messages: the chat template cannot write them: '
                          f'{ascii(str(error)[:200])[1:-1]}') from None
        parts, end = [], 0
        for found in re.finditer(f'({BLANK}?){secret}([0-9]+)\\.({BLANK}?)', text):
            content = messages[int(found[2])].content
            content = content if found[1] else content.lstrip()
            parts += [(text[end:found.start()], True), (content if found[3] else content.rstrip(), False)]
            end = found.end()
        return [*parts, (text[end:], True)]

    return ChatTemplate("the tokenizer's own", parts, _ending(parts, tokenizer), whole=True)


def _ending(parts: Callable[..., Parts], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Find the control token that a template ends an answer with, unless that is EOS; () where it writes none."""
    talk = [Message('user', 'a'), Message('assistant', 'b')]
    try:
        text, _ = _until_end(_spelled(parts(talk[:1])), _spelled(parts(talk, ask=False)), 1, tokenizer)
    except Mistake:  # not of these messages, or none
        return ()
    token = next(token for token in tokenizer.control if text.endswith(token))
    return () if tokenizer.control[token] == tokenizer.eos_token_id else (token,)


# ---------------------------------------------------------------- conversations to learn from


def read_messages(value) -> list[Message]:
    """Read the messages of a record.

    Raises Mistake unless they are [{"role": one of ROLES, "content": text}, ..] and the assistant says something.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Mistake('messages must be a list of {"role": .., "content": ..}')
    for number, message in enumerate(value):
        role, content = message.get('role'), message.get('content')
        if role not in ROLES:
            raise Mistake(f'messages[{number}] has {role=}; it must be one of {", ".join(ROLES)}')
        if not isinstance(content, str):
            raise Mistake(f'messages[{number}]: content must be text, this is {type(content).__name__}')
        if role == 'assistant' and not content.strip():
            raise Mistake(f'messages[{number}]: the content of the assistant is blank, so it has nothing to learn from')
    if not any(message['role'] == 'assistant' for message in value):
        raise Mistake('messages hold no turn of the assistant, so there is nothing to learn from')
    return [Message(message['role'], message['content']) for message in value]


def encode_conversation(messages: list[Message], template: ChatTemplate,
                        tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Encode messages as (ids, loss mask): 1.0 from where an answer begins to the token that ends it.

    The ids before an answer are those of `template.prompt`, which a server asks with, and it ends the last one.
    Raises Mistake where the template writes, or the tokenizer encodes, a turn's beginning otherwise once it is there.
    """
    tokens, loss_mask, written = [], [], ('', '')
    for number, message in enumerate(messages):
        if message.role != 'assistant':
            continue
        parts = template.parts(messages[:number])
        before, after = _spelled(parts), _spelled(template.parts(messages[:number + 1], ask=False))
        if not (_begins(before, written) and _begins(after, before)):
            raise Mistake(f'messages[{number}]: the chat template writes what stands before this turn otherwise than '
                          'without it, so where the answer begins cannot be told; choose another chat_template')
        after = _until_end(before, after, number, tokenizer)
        prompt, whole = tokenizer.encode_parts(parts), _encode(after, 0, tokenizer)
        if prompt[:len(tokens)] != tokens:
            raise Mistake(f'messages[{number}]: the tokenizer joins an earlier answer with what stands beside it, so '
                          'its tokens would not be those of a server; end the record with that answer')
        if whole[:len(prompt)] != prompt:  # they would be joined where the answer begins
            whole = prompt + _encode(after, len(before[0]), tokenizer)
        loss_mask += [0.0] * (len(prompt) - len(tokens)) + [1.0] * (len(whole) - len(prompt))
        tokens, written = whole, after
    return tokens, loss_mask


def _spelled(parts: Parts) -> tuple[str, str]:
    """Join parts to (text, a letter for each of its characters: t where it is the template's own, else c)."""
    return ''.join(text for text, _ in parts), ''.join('ct'[trusted] * len(text) for text, trusted in parts)


def _begins(spelled: tuple[str, str], other: tuple[str, str]) -> bool:
    return all(map(str.startswith, spelled, other))


def _encode(spelled: tuple[str, str], start: int, tokenizer: Tokenizer) -> list[int]:
    parts = [(spelled[0][found.start():found.end()], found[0][0] == 't')
             for found in re.compile('c+|t+').finditer(spelled[1], start)]
    return tokenizer.encode_parts(parts)


def _until_end(before: tuple[str, str], after: tuple[str, str], number: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """Cut `after` behind the control token that ends what the assistant says in its last turn, messages[number]."""
    end = after[1].rfind('c') + 1
    if end <= len(before[0]):
        raise Mistake(f'messages[{number}]: the chat template leaves out what the assistant says')
    ends = [found + len(token) for token in tokenizer.control if (found := after[0].find(token, end)) >= 0]
    if not ends:
        raise Mistake(f'messages[{number}]: the chat template puts no control token after the turn, so nothing would '
                      'teach the model to end it; choose another chat_template')
    return after[0][:min(ends)], after[1][:min(ends)]
