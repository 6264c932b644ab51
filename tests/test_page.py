"""Claims about the page (serving/page/): its files, and, marked `browser`, what it does in a real headless Chromium.

The server of the browser's tests only pretends, in the words of api.py, and keeps what it is sent.
"""
import csv
import io
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.labelled import LABEL_COLUMNS, TEXT_COLUMNS, Example
from data.prompt import PromptTemplate
from evaluation.accuracy import wilson_interval
from prepare_data import file_contents
from serving import page

browser = pytest.mark.browser
CONTROL, ENTER, ARROW_RIGHT, END = '\ue009', '\ue007', '\ue014', '\ue010'  # keys, as WebDriver spells them
INFO = {'model': 'smollm2-135m-instruct, reviews', 'parameters': 134_515_008, 'dtype': 'bfloat16',
        'template': {'prompt': '[Text]: {text}\n[Sentiment]:', 'labels': ['Negative', 'Positive']}, 'chat': True,
        'input_length': 512, 'seq_length': 1024, 'default_temperature': 0.7, 'platform': 'cpu',
        'notes': 'Trained on <b>reviews</b> alone.'}
PIECES = ['A caf', 'é 😀 says <img src=x onerror=alert(1)>', ' and', ' ends.']

# ---------------------------------------------------------------- the files


def test_the_page_is_these_files_and_loads_nothing_else():
    """Paths, kinds and bytes; what is linked and imported is there, and nothing comes from elsewhere."""
    files = page.read_page()
    assert {'/', '/page/style.css', '/page/main.js'} < set(files)
    for path, file in files.items():
        text = file.content.decode()
        assert file.kind.startswith({'css': 'text/css', '.js': 'text/javascript'}.get(path[-3:], 'text/html')), path
        assert not re.search(r'https?:|//\w|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|url\(',
                             text.replace('http://www.w3.org', '')), path
        for name in re.findall(r"from '\./(.+?)'", text):
            assert f'/page/{name}' in files, (path, name)
    text = files['/'].content.decode()
    assert set(re.findall(r'(?:src|href)="(?!#|data:)(.+?)"', text)) == {'page/style.css', 'page/main.js'}
    assert not re.search(r'<style|<script(?! type="module" src=)|\s(?:style|on\w+)=', text)


def test_the_policy_allows_the_page_itself_alone():
    assert page.HEADERS['Content-Security-Policy'] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    assert page.HEADERS['X-Content-Type-Options'] == 'nosniff' and page.HEADERS['Cache-Control'] == 'no-store'
    assert page.HEADERS['Referrer-Policy'] == 'no-referrer'


def test_the_page_looks_for_the_columns_that_prepare_data_looks_for():
    source = page.read_page()['/page/tables.js'].content.decode()
    for name, columns in ('TEXT_COLUMNS', TEXT_COLUMNS), ('LABEL_COLUMNS', LABEL_COLUMNS):
        assert tuple(re.findall(r"'(\w+)'", re.search(rf'{name} = \[(.*?)\]', source, re.DOTALL)[1])) == columns


# ---------------------------------------------------------------- the server that pretends


