// The Classify tab: texts in, labels with probabilities out, and how good they are where gold labels are known.

import {count, download, element, make, percent, several} from './elements.js';
import {confusion, coverage, scores, wilson} from './metrics.js';
import {ServerError, ask, wait} from './server.js';
import {TableError, classesOf, csvLine, examplesOf, readFiles, templateParts} from './tables.js';

const SHOWN = 200;                // rows at a time
const BARS = 4;                   // probabilities that are shown at once; the others are folded away
const MOST_TEXTS = 64, MOST_CHARACTERS = 200_000;   // of one request
const BATCH_SECONDS = 1;          // a request is made so large that it takes about so long: the bar moves, Stop stops
const PATIENCE = 60;              // times that a busy server is asked again

export function setUpClassify(info) {
  const own = {template: info.template?.prompt ?? '', labels: info.template?.labels ?? []};
  let table = null;               // a file: {name, rows, columns, text, label}
  let results = [];               // {text, gold, probabilities, error, node}: those done so far, as given
  let asked = null;               // {template, labels, classes, trouble} of the run that made them
  let visible = [], shown = SHOWN, stopper = null;

  // ---------------------------------------------------------------- what is asked

  const task = () => ({template: element('template').value,
                       labels: element('labels').value.split('\n').map(label => label.trim()).filter(Boolean)});

  function resetTask() {
    element('template').value = own.template;
    element('labels').value = own.labels.join('\n');
    sayTask();
  }

  function sayTask() {
    const {template, labels} = task(), same = template === own.template && labels.join('\n') === own.labels.join('\n');
    element('task-says').textContent = `${JSON.stringify(template)} → ${labels.join(', ') || 'no labels yet'}${same ? '' : ' (edited)'}`;
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
      const read = await Promise.all([...files].map(async file => ({name: file.name, bytes: await file.arrayBuffer()})));
      const {template, labels} = task();
      table = readFiles(read, template.split('{text}').length === 2 ? template : null, labels);
    } catch (error) {
      if (!(error instanceof TableError)) throw error;
      return fail(error);
    } finally {
      element('file').value = '';
    }
    const options = (none, chosen) => [make('option', {value: ''}, none), ...table.columns.map((name, at) =>
      make('option', {value: String(at), selected: name === chosen}, name))];
    element('text-column').replaceChildren(...options('choose …', table.text));
    element('label-column').replaceChildren(...options('none', table.label));
    element('file-name').textContent = table.name;
    sayTable();
    element('loaded').hidden = false;
    element('pasted').hidden = true;
  }

  const column = id => table.columns[Number(element(id).value || NaN)] ?? null;

  function sayTable() {
    const text = column('text-column'), label = column('label-column');
    const {examples, skipped} = examplesOf(table, text, label);
    const labelled = examples.filter(({gold}) => gold !== null).length;
    element('file-rows').textContent = text === null ? `${several(table.rows.length, 'row')}: which column holds the text?` : [
      several(examples.length, 'text'), label === null ? 'without labels' : `${count(labelled)} with a label`,
      skipped ? `${several(skipped, 'row')} without text left out` : null].filter(Boolean).join(', ');
  }

  function gather() {
    if (table === null) {
      return element('texts').value.split(/\r\n|\r|\n/).filter(line => line.trim()).map(text => ({text, gold: null}));
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
    results = [];
    shown = SHOWN;
    stopper = new AbortController();
    busy(true);
    element('progress').max = examples.length;
    render();
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
      render();
      if (element('order').value !== 'given' || element('wrong-only').checked) renderRows();
    }
  }

  /** Ask in batches of about a second; a text that the server refuses is marked, and the others go on. */
  async function askAll(examples, signal, begin) {
    let size = 4, refused = 0, drawn = 0;
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
        answers = await classify(batch.map(({text}) => text), signal);
      } catch (error) {
        // what is wrong with one text is found by halves; what is wrong with all of them ends the run
        if (!(error instanceof ServerError) || ![400, 413].includes(error.status)) throw error;
        if (batch.length > 1) { size = Math.ceil(batch.length / 2); continue; }
        refused += 1;
        if (refused >= 3 && refused === results.length + 1 || examples.length === 1) throw error;
        answers = [{error: error.message}];
      }
      batch.forEach((example, at) => results.push({...example, index: results.length, ...answers[at]}));
      const seconds = (performance.now() - started) / 1000;
      size = Math.max(1, Math.min(MOST_TEXTS, 2 * size, Math.round(batch.length * BATCH_SECONDS / seconds)));
      say(examples.length, begin, 'running');
      const now = performance.now();
      if (now - drawn > 500) { render(); drawn = performance.now(); }
    }
  }

  async function classify(texts, signal) {
    const {template, labels} = asked, body = {texts};
    if (template !== own.template) body.template = template;
    if (labels.join('\n') !== own.labels.join('\n')) body.labels = labels;
    for (let tries = 0; ; tries++) {
      try {
        const answer = await ask('classify', {body, signal});
        if (answer.results?.length !== texts.length) throw new ServerError(0, 'the server gave another number of answers');
        return answer.results.map(result => {
          const probabilities = labels.map(label => result.probabilities[label]);
          if (!probabilities.every(Number.isFinite)) throw new ServerError(0, 'the server gave no probability for a label');
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
    try { classes = classesOf(asked.labels, found); } catch (error) { asked.trouble = `Gold labels are not used: ${error.message}.`; }
    for (const example of examples) example.gold = {text: example.gold, class: classes.get(example.gold?.toLowerCase()) ?? null};
    const strange = [...found].filter(gold => !classes.has(gold.toLowerCase()));
    if (strange.length && !asked.trouble) {
      const rows = examples.filter(({gold}) => gold.text !== null && gold.class === null).length;
      asked.trouble = `${several(rows, 'row')} ${rows === 1 ? 'has a gold label that is' : 'have gold labels that are'} none of these labels ` +
                      `(“${strange[0].slice(0, 40)}”): left out of the figures.`;
    }
  }

  const busy = on => {
    element('run').disabled = on;
    element('stop').disabled = !on;
    element('progress').hidden = false;
    element('row-list').ariaBusy = String(on);
  };

  function say(total, begin, state) {
    const seconds = (performance.now() - begin) / 1000, done = results.length, rate = done / seconds;
    const left = done ? (total - done) / rate : 0;
    element('progress').value = done;
    element('bench-status').textContent = [`${count(done)} of ${count(total)}`, `${rate.toFixed(1)} texts/s`,
      state === 'running' ? `${Math.ceil(left)} s left` : `${state} in ${seconds.toFixed(1)} s`].join(' · ');
  }

  // ---------------------------------------------------------------- what came out

  const answered = () => results.filter(result => !result.error);
  const wrong = result => !result.error && result.gold.class !== null && result.gold.class !== result.predicted;
  const threshold = () => element('threshold').valueAsNumber;

  function render() {
    element('results').hidden = !results.length;
    if (!results.length) { element('row-list').replaceChildren(); return; }
    renderSummary();
    renderThreshold();
    if (element('order').value === 'given' && !element('wrong-only').checked && visible.length) appendRows();
    else renderRows();
  }

  const figure = (name, value, note = '') => make('div', {}, make('dt', {}, name),
    make('dd', {}, make('strong', {}, value), note ? ` ${note}` : ''));
  const interval = (correct, total) => wilson(correct, total).map(share => (100 * share).toFixed(1)).join('–');

  function renderSummary() {
    const all = answered(), judged = all.filter(({gold}) => gold.class !== null), labels = asked.labels;
    const correct = judged.filter(({gold, predicted}) => gold.class === predicted).length;
    const mean = all.reduce((sum, {probability}) => sum + probability, 0) / all.length;
    const figures = [figure('Texts', count(all.length), results.length > all.length ? `${results.length - all.length} refused` : '')];
    if (judged.length) {
      figures.push(figure('Accuracy', percent(correct / judged.length), `95 % interval ${interval(correct, judged.length)}`),
                   figure('Correct', count(correct), `of ${count(judged.length)}`));
    }
    if (all.length) figures.push(figure('Mean probability', mean.toFixed(3)));
    for (const [at, label] of labels.entries()) {
      const said = all.filter(({predicted}) => predicted === at).length;
      if (all.length) figures.push(figure(label, count(said), percent(said / all.length)));
    }
    element('summary').replaceChildren(...figures);
    element('gold-note').textContent = asked.trouble;
    element('gold-note').hidden = !asked.trouble;
    element('confusion-card').hidden = element('scores-card').hidden = !judged.length;
    if (!judged.length) return;
    const counts = confusion(judged.map(({gold, predicted}) => [gold.class, predicted]), labels.length);
    renderConfusion(counts, labels);
    renderScores(scores(counts), labels);
  }

  function renderConfusion(counts, labels) {
    const cell = (n, gold, said, total) => {
      const made = make('td', {className: gold === said ? 'number right' : 'number'}, count(n));
      made.style.setProperty('--share', total ? n / total : 0);
      return made;
    };
    element('confusion').replaceChildren(
      make('caption', {}, 'Rows: gold label. Columns: what the model says.'),
      make('thead', {}, make('tr', {}, make('th', {scope: 'col'}, 'Gold'), ...labels.map(label => make('th', {scope: 'col', className: 'number'}, label)),
                             make('th', {scope: 'col', className: 'number'}, 'all'))),
      make('tbody', {}, ...counts.map((row, gold) => {
        const total = row.reduce((sum, n) => sum + n, 0);
        return make('tr', {}, make('th', {scope: 'row'}, labels[gold]), ...row.map((n, said) => cell(n, gold, said, total)),
                    make('td', {className: 'number'}, count(total)));
      })));
  }

  function renderScores(each, labels) {
    const share = value => make('td', {className: 'number'}, value === null ? '–' : value.toFixed(3));
    const counted = each.filter(({f1}) => f1 !== null);
    element('scores').replaceChildren(
      make('caption', {}, `Macro F1 ${(counted.reduce((sum, {f1}) => sum + f1, 0) / counted.length).toFixed(3)}`),
      make('thead', {}, make('tr', {}, ...['Label', 'Precision', 'Recall', 'F1', 'Cases'].map((name, at) =>
        make('th', {scope: 'col', className: at ? 'number' : ''}, name)))),
      make('tbody', {}, ...each.map(({precision, recall, f1, support}, at) => make('tr', {}, make('th', {scope: 'row'}, labels[at]),
        share(precision), share(recall), share(f1), make('td', {className: 'number'}, count(support))))));
  }

  function renderThreshold() {
    const least = threshold(), all = answered();
    const found = coverage(all.map(({probability, predicted, gold}) => ({probability, predicted, gold: gold.class})), least);
    element('threshold-value').textContent = least.toFixed(2);
    const says = [`${count(found.sure)} of ${count(found.total)} texts are sure enough (coverage ${found.total ? percent(found.sure / found.total) : '–'}).`];
    if (found.judged) says.push(`Accuracy of these ${percent(found.correct / found.judged)} (95 % interval ${interval(found.correct, found.judged)}).`);
    element('threshold-says').textContent = says.join(' ');
  }

  function bar(label, probability, best) {
    const made = make('div', {className: best ? 'bar best' : 'bar'}, make('span', {className: 'name'}, label),
      make('span', {className: 'track', 'aria-hidden': 'true'}, make('span', {className: 'fill'})),
      make('span', {className: 'value'}, probability.toFixed(3)));
    made.querySelector('.fill').style.inlineSize = percent(probability).replace(' ', '');
    return made;
  }

  function rowOf(result) {
    const labels = asked.labels, number = make('td', {className: 'number index'}, String(result.index + 1));
    const text = make('td', {className: 'said-text'}, result.text);
    if (result.error) {
      return make('tr', {className: 'refused'}, number, text, make('td', {colSpan: 3, className: 'error'}, result.error));
    }
    const order = labels.map((_, at) => at);
    if (labels.length > BARS) order.sort((a, b) => result.probabilities[b] - result.probabilities[a]);
    const bars = order.map(at => bar(labels[at], result.probabilities[at], at === result.predicted));
    const folded = bars.splice(labels.length > BARS + 1 ? BARS : bars.length);
    const {gold} = result, mark = gold.class === null ? '' : gold.class === result.predicted ? '✓ right' : '✗ wrong';
    const sure = result.probability >= threshold();
    return make('tr', {className: wrong(result) ? 'wrong' : ''}, number, text,
      make('td', {}, sure ? labels[result.predicted] : make('span', {className: 'unsure'}, 'not sure'),
           sure ? null : make('span', {className: 'hint'}, ` (${labels[result.predicted]})`)),
      make('td', {className: 'bars'}, ...bars,
           folded.length ? make('details', {}, make('summary', {}, `${folded.length} more`), ...folded) : null),
      make('td', {className: 'gold'}, gold.text === null ? '–' : gold.class === null ? gold.text : labels[gold.class],
           mark ? make('span', {className: 'mark'}, ` ${mark}`) : null));
  }

  /** The rows as they are ordered and filtered; each is made once, until labels or threshold change. */
  function arrange() {
    visible = element('wrong-only').checked ? results.filter(wrong) : [...results];
    const certainty = result => result.error ? 2 : result.probability;
    if (element('order').value === 'uncertain') visible.sort((a, b) => certainty(a) - certainty(b));
    if (element('order').value === 'wrong') visible.sort((a, b) => wrong(b) - wrong(a) || (wrong(a) ? b.probability - a.probability : 0));
  }

  const nodes = rows => rows.map(result => result.node ??= rowOf(result));

  function renderRows() {
    arrange();
    element('row-list').replaceChildren(...nodes(visible.slice(0, shown)));
    sayRows();
  }

  function appendRows() {
    arrange();
    const list = element('row-list');
    list.append(...nodes(visible.slice(list.childElementCount, shown)));
    sayRows();
  }

  function sayRows() {
    const least = Math.min(shown, visible.length);
    element('rows-says').textContent = visible.length ? `${count(least)} of ${several(visible.length, 'row')}` : 'No such rows';
    element('more').hidden = least === visible.length;
    element('more').textContent = `Show ${Math.min(SHOWN, visible.length - least)} more`;
  }

  // ---------------------------------------------------------------- export

  function exported() {
    const labels = asked.labels, least = threshold();
    return results.map(result => ({
      text: result.text, label: result.error ? null : labels[result.predicted],
      probability: result.error ? null : result.probability, sure: result.error ? null : result.probability >= least,
      gold: result.gold.class === null ? result.gold.text : labels[result.gold.class],
      correct: result.error || result.gold.class === null ? null : !wrong(result),
      probabilities: result.error ? null : Object.fromEntries(labels.map((label, at) => [label, result.probabilities[at]])),
      error: result.error ?? null,
    }));
  }

  element('export-csv').addEventListener('click', () => {
    const names = ['text', 'label', 'probability', 'sure', 'gold', 'correct', 'error'];
    const lines = exported().map(row => csvLine([...names.map(name => row[name]), ...asked.labels.map(label => row.probabilities?.[label])]));
    download('classified.csv', 'text/csv', ['\ufeff', csvLine([...names, ...asked.labels.map(label => `p(${label})`)]), ...lines]);
  });
  element('export-jsonl').addEventListener('click', () => {
    download('classified.jsonl', 'application/jsonl', exported().map(row => JSON.stringify(row) + '\n'));
  });

  // ---------------------------------------------------------------- the controls

  element('bench').addEventListener('submit', event => { event.preventDefault(); if (!stopper) run(); });
  element('stop').addEventListener('click', () => stopper?.abort());
  element('task-reset').addEventListener('click', resetTask);
  for (const id of ['template', 'labels']) element(id).addEventListener('input', sayTask);
  element('file').addEventListener('change', event => { if (event.target.files.length) load(event.target.files); });
  for (const id of ['text-column', 'label-column']) element(id).addEventListener('change', sayTable);
  element('unload').addEventListener('click', () => {
    table = null;
    element('loaded').hidden = true;
    element('pasted').hidden = false;
    element('texts').focus();
  });
  for (const [name, on] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
    element('drop').addEventListener(name, event => {
      event.preventDefault();
      element('drop').classList.toggle('over', on);
      if (name === 'drop' && event.dataTransfer.files.length) load(event.dataTransfer.files);
    });
  }
  for (const id of ['order', 'wrong-only']) {
    element(id).addEventListener('change', () => { shown = SHOWN; renderRows(); });
  }
  element('threshold').addEventListener('input', () => {
    for (const result of results) result.node = undefined;
    renderThreshold();
    renderRows();
  });
  element('more').addEventListener('click', () => {
    const first = shown;
    shown += SHOWN;
    appendRows();
    const row = element('row-list').children[first];
    if (row) { row.tabIndex = -1; row.focus(); }
  });
  resetTask();
  if (!info.template) element('task').open = true;
}
