"""Serves a model over HTTP, as EasyLM's server: /generate, /greedy-until, /chat, /loglikelihood,
/loglikelihood-rolling, /ready; /classify; OpenAI's completions and chats (serving/api.py and openai.py have the
formats); and a page to try it by hand.

  python serve.py --load_checkpoint=runs/tuned --input_length=1024 --seq_length=1152
  python serve.py --load_llama_config=3b --load_checkpoint=params::PATH --tokenizer.vocab_file=tokenizer.model

Ctrl-C or SIGTERM finishes the requests that are running or waiting, for at most --lm_server.drain_seconds, while new
ones are answered 503, and ends with exit code 0; a second one ends at once.  Exit code 1 says that the engine failed, 2
that flags or files are wrong.

Several processes (hosts) serve one model together with --jax_distributed.initialize_jax_distributed=True and otherwise
the same flags: process 0 has the port, the log and the signals, the others follow it (serving/followers.py).
"""
import asyncio
import dataclasses
import errno
import hashlib
import ipaddress
import json
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import uvicorn

import checkpoint
from checkpoint.adapter import AdaptedSource, describe_adapter
from data.chat import ChatTemplate
from data.prompt import PromptTemplate
from evaluation.calibration import read_temperature
from hosts import processes
from hosts.start import failing_together, start_processes
from mistake import Mistake
from model.partition import check_rows
from model.weights import weight_specs
from program import flags, parse, settings
from program.model import Model, describe, open_model
from serving.api import Options, Variant, make_app
from serving.chat import choose_template
from serving.engine import Engine, make_engine
from serving.followers import CallLine, follow
from serving.guard import MAX_HEADER_BYTES, Protocol
from serving.texts import Texts, check_beams
from serving.thread import EngineThread


@failing_together()
def main(config) -> None:
    warm_up = programs_of(config.lm_server.pre_compile)
    options = options_of(config)
    check_beams(config.do_sample, config.num_beams)
    start_processes(config)
    load, compute = settings.read_load(config), settings.read_compute(config)
    if processes.index() > 0:
        model = open_model(load, compute)
        engine, _ = load_engine(config, model, open_adapters(config.lm_server.adapters, load, model, options))
        return follow(engine, warm_up, config.num_beams, CallLine())
    if config.lm_server.logging:
        sys.stdout.reconfigure(errors='backslashreplace')  # requests hold characters that the terminal may not have
    refuse_open(config.lm_server)
    listener = listen(config.lm_server.host, config.lm_server.port)
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        options = dataclasses.replace(options, allowed_hosts=None)
        if options.key_digest is None:
            print(f'WARNING: {host} is not a loopback address and there is no API key: everyone who can reach '
                  f'{host}:{port} can use this model.', flush=True)
    with listener:
        model = open_model(load, compute)
        variants = open_adapters(config.lm_server.adapters, load, model, options)
        engine, texts = load_engine(config, model, variants)
        started = time.monotonic()
        line = CallLine() if processes.count() > 1 else None
        thread = EngineThread(engine, config.lm_server.queue_size, warm_up, config.num_beams, line)
        options = dataclasses.replace(options, calibration_temperature=calibration_of(model.source))
        chat = chat_of(config.lm_server, model.source, model, options)
        named = {name: Variant(number, source.template, calibration_of(source),
                               chat_of(config.lm_server, source, model, options, name))
                 for number, (name, source) in enumerate(variants.items(), 1)}
        app = make_app(thread, texts, options, info_of(model), chat, named)
        server = Server(app, thread, config.lm_server.drain_seconds)

        def announce(warm):
            if warm.exception() is not None:
                server.should_exit = True
            if not thread.ready:
                return
            print(f'compiled {engine.programs.compilations} programs in {time.monotonic() - started:.1f} s\nready on '
                  f'{url_of(host, port)}, for example\n  {curl_line(host, port, model.template)}', flush=True)

        thread.warm.add_done_callback(announce)
        # uvicorn raises the signal once more for whoever handled it before: nobody needs to
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        server.run(sockets=[listener])
        for number, handler in before.items():
            signal.signal(number, handler)  # from here on a second signal ends the program at once
        thread.close(0)
    if thread.failure is not None:
        raise SystemExit(1)
    print('stopped', flush=True)


# ---------------------------------------------------------------- flags


ENDPOINTS = {'generate': ('prefill', 'decode'), 'greedy_until': ('prefill', 'decode'), 'chat': ('prefill', 'decode'),
             'loglikelihood': ('score', 'first')}  # EasyLM's names -> programs


