// The Generate tab: one text is gone on from, as it comes.

import {copy, element, samplingOf} from './elements.js';
import {describe, stream} from './server.js';

export function setUpGenerate(info) {
  let stopper = null;
  const busy = on => {
    element('generate-run').disabled = on;
    element('generate-stop').disabled = !on;
    element('answer').ariaBusy = String(on);
  };

  element('generate-form').addEventListener('submit', async event => {
    event.preventDefault();
    if (stopper) return;
    const prompt = element('prefix').value;
    stopper = new AbortController();
    busy(true);
    element('generate-error').hidden = true;
    element('generate-card').hidden = false;
    element('answer-prefix').textContent = prompt;
    element('answer-text').textContent = '';
    element('generate-copy').disabled = true;
    element('generate-status').textContent = 'writing …';
    try {
      const answer = await stream(
        'v1/completions',
        {model: info.model, prompt, ...samplingOf(element('generate-sampling'))},
        stopper.signal,
        text => {
          element('answer-text').textContent = text;
        },
      );
      element('generate-status').textContent = describe(answer);
    } catch (error) {
      element('generate-status').textContent = error.name === 'AbortError' ? 'stopped' : '';
      element('generate-error').textContent = error.message;
      element('generate-error').hidden = error.name === 'AbortError';
    }
    stopper = null;
    busy(false);
    element('generate-copy').disabled = !element('answer-text').textContent;
  });
  element('generate-stop').addEventListener('click', () => stopper?.abort());
  element('generate-copy').addEventListener('click', event => copy(event.target, element('answer-text').textContent));
}
