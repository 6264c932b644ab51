// What came out of a run: figures, rows, export.  Before: classify.js.

import {count, download, element, make, percent, several} from './elements.js';
import {confusion, coverage, scores, wilson} from './metrics.js';
import {csvLine} from './tables.js';

const SHOWN = 200; // rows at a time
const BARS = 4; // probabilities that are shown at once; the others are folded away

/** {start, render, end}: of one run after another, whose results are pushed to the list that start() returns. */
export function setUpResults() {
  let asked = null; // {labels, trouble} of the run: its labels, and what is wrong with the gold labels
  let results = []; // {index, text, gold: {text, class}, probabilities, predicted, probability or error}, as given
  let visible = [],
    shown = SHOWN;

  const answered = () => results.filter(result => !result.error);
  const wrong = result => !result.error && result.gold.class !== null && result.gold.class !== result.predicted;
  const threshold = () => element('threshold').valueAsNumber;

  function render() {
    element('results').hidden = !results.length;
    if (!results.length) {
      element('row-list').replaceChildren();
      return;
    }
    renderSummary();
    renderThreshold();
    if (element('order').value === 'given' && !element('wrong-only').checked && visible.length) appendRows();
    else renderRows();
  }

  const figure = (name, value, note = '') =>
    make('div', {}, make('dt', {}, name), make('dd', {}, make('strong', {}, value), note ? ` ${note}` : ''));
  const interval = (correct, total) =>
    wilson(correct, total)
      .map(share => (100 * share).toFixed(1))
      .join('–');

  function renderSummary() {
    const all = answered(),
      judged = all.filter(({gold}) => gold.class !== null),
      labels = asked.labels;
    const correct = judged.filter(({gold, predicted}) => gold.class === predicted).length;
    const mean = all.reduce((sum, {probability}) => sum + probability, 0) / all.length;
    const figures = [
      figure('Texts', count(all.length), results.length > all.length ? `${results.length - all.length} refused` : ''),
    ];
    if (judged.length) {
      figures.push(
        figure('Accuracy', percent(correct / judged.length), `95 % interval ${interval(correct, judged.length)}`),
        figure('Correct', count(correct), `of ${count(judged.length)}`),
      );
    }
    if (all.length) figures.push(figure('Mean probability', mean.toFixed(3)));
    for (const [at, label] of labels.entries()) {
      const said = all.filter(({predicted}) => predicted === at).length;
      if (all.length) figures.push(figure(label, count(said), percent(said / all.length)));
    }
    element('summary').replaceChildren(...figures);
    element('gold-note').textContent = asked.trouble;
    element('gold-note').hidden = !asked.trouble;
    element('gold-card').hidden = !judged.length;
    if (!judged.length) return;
    const counts = confusion(
      judged.map(({gold, predicted}) => [gold.class, predicted]),
      labels.length,
    );
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
      make(
        'thead',
        {},
        make(
          'tr',
          {},
          make('th', {scope: 'col'}, 'Gold'),
          ...labels.map(label => make('th', {scope: 'col', className: 'number'}, label)),
          make('th', {scope: 'col', className: 'number'}, 'all'),
        ),
      ),
      make(
        'tbody',
        {},
        ...counts.map((row, gold) => {
          const total = row.reduce((sum, n) => sum + n, 0);
          return make(
            'tr',
            {},
            make('th', {scope: 'row'}, labels[gold]),
            ...row.map((n, said) => cell(n, gold, said, total)),
            make('td', {className: 'number'}, count(total)),
          );
        }),
      ),
    );
  }

  function renderScores(each, labels) {
    const share = value => make('td', {className: 'number'}, value === null ? '–' : value.toFixed(3));
    const counted = each.filter(({f1}) => f1 !== null);
    element('scores').replaceChildren(
      make('caption', {}, `Macro F1 ${(counted.reduce((sum, {f1}) => sum + f1, 0) / counted.length).toFixed(3)}`),
      make(
        'thead',
        {},
        make(
          'tr',
          {},
          ...['Label', 'Precision', 'Recall', 'F1', 'Cases'].map((name, at) =>
            make('th', {scope: 'col', className: at ? 'number' : ''}, name),
          ),
        ),
      ),
      make(
        'tbody',
        {},
        ...each.map(({precision, recall, f1, support}, at) =>
          make(
            'tr',
            {},
            make('th', {scope: 'row'}, labels[at]),
            share(precision),
            share(recall),
            share(f1),
            make('td', {className: 'number'}, count(support)),
          ),
        ),
      ),
    );
  }

  function renderThreshold() {
    const least = threshold(),
      all = answered();
    const found = coverage(
      all.map(({probability, predicted, gold}) => ({probability, predicted, gold: gold.class})),
      least,
    );
    element('threshold-value').textContent = least.toFixed(2);
    const share = found.total ? percent(found.sure / found.total) : '–';
    const says = [`${count(found.sure)} of ${count(found.total)} texts are sure enough (coverage ${share}).`];
    if (found.judged) {
      const bounds = interval(found.correct, found.judged);
      says.push(`Accuracy of these ${percent(found.correct / found.judged)} (95 % interval ${bounds}).`);
    }
    element('threshold-says').textContent = says.join(' ');
  }

  function bar(label, probability, best) {
    const made = make(
      'div',
      {className: best ? 'bar best' : 'bar'},
      make('span', {className: 'name'}, label),
      make('span', {className: 'track', 'aria-hidden': 'true'}, make('span', {className: 'fill'})),
      make('span', {className: 'value'}, probability.toFixed(3)),
    );
    made.querySelector('.fill').style.inlineSize = `${100 * probability}%`;
    return made;
  }

  function rowOf(result) {
    const labels = asked.labels,
      number = make('td', {role: 'cell', className: 'number index'}, String(result.index + 1));
    const text = make('td', {role: 'cell', className: 'said-text'}, result.text);
    if (result.error) {
      return make(
        'tr',
        {role: 'row', className: 'refused'},
        number,
        text,
        make('td', {role: 'cell', colSpan: 3, className: 'error'}, result.error),
      );
    }
    const order = labels.map((_, at) => at);
    if (labels.length > BARS) order.sort((a, b) => result.probabilities[b] - result.probabilities[a]);
    const bars = order.map(at => bar(labels[at], result.probabilities[at], at === result.predicted));
    const folded = bars.splice(labels.length > BARS + 1 ? BARS : bars.length);
    const {gold} = result,
      mark = gold.class === null ? '' : gold.class === result.predicted ? '✓ right' : '✗ wrong';
    const sure = result.probability >= threshold();
    return make(
      'tr',
      {role: 'row', className: wrong(result) ? 'wrong' : ''},
      number,
      text,
      make(
        'td',
        {role: 'cell'},
        sure ? labels[result.predicted] : make('span', {className: 'unsure'}, 'not sure'),
        sure ? null : make('span', {className: 'hint'}, ` (${labels[result.predicted]})`),
      ),
      make(
        'td',
        {role: 'cell', className: 'bars'},
        ...bars,
        folded.length ? make('details', {}, make('summary', {}, `${folded.length} more`), ...folded) : null,
      ),
      make(
        'td',
        {role: 'cell', className: 'gold'},
        gold.text === null ? '–' : gold.class === null ? gold.text : labels[gold.class],
        mark ? make('span', {className: 'mark'}, ` ${mark}`) : null,
      ),
    );
  }

  /** The rows as they are ordered and filtered; each is made once, until labels or threshold change. */
  function arrange() {
    visible = element('wrong-only').checked ? results.filter(wrong) : [...results];
    const certainty = result => (result.error ? 2 : result.probability);
    if (element('order').value === 'uncertain') visible.sort((a, b) => certainty(a) - certainty(b));
    if (element('order').value === 'wrong')
      visible.sort((a, b) => wrong(b) - wrong(a) || (wrong(a) ? b.probability - a.probability : 0));
  }

  const nodes = rows => rows.map(result => (result.node ??= rowOf(result)));

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
    element('rows-says').textContent = visible.length
      ? `${count(least)} of ${several(visible.length, 'row')}`
      : 'No such rows';
    element('more').hidden = least === visible.length;
    element('more').textContent = `Show ${Math.min(SHOWN, visible.length - least)} more`;
  }

  // ---------------------------------------------------------------- export

  function exported() {
    const labels = asked.labels,
      least = threshold();
    return results.map(result => ({
      text: result.text,
      label: result.error ? null : labels[result.predicted],
      probability: result.error ? null : result.probability,
      sure: result.error ? null : result.probability >= least,
      gold: result.gold.class === null ? result.gold.text : labels[result.gold.class],
      correct: result.error || result.gold.class === null ? null : !wrong(result),
      probabilities: result.error
        ? null
        : Object.fromEntries(labels.map((label, at) => [label, result.probabilities[at]])),
      error: result.error ?? null,
    }));
  }

  element('export-csv').addEventListener('click', () => {
    const names = ['text', 'label', 'probability', 'sure', 'gold', 'correct', 'error'];
    const lines = exported().map(row =>
      csvLine([...names.map(name => row[name]), ...asked.labels.map(label => row.probabilities?.[label])]),
    );
    download('classified.csv', 'text/csv', [
      '\ufeff',
      csvLine([...names, ...asked.labels.map(label => `p(${label})`)]),
      ...lines,
    ]);
  });
  element('export-jsonl').addEventListener('click', () => {
    download(
      'classified.jsonl',
      'application/jsonl',
      exported().map(row => JSON.stringify(row) + '\n'),
    );
  });

  for (const id of ['order', 'wrong-only']) {
    element(id).addEventListener('change', () => {
      shown = SHOWN;
      renderRows();
    });
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
    if (row) {
      row.tabIndex = -1;
      row.focus();
    }
  });

  return {
    start(run) {
      [asked, results, visible, shown] = [run, [], [], SHOWN];
      render();
      return results;
    },
    render,
    /** Order the rows anew, behind the last. */
    end() {
      render();
      if (results.length) renderRows();
    },
  };
}
