"""The report in a real browser: it fits a telephone and a screen, in light and dark and on paper, and loads nothing.

Needs Chromium and its driver (Debian: chromium, chromium-driver), driven over WebDriver.
Without them the tests skip."""
import base64, functools, http.server, itertools, json, re, shutil, subprocess, tempfile, threading, urllib.request

import pytest
import torch

from rdd_nb.core import write_json
from rdd_nb.corruptions import LADDER
from rdd_nb.data import GroupedDataset
from rdd_nb.hands_on import _best_place, movable_centres, share_slider, tail_slider
from rdd_nb.kmeans import assign_nearest
from rdd_nb.report import write_report
from rdd_nb.risk import CVaR
from test_report import CLASSES, comparison, on_damaged, row

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
CHROMIUM = next((p for name in NAMES if (p := shutil.which(name))), None)
DRIVER = shutil.which('chromedriver')
ABSENT = ' and '.join(name for name, path in (('chromium', CHROMIUM), ('chromedriver', DRIVER)) if path is None)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f'no {ABSENT} here (Debian: chromium, chromium-driver); '
                                'layout, network and console of the report are not checked')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage']


class Browser:
    "Chromium without a window, in a profile of its own."
    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        piped = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.driver = subprocess.Popen([DRIVER, '--port=0'], **piped)
        try:
            told = (re.search(r'started successfully on port (\d+)', line) for line in self.driver.stdout)
            port = next(found[1] for found in told if found)
            self.base = f'http://127.0.0.1:{port}'
            options = dict(binary=CHROMIUM, args=[*FLAGS, f'--user-data-dir={self.profile.name}'])
            always = {'goog:chromeOptions': options, 'goog:loggingPrefs': dict(browser='ALL', performance='ALL')}
            found = self('POST', '/session', capabilities=dict(alwaysMatch=always))
            self.base += f'/session/{found["sessionId"]}'
        except BaseException:
            self.driver.kill()
            raise

    def __call__(self, method, path, **body):
        data = json.dumps(body).encode() if method == 'POST' else None
        request = urllib.request.Request(self.base + path, data, {'Content-Type': 'application/json'}, method=method)
        with self.open(request, timeout=120) as answer: return json.loads(answer.read())['value']

    def devtools(self, command, **params): return self('POST', '/goog/cdp/execute', cmd=command, params=params)
    def run(self, script): return self('POST', '/execute/sync', script=script, args=[])

    def show(self, url, width=1280, scheme='light', media=''):
        "Open a page at a width in CSS pixels; what was logged before is forgotten."
        self('POST', '/url', url='about:blank')
        for kind in ('browser', 'performance'): self.logged(kind)
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.devtools('Emulation.setDeviceMetricsOverride', **size)
        features = [dict(name='prefers-color-scheme', value=scheme)]
        self.devtools('Emulation.setEmulatedMedia', media=media, features=features)
        self('POST', '/url', url=str(url))

    def logged(self, kind):
        "What was logged since the last time; a moment is waited for what is on its way."
        self.run('return new Promise(done => setTimeout(done, 150))')
        return self('POST', '/se/log', type=kind)

    def console(self): return [f'{e["level"]}: {e["message"]}' for e in self.logged('browser')]

    def requests(self):
        "Addresses asked for since `show`, without what is inside the page."
        events = [json.loads(e['message'])['message'] for e in self.logged('performance')]
        urls = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
        return [u for u in urls if not u.startswith('data:')]

    def close(self):
        try: self('DELETE', '')
        finally:
            self.driver.terminate()
            self.driver.wait(20)
            self.driver.stdout.close()
            self.profile.cleanup()


@pytest.fixture(scope='module')
def browser():
    found = Browser()
    yield found
    found.close()


