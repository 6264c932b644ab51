// Elements of the page, made and found.

export const element = id => document.getElementById(id);

/** An element with its properties and children; strings become text, never markup. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-') || name === 'role' || name === 'for') made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter(child => child !== null));
  return made;
}

/** Hand over a file to the browser's downloads. */
export function download(name, kind, parts) {
  const address = URL.createObjectURL(new Blob(parts, {type: kind}));
  make('a', {href: address, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Copy a text; the button says so, for a moment. */
export async function copy(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = 'Copied';
  } catch {
    button.textContent = 'Not allowed by the browser';
  }
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

export const percent = share => `${(100 * share).toFixed(1)}\u00a0%`;
export const count = number => number.toLocaleString('en');
export const several = (number, name) => `${count(number)} ${name}${number === 1 ? '' : 's'}`;

/** The fields of a fieldset of sampling controls: those left empty are the server's to choose. */
export function samplingOf(fieldset) {
  const chosen = {};
  for (const input of fieldset.querySelectorAll('[data-field]')) {
    if (input.value === '') continue;
    if (input.dataset.field === 'stop') {
      chosen.stop = input.value
        .split('\n')
        .filter(Boolean)
        .map(line => line.replaceAll('\\n', '\n'));
    } else chosen[input.dataset.field] = input.valueAsNumber;
  }
  return chosen;
}

/** Fieldsets of the same controls, with names of their own for each tab. */
export function samplingFields(tab) {
  const fields = [
    ['temperature', 'Temperature', 0, 100, 'any', 'default'],
    ['top_p', 'top_p', 0, 1, 'any', '1'],
    ['top_k', 'top_k', 0, 1e9, 1, '0: off'],
    ['min_p', 'min_p', 0, 1, 'any', '0'],
    ['max_tokens', 'Max tokens', 1, 1e9, 1, 'default'],
    ['seed', 'Seed', 0, Number.MAX_SAFE_INTEGER, 1, 'random'],
  ];
  return [
    ...fields.map(([field, name, min, max, step, placeholder]) =>
      make(
        'label',
        {className: 'field', for: `${tab}-${field}`},
        name,
        make('input', {id: `${tab}-${field}`, type: 'number', min, max, step, placeholder, 'data-field': field}),
      ),
    ),
    make(
      'label',
      {className: 'field', for: `${tab}-stops`},
      'Stop texts, one a line',
      make('textarea', {
        id: `${tab}-stops`,
        rows: 1,
        placeholder: '\\n: a line’s end',
        spellcheck: false,
        'data-field': 'stop',
      }),
    ),
  ];
}
