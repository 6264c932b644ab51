// Rows out of files, and files out of rows; no page in here, so that a test can ask it.
// The columns are found, and the labels read, as prepare_data.py does it (data/labelled.py).

export const TEXT_COLUMNS = [
  'text',
  'review',
  'sentence',
  'ticket',
  'content',
  'message',
  'comment',
  'body',
  'document',
  'question',
  'query',
  'utterance',
  'post',
  'tweet',
];
export const LABEL_COLUMNS = [
  'label',
  'labels',
  'class',
  'category',
  'sentiment',
  'team',
  'stars',
  'rating',
  'target',
  'tag',
  'topic',
  'intent',
  'emotion',
  'polarity',
];
const NUMBER = /^[+-]?\d+(\.\d+)?$/;

/** A file that cannot be used; the message is one line for the reader. */
export class TableError extends Error {}

// ---------------------------------------------------------------- CSV

/** [{line, cells}] of a table: quotes, doubled quotes, commas and line ends within quotes.  Blank lines are none. */
export function parseCsv(text, mark = ',') {
  const found = [];
  let cells = [],
    cell = '',
    state = 'start',
    line = 1,
    begun = 1; // state: start, bare, quoted, closed (behind a quote)
  const endCell = () => {
    cells.push(cell);
    cell = '';
    state = 'start';
  };
  const endRow = () => {
    if (cells.length || cell || state !== 'start') {
      endCell();
      found.push({line: begun, cells});
    }
    cells = [];
  };
  for (let at = 0; at < text.length; at++) {
    const character = text[at],
      newline = character === '\n' || character === '\r';
    if (state === 'quoted') {
      if (character !== '"') {
        cell += character;
        if (character === '\n') line += 1;
      } else if (text[at + 1] === '"') {
        cell += '"';
        at += 1;
      } else state = 'closed';
    } else if (character === mark) endCell();
    else if (newline) {
      if (character === '\r' && text[at + 1] === '\n') at += 1;
      endRow();
      line += 1;
      begun = line;
    } else if (state === 'closed') {
      throw new TableError(`line ${begun}: "${character}" behind a closing quote; write a quote in a text as ""`);
    } else if (character === '"' && state === 'start') state = 'quoted';
    else {
      cell += character;
      state = 'bare';
    }
  }
  if (state === 'quoted') throw new TableError(`line ${begun}: a quote that is not closed`);
  endRow();
  return found;
}

function csvRows(text, tabs) {
  const first = text.split(/\r\n|\r|\n/).find(line => line.trim()) ?? '';
  let mark = '\t';
  if (!tabs) {
    const columns = candidate => {
      try {
        return parseCsv(first, candidate)[0]?.cells.length ?? 0;
      } catch {
        return 0;
      }
    };
    mark = [',', ';', '\t', '|'].reduce((best, next) => (columns(next) > columns(best) ? next : best));
  }
  const [head, ...rest] = parseCsv(text, mark);
  if (!head) return [];
  const header = head.cells.map(name => name.trim());
  const twice = header.find((name, at) => name && header.indexOf(name) !== at);
  if (twice) throw new TableError(`line ${head.line}: two columns are named '${twice}'; rename one`);
  return rest.map(({line, cells}) => {
    if (cells.length > header.length) throw new TableError(`line ${line}: more columns than the header has`);
    return {place: `line ${line}`, values: new Map(header.map((name, at) => [name, cells[at] ?? null]))};
  });
}

/** One line of CSV.  A cell that a spreadsheet would take for a formula gets a ' in front. */
export function csvLine(values) {
  return (
    values
      .map(value => {
        let cell = value === null || value === undefined ? '' : String(value);
        if (typeof value === 'string' && /^[=+\-@\t\r\n＝＋－＠]/.test(cell)) cell = "'" + cell;
        return /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
      })
      .join(',') + '\r\n'
  );
}

// ---------------------------------------------------------------- JSON

const isObject = value => typeof value === 'object' && value !== null && !Array.isArray(value);

function jsonLines(text) {
  const found = [];
  text.split('\n').forEach((line, at) => {
    if (!line.trim()) return;
    let row;
    try {
      row = JSON.parse(line);
    } catch {
      throw new TableError(`line ${at + 1}: no valid JSON`);
    }
    if (!isObject(row)) throw new TableError(`line ${at + 1}: must be an object, {"text": ".."}`);
    found.push({place: `line ${at + 1}`, values: new Map(Object.entries(row))});
  });
  return found;
}