def programs_of(pre_compile: str) -> tuple[str, ...]:
    """The programs that --lm_server.pre_compile means."""
    names = ENDPOINTS if pre_compile == 'all' else [name.strip() for name in pre_compile.split(',') if name.strip()]
    if unknown := sorted(set(names) - set(ENDPOINTS)):
        raise Mistake(f'lm_server.{pre_compile=} names {unknown}: use a comma list of {" ".join(ENDPOINTS)}; or all')
    return tuple(dict.fromkeys(program for name in names for program in ENDPOINTS[name]))


def options_of(config) -> Options:
    """Take the flags of the HTTP side."""
    flags_of, names = config.lm_server, {field.name for field in dataclasses.fields(Options)}
    taken = {name: value for name, value in flags_of.items() if name in names}
    weights = config.adapter or config.load_checkpoint.rpartition('::')[2]
    taken['model_name'] = flags_of.model_name or Path(weights).name or 'model'
    drawing = {name: config[name] for name in ('top_k', 'top_p', 'do_sample', 'num_beams')}
    return Options(**taken, **drawing, key_digest=read_key(flags_of.api_key_file))


def read_key(path: str) -> bytes | None:
    """Read the API key of a file, as its sha256; None without a file.  Raises Mistake naming the flag.

    A file that others can read is told to make private.
    """
    if not path:
        return None
    try:
        key, mode = Path(path).read_text(encoding='ascii').strip(), Path(path).stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not ASCII'
        raise Mistake(f'lm_server.api_key_file={path!r} cannot be read ({reason}): name a file with the key') from None
    if len(key) < MIN_KEY or not key.isprintable() or ' ' in key:
        raise Mistake(f'lm_server.api_key_file={path!r} must hold one key of at least {MIN_KEY} characters without '
                      'blanks, for example of: openssl rand -hex 32')
    if mode & 0o077:
        print(f'WARNING: others on this computer can read {path}: chmod 600 {path}', flush=True)
    return hashlib.sha256(key.encode()).digest()


def chat_of(lm_server, source, model: Model, options: Options, name: str = '') -> ChatTemplate | None:
    """Choose the chat template of the model, or of the adapter `name`, and say which."""
    found = choose_template(lm_server.chat_template, source and source.chat_template, model.tokenizer, options)
    print(f'chat template{name and f" of {name}"}: {found.name if found else "none"}', flush=True)
    return found


def calibration_of(source) -> float:
    """Read the temperature that evaluate.py --calibrate left in a checkpoint; 1 where there is none."""
    return read_temperature(source and source.native and Path(source.native.path))


def open_adapters(given: str, load, model: Model, options: Options) -> dict[str, AdaptedSource]:
    """Open --lm_server.adapters: name -> the checkpoint with that adapter.

    Raises Mistake, naming the flag, for what is no NAME=DIR, a name that is taken, and an adapter that expects other
    tokens than the model.
    """
    found: dict[str, AdaptedSource] = {}
    for part in filter(None, (part.strip() for part in given.split(','))):
        name, _, path = part.partition('=')
        where = f'lm_server.adapters={given!r}'
        if not name or not path or name in (options.model_name, *found):
            raise Mistake(f'{where}: {part!r} must be NAME=DIR with a name that is not taken')
        if load.adapter:
            raise Mistake(f'{where} and adapter={load.adapter!r}: an adapter belongs to the weights as they were, so '
                          'give it a name here, too, and leave --adapter out')
        source = checkpoint.open(load.checkpoint, str(Path(path).expanduser()))
        if source.tokenizer and source.tokenizer.fingerprint != model.tokenizer.fingerprint:
            raise Mistake(f'{where}: {path} was trained with another tokenizer than that of the model')
        if source.add_bos_token not in (None, model.add_bos_token):
            raise Mistake(f'{where}: {path} was trained with add_bos_token={source.add_bos_token}, and the model is '
                          f'served with {model.add_bos_token}: give --add_bos_token={source.add_bos_token}')
        found[name] = source
    return found


def info_of(model: Model) -> dict:
    """What /info tells of the model."""
    parameters = sum(spec.size for spec in jax.tree.leaves(weight_specs(model.config)))
    adapter = describe_adapter(model.source) if model.source and model.source.adapter else None
    return dict(parameters=parameters, dtype=model.compute.dtype, platform=jax.devices()[0].platform, adapter=adapter)


# ---------------------------------------------------------------- the address


MIN_KEY = 16  # characters of an API key


def refuse_open(lm_server) -> None:
    """Raise Mistake for an address that others can reach, unless there is a key or --lm_server.insecure."""
    host = lm_server.host
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(host, None)}
    except (socket.gaierror, UnicodeError):
        return  # `listen` says so
    loopback = all(ipaddress.ip_address(address.partition('%')[0]).is_loopback for address in addresses)
    if not (loopback or lm_server.api_key_file or lm_server.insecure):
        raise Mistake(f'lm_server.{host=} can be reached by others, who could all use this model: give an API key with '
                      '--lm_server.api_key_file=FILE, or let everyone in with --lm_server.insecure=True')


