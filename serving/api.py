"""Serve the engine over HTTP, in the words of EasyLM's server.  Before: asking.py, guard.py; next: openai.py.

  POST /generate               {"prefix_text": [str], "temperature": float?}
                               -> {"prefix_text", "output_text", "temperature"} + "truncated", "finish_reason"
  POST /greedy-until           {"prefix_text": [str], "until": [str | [str]], "max_length": int?}
                               -> {"prefix_text", "until", "max_length", "output_text"} + "truncated", "finish_reason"
  POST /chat                   {"prompt": str, "context": str?, "temperature": float?}
                               -> {"response", "context", "temperature"} + "truncated", "finish_reason"
  POST /loglikelihood          {"prefix_text": [str]?, "text": [str]}
                               -> {"prefix_text", "text", "log_likelihood", "is_greedy"}
  POST /loglikelihood-rolling  {"text": [str]} -> {"text", "log_likelihood", "is_greedy"}
  POST /classify               {"texts": [str], "labels": [str]?, "template": str?, "threshold": float?,
                               "model": str?}
                               -> {"results": [{"label", "probability", "probabilities"}], "labels",
                                   "calibration_temperature"}
  GET  /ready                  "Ready!\\n", or 503 while programs compile, while the server stops, after a failure
  GET  /health                 200 while the engine lives, 503 after it failed
  GET  /metrics  /info  /openapi.json      for Prometheus; what is served; these endpoints as an OpenAPI document
  GET  /                       page/, to try the model by hand
  /v1/..., /tokenize, /detokenize          openai.py

The fields behind + are added to EasyLM's answer, for every prompt: whether it was too long (input_length) and lost its
beginning, which in /greedy-until can also happen on the way, as the answer grows; and whether the answer ended by
itself ("stop": EOS or a stop text) or at its limit ("length").
/loglikelihood refuses a pair that is too long, whose score would be that of another text; rolling takes any length.
/classify: labels and template are the checkpoint's where the request names none.  A label's probability is the softmax
over the labels of their log-likelihoods (the sum over a label's tokens, not divided by their number) / the calibration
temperature; "label" is the most probable, or null where that is below the threshold.

Every refusal is {"detail": one line} (below /v1 OpenAI's form): 400 what is wrong with the request, 401 no API key,
408 a body that does not come, 413 too large, 415 not application/json, 429 the line is full, 500 the engine failed,
503 the server stops or takes too long.  The form is checked before the engine is asked.
No field of a request is ever a path, an id or code; nothing of a request is printed unless `logging` is set.  A page of
another site cannot use a server on this computer: its Host header would be no loopback name, and its form cannot send
application/json.
"""
import pprint
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from data.prompt import PromptTemplate
from serving import page
from serving.asking import Asking, Refused
from serving.guard import LOOPBACK, RequestGuard, parse_json, refusal
from serving.metrics import Access, Metrics
from serving.texts import Classified, Question, Texts
from serving.thread import EngineThread
from serving.work import Generated, Sampling

MAX_TEXTS = 100_000
MAX_TEMPERATURE = 100.0
MAX_STOPS, MAX_STOP_LENGTH = 64, 1_000
MAX_CHAT_LENGTH = 1_000_000
MAX_LABELS, MAX_LABEL_LENGTH = 64, 1_000


@dataclass(frozen=True)
class Options:
    """Holds the lm_server flags: texts put around prefix, text and what is said in a chat; `notes` for the page; ours.

    max_body_bytes, body_seconds, allowed_hosts: see guard.py.  key_digest: sha256 of the API key, or None.
    request_seconds: the longest that an answer may take; 0 for no limit.  model_name: of /v1/models.
    top_k, top_p, do_sample, num_beams: how /generate and /chat draw.  calibration_temperature: of /classify.
    """

    default_temperature: float = 1.0
    greedy_until_max_length: int = 5000
    prepend_to_prefix: str = ''
    append_to_prefix: str = ''
    prepend_to_text: str = ''
    append_to_text: str = ''
    chat_prepend_text: str = ''
    chat_user_prefix: str = ''
    chat_user_suffix: str = ''
    chat_lm_prefix: str = ''
    chat_lm_suffix: str = ''
    notes: str = ''
    logging: bool = False
    max_body_bytes: int = 4_000_000
    request_seconds: float = 0.0
    model_name: str = ''
    body_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] | None = LOOPBACK
    key_digest: bytes | None = None
    top_k: int = 50
    top_p: float = 1.0
    do_sample: bool = True
    num_beams: int = 1
    calibration_temperature: float = 1.0

    def sampling(self, temperature: float | None) -> Sampling:
        """How EasyLM's endpoints draw at this temperature; do_sample=False makes every answer greedy."""
        value = self.default_temperature if temperature is None else temperature
        return Sampling(value if self.do_sample else 0.0, self.top_k, self.top_p)