function jsonRows(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new TableError('no valid JSON; if it holds one object a line, rename it to .jsonl');
  }
  if (isObject(found) && Array.isArray(found.prefix_text)) {
    // eval_NAME.json of prepare_data.py
    return found.prefix_text.map((prompt, at) => ({place: `entry ${at + 1}`, values: new Map([['prompt', prompt]])}));
  }
  if (isObject(found)) found = found.data;
  if (!Array.isArray(found))
    throw new TableError('must hold a list of objects, {"data": [..]} or {"prefix_text": [..]}');
  return found.map((row, at) => {
    if (typeof row === 'string') return {place: `entry ${at + 1}`, values: new Map([['text', row]])};
    if (!isObject(row)) throw new TableError(`entry ${at + 1}: must be an object or a text`);
    return {place: `entry ${at + 1}`, values: new Map(Object.entries(row))};
  });
}

/** The text of a file's bytes; only UTF-8, with or without its mark. */
export function decode(bytes) {
  try {
    return new TextDecoder('utf-8', {fatal: true}).decode(bytes);
  } catch {
    throw new TableError('is not UTF-8: save it as CSV UTF-8');
  }
}

/** {place, values: Map(column -> value)} of each row of a file. */
export function readRows(name, text) {
  const kind = name.toLowerCase().match(/\.[a-z]+$/)?.[0] ?? '';
  if (kind === '.csv' || kind === '.tsv') return csvRows(text, kind === '.tsv');
  if (kind === '.jsonl' || kind === '.txt') return jsonLines(text);
  if (kind === '.json') return jsonRows(text);
  throw new TableError('must end in .csv, .tsv, .jsonl, .txt (JSON lines) or .json');
}

// ---------------------------------------------------------------- columns

/** A label as it stands there: one blank between words, 1.0 is 1; null for none. */
export function labelText(value) {
  if (value === null || value === undefined || typeof value === 'object') return null;
  return (
    String(value)
      .split(/\s+/)
      .filter(Boolean)
      .join(' ')
      .replace(/^([+-]?\d+)\.0+$/, '$1') || null
  );
}

/** {columns, text, label}: all columns, and those of text and label, null where their names do not tell. */
export function findColumns(rows) {
  const columns = [];
  for (const {values} of rows.slice(0, 100))
    for (const name of values.keys()) if (!columns.includes(name)) columns.push(name);
  const chosen = {text: null, label: null};
  for (const [kind, usual] of [
    ['text', TEXT_COLUMNS],
    ['label', LABEL_COLUMNS],
  ]) {
    let named = columns.filter(name => name !== chosen.text && usual.includes(name.toLowerCase()));
    const exact = named.filter(name => name.toLowerCase() === kind);
    if (exact.length) named = exact;
    if (named.length === 1) chosen[kind] = named[0];
  }
  if (chosen.text === null && columns.length === 1) chosen.text = columns[0];
  if (columns.length === 2) {
    const other = name => columns.find(column => column !== name);
    if (chosen.text === null && chosen.label !== null) chosen.text = other(chosen.label);
    else if (chosen.label === null && chosen.text !== null) {
      // labels are optional here: numbers of rows are none
      const seen = new Set(rows.map(row => labelText(row.values.get(other(chosen.text)))));
      if (seen.size <= Math.max(20, rows.length / 10) && seen.size < rows.length) chosen.label = other(chosen.text);
    }
  }
  return {columns, ...chosen};
}

// ---------------------------------------------------------------- labels

/** Names in a column, as labels: numbers ascending, else names by alphabet, each in its commonest spelling. */
export function labelsOf(found) {
  const spellings = new Map();
  for (const label of found) {
    const key = label.toLowerCase();
    if (!spellings.has(key)) spellings.set(key, new Map());
    spellings.get(key).set(label, (spellings.get(key).get(label) ?? 0) + 1);
  }
  const keys = [...spellings.keys()],
    numeric = keys.every(key => NUMBER.test(key));
  keys.sort(numeric ? (a, b) => a - b : undefined);
  return keys.map(key => [...spellings.get(key)].reduce((best, next) => (next[1] > best[1] ? next : best))[0]);
}

/** Map(a label as it stands in the data, in lower case -> its class); TableError where numbers may mean other names. */
export function classesOf(labels, found) {
  const names = new Map(labels.map((name, at) => [name.toLowerCase(), at]));
  if ([...names.keys()].some(name => NUMBER.test(name))) return names;
  const counted = [...found].filter(label => !names.has(label.toLowerCase()) && /^\d+$/.test(label)).map(Number);
  const least = Math.min(...counted),
    most = Math.max(...counted);
  if (counted.length && least > 0 && most > 1) {
    throw new TableError(
      `the labels in the file are the numbers ${least} .. ${most} and no 0: which is which? `
        + `Write the names (${labels.join(', ')}) into the file`,
    );
  }
  const numbers = new Map(labels.map((_, at) => [String(at), at]));
  const spoken =
    labels.length === 2
      ? new Map([
          ['false', 0],
          ['true', 1],
        ])
      : new Map();
  return new Map([...spoken, ...numbers, ...names]);
}