class Server(ThreadingHTTPServer):
    """What it is sent is in `bodies`; the attributes below change how it answers."""

    daemon_threads = True
    handle_error = lambda *_: None  # a browser that is gone

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.address = page.read_page(), f'http://127.0.0.1:{self.server_port}/'
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.info, self.bodies, self.key = dict(INFO), [], None
        self.busy, self.gate, self.left = 0, None, threading.Event()
        self.probability = lambda text: 0.9 if 'fine' in text else 0.2 if 'dull' in text else 0.55
        self.pieces, self.broken = PIECES, None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, status, content, kind='application/json', headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Type': kind, 'Content-Length': len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def refused(self):
        if self.server.key is None or self.headers.get('Authorization') == f'Bearer {self.server.key}':
            return False
        self.answer(401, {'error': {'message': 'a wrong key', 'type': 'x'}})
        return True

    def do_GET(self):
        if self.path in self.server.files:
            file = self.server.files[self.path]
            self.answer(200, file.content, file.kind, page.HEADERS)
        elif self.path != '/info':
            self.answer(404, {'detail': 'no such path'})
        elif not self.refused():
            self.answer(200, self.server.info)

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.refused():
            return
        server.bodies.append((self.path, body))
        if server.busy:
            server.busy -= 1
            self.answer(429, {'detail': 'the line is full'}, headers={'Retry-After': '0'})
        elif self.path == '/classify':
            self.classify(body)
        else:
            self.stream(body)

    def classify(self, body):
        labels = body.get('labels') or self.server.info['template']['labels']
        if bad := [text for text in body['texts'] if 'too long' in text]:
            self.answer(400, {'detail': f'texts[0] has {len(bad[0])} tokens, input_length is 512'})
            return
        if self.server.gate:
            self.server.gate.wait(10)
        found = []
        for text in body['texts']:
            best = self.server.probability(text)
            values = [(1 - best) / (len(labels) - 1)] * (len(labels) - 1) + [best]
            found.append({'label': labels[values.index(max(values))], 'probability': max(values),
                          'probabilities': dict(zip(labels, values, strict=True))})
        self.answer(200, {'results': found, 'labels': labels, 'calibration_temperature': 1.0})

    def stream(self, body):
        """Send the pieces as events, each cut in the middle of its first character of several bytes, if it has one."""
        server, chat = self.server, self.path.endswith('/chat/completions')
        if body.get('max_tokens') == 1000:
            self.answer(400, {'error': {'message': 'max_tokens=1000 is above 512', 'type': 'invalid_request_error'}})
            return
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Connection', 'close')
        self.end_headers()
        self.close_connection = True
        events = []
        for text in server.pieces:
            events.append({'choices': [{'delta': {'content': text}} if chat else {'text': text}]})
        events.append({'choices': [{**({'delta': {}} if chat else {'text': ''}), 'finish_reason': 'length'}]})
        events.append({'choices': [], 'usage': {'completion_tokens': 17}})
        try:
            for number, event in enumerate(events):
                if server.broken is not None and number == server.broken:
                    return
                data = b'data: ' + json.dumps(event, ensure_ascii=False).encode() + b'\n\n'
                cut = next((at + 1 for at, byte in enumerate(data) if byte >= 0xC0), 4)
                for part in data[:cut], data[cut:]:
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.02)
                for _ in range(100 if server.gate and number == 1 else 0):  # until the client is gone
                    self.wfile.write(b': wait\n\n')
                    self.wfile.flush()
                    if server.gate.wait(0.1):
                        break
            self.wfile.write(b'data: [DONE]\n\n')
        except OSError:
            server.left.set()


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope='module')
def server():
    server = Server()
    yield server
    server.shutdown()


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver')
    if not (shutil.which('chromium') and shutil.which('chromedriver')):
        pytest.fail('make test-browser needs chromium and chromedriver: apt-get install chromium chromium-driver')
    options = webdriver.ChromeOptions()
    downloads = tmp_path_factory.mktemp('downloads')
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,900',
                     f'--user-data-dir={tmp_path_factory.mktemp("profile")}'):
        options.add_argument(argument)
    options.add_experimental_option('prefs', {'download.default_directory': str(downloads)})
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    driver.downloads = downloads
    yield driver
    driver.quit()


