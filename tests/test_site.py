"The site in a real browser: it loads by itself, can be searched, leads from a number to its run"
import functools, http.server, importlib.util, json, os, re, shutil, subprocess, threading, time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
NEEDED = {'websocket': 'websocket-client', 'myst_nb': 'the extra `docs`'}
MISSING = [what for module,what in NEEDED.items() if not importlib.util.find_spec(module)]
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine: apt install chromium'),
    pytest.mark.skipif(bool(MISSING), reason=f'not installed: {MISSING}; make setup'),
    pytest.mark.skipif(not os.environ.get('REFINE_SITE'), reason='`make site-test` builds and drives it'),
    pytest.mark.xdist_group('site')]

PAGES = ('index', 'papers/adcorda', 'papers/spat_open', 'nbs/tab1_adcorda', 'nbs/attacks/20_gradient',
         'library/attacks', 'runs/tab1_adcorda/small/resnet18_cifar10_jpeg', 'genindex')

class Browser:
    "Chromium by its own protocol: one tab, what it logged and what it asked for"
    def __init__(self, port):
        import websocket
        tabs = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json'))
        url = next(t['webSocketDebuggerUrl'] for t in tabs if t['type'] == 'page')
        self.socket = websocket.create_connection(url, suppress_origin=True, timeout=120)
        self.n, self.events = 0, []
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self.call(f'{domain}.enable')

    def call(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps({'id': self.n, 'method': method, 'params': params}))
        while (got := json.loads(self.socket.recv())).get('id') != self.n: self.events.append(got)
        assert 'error' not in got, f"{method}: {got.get('error')}"
        return got['result']

    def js(self, code):
        got = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in got, got['exceptionDetails']
        return got['result'].get('value')

    def until(self, code, seconds=60):
        end = time.monotonic()+seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f'{code} did not come true within {seconds} s'
            time.sleep(.1)
        return value

    def open(self, url, width=1280, height=900, theme='light'):
        self.events.clear()
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': theme}])
        self.call('Page.navigate', url=url)
        there = f'location.href.startsWith({json.dumps(url.split("#")[0])})'
        self.until(f'document.readyState == "complete" && {there}')

    def complaints(self):
        "What the console got that is no greeting"
        def bad(method, params):
            if method == 'Runtime.consoleAPICalled': return params['type'] in ('error', 'warning', 'assert')
            return method in ('Runtime.exceptionThrown', 'Log.entryAdded')
        return [e['params'] for e in self.events if bad(e.get('method'), e.get('params'))]

    def asked(self):
        "Every address"
        return [e['params']['request']['url'] for e in self.events
                if e.get('method') == 'Network.requestWillBeSent']

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def served(folder):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()

@contextmanager
def chromium(profile):
    flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--hide-scrollbars',
             '--remote-debugging-port=0', f'--user-data-dir={profile}', 'about:blank']
    process = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, end = Path(profile)/'DevToolsActivePort', time.monotonic()+60
        while not port.exists() or not port.read_text():
            assert process.poll() is None and time.monotonic() < end, f'{CHROMIUM} does not start'
            time.sleep(.1)
        yield Browser(int(port.read_text().split()[0]))
    finally:
        process.terminate(); process.wait(20)

@pytest.fixture(scope='module')
def site():
    with served(ROOT/os.environ['REFINE_SITE']) as url: yield url

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp('chromium')) as b: yield b

@pytest.mark.parametrize('page', PAGES)
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_a_page_loads_by_itself(browser, site, page, theme):
    browser.open(f'{site}/{page}.html', theme=theme)
    assert not browser.complaints()
    assert not [u for u in browser.asked() if not u.startswith((site, 'data:', 'blob:'))]

def test_mathematics_is_drawn(browser, site):
    browser.open(f'{site}/nbs/attacks/20_gradient.html')
    assert browser.until('document.querySelectorAll("mjx-container svg").length') > 0
    assert '\\operatorname' not in browser.js('document.querySelector("article").innerText')

@pytest.mark.parametrize('words, wanted', [
    ('pgd', 'nbs/attacks/20_gradient'), ('open-A12', 'papers/adcorda_open'),
    ('A12', 'papers/adcorda'), ('SPAT', 'papers/spat')])
def test_the_search_finds(browser, site, words, wanted):
    browser.open(f'{site}/search.html?q={words}')
    browser.until('document.querySelector("#search-results").innerText.includes("finished")')
    found = browser.js('[...document.querySelectorAll("ul.search li a")].map(a => a.getAttribute("href"))')
    assert any(wanted in f for f in found), f'{words}: {found[:10]}'

def test_a_number_leads_to_its_run(browser, site):
    browser.open(f'{site}/papers/adcorda.html') # first click: the run; second: the record
    run = browser.js('[...document.querySelectorAll("article a")].map(a => a.href)'
                     '.find(a => a.includes("/runs/tab1_adcorda/"))')
    browser.open(run)
    number = browser.js('(a => ({text: a.textContent, href: a.href}))'
                        '(document.querySelector("td a.number"))')
    assert re.match(r'[+-]?\d', number['text'])
    browser.open(number['href'])
    assert browser.js('!!document.querySelector(":target") && location.hash.startsWith("#run-")')

