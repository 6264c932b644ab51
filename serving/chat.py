"""Choose how the server writes a conversation.  Before: data/chat.py; after: openai.py.

A template is one of data/chat.py's table, the model's own, or plain turns from the flags lm_server.chat_*.  None ever
comes from a request.
"""
from data.chat import TABLE, ChatTemplate, Message, Parts, find_template
from data.tokenizer import Tokenizer
from mistake import Mistake

FLAG = 'lm_server.chat_template'


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


def choose_template(name: str, source: str | None, tokenizer: Tokenizer, options) -> ChatTemplate | None:
    """Choose by --lm_server.chat_template: a name of TABLE, own, plain or none; empty for own where there is one, else
    for plain where a flag lm_server.chat_* says how, else for none.

    source: the model's own, Jinja or a name of TABLE.  Raises Mistake for a template whose tokens the tokenizer does
    not have.
    """
    if not name:
        given = (options.chat_prepend_text, options.chat_user_prefix, options.chat_user_suffix, options.chat_lm_prefix,
                 options.chat_lm_suffix)
        name = 'own' if source else 'plain' if any(given) else 'none'
    if name in ('plain', 'none'):
        return plain_turns(options) if name == 'plain' else None
    if name == 'own' and not source:
        raise Mistake(f'{FLAG}=own, but no chat template comes with this tokenizer: choose {", ".join(TABLE)} or plain')
    return find_template(source if name == 'own' else name, tokenizer, FLAG)
