// The page's beginning: what the server says of itself, the key, the tabs, light and dark.

import {setUpChat} from './chat.js';
import {setUpClassify} from './classify.js';
import {count, element, make, samplingFields} from './elements.js';
import {setUpGenerate} from './generate.js';
import {ask, keepKey, onKeyNeeded, wait} from './server.js';

// ---------------------------------------------------------------- light and dark

const system = matchMedia('(prefers-color-scheme: dark)');

function showTheme() {
  const chosen = localStorage.getItem('pallama-theme'),
    dark = chosen ? chosen === 'dark' : system.matches;
  if (chosen) document.documentElement.dataset.theme = chosen;
  element('theme').textContent = dark ? 'Light' : 'Dark';
  element('theme').ariaLabel = `Change to ${dark ? 'light' : 'dark'} colours`;
}

element('theme').addEventListener('click', () => {
  localStorage.setItem('pallama-theme', element('theme').textContent.toLowerCase());
  showTheme();
});
system.addEventListener('change', showTheme);
showTheme();

// ---------------------------------------------------------------- the key

let key = null; // {promise, resolve} while calls wait for one

onKeyNeeded((used, line) => {
  if (key === null) {
    key = Promise.withResolvers();
    element('key-why').textContent = used ? `This key is refused: ${line}` : 'This server wants its API key.';
    element('key-form').hidden = false;
    element('key').focus();
  }
  return key.promise;
});

element('key-form').addEventListener('submit', event => {
  event.preventDefault();
  keepKey(element('key').value.trim());
  element('key').value = '';
  element('key-form').hidden = true;
  element('model').focus();
  key.resolve();
  key = null;
});

// ---------------------------------------------------------------- tabs

const tabs = [...document.querySelectorAll('[role=tab]')];

function choose(tab, focus = false) {
  for (const other of tabs) {
    other.ariaSelected = String(other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    element(other.getAttribute('aria-controls')).hidden = other !== tab;
  }
  if (focus) tab.focus();
}

for (const tab of tabs) {
  tab.addEventListener('click', () => choose(tab));
  tab.addEventListener('keydown', event => {
    const shown = tabs.filter(other => !other.hidden),
      at = shown.indexOf(tab);
    const next = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1}[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(shown.at(next % shown.length), true);
  });
}

for (const form of document.querySelectorAll('form')) {
  form.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
    event.preventDefault();
    if (!form.querySelector('.primary').disabled) form.requestSubmit();
  });
}

// ---------------------------------------------------------------- what the server says of itself

function readable(parameters) {
  const [size, unit] = parameters >= 1e9 ? [1e9, 'B'] : parameters >= 1e6 ? [1e6, 'M'] : [1e3, 'k'];
  return `${(parameters / size).toPrecision(3)} ${unit} (${count(parameters)})`;
}

function showInfo(info) {
  const facts = [
    ['Parameters', readable(info.parameters)],
    ['dtype', info.dtype],
    ['Platform', info.platform],
    ['Lengths', `prompt ${count(info.input_length)}, all ${count(info.seq_length)} tokens`],
  ];
  if (info.template) {
    facts.push(['Template', info.template.prompt.replaceAll('\n', '⏎')], ['Labels', info.template.labels.join(', ')]);
  } else facts.push(['Template', 'none']);
  element('model').textContent = info.model;
  document.title = `${info.model} · Pallama`;
  element('facts').replaceChildren(
    ...facts.map(([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, String(value)))),
  );
  element('facts').hidden = false;
  element('notes').textContent = info.notes ?? '';
  element('notes').hidden = !info.notes;
}

async function begin() {
  for (const tab of ['generate', 'chat']) {
    element(`${tab}-sampling`).append(...samplingFields(tab));
  }
  let info = null;
  while (info === null) {
    try {
      info = await ask('info');
      element('trouble').hidden = true;
    } catch (error) {
      element('model').textContent = 'no answer yet; asking again every 3 seconds';
      if (element('trouble').textContent !== error.message) element('trouble').textContent = error.message;
      element('trouble').hidden = false;
      await wait(3);
    }
  }
  showInfo(info);
  for (const tab of ['generate', 'chat'])
    element(`${tab}-temperature`).placeholder = String(info.default_temperature ?? 'default');
  setUpClassify(info);
  setUpGenerate(info);
  if (info.chat) {
    setUpChat(info);
    element('tab-chat').hidden = false;
  }
  element('tabs').hidden = element('main').hidden = false;
  document.body.dataset.ready = 'yes';
}

begin();