# ---------------------------------------------------------------- requests


def _whole_characters(text: str) -> str:
    """Refuse half a surrogate pair: JSON can spell it, but it is no character and cannot be encoded."""
    if any('\ud800' <= character <= '\udfff' for character in text):
        raise ValueError('half a surrogate pair')
    return text


LIST = f'a list of 1 to {MAX_TEXTS} strings of valid Unicode'
CHAT = f'a string of valid Unicode, of at most {MAX_CHAT_LENGTH} characters'
UNTIL = (f'a list with one item for each prefix_text: a string of 1 to {MAX_STOP_LENGTH} characters of valid Unicode, '
         f'or a list of at most {MAX_STOPS} of them')
LABELS = f'a list of 2 to {MAX_LABELS} different strings of 1 to {MAX_LABEL_LENGTH} characters'
TEMPLATE = r'a string with {text} in it exactly once, where the text goes, for example "Ticket: {text}\nTeam:"'

Text = Annotated[str, AfterValidator(_whole_characters)]
TextList = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, description=LIST)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
ChatText = Annotated[Text, Field(max_length=MAX_CHAT_LENGTH, description=CHAT)]
Temperature = Annotated[
    Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] | None,
    Field(description=f'a finite number from 0 to {MAX_TEMPERATURE:g}, or null for the default')]
Label = Annotated[Text, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]


class Body(BaseModel):
    """A request's body.  The description of each field is what it must be, for the client to read."""

    model_config = ConfigDict(strict=True, extra='forbid')


class GenerateBody(Body):
    prefix_text: TextList
    temperature: Temperature = None


class GreedyUntilBody(Body):
    prefix_text: TextList
    until: Annotated[list[Stop | Stops], Field(min_length=1, max_length=MAX_TEXTS, description=UNTIL)]
    max_length: Annotated[Annotated[int, Field(ge=1)] | None, Field(
        description='a whole number of at least 1, or null for the largest')] = None


class ChatBody(Body):
    prompt: ChatText
    context: ChatText = ''
    temperature: Temperature = None


class LoglikelihoodBody(Body):
    prefix_text: Annotated[TextList | None, Field(description=LIST)] = None
    text: TextList


class RollingBody(Body):
    text: TextList


class ClassifyBody(Body):
    texts: TextList
    labels: Annotated[Annotated[list[Label], Field(min_length=2, max_length=MAX_LABELS)] | None,
                      Field(description=LABELS)] = None
    template: Annotated[Annotated[Text, Field(max_length=MAX_CHAT_LENGTH)] | None, Field(description=TEMPLATE)] = None
    threshold: Annotated[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None,
                         Field(description='a number from 0 to 1')] = None
    model: Annotated[Annotated[str, Field(max_length=1000)] | None, Field(description='a string')] = None


