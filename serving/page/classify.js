// The Classify tab: texts in, batches of them to the server.  Next: results.js, which shows what comes back.

import {count, element, make, several} from './elements.js';
import {setUpResults} from './results.js';
import {ServerError, ask, wait} from './server.js';
import {TableError, classesOf, examplesOf, readFiles, templateParts} from './tables.js';

const MOST_TEXTS = 64; // of one request
const MOST_CHARACTERS = 200_000; // of one request
const BATCH_SECONDS = 1; // a request is made so large that it takes about so long: the bar moves, Stop stops
const PATIENCE = 60; // times that a busy server is asked again

export function setUpClassify(info) {
  const own = {template: info.template?.prompt ?? '', labels: info.template?.labels ?? []};
  let table = null; // a file: {name, rows, columns, text, label}
  let asked = null; // {template, labels, trouble} of the run
  let results = []; // its answers so far, in the order of the texts
  let stopper = null; // while it runs
  const view = setUpResults();

  // ---------------------------------------------------------------- what is asked

  const task = () => ({
    template: element('template').value,
    labels: element('labels')
      .value.split('\n')
      .map(label => label.trim())
      .filter(Boolean),
  });

  function resetTask() {
    element('template').value = own.template;
    element('labels').value = own.labels.join('\n');
    sayTask();
  }

  function sayTask() {
    const {template, labels} = task(),
      same = template === own.template && labels.join('\n') === own.labels.join('\n');
    element('task-says').textContent =
      `${JSON.stringify(template)} → ${labels.join(', ') || 'no labels yet'}${same ? '' : ' (edited)'}`;
  }

  function checkTask() {
    const {template, labels} = task();
    templateParts(template);
    if (labels.length < 2 || new Set(labels.map(label => label.toLowerCase())).size < labels.length) {
      throw new TableError('write at least two different labels, one a line');
    }
    return {template, labels};
  }

  function fail(error) {
    element('bench-error').textContent = error?.message ?? '';
    element('bench-error').hidden = !error;
  }

  async function load(files) {
    fail(null);
    try {
      const read = await Promise.all(
        [...files].map(async file => ({name: file.name, bytes: await file.arrayBuffer()})),
      );
      const {template, labels} = task();
      table = readFiles(read, template.split('{text}').length === 2 ? template : null, labels);
    } catch (error) {
      if (!(error instanceof TableError)) throw error;
      return fail(error);
    } finally {
      element('file').value = '';
    }
    const options = (none, chosen) => [
      make('option', {value: ''}, none),
      ...table.columns.map((name, at) => make('option', {value: String(at), selected: name === chosen}, name)),
    ];
    element('text-column').replaceChildren(...options('choose …', table.text));
    element('label-column').replaceChildren(...options('none', table.label));
    element('file-name').textContent = table.name;
    sayTable();
    element('loaded').hidden = false;
    element('pasted').hidden = true;
  }

  const column = id => table.columns[Number(element(id).value || NaN)] ?? null;

  function sayTable() {
    const text = column('text-column'),
      label = column('label-column');
    const {examples, skipped} = examplesOf(table, text, label);
    const labelled = examples.filter(({gold}) => gold !== null).length;
    element('file-rows').textContent =
      text === null
        ? `${several(table.rows.length, 'row')}: which column holds the text?`
        : [
            several(examples.length, 'text'),
            label === null ? 'without labels' : `${count(labelled)} with a label`,
            skipped ? `${several(skipped, 'row')} without text left out` : null,
          ]
            .filter(Boolean)
            .join(', ');
  }

  function gather() {
    if (table === null) {
      return element('texts')
        .value.split(/\r\n|\r|\n/)
        .filter(line => line.trim())
        .map(text => ({text, gold: null}));
    }
    if (column('text-column') === null) throw new TableError(`${table.name}: choose the column that holds the text`);
    return examplesOf(table, column('text-column'), column('label-column')).examples;
  }

  // ---------------------------------------------------------------- the run

  async function run() {
    let examples;
    fail(null);
    try {
      asked = checkTask();
      examples = gather();
      if (!examples.length) throw new TableError('no texts yet: paste some, one a line, or choose a file');
    } catch (error) {
      if (!(error instanceof TableError)) throw error;
      return fail(error);
    }
    judge(examples);
    results = view.start(asked);
    stopper = new AbortController();
    busy(true);
    element('progress').max = examples.length;
    const begin = performance.now();
    let ended = 'done';
    try {
      await askAll(examples, stopper.signal, begin);
    } catch (error) {
      ended = 'stopped';
      if (error.name !== 'AbortError') fail(error);
      if (error.name !== 'AbortError' && !(error instanceof ServerError)) throw error;
    } finally {
      stopper = null;
      busy(false);
      say(examples.length, begin, ended);
      view.end();
    }
  }

  /** Ask in batches of about a second; a text that the server refuses is marked, and the others go on. */
  async function askAll(examples, signal, begin) {
    let size = 4,
      refused = 0,
      drawn = 0;
    while (results.length < examples.length) {
      const batch = [];
      for (let characters = 0; batch.length < size && results.length + batch.length < examples.length;) {
        const next = examples[results.length + batch.length];
        characters += next.text.length;
        if (batch.length && characters > MOST_CHARACTERS) break;
        batch.push(next);
      }
      const started = performance.now();
      let answers;
      try {
        answers = await classify(
          batch.map(({text}) => text),
          signal,
        );
      } catch (error) {
        // what is wrong with one text is found by halves; what is wrong with all of them ends the run
        if (!(error instanceof ServerError) || ![400, 413].includes(error.status)) throw error;
        if (batch.length > 1) {
          size = Math.ceil(batch.length / 2);
          continue;
        }
        refused += 1;
        if ((refused >= 3 && refused === results.length + 1) || examples.length === 1) throw error;
        answers = [{error: error.message}];
      }
      batch.forEach((example, at) => results.push({...example, index: results.length, ...answers[at]}));
      const seconds = (performance.now() - started) / 1000;
      size = Math.max(1, Math.min(MOST_TEXTS, 2 * size, Math.round((batch.length * BATCH_SECONDS) / seconds)));
      say(examples.length, begin, 'running');
      const now = performance.now();
      if (now - drawn > 500) {
        view.render();
        drawn = performance.now();
      }
    }
  }

  async function classify(texts, signal) {
    const {template, labels} = asked,
      body = {texts};
    if (template !== own.template) body.template = template;
    if (labels.join('\n') !== own.labels.join('\n')) body.labels = labels;
    for (let tries = 0; ; tries++) {
      try {
        const answer = await ask('classify', {body, signal});
        if (answer.results?.length !== texts.length)
          throw new ServerError(0, 'the server gave another number of answers');
        return answer.results.map(result => {
          const probabilities = labels.map(label => result.probabilities[label]);
          if (!probabilities.every(Number.isFinite))
            throw new ServerError(0, 'the server gave no probability for a label');
          const best = probabilities.indexOf(Math.max(...probabilities));
          return {probabilities, predicted: best, probability: probabilities[best]};
        });
      } catch (error) {
        if (!(error instanceof ServerError) || ![429, 503].includes(error.status) || tries >= PATIENCE) throw error;
        element('bench-status').textContent = 'The server is busy; asking again …';
        await wait(Math.min(10, Math.max(0.2, error.retryAfter ?? 1)), signal);
      }
    }
  }

  /** Find the class of each gold label; those that are none of the labels are counted and told. */
  function judge(examples) {
    const found = new Set(examples.map(({gold}) => gold).filter(gold => gold !== null));
    asked.trouble = '';
    let classes = new Map();
    try {
      classes = classesOf(asked.labels, found);
    } catch (error) {
      asked.trouble = `Gold labels are not used: ${error.message}.`;
    }
    for (const example of examples)
      example.gold = {text: example.gold, class: classes.get(example.gold?.toLowerCase()) ?? null};
    const strange = [...found].filter(gold => !classes.has(gold.toLowerCase()));
    if (strange.length && !asked.trouble) {
      const rows = examples.filter(({gold}) => gold.text !== null && gold.class === null).length;
      asked.trouble =
        `Gold labels that are none of these labels: ${several(rows, 'row')} (“${strange[0].slice(0, 40)}”), `
        + 'left out of the figures.';
    }
  }

  const busy = on => {
    element('run').disabled = on;
    element('stop').disabled = !on;
    element('progress').hidden = false;
    element('row-list').ariaBusy = String(on);
  };

  function say(total, begin, state) {
    const seconds = (performance.now() - begin) / 1000,
      done = results.length,
      rate = done / seconds;
    const left = done ? (total - done) / rate : 0;
    element('progress').value = done;
    element('bench-status').textContent = [
      `${count(done)} of ${count(total)}`,
      `${rate.toFixed(1)} texts/s`,
      state === 'running' ? `${Math.ceil(left)} s left` : `${state} in ${seconds.toFixed(1)} s`,
    ].join(' · ');
  }

  // ---------------------------------------------------------------- the controls

  element('bench').addEventListener('submit', event => {
    event.preventDefault();
    if (!stopper) run();
  });
  element('stop').addEventListener('click', () => stopper?.abort());
  element('task-reset').addEventListener('click', resetTask);
  for (const id of ['template', 'labels']) element(id).addEventListener('input', sayTask);
  element('file').addEventListener('change', event => {
    if (event.target.files.length) load(event.target.files);
  });
  for (const id of ['text-column', 'label-column']) element(id).addEventListener('change', sayTable);
  element('unload').addEventListener('click', () => {
    table = null;
    element('loaded').hidden = true;
    element('pasted').hidden = false;
    element('texts').focus();
  });
  for (const [name, on] of [
    ['dragover', true],
    ['dragleave', false],
    ['drop', false],
  ]) {
    element('drop').addEventListener(name, event => {
      event.preventDefault();
      element('drop').classList.toggle('over', on);
      if (name === 'drop' && event.dataTransfer.files.length) load(event.dataTransfer.files);
    });
  }
  resetTask();
  if (!info.template) element('task').open = true;
}