class Server(uvicorn.Server):
    """uvicorn that drains: after a signal /ready and new requests are 503, and what runs has drain_seconds to end."""

    def __init__(self, app, thread: EngineThread, drain_seconds: float):
        super().__init__(uvicorn.Config(
            app, log_level='warning', access_log=False, http=Protocol, lifespan='off', server_header=False,
            limit_concurrency=512, h11_max_incomplete_event_size=MAX_HEADER_BYTES, timeout_graceful_shutdown=5))
        self._metrics, self._thread, self._seconds = app.state.metrics, thread, drain_seconds
        self._end: float | None = None

    def handle_exit(self, sig, frame) -> None:
        if self._metrics.draining:
            self.should_exit = self.force_exit = True
        self._metrics.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._thread.failure is not None and self._metrics.in_flight == 0:
            self.should_exit = True  # all have heard of it
        if self._metrics.draining and not self.should_exit:
            if self._end is None:
                self._end = time.monotonic() + self._seconds
            late = time.monotonic() >= self._end
            if late:
                await asyncio.get_running_loop().run_in_executor(None, self._thread.close, 0)
            self.should_exit = late or self._metrics.in_flight == 0
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the weights are read.  Port 0 takes any free port.

    Raises Mistake naming --lm_server.host or --lm_server.port and what to do.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError):
        raise Mistake(f'lm_server.{host=} is no address or known name: use --lm_server.host=127.0.0.1') from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: f'another program listens on lm_server.{port=}: choose another --lm_server.port',
            errno.EACCES: f'lm_server.{port=} needs privileges: choose --lm_server.port of at least 1024',
            errno.EADDRNOTAVAIL: f'lm_server.{host=} is no address of this computer: use --lm_server.host=127.0.0.1',
        }
        unknown = f'lm_server.{host=} lm_server.{port=}: {error}: choose another --lm_server.host or --lm_server.port'
        raise Mistake(reasons.get(error.errno, unknown)) from None
    return listener


def url_of(host: str, port: int) -> str:
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def curl_line(host: str, port: int, template: PromptTemplate | None) -> str:
    """A command to try: a prompt of the kind the model was trained on."""
    body = json.dumps(dict(prefix_text=[(template or PromptTemplate()).prompt('a fine film')], temperature=0))
    return f"curl {url_of(host, port)}/generate -H 'Content-Type: application/json' --data-binary '{body}'"


# ---------------------------------------------------------------- the model


def load_engine(config, model: Model, variants: dict[str, AdaptedSource] | None = None) -> tuple[Engine, Texts]:
    """Check what the engine needs, load the weights, and say what was loaded."""
    spec, path, server = config.load_checkpoint, config.tokenizer.vocab_file, config.lm_server
    if not spec:
        raise Mistake('load_checkpoint is empty: say which weights to serve (--load_checkpoint=TYPE::PATH)')
    own = model.source.tokenizer
    if own is not None and own.fingerprint != model.tokenizer.fingerprint:
        raise Mistake(f'tokenizer.vocab_file={path!r} is not the tokenizer that load_checkpoint={spec!r} was made '
                         'with and holds: leave --tokenizer.vocab_file away')
    processes.refuse_difference('the tokenizer and the model', f'{model.tokenizer.fingerprint} {model.config}',
                                'give all processes the same files (--load_checkpoint, --tokenizer.vocab_file)')
    texts = Texts(model.tokenizer, model.config, input_length=config.input_length, seq_length=config.seq_length,
                  add_bos_token=model.add_bos_token, template=model.template)
    check_rows(server.batch_size, model.mesh, 'lm_server.batch_size')
    print(f'{describe(model)}\n{model.config}', flush=True)
    started = time.monotonic()
    engine = make_engine(lambda: model.load_params(config.seed), model.config, model.compute, model.mesh,
                         model.tokenizer, batch_size=server.batch_size, length=config.seq_length,
                         answer_tokens=texts.max_new_tokens, weight_dtype=server.weight_dtype,
                         cache_dtype=server.cache_dtype, seed=config.seed, prefix_reuse=server.prefix_reuse,
                         adapters=[(source.load_adapter(model.config), source.adapter.lora)
                                   for source in (variants or {}).values()])
    beside = f' and adapter {config.adapter}' if config.adapter else ''
    print(f'loaded {spec}{beside} in {time.monotonic() - started:.1f} s', flush=True)
    return engine, texts


if __name__ == '__main__':
    parse.run(main, flags.SERVE)