class StrictRequest(Request):
    async def json(self):
        """Parse the body as guard.parse_json does."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is strict JSON."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_strictly(request: Request):
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


REFUSALS = {status: {'description': meaning, 'content': {'application/json': {'schema': {'type': 'object'}}}}
            for status, meaning in (
    (400, 'what is wrong with the request'), (401, 'no API key'), (404, 'no such model'),
    (408, 'the body did not come'), (413, 'the body is too large'), (415, 'not application/json'),
    (429, 'the line is full'), (500, 'the engine failed'), (503, 'the server stops, or is not ready'))}


# ---------------------------------------------------------------- endpoints


@dataclass(frozen=True)
class Variant:
    """Say what a request's `model` names: the weights alone, number 0, or with an adapter of the engine.

    template: of /classify, None where it has none; calibration_temperature: of its probabilities.  chat: a
    chat.ChatTemplate, or None.
    """

    number: int
    template: PromptTemplate | None
    calibration_temperature: float = 1.0
    chat: object = None

    def works(self, works: list) -> list:
        """Have works done with this adapter."""
        return [replace(work, adapter=self.number) for work in works]


def make_app(thread: EngineThread, texts: Texts, options: Options, info: dict | None = None, chat=None,
             adapters: dict[str, Variant] | None = None) -> FastAPI:
    """Make the application: `thread` does the works of what `texts` asks.

    info: what /info tells beside the options.  chat: a chat.ChatTemplate, or None where the model has none.  adapters:
    by the names that requests give as `model`, beside options.model_name, which is the model without one.
    app.state.metrics: counts; its `draining` turns new requests away.
    """
    from serving import openai  # it builds upon what is above

    app = FastAPI(title='Pallama', version='1', openapi_url='/openapi.json', docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    metrics = app.state.metrics = Metrics(thread)
    app.add_middleware(RequestGuard, max_body_bytes=options.max_body_bytes, body_seconds=options.body_seconds,
                       allowed_hosts=options.allowed_hosts, key_digest=options.key_digest,
                       draining=lambda: metrics.draining)
    app.add_middleware(Access, metrics=metrics)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_so)
    asking = Asking(thread, metrics, options.request_seconds)
    _add_easylm(app, asking, texts, options)
    models = {options.model_name: Variant(0, texts.template, options.calibration_temperature, chat), **(adapters or {})}
    _add_classify(app, asking, texts, options, models)
    _add_state(app, thread, texts, options, {**(info or {}), 'models': list(models)}, chat)
    openai.add_endpoints(app, asking, texts, options, models)
    metrics.paths = frozenset(route.path for route in app.routes)
    app.openapi = _without_422(app.openapi)
    return app


async def _answer(request: Request, body: Body, options: Options, asking: Asking, question: Question,
                  content) -> JSONResponse:
    """Ask, and make the response out of the answer: content(answer)."""
    if options.logging:
        print(f'{request.url.path} is asked\n{pprint.pformat(body.model_dump())}', flush=True)
    found = content(question.answer(await asking.ask(request, question.works)))
    if options.logging:
        print(f'{request.url.path} answers\n{pprint.pformat(found)}', flush=True)
    return JSONResponse(found)


def _add_easylm(app: FastAPI, asking: Asking, texts: Texts, options: Options) -> None:
    def prefixes_of(found: list[str]) -> list[str]:
        return [options.prepend_to_prefix + text + options.append_to_prefix for text in found]

    def texts_of(found: list[str]) -> list[str]:
        return [options.prepend_to_text + text + options.append_to_text for text in found]

    def temperature_of(body) -> float:
        return options.default_temperature if body.temperature is None else body.temperature

    def continuing(prompts: list[str], temperature: float) -> Question:
        beams = 1 if options.do_sample else options.num_beams
        return texts.generate(prompts, options.sampling(temperature), num_beams=beams)

    @app.post('/generate', responses=REFUSALS)
    async def generate(body: GenerateBody, request: Request):
        temperature, prompts = temperature_of(body), prefixes_of(body.prefix_text)
        return await _answer(
            request, body, options, asking, await asking.apart(continuing, prompts, temperature),
            lambda answers: dict(prefix_text=body.prefix_text, output_text=[answer.text for answer in answers],
                                 temperature=temperature, **_added(answers)))

    @app.post('/greedy-until', responses=REFUSALS)
    async def greedy_until(body: GreedyUntilBody, request: Request):
        _check_pairs('prefix_text', body.prefix_text, 'until', body.until)
        most = options.greedy_until_max_length
        max_length = most if body.max_length is None else body.max_length
        if max_length > most:
            raise Refused(400, f'max_length must be at most {most} here (--lm_server.greedy_until_max_length)')
        stops = [[stop] if isinstance(stop, str) else stop for stop in body.until]
        return await _answer(
            request, body, options, asking,
            await asking.apart(texts.greedy_until, prefixes_of(body.prefix_text), stops, max_length),
            lambda answers: dict(prefix_text=body.prefix_text, until=body.until, max_length=max_length,
                                 output_text=[answer.text for answer in answers], **_added(answers)))

    @app.post('/chat', responses=REFUSALS)
    async def chat(body: ChatBody, request: Request):
        temperature = temperature_of(body)
        context = (body.context + options.chat_user_prefix + body.prompt + options.chat_user_suffix +
                   options.chat_lm_prefix)

        def answer(answers: list[Generated]) -> dict:
            said, = answers
            return dict(response=said.text, context=context + said.text + options.chat_lm_suffix,
                        temperature=temperature, truncated=said.truncated, finish_reason=said.finish_reason)

        question = await asking.apart(continuing, [options.chat_prepend_text + context], temperature)
        return await _answer(request, body, options, asking, question, answer)

    @app.post('/loglikelihood', responses=REFUSALS)
    async def loglikelihood(body: LoglikelihoodBody, request: Request):
        prefixes = [''] * len(body.text) if body.prefix_text is None else body.prefix_text
        _check_pairs('prefix_text', prefixes, 'text', body.text)
        question = await asking.apart(texts.loglikelihood, prefixes_of(prefixes), texts_of(body.text))
        return await _answer(request, body, options, asking, question,
                             lambda scores: dict(prefix_text=prefixes, text=body.text, **_scores(scores)))

    @app.post('/loglikelihood-rolling', responses=REFUSALS)
    async def loglikelihood_rolling(body: RollingBody, request: Request):
        question = await asking.apart(texts.loglikelihood_rolling, texts_of(body.text))
        return await _answer(request, body, options, asking, question,
                             lambda scores: dict(text=body.text, **_scores(scores)))


def find_model(name: str | None, options: Options, models: dict[str, Variant]) -> Variant:
    """Look up a request's `model`; without one it is the model without adapter.  Raises Refused, 404."""
    if (found := models.get(options.model_name if name is None else name)) is None:
        raise Refused(404, f'there is no such model here: {", ".join(map(repr, models))} '
                      f'{"is" if len(models) == 1 else "are"} served', param='model', code='model_not_found')
    return found


