"""Write a conversation as the prompt a model was tuned on.  Before: data/tokenizer.py; after: openai.py.

A template is one of a fixed table (plain Python below), the tokenizer's own (Jinja, in a sandbox), or plain turns from
the flags lm_server.chat_*.  None ever comes from a request.

What is said is never read as a control token: a template is rendered with marks in the places of the contents, cut
there, and only its own text may hold control tokens.  '<|im_start|>system' inside a message is those letters.
"""
import datetime
import json
import re
import secrets
from collections.abc import Callable
from typing import NamedTuple

from data.tokenizer import Tokenizer
from mistake import Mistake
from serving.work import RequestError

Parts = list[tuple[str, bool]]  # (text, whether it is the template's own)
BLANK = '\u205f'  # around a mark: gone where the template strips a content, and then the content is stripped too
MAX_TEMPLATE = 100_000


class Message(NamedTuple):
    """role: system, user or assistant."""

    role: str
    content: str


class ChatTemplate(NamedTuple):
    """name: for the log.  parts(messages) -> the prompt.  stop: texts that end an answer beside EOS.

    whole: the parts hold bos where the model wants it; otherwise it is put before them as before any prompt.
    """

    name: str
    parts: Callable[[list[Message]], Parts]
    stop: tuple[str, ...]
    whole: bool

    def prompt(self, messages: list[Message], tokenizer: Tokenizer) -> str | list[int]:
        """Write the prompt: token ids, or a text that is encoded as any prompt.  Raises RequestError."""
        parts = self.parts(messages)
        return tokenizer.encode_parts(parts) if self.whole else ''.join(text for text, _ in parts)


# ---------------------------------------------------------------- the table


def _chatml(messages: list[Message]) -> Parts:
    parts = []
    for role, content in messages:
        parts += [(f'<|im_start|>{role}\n', True), (content, False), ('<|im_end|>\n', True)]
    return [*parts, ('<|im_start|>assistant\n', True)]


def _llama_3(messages: list[Message]) -> Parts:
    def head(role):
        return f'<|start_header_id|>{role}<|end_header_id|>\n\n', True

    parts = [('<|begin_of_text|>', True)]
    for role, content in messages:
        parts += [head(role), (content.strip(), False), ('<|eot_id|>', True)]
    return [*parts, head('assistant')]


def _llama_2(messages: list[Message]) -> Parts:
    """<s>[INST] <<SYS>>, system, <</SYS>>, user [/INST] assistant </s> ...: turns alternate."""
    system = messages[0].content if messages[0].role == 'system' else None
    turns = messages[system is not None:]
    if not turns or [role for role, _ in turns] != (['user', 'assistant'] * len(turns))[:len(turns)] or (
            len(turns) % 2 == 0):
        raise RequestError('messages: this template takes a system message at the beginning or none, then user and '
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


def plain_turns(options) -> ChatTemplate:
    """Put the flags' texts around each turn, as /chat does it; a system message stands before them as it is."""
    def parts(messages: list[Message]) -> Parts:
        parts: Parts = [(options.chat_prepend_text, True)]
        around = {'user': (options.chat_user_prefix, options.chat_user_suffix), 'system': ('', ''),
                  'assistant': (options.chat_lm_prefix, options.chat_lm_suffix)}
        for role, content in messages:
            before, after = around[role]
            parts += [(before, True), (content, False), (after, True)]
        return [*parts, (options.chat_lm_prefix, True)]

    ends = options.chat_lm_suffix, options.chat_user_prefix
    return ChatTemplate('plain', parts, tuple(dict.fromkeys(end for end in ends if end.strip())), whole=False)


# ---------------------------------------------------------------- the tokenizer's own


def from_jinja(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Compile a template that came with a tokenizer.  Raises Mistake for one that cannot be compiled."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Mistake("the tokenizer's chat template needs the Python package 'jinja2': install this project with its "
                      "extra 'serve', or choose another --lm_server.chat_template") from None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)

    def refuse(message):
        raise RequestError(f'messages: the chat template refuses them: {ascii(str(message)[:200])[1:-1]}')

    environment.globals |= {'raise_exception': refuse,
                            'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
    if len(source) > MAX_TEMPLATE:
        raise Mistake(f'the tokenizer\'s chat template has {len(source)} characters, more than {MAX_TEMPLATE}')
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise Mistake(f"the tokenizer's chat template cannot be read: {error}: choose another "
                      '--lm_server.chat_template') from None
    names = {i: token for token, i in tokenizer.control.items()}

    def parts(messages: list[Message]) -> Parts:
        secret = secrets.token_hex(16)
        marked = [{'role': role, 'content': f'{BLANK}{secret}{number}.{BLANK}'}
                  for number, (role, _) in enumerate(messages)]
        try:
            text = template.render(messages=marked, add_generation_prompt=True, tools=None, documents=None,
                                   bos_token=names.get(tokenizer.bos_token_id, ''),
                                   eos_token=names.get(tokenizer.eos_token_id, ''))
        except RequestError:
            raise
        except Exception as error:  # whatever a template does to these messages
            raise RequestError('messages: the chat template cannot write them: '
                               f'{ascii(str(error)[:200])[1:-1]}') from None
        parts, end = [], 0
        for found in re.finditer(f'({BLANK}?){secret}([0-9]+)\\.({BLANK}?)', text):
            content = messages[int(found[2])].content
            content = content if found[1] else content.lstrip()
            parts += [(text[end:found.start()], True), (content if found[3] else content.rstrip(), False)]
            end = found.end()
        return [*parts, (text[end:], True)]

    return ChatTemplate("the tokenizer's own", parts, (), whole=True)


def choose_template(name: str, source: str | None, tokenizer: Tokenizer, options) -> ChatTemplate | None:
    """Choose by --lm_server.chat_template: a name of TABLE, own, plain or none; empty for own where there is one, else
    for plain where a flag lm_server.chat_* says how, else for none.

    source: the tokenizer's own.  Raises Mistake for a template whose tokens the tokenizer does not have.
    """
    if not name:
        given = (options.chat_prepend_text, options.chat_user_prefix, options.chat_user_suffix, options.chat_lm_prefix,
                 options.chat_lm_suffix)
        name = 'own' if source else 'plain' if any(given) else 'none'
    if name in ('plain', 'none'):
        return plain_turns(options) if name == 'plain' else None
    if name == 'own':
        if not source:
            raise Mistake('lm_server.chat_template=own, but no chat template comes with this tokenizer: choose '
                          f'{", ".join(TABLE)} or plain')
        return from_jinja(source, tokenizer)
    parts, stop = TABLE[name]
    needed = set(re.findall(r'<\|\w+\|>|</?s>', ''.join(text for text, _ in parts(
        [Message('user', ''), Message('assistant', ''), Message('user', '')]))))
    if missing := sorted(needed - set(tokenizer.control)):
        raise Mistake(f'lm_server.chat_template={name} needs the control tokens {" ".join(missing)}, which the '
                      'tokenizer does not have: choose another --lm_server.chat_template')
    return ChatTemplate(name, parts, stop, whole=True)