MEASURE = '''
const all = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg *'));
const loose = all.filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const charts = [...document.querySelectorAll('svg.chart')].filter(c => c.checkVisibility());
const images = [...document.images, ...document.querySelectorAll('svg image')];
const text = document.querySelector('svg.chart text');
return {inner: innerWidth, scroll: document.documentElement.scrollWidth, images: images.length,
  loose: loose.map(e => e.tagName + '.' + e.className), charts: charts.map(c => c.getBoundingClientRect().height),
  broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
  background: getComputedStyle(document.body).backgroundColor, ink: text && getComputedStyle(text).fill,
  small: text && text.getBoundingClientRect().height};'''


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "A report with everything in it: runs that failed or stopped, weights, real samples and maps."
    names = 'kmeans', 'gradient', 'rdd-target', 'full'
    folder = comparison(tmp_path_factory.mktemp('browser')/'comparison', names, gains=(-.1, 0., .2, .25))
    g, ids = torch.Generator().manual_seed(0), torch.arange(60)
    data = GroupedDataset(torch.rand(60, 1, 8, 8, generator=g), ids % 3, group=ids % 2, groups=['majority', 'minority'],
                          classes=list(CLASSES))
    rows = json.loads((folder/'report.json').read_text())
    names = [f'{k}-{s}' for k in LADDER for s in range(1, 6)] + ['reference-blur']
    more = dict(confusion=[[9, 1, 0], [2, 8, 0], [0, 0, 10]], ece=.1)
    rows['rows'] = [on_damaged(r, names, .1) | more for r in rows['rows']]
    write_json(folder/'report.json', rows)
    (folder/'runs'/'gradient-seed1'/'synthetic.safetensors').unlink()
    error = 'Traceback (most recent call last):\nMemoryError: no more of it\n'
    (folder/'runs'/'gradient-seed1'/'error.txt').write_text(error)
    return write_report(folder, data=data).as_uri()


@pytest.mark.parametrize('width, scheme', list(itertools.product((390, 1280), ('light', 'dark'))))
def test_page_fits(browser, report, width, scheme):
    browser.show(report, width, scheme)
    found = browser.run(MEASURE)
    assert found['inner'] == width and found['scroll'] <= width and found['loose'] == []
    assert found['images'] > 3 and found['broken'] == 0
    assert len(found['charts']) > 5 and min(found['charts']) > 50
    assert found['small'] > 9          # the text of charts, in pixels
    expected = {'light': ('rgb(255, 255, 255)', 'rgb(27, 30, 35)'), 'dark': ('rgb(21, 24, 28)', 'rgb(230, 232, 235)')}
    assert (found['background'], found['ink']) == expected[scheme]


def test_unfolded_it_fits_too(browser, report):
    browser.show(report, 390)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.run(MEASURE)
    assert found['scroll'] <= 390 and found['loose'] == []


def test_page_asks_for_nothing_and_is_silent(browser, report):
    browser.show(report)
    assert browser.requests() == [report]
    assert browser.console() == []


def test_a_page_that_asks_would_be_caught(browser, report, tmp_path):
    "The two assertions above, on a page that must fail them; and the policy of the page, which would stop it."
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): asked.append(self.path)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        here = f'http://127.0.0.1:{server.server_port}'
        outside = f'{here}/pixel.png'
        with urllib.request.urlopen(report) as f: text = f.read().decode()
        text = text.replace('</body>', f'<img src="{outside}" alt=""></body>')
        (tmp_path/'policy.html').write_text(text)
        (tmp_path/'none.html').write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', text))
        browser.show(f'{here}/none.html')
        assert outside in browser.requests() and any('404' in line for line in browser.console())
        browser.show(f'{here}/policy.html')
        assert '/pixel.png' not in asked[asked.index('/policy.html'):]
        assert any('Content Security Policy' in line for line in browser.console())
    finally:
        server.shutdown()
        server.server_close()


def test_links_lead_to_their_sections(browser, report):
    browser.show(report)
    links = "[...document.querySelectorAll('nav a')]"
    assert browser.run(f"return {links}.every(a => document.querySelector(a.getAttribute('href')))")
    assert browser.run(f'{links}.at(-1).click(); return location.hash && scrollY > 0')


def test_what_is_wrong_is_said_where_it_is_seen(browser, report):
    browser.show(report, 390)
    text = browser.run("return document.querySelector('#missing').parentElement.innerText")
    assert 'gradient seed 1: failed (MemoryError: no more of it)' in text


def test_paper_is_white(browser, report):
    browser.show(report, scheme='dark', media='print')
    found = browser.run(MEASURE)
    assert (found['background'], found['ink']) == ('rgb(255, 255, 255)', 'rgb(27, 30, 35)')
    pdf = base64.b64decode(browser.devtools('Page.printToPDF')['data'])
    assert pdf.startswith(b'%PDF') and len(pdf) > 20_000