def _add_classify(app: FastAPI, asking: Asking, texts: Texts, options: Options, models: dict[str, Variant]) -> None:
    @app.post('/classify', responses=REFUSALS)
    async def classify(body: ClassifyBody, request: Request):
        variant = find_model(body.model, options, models)
        template, temperature = template_of(body, variant.template), variant.calibration_temperature

        def result(found: Classified) -> dict:
            probability = max(found.probabilities)
            sure = body.threshold is None or probability >= body.threshold
            return dict(label=found.label if sure else None, probability=probability,
                        probabilities=dict(zip(template.labels, found.probabilities, strict=True)))

        question = await asking.apart(texts.classify, body.texts, template, temperature)
        question = question._replace(works=variant.works(question.works))
        return await _answer(request, body, options, asking, question,
                             lambda answers: dict(results=[result(answer) for answer in answers],
                                                  labels=list(template.labels), calibration_temperature=temperature))


def template_of(body: ClassifyBody, own: PromptTemplate | None) -> PromptTemplate:
    """Take the request's template and labels, else the checkpoint's; plain text, in which {text} alone is replaced.

    Raises Refused where neither says them, and for what is no template.
    """
    for name, given in (('labels', body.labels), ('template', body.template)):
        if given is None and own is None:
            raise Refused(400, f'{name} is missing, and the checkpoint has no template: say both')
    labels = own.labels if body.labels is None else tuple(body.labels)
    if len(set(labels)) < len(labels):
        raise Refused(400, f'labels: some are equal; labels must be {LABELS}')
    try:
        if body.template is None:
            return PromptTemplate(own.prefix, own.suffix, own.answer_prefix, labels)
        parts = body.template.split('{text}')
        if len(parts) != 2:
            raise Refused(400, f'template must be {TEMPLATE}')
        if parts[1].endswith(' '):
            raise Refused(400, 'template ends in a blank: leave it off, the label begins with one')
        return PromptTemplate(*parts, labels=labels)
    except ValueError:
        raise Refused(400, f'labels: two differ in blanks or capitals alone, or one is blank; labels must be '
                           f'{LABELS}') from None


