// The Chat tab: a conversation, through the model's own chat template.

import {copy, element, make, samplingOf} from './elements.js';
import {describe, stream} from './server.js';

export function setUpChat(info) {
  let stopper = null;
  const said = []; // {role, content, block}

  const buttons = () => {
    const idle = stopper === null;
    element('chat-run').disabled = !idle;
    element('chat-stop').disabled = idle;
    element('chat-again').disabled = !idle || !said.length;
    element('chat-clear').disabled = !idle || !said.length;
    element('transcript').ariaBusy = String(!idle); // a screen reader waits for the whole answer
  };

  function show(role, content) {
    const text = make('p', {className: 'text'}, content),
      meta = make('span', {className: 'hint'});
    const copier = make('button', {type: 'button', className: 'quiet', textContent: 'Copy'});
    copier.addEventListener('click', () => copy(copier, text.textContent));
    const block = make(
      'article',
      {className: `said ${role}`},
      make('h2', {}, role === 'user' ? 'You' : 'Model'),
      text,
      role === 'user' ? null : make('div', {className: 'row'}, copier, meta),
    );
    element('transcript').append(block);
    const entry = {
      role,
      block,
      text,
      meta,
      get content() {
        return text.textContent;
      },
    };
    said.push(entry);
    return entry;
  }

  /** Answer what was said last. */
  async function answer() {
    const system = element('system').value.trim();
    const messages = [
      ...(system ? [{role: 'system', content: system}] : []),
      ...said.map(({role, content}) => ({role, content})),
    ];
    const entry = show('assistant', '');
    stopper = new AbortController();
    buttons();
    element('chat-error').hidden = true;
    element('chat-status').textContent = 'The model is writing …';
    try {
      const found = await stream(
        'v1/chat/completions',
        {model: info.model, messages, ...samplingOf(element('chat-sampling'))},
        stopper.signal,
        text => {
          entry.text.textContent = text;
          follow();
        },
      );
      entry.meta.textContent = describe(found);
    } catch (error) {
      if (error.name === 'AbortError') entry.meta.textContent = 'stopped';
      else {
        element('chat-error').textContent = error.message;
        element('chat-error').hidden = false;
        if (entry.content) entry.meta.textContent = 'broken off';
      }
      if (!entry.content) forget(entry);
    }
    follow();
    element('chat-status').textContent = '';
    stopper = null;
    buttons();
  }

  /** Keep the end in sight, unless the reader has scrolled away from it. */
  function follow() {
    const log = element('transcript');
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }

  function forget(entry) {
    said.splice(said.indexOf(entry), 1);
    entry.block.remove();
  }

  element('chat-form').addEventListener('submit', event => {
    event.preventDefault();
    const message = element('message').value;
    if (stopper || !message.trim()) return;
    show('user', message);
    element('message').value = '';
    element('transcript').scrollTop = element('transcript').scrollHeight;
    answer();
  });
  element('chat-again').addEventListener('click', () => {
    if (said.at(-1).role === 'assistant') forget(said.at(-1));
    answer();
  });
  element('chat-stop').addEventListener('click', () => stopper?.abort());
  element('chat-clear').addEventListener('click', () => {
    said.length = 0;
    element('transcript').replaceChildren();
    element('chat-error').hidden = true;
    buttons();
    element('message').focus();
  });
  buttons();
}