def test_every_number_has_a_place(site):
    "A link to a run ends at its anchor, whatever page it is on"
    root = ROOT/os.environ['REFINE_SITE']; ids = {}
    for page in root.rglob('*.html'):
        for href in re.findall(r'class="(?:number|run)" href="([^"]+)"', page.read_text(encoding='utf-8')):
            path, _, anchor = href.partition('#')
            there = (page.parent/path).resolve() if path else page
            if there not in ids:
                ids[there] = set(re.findall(r'id="([^"]+)"', there.read_text(encoding='utf-8')))
            assert anchor in ids[there], f'{page.relative_to(root)}: {href}'
    assert ids

def test_a_key_without_a_record_is_said_and_not_dropped(site):
    page = 'nbs/tab1_adcorda'
    stored, shown = (Path(p).read_text(encoding='utf-8') for p in
                     (ROOT/f'{page}.ipynb', ROOT/os.environ['REFINE_SITE']/f'{page}.html'))
    keys = set(re.findall(r'\|([0-9a-f]{20})\|', stored)) # of the demo, of which no report is kept
    assert keys and all(f'{k}: no report has a record' in shown or f'#run-{k}' in shown for k in keys)

@pytest.mark.parametrize('page', PAGES)
def test_no_page_scrolls_sideways_on_a_phone(browser, site, page):
    browser.open(f'{site}/{page}.html', width=390, height=844)
    wide = browser.js('''[...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > 391).slice(0, 3).map(e => e.outerHTML.slice(0, 99))''')
    assert browser.js('document.documentElement.scrollWidth') <= 390, wide

def test_what_is_printed_is_not_cut_off(browser, site):
    browser.open(f'{site}/nbs/tab2_mixture.html', width=1250, height=900)
    shown = browser.js('''[...document.querySelectorAll(".cell_output .stream pre")].map(e =>
        [e.scrollWidth, e.clientWidth, Math.max(...e.innerText.split("\\n").map(l => l.length))])''')
    assert max(chars for *_,chars in shown) > 120 and all(inner <= outer for inner,outer,_ in shown)

@pytest.mark.parametrize('page', PAGES)
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_contrast_and_names(browser, site, page, theme):
    axe = importlib.util.find_spec('axe_core_python')
    if axe is None: pytest.skip('axe-core-python is not installed: make setup')
    browser.open(f'{site}/{page}.html', theme=theme)
    browser.js(next(Path(axe.origin).parent.glob('axe*.js')).read_text(encoding='utf-8') + ';0')
    found = browser.js('''axe.run(document, {runOnly: ["color-contrast", "image-alt", "svg-img-alt",
        "link-name", "label", "button-name", "select-name", "document-title", "html-has-lang"]})
        .then(r => r.violations.map(v => [v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 160))]))''')
    assert not found

BOARD = '''<!doctype html><meta charset="utf-8"><title>board</title><table class="scoreboard"><thead><tr>
<th>claim</th><th>document</th><th>ours</th><th>scale</th><th>verdict</th></tr></thead><tbody>
<tr><td>A1</td><td>AdCorDA</td><td>10.5 [9, 12]</td><td>paper</td><td>holds</td></tr>
<tr><td>A2</td><td>AdCorDA</td><td>9.1</td><td>small<br>resnet18</td><td>with</td></tr>
<tr><td>T1</td><td>SPAT</td><td></td><td></td><td>not judged: needs paper</td></tr></tbody></table>
<script src="site.js"></script>'''

def test_a_scoreboard_sorts_and_filters(browser, tmp_path):
    (tmp_path/'board.html').write_text(BOARD, encoding='utf-8')
    shutil.copy(ROOT/'docs'/'static'/'site.js', tmp_path)
    shown = '[...document.querySelectorAll("tr:not([hidden])>td:first-child")].map(c => c.innerText).join()'
    def choose(i, value):
        browser.js(f'(s => {{ s.value = "{value}"; s.dispatchEvent(new Event("change")) }})'
                   f'(document.querySelectorAll("select")[{i}])')
        return browser.js(shown)
    with served(tmp_path) as url:
        browser.open(f'{url}/board.html')
        browser.js('document.querySelectorAll("th button")[2].click()')
        assert browser.js(shown) == 'A2,A1,T1' # numbers as numbers, an empty cell last
        browser.js('document.querySelectorAll("th button")[2].click()')
        assert browser.js(shown).endswith('A1,A2')
        labels = browser.js('[...document.querySelectorAll("label")].map(l => l.firstChild.data).join()')
        assert labels == 'document,scale,verdict,search'
        assert choose(2, 'not judged') == 'T1' and choose(2, '') == 'T1,A1,A2'
        assert choose(0, 'AdCorDA') == 'A1,A2' and choose(1, 'paper') == 'A1' and choose(1, 'small') == 'A2'
        assert browser.js('document.querySelector("output").textContent') == '1 of 3'