def test_long_names_and_different_labels_fit_a_telephone(browser, tmp_path):
    a, b = tmp_path/'digits', tmp_path/'letters'
    words = 'distribution 0.5*mean + 0.5*cvar(tail={}) at distance clustering=kmeans(4) lr=5.0'
    long = [words.format(t) for t in (.1, .2)] + ['a' * 70]
    write_json(a/'report.json', dict(rows=[row(m, s) for m in long for s in (0, 1)]))
    other = [row('gradient', s) for s in (0, 1)]
    for r in other:
        for k in ('class_group_accuracy', 'class_group_counts'): r[k] = {'letter ' + c: v for c, v in r[k].items()}
    write_json(b/'report.json', dict(rows=other))
    page = write_report([a, b], tmp_path/'both')
    browser.show(page.as_uri(), 390)
    found = browser.run(MEASURE)
    assert found['scroll'] <= 390 and found['loose'] == []
    assert 'different labels' in browser.run("return document.querySelector('#summary').innerText")
    assert browser.console() == []


# Pictures that move: the numbers of their scripts are those of the package

def opened(browser, picture, path):
    path.write_text(f'<!doctype html><title>t</title>{picture._repr_html_()}', encoding='utf-8')
    browser.show(path.as_uri())
    assert not browser.console() and browser.requests() == [path.as_uri()]
    text = 'return document.querySelector("[data-text]").innerText'
    return lambda: [float(v) for v in re.findall(r'\d+\.\d+', browser.run(text))]


def slide(browser, value):
    browser.run(f'const s = document.querySelector("input"); s.value = {value}; s.dispatchEvent(new Event("input"))')


def test_the_slider_of_the_tail(browser, tmp_path):
    losses = torch.rand(31, generator=torch.Generator().manual_seed(1)) * 3
    numbers = opened(browser, tail_slider(losses), tmp_path/'tail.html')
    assert numbers() == pytest.approx([.2, CVaR(.2)(losses).item(), losses.mean().item()], abs=.0051)
    for tail in (.05, .33, 1.):
        slide(browser, tail)
        assert numbers() == pytest.approx([tail, CVaR(tail)(losses).item(), losses.mean().item()], abs=.0051)


def test_centres_can_be_dragged_and_make_steps_of_k_means(browser, tmp_path):
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    centres = points[:3].clone()
    numbers = opened(browser, movable_centres(points, centres), tmp_path/'centres.html')
    start = assign_nearest(points, centres)[1].mean().item()
    assert numbers() == pytest.approx([start], abs=.0051)
    for _ in range(2):
        ids, _ = assign_nearest(points, centres)
        centres = torch.stack([points[ids == k].mean(0) for k in range(3)])
        browser.run('document.querySelector("button").click()')
        assert numbers() == pytest.approx([assign_nearest(points, centres)[1].mean().item()], abs=.0051)
    browser.run('''const svg = document.querySelector("svg"), b = svg.getBoundingClientRect();
        const g = svg.querySelector("g");
        g.dispatchEvent(new PointerEvent("pointerdown", {bubbles: true}));
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: b.x + 1, clientY: b.y + 1}));
        dispatchEvent(new PointerEvent("pointerup"));''')
    assert numbers()[0] > assign_nearest(points, centres)[1].mean().item() + .05


def test_the_slider_of_the_minority(browser, tmp_path):
    draw = torch.Generator().manual_seed(3)
    many, few = (torch.randn(n, 2, generator=draw, dtype=torch.float64) + m for n, m in ((60, 0.), (20, 4.)))
    numbers = opened(browser, share_slider(many, few), tmp_path/'share.html')
    for share in (.1, .02, .4):
        if share != .1: slide(browser, share)
        p = torch.tensor([(1 - share) / 60] * 60 + [share / 20] * 20, dtype=torch.float64)
        both = torch.cat([many, few])
        places = p @ both, _best_place(both, p, .1)
        far = [(part - x).square().sum(1).mean().item() for x in places for part in (many, few)]
        assert numbers() == pytest.approx(far, abs=.0051)