class Page:
    """The page in the browser, in the words of somebody who works with it."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def open(self, wait=True):
        self.driver.get(self.server.address)
        self.driver.execute_script('sessionStorage.clear(); localStorage.clear()')
        self.driver.get(self.server.address)
        if wait:
            self.until(lambda: self.js('return document.body.dataset.ready'))
        return self

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.text('body')
            time.sleep(0.02)
        return found

    def find(self, css):
        return self.driver.find_element('css selector', css)

    def text(self, css):
        return self.find(css).text

    def texts(self, css):
        return self.js('return [...document.querySelectorAll(arguments[0])].map(found => found.innerText.trim())', css)

    def click(self, css):
        self.find(css).click()

    def fill(self, css, text):
        field = self.find(css)
        field.clear()
        field.send_keys(text)

    def set(self, css, value, event='input'):
        self.js('const field = document.querySelector(arguments[0]); field.value = arguments[1];'
                'field.dispatchEvent(new Event(arguments[2], {bubbles: true}))', css, value, event)

    def choose_files(self, *paths):
        self.find('#file').send_keys('\n'.join(map(str, paths)))
        self.until(lambda: self.shown('#loaded') or self.shown('#bench-error'))

    def shown(self, css):
        return self.find(css).is_displayed()

    def classify(self, seconds=10):
        self.click('#run')
        self.until(lambda: self.find('#run').is_enabled(), seconds)


@pytest.fixture
def opened(chromium, server):
    server.reset()
    chromium.set_window_size(1200, 900)
    yield Page(chromium, server).open()
    logged = [entry['message'] for entry in chromium.get_log('browser')]
    logged = [line for line in logged if 'Failed to load resource' not in line]  # a refusal that a test asks for
    assert not logged, logged  # neither errors nor what the policy stopped


@browser
def test_the_header_says_what_the_server_says_of_itself(opened):
    facts = opened.text('#facts')
    assert opened.text('#model') == INFO['model'] and opened.text('#notes') == INFO['notes']  # text, no markup
    for value in '135 M (134,515,008)', 'bfloat16', 'cpu', '[Text]: {text}⏎[Sentiment]:', 'Negative, Positive':
        assert value in facts
    assert opened.texts('[role=tab]') == ['Classify', 'Generate', 'Chat']


@browser
def test_chat_is_there_for_a_model_that_chats(opened, server):
    server.info |= {'chat': False, 'template': None}
    opened.open()
    assert not opened.shown('#tab-chat') and opened.find('#task').get_attribute('open')


@browser
def test_a_key_is_asked_for_and_kept_for_the_session(opened, server):
    server.key = 'right'
    opened.open(wait=False)
    opened.until(lambda: opened.shown('#key-form'))
    opened.fill('#key', 'false\n')
    opened.until(lambda: 'a wrong key' in opened.text('#key-why'))
    opened.fill('#key', 'right\n')
    opened.until(lambda: opened.text('#model') == INFO['model'])
    assert not opened.shown('#key-form')
    opened.driver.refresh()
    opened.until(lambda: opened.text('#model') == INFO['model'])
    assert not opened.shown('#key-form')


@browser
def test_texts_get_labels_and_probabilities(opened, server):
    opened.fill('#texts', 'a fine film\n\nso dull\n<b>neither</b>')
    opened.classify()
    assert opened.texts('#row-list .said-text') == ['a fine film', 'so dull', '<b>neither</b>']
    assert opened.texts('#row-list td:nth-child(3)') == ['Positive', 'Negative', 'Positive']
    assert opened.texts('#row-list tr:first-child .value') == ['0.100', '0.900']
    assert opened.js('return document.querySelector("#row-list .best .fill").style.inlineSize') == '90%'
    assert server.bodies == [('/classify', {'texts': ['a fine film', 'so dull', '<b>neither</b>']})]
    assert not opened.shown('#gold-card')
    opened.set('#order', 'uncertain', 'change')
    assert opened.texts('#row-list .index') == ['3', '2', '1']


@browser
def test_template_and_labels_can_be_others_for_the_session(opened, server):
    opened.click('#task summary')
    opened.fill('#template', 'Film: {text}\nIt is')
    opened.fill('#labels', 'bad\nmiddling\ngood')
    opened.fill('#texts', 'a fine film')
    opened.classify()
    assert server.bodies == [('/classify', {'texts': ['a fine film'], 'template': 'Film: {text}\nIt is',
                                            'labels': ['bad', 'middling', 'good']})]
    assert opened.texts('#row-list .name') == ['bad', 'middling', 'good']
    for template, labels, said in ('no place', 'a\nb', '{text} exactly once'), ('{text}', 'a\nA', 'two different'):
        opened.fill('#template', template)
        opened.fill('#labels', labels)
        opened.click('#run')
        assert said in opened.text('#bench-error')
    assert len(server.bodies) == 1
    opened.click('#task-reset')
    assert opened.find('#template').get_attribute('value') == INFO['template']['prompt']


TABLE = ('id;Review;Sentiment\r\n1;"a ""fine""; film,\nat last";positive\r\n2;so dull;Negative\r\n'
         '3;fine but no;negative\r\n4;nothing;\r\n5;;positive\r\n6;fine;unknown\r\n')


@browser
def test_a_table_with_labels_gives_accuracy_and_confusion(opened, tmp_path):
    (tmp_path / 'reviews.csv').write_text('\ufeff' + TABLE, newline='')
    opened.choose_files(tmp_path / 'reviews.csv')
    assert opened.text('#file-rows') == '5 texts, 4 with a label, 1 row without text left out'
    opened.classify()
    assert opened.texts('#row-list .said-text')[0] == 'a "fine"; film,\nat last'
    assert opened.texts('#row-list .gold') == [
        'Positive\n✓ right', 'Negative\n✓ right', 'Negative\n✗ wrong', '–', 'unknown']
    low, high = (f'{100 * share:.1f}' for share in wilson_interval(2, 3))
    assert f'Accuracy\n66.7 % 95 % interval {low}–{high}' in opened.text('#summary').replace('66.7 %\n', '66.7 % ')
    assert opened.texts('#confusion tbody td') == ['1', '1', '2', '0', '1', '1']
    assert opened.texts('#scores tbody td') == ['1.000', '0.500', '0.667', '2', '0.500', '1.000', '0.667', '1']
    assert 'none of these labels: 1 row (“unknown”), left out' in opened.text('#gold-note')
    opened.click('#wrong-only')
    assert opened.texts('#row-list .index') == ['3']
    opened.click('#wrong-only')
    opened.set('#order', 'wrong', 'change')
    assert opened.texts('#row-list .index') == ['3', '1', '2', '4', '5']


@browser
def test_below_the_threshold_is_not_sure(opened, tmp_path):
    (tmp_path / 'reviews.csv').write_text('text,label\nfine,1\ndull,1\nneither,0\n')
    opened.choose_files(tmp_path / 'reviews.csv')
    opened.classify()
    opened.set('#threshold', '0.6')
    low, high = (f'{100 * share:.1f}' for share in wilson_interval(1, 2))
    assert opened.text('#threshold-says') == ('2 of 3 texts are sure enough (coverage 66.7 %). Accuracy of these '
                                              f'50.0 % (95 % interval {low}–{high}).')
    assert opened.texts('#row-list td:nth-child(3)') == ['Positive', 'Negative', 'not sure (Positive)']


@browser
def test_what_prepare_data_writes_is_read(opened, server, tmp_path):
    """Prompts with and without their labels beside them, and records, become the texts again."""
    examples, template = [Example('a fine film', 1), Example('dull\n[Sentiment]: no', 0)], PromptTemplate()
    for name, text in file_contents('test', examples, template, ['text', 'prompt', 'answer'], {}).items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'bare.jsonl').write_text(file_contents('bare', examples, template, ['text'], {})['bare.jsonl'])
    for names, gold in ((['eval_test.json'], ['–', '–']), (['test.jsonl'], ['Positive', 'Negative']),
                        (['bare.jsonl'], ['Positive', 'Negative']),
                        (['eval_test.json', 'labels_test.json'], ['Positive', 'Negative'])):
        server.bodies.clear()
        opened.choose_files(*(tmp_path / name for name in names))
        opened.classify()
        assert server.bodies[0][1]['texts'] == [example.text for example in examples]
        assert [text.partition('\n')[0] for text in opened.texts('#row-list .gold')] == gold
        opened.click('#unload')
    other = PromptTemplate(prefix='Ticket: ')
    for name, text in file_contents('other', examples, other, ['text', 'prompt', 'answer'], {}).items():
        (tmp_path / name).write_text(text)
    opened.choose_files(tmp_path / 'eval_other.json')
    assert 'eval_other.json: entry 1: the prompt does not fit the template' in opened.text('#bench-error')


@browser
@pytest.mark.parametrize('name, text, said', [
    ('a.csv', 'text,label\n"open,1\n', 'a.csv: line 2: a quote that is not closed'),
    ('a.csv', 'text,label\nfine,1,2\n', 'a.csv: line 2: more columns than the header has'),
    ('a.csv', 'text,text\nfine,1\n', "a.csv: line 1: two columns are named 'text'; rename one"),
    ('a.csv', 'text\ncaf\xe9\n'.encode('latin-1'), 'a.csv: is not UTF-8: save it as CSV UTF-8'),
    ('a.jsonl', '{"text": "fine"}\n{"text": \n', 'a.jsonl: line 2: no valid JSON'),
    ('a.json', '{"rows": []}', 'a.json: must hold a list of objects'),
    ('a.xlsx', 'PK', 'a.xlsx: must end in .csv'),
    ('a.csv', 'text,label\n', 'a.csv: no rows in it'),
    ('labels_a.json', '{}', 'labels_a.json: choose it together with its eval_NAME.json'),
])
def test_a_file_that_cannot_be_read_is_told_in_one_line(opened, tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    opened.choose_files(tmp_path / name)
    assert said in opened.text('#bench-error') and not opened.shown('#loaded')


@browser
def test_a_file_can_be_dropped(opened):
    opened.js('''
      const dropped = new DataTransfer();
      dropped.items.add(new File(['text\\nfine\\n'], 'dropped.csv'));
      document.querySelector('#drop').dispatchEvent(
        new DragEvent('drop', {dataTransfer: dropped, cancelable: true}))''')
    opened.until(lambda: opened.shown('#loaded'))
    assert opened.text('#file-name') == 'dropped.csv' and opened.text('#file-rows') == '1 text, without labels'


@browser
def test_rows_and_progress_come_while_it_runs(opened, server, tmp_path):
    (tmp_path / 'a.csv').write_text('text,label\n' + ''.join(f'fine {n},{n % 2}\n' for n in range(40)))
    server.probability = lambda text: time.sleep(0.05) or 0.9
    opened.choose_files(tmp_path / 'a.csv')
    opened.click('#run')
    opened.until(lambda: 0 < len(opened.texts('#row-list tr')) < 40)
    assert 0 < float(opened.find('#progress').get_attribute('value')) < 40 and opened.shown('#gold-card')
    opened.until(lambda: opened.find('#run').is_enabled())
    assert opened.texts('#row-list .index') == [str(n + 1) for n in range(40)]


@browser
def test_a_column_can_be_chosen(opened, server, tmp_path):
    (tmp_path / 'a.csv').write_text('first,second,third\n1,fine,x\n')
    opened.choose_files(tmp_path / 'a.csv')
    opened.click('#run')
    assert 'choose the column that holds the text' in opened.text('#bench-error')
    opened.set('#text-column', '1', 'change')
    opened.classify()
    assert server.bodies == [('/classify', {'texts': ['fine']})]


@browser
def test_numbers_that_may_mean_other_labels_are_not_used(opened, tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "fine", "label": 2}\n{"text": "dull", "label": 1.0}\n')
    opened.choose_files(tmp_path / 'a.jsonl')
    opened.classify()
    assert 'the numbers 1 .. 2 and no 0: which is which?' in opened.text('#gold-note')
    assert not opened.shown('#gold-card')


@browser
def test_a_text_that_is_refused_is_marked_and_the_others_go_on(opened, server):
    opened.fill('#texts', '\n'.join(['fine'] * 5 + ['too long'] + ['dull'] * 3))
    opened.classify()
    assert len(opened.texts('#row-list tr')) == 9 and '1 refused' in opened.text('#summary')
    assert opened.texts('#row-list .refused td.error') == ['400: texts[0] has 8 tokens, input_length is 512']
    opened.fill('#texts', '\n'.join(['too long'] * 9))
    server.bodies.clear()
    opened.classify()
    assert opened.text('#bench-error').endswith('400: texts[0] has 8 tokens, input_length is 512')
    assert len(server.bodies) < 9  # what is wrong with all of them ends the run


@browser
def test_a_busy_server_is_asked_again(opened, server):
    server.busy = 3
    opened.fill('#texts', 'fine')
    opened.classify()
    assert len(server.bodies) == 4 and opened.texts('#row-list td:nth-child(3)') == ['Positive']


@browser
def test_stop_stops_and_keeps_what_is_done(opened, server, tmp_path):
    (tmp_path / 'a.txt').write_text(''.join(f'{{"text": "fine {n}"}}\n' for n in range(300)))
    opened.choose_files(tmp_path / 'a.txt')
    server.probability = lambda text: time.sleep(0.02) or 0.9
    opened.click('#run')
    opened.until(lambda: len(server.bodies) > 2)
    opened.click('#stop')
    opened.until(lambda: 'stopped in' in opened.text('#bench-status'))
    asked = len(server.bodies)
    done = int(opened.text('#bench-status').split()[0])
    time.sleep(0.3)
    assert 0 < done < 300 and len(server.bodies) == asked and opened.find('#run').is_enabled()
    assert not opened.shown('#bench-error')


@browser
def test_thousands_of_rows_stay_usable(opened, server, tmp_path):
    """6,000 rows: all are asked once and counted, 200 are in the page; a change of the order takes a moment."""
    texts = [f'{"fine" if n % 3 else "dull"} {n}' for n in range(6000)]
    (tmp_path / 'a.csv').write_text('text,label\n' + ''.join(f'{text},{n % 2}\n' for n, text in enumerate(texts)))
    opened.choose_files(tmp_path / 'a.csv')
    opened.classify(60)
    assert [text for _, body in server.bodies for text in body['texts']] == texts
    assert max(len(body['texts']) for _, body in server.bodies) == 64
    assert len(opened.texts('#row-list tr')) == 200 and opened.text('#rows-says') == '200 of 6,000 rows'
    opened.click('#more')
    assert len(opened.texts('#row-list tr')) == 400
    assert opened.js('return document.activeElement.rowIndex') == 201
    opened.set('#order', 'wrong', 'change')
    assert len(opened.texts('#row-list tr')) == 200 and opened.texts('#row-list .mark') == ['✗ wrong'] * 200
    spent = opened.js('const begin = performance.now(); const order = document.querySelector("#order"); order.value = '
                      '"uncertain"; order.dispatchEvent(new Event("change")); document.body.offsetHeight; '
                      'return performance.now() - begin')
    assert spent < 1000


@browser
def test_exports_are_read_again_and_hold_no_formula(opened, tmp_path):
    texts = ['=HYPERLINK("x")', '- a fine one', 'a "fine", film', '@fine', 'dull']
    rows = io.StringIO()
    csv.writer(rows).writerows([['text', 'label'], *([text, 1] for text in texts)])
    (tmp_path / 'a.csv').write_text(rows.getvalue())
    opened.choose_files(tmp_path / 'a.csv')
    opened.classify()
    opened.set('#threshold', '0.6')
    for kind in 'csv', 'jsonl':
        opened.click(f'#export-{kind}')
        opened.until((opened.driver.downloads / f'classified.{kind}').exists)
    found = [json.loads(line) for line in (opened.driver.downloads / 'classified.jsonl').read_text().splitlines()]
    assert [row['text'] for row in found] == texts and [row['gold'] for row in found] == ['Positive'] * 5
    assert found[1] == {
        'text': '- a fine one', 'label': 'Positive', 'probability': 0.9, 'sure': True, 'gold': 'Positive',
        'correct': True, 'probabilities': {'Negative': pytest.approx(0.1), 'Positive': 0.9}, 'error': None}
    content = (opened.driver.downloads / 'classified.csv').read_text(encoding='utf-8-sig')
    table = list(csv.DictReader(io.StringIO(content, newline='')))
    assert [row['text'] for row in table] == ["'=HYPERLINK(\"x\")", "'- a fine one", 'a "fine", film', "'@fine", 'dull']
    assert [row['correct'] for row in table] == ['true', 'true', 'true', 'true', 'false']
    assert [row['sure'] for row in table] == ['false', 'true', 'true', 'true', 'true']
    assert float(table[1]['p(Positive)']) == 0.9


@browser
def test_generated_text_streams_with_what_was_set(opened, server):
    opened.click('#tab-generate')
    for field, value in dict(temperature='0', top_k='40', top_p='0.9', min_p='0.05', max_tokens='32', seed='7').items():
        opened.fill(f'#generate-{field}', value)
    opened.set('#generate #generate-sampling textarea', 'END\n\\n\\n')
    opened.fill('#prefix', 'Once')
    opened.click('#generate-run')
    opened.until(lambda: '17 tokens' in opened.text('#generate-status'))
    assert opened.text('#answer') == 'Once' + ''.join(PIECES)  # the cut characters are whole, the markup is text
    assert 'cut at max tokens' in opened.text('#generate-status') and 'tokens/s' in opened.text('#generate-status')
    (path, body), = server.bodies
    assert path == '/v1/completions' and body == {
        'model': INFO['model'], 'prompt': 'Once', 'temperature': 0, 'top_k': 40, 'top_p': 0.9, 'min_p': 0.05,
        'max_tokens': 32, 'seed': 7, 'stop': ['END', '\n\n'], 'stream': True, 'stream_options': {'include_usage': True}}


@browser
def test_generation_stops(opened, server):
    server.gate = threading.Event()
    opened.click('#tab-generate')
    opened.fill('#prefix', 'Once')
    opened.click('#generate-run')
    opened.until(lambda: opened.text('#answer-text') == ''.join(PIECES[:2]))
    opened.click('#generate-stop')
    opened.until(lambda: opened.text('#generate-status') == 'stopped')
    assert server.left.wait(5) and opened.find('#generate-run').is_enabled() and not opened.shown('#generate-error')


@browser
def test_a_stream_that_is_refused_or_breaks_off_is_told(opened, server):
    opened.click('#tab-generate')
    opened.fill('#prefix', 'Once')
    opened.fill('#generate-max_tokens', '1000')
    opened.click('#generate-run')
    opened.until(lambda: '400: max_tokens=1000 is above 512' in opened.text('#generate-error'))
    opened.find('#generate-max_tokens').clear()
    server.broken = 2
    opened.click('#generate-run')
    opened.until(lambda: 'the stream broke off' in opened.text('#generate-error'))
    assert opened.text('#answer-text') == ''.join(PIECES[:2])


@browser
def test_a_conversation_goes_on_and_again(opened, server):
    opened.driver.set_window_size(600, 600)  # the conversation is longer than its frame
    opened.click('#tab-chat')
    opened.js('document.querySelector("#chat details").open = true')
    opened.fill('#system', 'Be brief.')
    opened.fill('#message', 'Hello')
    opened.find('#message').send_keys(CONTROL, ENTER)
    answer, done = ''.join(PIECES), lambda: '17 tokens' in opened.texts('.said .row .hint')[-1]
    opened.until(done)
    assert opened.texts('.said .text') == ['Hello', answer]
    opened.click('#chat-again')
    opened.until(lambda: len(server.bodies) == 2 and done())
    opened.fill('#message', 'And?')
    opened.click('#chat-run')
    opened.until(lambda: len(server.bodies) == 3 and done())
    asked = [body.pop('messages') for _, body in server.bodies]
    opened.until(lambda: opened.js('const log = document.querySelector("#transcript");'  # the end is in sight
                                   'return log.scrollTop > 0 && '
                                   'log.scrollHeight - log.scrollTop - log.clientHeight < 2'), 3)
    assert [body for _, body in server.bodies] == 3 * [  # fields that are empty are left out
        {'model': INFO['model'], 'stream': True, 'stream_options': {'include_usage': True}}]
    first = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello'}]
    last = [{'role': 'assistant', 'content': answer}, {'role': 'user', 'content': 'And?'}]
    assert asked == [first, first, first + last]
    opened.click('#chat-clear')
    assert not opened.texts('.said')


@browser
def test_a_stopped_answer_lets_the_server_go_and_stays(opened, server):
    server.gate = threading.Event()
    opened.click('#tab-chat')
    opened.fill('#message', 'Hello')
    opened.click('#chat-run')
    opened.until(lambda: opened.texts('.said .text')[-1] == ''.join(PIECES[:2]))
    opened.click('#chat-stop')
    opened.until(lambda: 'stopped' in opened.texts('.said .row .hint')[-1])
    assert server.left.wait(5) and opened.texts('.said .text')[-1] == ''.join(PIECES[:2])
    assert opened.find('#chat-run').is_enabled()


@browser
def test_tabs_go_by_arrows_and_every_control_has_a_name(opened):
    opened.find('#tab-classify').send_keys(ARROW_RIGHT)
    assert opened.driver.switch_to.active_element.get_attribute('id') == 'tab-generate' and opened.shown('#generate')
    opened.driver.switch_to.active_element.send_keys(END)
    assert opened.shown('#chat') and not opened.shown('#generate')
    opened.js('document.querySelectorAll("details").forEach(found => { found.open = true })')
    ids = opened.js('return [...document.querySelectorAll("[id]")].map(found => found.id)')
    assert len(ids) == len(set(ids))
    for tab in 'classify', 'generate', 'chat':
        opened.click(f'#tab-{tab}')
        for control in opened.driver.find_elements(
                'css selector', f'header button, #{tab} :is(button, input, select, textarea)'):
            if control.is_displayed():  # a placeholder is no name: it goes when somebody writes
                assert opened.js('const [one] = arguments; return one.ariaLabel || (one.tagName === "BUTTON" ? one : '
                                 'one.labels[0])?.innerText.trim()', control), control.get_attribute('outerHTML')


CONTRAST = '''
const light = colour => { const [r, g, b] = colour.map(
                            v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
                          return .2126 * r + .7152 * g + .0722 * b; };
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = (under, over) => { for (const c of [under, over]) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
                               return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
const poor = [];
for (const found of document.querySelectorAll('body *')) {
  const own = [...found.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!own || !found.checkVisibility() || found.disabled) continue;
  const layers = [];
  for (let at = found; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
  let ground = '#fff';
  for (const layer of layers) ground = `rgb(${rgb(ground, layer)})`;
  const [a, b] = [light(rgb(ground, ground)), light(rgb(ground, getComputedStyle(found).color))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) poor.push(`${found.outerHTML.slice(0, 80)} ${((a + .05) / (b + .05)).toFixed(2)}`);
}
return poor;'''


@browser
def test_colours_can_be_read_in_light_and_dark(opened, tmp_path):
    """Text has a contrast of at least 4.5 to what is under it (WCAG AA), and the chosen colours stay."""
    (tmp_path / 'a.csv').write_text('text,label\nfine,1\ndull,1\ntoo long,0\n')
    opened.choose_files(tmp_path / 'a.csv')
    opened.classify()
    grounds, ground = [], 'return getComputedStyle(document.body).backgroundColor'
    for _ in range(2):
        assert not opened.js(CONTRAST)
        grounds.append(opened.js(ground))
        opened.click('#theme')
    assert grounds[0] != grounds[1] and opened.js(ground) == grounds[0]
    opened.click('#theme')
    opened.driver.refresh()
    opened.until(lambda: opened.js(ground) == grounds[1])


@browser
def test_nothing_is_wider_than_a_phone(opened, server, tmp_path):
    server.info['template'] = {'prompt': 'Ticket: {text}\nTeam:',
                               'labels': ['shipping', 'billing', 'technical', 'account', 'returns', 'sales']}
    opened.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                                  {'width': 360, 'height': 740, 'deviceScaleFactor': 1, 'mobile': True})
    try:
        opened.open()
        (tmp_path / 'a.csv').write_text(f'ticket,team\n{"x" * 300},billing\nfine,sales\n')
        opened.choose_files(tmp_path / 'a.csv')
        opened.classify()
        for tab in 'classify', 'generate', 'chat':
            opened.click(f'#tab-{tab}')
            if tab == 'chat':
                opened.fill('#message', 'y' * 300)
                opened.click('#chat-run')
                opened.until(lambda: '17 tokens' in opened.texts('.said .row .hint')[-1])
            assert opened.js('return document.documentElement.scrollWidth') <= 360
    finally:
        opened.driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


# ---------------------------------------------------------------- the modules


@browser
def test_intervals_are_evaluate_s(opened):
    for correct, total in (0, 1), (1, 1), (3, 4), (0, 30), (912, 1062), (1062, 1062):
        found = opened.js('return import("/page/metrics.js").then(found => found.wilson(...arguments))', correct, total)
        assert found == pytest.approx(wilson_interval(correct, total), abs=1e-12)


@browser
def test_a_share_of_nothing_is_no_number(opened):
    found = opened.js('''
      const {scores} = await import("/page/metrics.js");
      return scores([[2, 0, 0], [1, 0, 0], [0, 0, 0]]).map(score => Object.fromEntries(
        Object.entries(score).map(([name, value]) => [name, Number.isNaN(value) ? "NaN" : value])));''')
    assert found == [{'precision': pytest.approx(2 / 3), 'recall': 1, 'f1': 0.8, 'support': 2},
                     {'precision': None, 'recall': 0, 'f1': 0, 'support': 1},
                     {'precision': None, 'recall': None, 'f1': None, 'support': 0}]


@browser
@pytest.mark.parametrize('text', [
    'a,b\n1,2\n', 'a,b\r\n1,"2\r\n3"\r\n\r\n4,""\r\n', '"x ""y""",z', ',,\n,', '""', '', 'a,"b\nc",d\n"e"',
    'a"b,c"\n', 'é,😀\n" ",\t'])
