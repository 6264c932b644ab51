// The one way to the server: the API key, errors as one line, answers that come in pieces.

const KEY = 'pallama-key';

/** An answer that is none; the message is the server's one line. */
export class ServerError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    Object.assign(this, {status, retryAfter});
  }
}

let askForKey = null; // () -> promise of a key

/** Say who asks the reader for a key. */
export const onKeyNeeded = ask => {
  askForKey = ask;
};
export const keepKey = key => sessionStorage.setItem(KEY, key);

/** The response to a GET, or to a POST of `body`; a 401 asks for the key and tries again. */
export async function send(path, {body, signal} = {}) {
  for (;;) {
    const headers = {},
      key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? 'GET' : 'POST',
        headers,
        signal,
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ServerError(0, 'the server does not answer');
    }
    if (response.ok) return response;
    const refusal = await response.json().catch(() => ({}));
    const line = errorLine(refusal) ?? (response.statusText || 'no reason given');
    if (response.status !== 401) {
      const retryAfter = Number(response.headers.get('Retry-After') ?? NaN);
      throw new ServerError(
        response.status,
        `${response.status}: ${line}`,
        Number.isFinite(retryAfter) ? retryAfter : null,
      );
    }
    await abortable(askForKey(key, line), signal);
  }
}

export const ask = async (path, options) => (await send(path, options)).json();

function errorLine(answer) {
  const said = answer?.error?.message ?? answer?.detail ?? answer?.error;
  return typeof said === 'string' ? said : null;
}

/** A promise that an abort ends. */
export function abortable(promise, signal) {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    const stop = () => reject(new DOMException('stopped', 'AbortError'));
    if (signal.aborted) stop();
    signal.addEventListener('abort', stop, {once: true});
    promise.then(resolve, reject);
  });
}

export const wait = (seconds, signal) => abortable(new Promise(resolve => setTimeout(resolve, 1000 * seconds)), signal);

/** The data of each event of a stream; a character that is cut between two pieces is put together. */
export async function* events(response) {
  const decoder = new TextDecoder('utf-8'),
    reader = response.body.getReader();
  let rest = '',
    data = [];
  try {
    for (;;) {
      const {value, done} = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, {stream: true});
      // a \r at the end may be half of a \r\n
      const lines = rest.split(done ? /\r\n|\r|\n/ : /\r\n|\r(?!$)|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === '') {
          if (data.length) yield data.join('\n');
          data = [];
        } else if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Stream one answer: onText(text so far) for each piece; -> {text, reason, tokens, pieces, first, seconds}.
 * tokens: of the answer, as the server counts them (null where it does not).  first: seconds to the first piece.
 */
export async function stream(path, body, signal, onText) {
  const begin = performance.now(),
    response = await send(path, {signal, body: {...body, stream: true, stream_options: {include_usage: true}}});
  let text = '',
    reason = null,
    tokens = null,
    pieces = 0,
    first = null,
    ended = false;
  const seconds = () => (performance.now() - begin) / 1000;
  for await (const data of events(response)) {
    if (data === '[DONE]') {
      ended = true;
      break;
    }
    let piece;
    try {
      piece = JSON.parse(data);
    } catch {
      throw new ServerError(0, 'the stream holds what is no JSON');
    }
    const failed = piece.error !== undefined ? (errorLine(piece) ?? 'the answer failed') : null;
    if (failed) throw new ServerError(0, failed);
    const choice = piece.choices?.[0],
      more = choice?.delta?.content ?? choice?.text ?? '';
    if (more) {
      first ??= seconds();
      pieces += 1;
      text += more;
      onText(text);
    }
    reason = choice?.finish_reason ?? reason;
    tokens = piece.usage?.completion_tokens ?? tokens;
  }
  if (!ended && reason === null) throw new ServerError(0, 'the stream broke off');
  return {text, reason, tokens, pieces, first, seconds: seconds()};
}

/** How an answer ended and how fast it came, in words. */
export function describe({reason, tokens, pieces, first, seconds}) {
  const [number, name] = tokens === null ? [pieces, 'pieces'] : [tokens, 'tokens'];
  const parts = [`${number} ${name}`, `${(number / seconds).toFixed(1)} ${name}/s`];
  if (first !== null) parts.push(`first after ${first.toFixed(2)} s`);
  parts.push(`${seconds.toFixed(1)} s`);
  if (reason === 'length') parts.push('cut at max tokens');
  return parts.join(' · ');
}