def _add_state(app: FastAPI, thread: EngineThread, texts: Texts, options: Options, info: dict, chat) -> None:
    metrics, files = app.state.metrics, page.read_page()

    @app.get('/ready', responses={503: REFUSALS[503]}, response_class=PlainTextResponse)
    async def ready():
        if thread.ready and not metrics.draining:
            return PlainTextResponse('Ready!\n')
        stopping = metrics.draining or thread.closing
        return PlainTextResponse('the engine failed\n' if thread.failure else 'draining\n' if stopping else
                                 'compiling\n', 503)

    @app.get('/health', responses={503: REFUSALS[503]}, response_class=PlainTextResponse)
    async def health():
        return PlainTextResponse('the engine failed\n', 503) if thread.failure else PlainTextResponse('ok\n')

    @app.get('/metrics', response_class=PlainTextResponse)
    async def prometheus():
        text, kind = metrics.write()
        return Response(text, headers={'Content-Type': kind})

    @app.get('/info')
    async def about():
        template = texts.template
        return JSONResponse({
            'model': options.model_name, **info, 'chat': chat is not None,
            'template': template and {'prompt': template.prompt('{text}'), 'labels': list(template.labels)},
            'input_length': texts.input_length, 'seq_length': texts.seq_length,
            'default_temperature': options.default_temperature, 'notes': options.notes,
            'calibration_temperature': options.calibration_temperature})

    def serve_file(path: str, file: page.PageFile) -> None:
        @app.get(path, include_in_schema=False)
        async def send_file():
            return Response(file.content, headers={'Content-Type': file.kind, **page.HEADERS})

    for path, file in files.items():
        serve_file(path, file)


def _check_pairs(name: str, values: list, other_name: str, others: list) -> None:
    if len(values) != len(others):
        raise Refused(400, f'{name} has {len(values)} items, {other_name} {len(others)}: they are pairs')


def _added(answers: list[Generated]) -> dict:
    return dict(truncated=[answer.truncated for answer in answers],
                finish_reason=[answer.finish_reason for answer in answers])


def _scores(scores: list[tuple[float, bool]]) -> dict:
    return dict(log_likelihood=[score for score, _ in scores], is_greedy=[greedy for _, greedy in scores])


# ---------------------------------------------------------------- refusals


async def _refuse_so(request: Request, error: HTTPException) -> JSONResponse:
    return refusal(request.url.path, error.status_code, error.detail, error.headers, getattr(error, 'param', None),
                   getattr(error, 'code', None))


async def _refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    """Name the first mistake in one line: the field, and what it must be; the value itself is not repeated."""
    fields = request.scope['route'].body_field.field_info.annotation.model_fields
    first, names = error.errors()[0], ', '.join(fields)
    _, *path = first['loc']
    field = path[0] if path and path[0] in fields else None
    if first['type'] == 'json_invalid':
        detail = f'the body is not JSON: {first["ctx"]["error"]} at character {first["loc"][1]}'
    elif path and first['type'] == 'extra_forbidden' and len(path) == 1:
        field = ascii(str(path[0])[:40])
        detail = f'{field} is no field of {request.url.path}: its fields are {names}'
        field = field[1:-1]
    elif field is None:
        detail = f'the body must be a JSON object with the fields {names}'
    else:
        where = field + ''.join(f'[{part}]' for part in path[1:] if isinstance(part, int))
        detail = f'{where}: {first["msg"]}; {field} must be {fields[field].description}'
    return refusal(request.url.path, 400, detail, param=field)


def _without_422(openapi):
    """Every mistake of a body is answered 400 here."""
    def document() -> dict:
        found = openapi()
        for path in found['paths'].values():
            for operation in path.values():
                operation['responses'].pop('422', None)
        return found

    return document