def test_tables_are_parted_as_python_parts_them(opened, text):
    found = opened.js('return import("/page/tables.js").then(found => found.parseCsv(arguments[0]))', text)
    rows = csv.reader(io.StringIO(text, newline=''), strict=True)
    assert [row['cells'] for row in found] == [row for row in rows if row]


@browser
@pytest.mark.parametrize('columns, chosen', [
    (('text', 'label'), ('text', 'label')), (('Text', 'sentence', 'x'), ('Text', None)),
    (('review',), ('review', None)),
    (('line',), ('line', None)), (('line', 'stars'), ('line', 'stars')), (('tweet', 'mood'), ('tweet', 'mood')),
    (('body', 'message', 'label'), (None, 'label')), (('a', 'b', 'c'), (None, None))])
def test_columns_are_found_by_name_or_as_the_other_of_two(opened, columns, chosen):
    rows = ','.join(columns) + '\n' + (','.join('x' * len(columns)) + '\n') * 3
    found = opened.js('const tables = await import("/page/tables.js");'
                      'return tables.findColumns(tables.readRows("a.csv", arguments[0]))', rows)
    assert (found['text'], found['label']) == chosen


@browser
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_events_may_be_cut_anywhere(opened, end):
    """Every place to cut the bytes of a stream gives the same events: within a character, a line's end, a field."""
    found = opened.js('''
      const {events} = await import("/page/server.js");
      const text = ": note\\n\\ndata: é😀\\n\\ndata:a\\ndata: b\\n\\ndata: [DONE]\\n\\n";
      const bytes = new TextEncoder().encode(text.replaceAll("\\n", arguments[0]));
      const all = [];
      for (let cut = 0; cut <= bytes.length; cut++) {
        const body = new ReadableStream({start(queue) {
          for (const part of [bytes.slice(0, cut), bytes.slice(cut)]) if (part.length) queue.enqueue(part);
          queue.close(); }});
        const read = [];
        for await (const data of events({body})) read.push(data);
        all.push(JSON.stringify(read));
      }
      return [...new Set(all)];''', end)
    assert [json.loads(text) for text in found] == [['é😀', 'a\nb', '[DONE]']]