// ---------------------------------------------------------------- the template

/** [before, behind] of a template with one {text}; TableError for another. */
export function templateParts(template) {
  const parts = template.split('{text}');
  if (parts.length !== 2) throw new TableError('the template must hold {text} exactly once, where the text goes');
  return parts;
}

/** The bare text of a prompt or of a record of prepare_data.py, and the label that ends it (null without). */
export function unwrap(prompt, template, labels) {
  const [before, behind] = templateParts(template);
  if (!prompt.startsWith(before)) return null;
  const inner = prompt.slice(before.length);
  if (inner.endsWith(behind)) return {text: inner.slice(0, inner.length - behind.length), label: null};
  for (const label of labels) {
    const end = `${behind} ${label}`;
    if (inner.endsWith(end)) return {text: inner.slice(0, inner.length - end.length), label};
  }
  return null;
}

/** Rows with the columns text and label out of those that prepare_data.py writes; null for any other rows. */
function preparedRows(rows, template, labels) {
  const columns = new Set(rows.flatMap(({values}) => [...values.keys()]));
  if (!rows.length || [...columns].some(name => !['text', 'prompt', 'answer'].includes(name))) return null;
  const from = columns.has('prompt') ? 'prompt' : 'text',
    found = [];
  for (const {place, values} of rows) {
    const value = values.get(from),
      bare = template && typeof value === 'string' ? unwrap(value, template, labels) : null;
    if (from === 'text' && (bare === null || bare.label === null)) return null;
    if (bare === null) {
      throw new TableError(
        `${place}: the prompt does not fit the template ${JSON.stringify(template ?? '')}; `
          + 'set the template that it was prepared with',
      );
    }
    const label = bare.label ?? labelText(values.get('answer'));
    found.push({place, values: new Map([['text', bare.text], ...(label === null ? [] : [['label', label]])])});
  }
  return found;
}

/**
 * {name, rows, columns, text, label} out of files [{name, bytes}]: one file, or eval_NAME.json or NAME.jsonl with the
 * labels_NAME.json that prepare_data.py wrote beside it.  template, labels: those of the session.
 */
export function readFiles(files, template, labels) {
  const read = ({name, bytes}) => {
    try {
      return readRows(name, decode(bytes));
    } catch (error) {
      throw error instanceof TableError ? new TableError(`${name}: ${error.message}`) : error;
    }
  };
  const notes = files.filter(file => /^labels_.*\.json$/.test(file.name)),
    [main, more] = files.filter(file => !notes.includes(file));
  if (!main)
    throw new TableError(`${notes[0]?.name ?? 'no file'}: choose it together with its eval_NAME.json or NAME.jsonl`);
  if (more || notes.length > 1) throw new TableError('one file at a time (with its labels_NAME.json)');
  let noted = null;
  if (notes.length) {
    try {
      noted = JSON.parse(decode(notes[0].bytes));
      labels = noted.template.labels;
      template = noted.template.prefix + '{text}' + noted.template.suffix;
      if (!noted.labels.every(label => labels[label] !== undefined)) throw new TypeError();
    } catch {
      throw new TableError(`${notes[0].name}: not as prepare_data.py writes it`);
    }
  }
  let rows = read(main);
  if (!rows.length) throw new TableError(`${main.name}: no rows in it`);
  let prepared;
  try {
    prepared = preparedRows(rows, template, labels);
  } catch (error) {
    throw new TableError(`${main.name}: ${error.message}`);
  }
  if (noted) {
    if (!prepared || rows.length !== noted.labels.length) {
      throw new TableError(`${main.name} and ${notes[0].name} do not belong together`);
    }
    prepared.forEach(({values}, at) => values.set('label', labels[noted.labels[at]]));
  }
  rows = prepared ?? rows;
  return {name: main.name, rows, ...findColumns(rows)};
}

/** {examples: [{text, gold}], skipped} of the rows: gold null without a label; rows without text are counted. */
export function examplesOf({rows}, textColumn, labelColumn) {
  const examples = rows
    .map(({values}) => ({
      text: values.get(textColumn),
      gold: labelColumn === null ? null : labelText(values.get(labelColumn)),
    }))
    .filter(({text}) => typeof text === 'string' && text.trim() && text.isWellFormed());
  return {examples, skipped: rows.length - examples.length};
}
