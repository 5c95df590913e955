"The HTML pages are built, without executing what stands in the notebooks."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from test_browser import ABSENT, browser

ROOT = Path(__file__).resolve().parents[1]
SOME = ['index.ipynb', '00_core.ipynb', '40_synthetic.ipynb', 'tutorials/05_coin_toss_to_cvar.ipynb',
        'glossary.ipynb', 'references.ipynb']
BOMB = dict(cell_type='code', id='bomb', metadata={}, outputs=[], execution_count=None,
            source=['import os\n', 'open("executed", "w").close()\n', 'raise RuntimeError("executed")'])


def project(folder):
    "A copy of the project with some notebooks, each with a cell that must not run."
    for name in SOME:
        nb = json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))
        nb['cells'].insert(len(nb['cells']) - 2, BOMB)
        (folder/'nbs'/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/'nbs'/name).write_text(json.dumps(nb), encoding='utf-8')
    for path in ('settings.ini', 'nbs/styles.css', 'nbs/references.bib', 'CONTRIBUTING.md', 'LICENSE'):
        shutil.copy(ROOT/path, folder/path)
    shutil.copytree(ROOT/'rdd_nb', folder/'rdd_nb', ignore=shutil.ignore_patterns('__pycache__'))
    return folder


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp('project'))
    command = [sys.executable, ROOT/'tools'/'make_docs.py', '--out', folder/'site', *(folder/'nbs'/n for n in SOME)]
    env = os.environ | {'PYTHONPATH': str(folder)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'FAQ' not in done.stderr and not list(folder.rglob('executed'))
    return folder/'site'


def test_a_page_for_every_notebook(site):
    found = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    assert found == {'index.html', 'core.html', 'synthetic.html', 'tutorials/coin_toss_to_cvar.html', 'glossary.html',
                     'references.html'}


def test_pages_show_what_functions_take_and_say(site):
    core = (site/'core.html').read_text(encoding='utf-8')
    for text in ('missing folders are made', 'called with the temporary path', 'Write a file through',
                 'raise RuntimeError'):
        assert text in re.sub(r'<[^>]+>|\s+', lambda m: ' ' if m[0].isspace() else '', core), text
    assert 'SyntheticDataset.pixels' in (site/'synthetic.html').read_text(encoding='utf-8')


def pages(site): return {p: p.read_text(encoding='utf-8') for p in site.rglob('*.html')}


def test_pages_need_no_network_and_link_to_each_other(site):
    for page, html in pages(site).items():
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', html)
        links = re.findall(r'<nav class="pages">.*?</nav>', html, re.S)[0]
        targets = re.findall(r'href="([^"]+)"', links)
        assert len(targets) == len(SOME) and all((page.parent/target).resolve().exists() for target in targets)


def dead(page, html):
    "Targets in a page that lead nowhere. Links to notebooks are those that this copy of the project lacks."
    for target in re.findall(r'(?:href|src)="([^"]+)"', html):
        file, _, anchor = target.partition('#')
        if re.match(r'\w+:', target) or file.endswith('.ipynb') or file.startswith('data:'): continue
        other = (page.parent/file).resolve() if file else page
        if not other.exists(): yield target
        elif anchor and other.suffix == '.html':
            if f'id="{anchor}"' not in other.read_text(encoding='utf-8'): yield target


def test_links_lead_somewhere(site):
    some = [t for page, html in pages(site).items() for t in re.findall(r'href="(\.\./glossary.html#[^"]+)"', html)]
    assert len(some) > 3                      # a lesson explains its words
    modules = {p.stem for p in (ROOT/'rdd_nb').glob('*.py')}
    found = [(page, t) for page, html in pages(site).items() for t in dead(page, html)]
    def lacks_page(page, t): return Path(t).stem in modules and not (page.parent/t).exists()   # in this copy
    assert [t for page, t in found if not lacks_page(page, t.partition('#')[0])] == []


def test_the_source_of_a_function_is_linked(site):
    assert 'rdd_nb/core.py' in (site/'core.html').read_text(encoding='utf-8')


def test_mathematics_is_mathml(site):
    html = (site/'tutorials'/'coin_toss_to_cvar.html').read_text(encoding='utf-8')
    assert html.count('<math') > 5 and '$$' not in html and 'MathJax' not in html


def test_a_page_is_small(site):
    assert max(len(html.encode()) for html in pages(site).values()) < 1e6
    assert (site/'search-index.js').stat().st_size < 1e6


def test_the_index_of_the_search_holds_the_words_of_all_pages(site):
    text = (site/'search-index.js').read_text(encoding='utf-8')
    titles, rows = (json.loads(part) for part in re.findall(r' = (.*);$', text, re.M))
    assert {row[0] for row in rows} == set(titles) == {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    [(page, _, anchor, _)] = [r for r in rows if r[1] == 'A third way: a threshold']
    assert f'id="{anchor}"' in (site/page).read_text(encoding='utf-8')
    assert any('opponent' in words.split() for page, _, _, words in rows if page.startswith('tutorials/'))


SEARCH = '''
const box = document.getElementById('search');
document.dispatchEvent(new KeyboardEvent('keydown', {key: '/'}));
const focused = document.activeElement === box;
box.value = 'conditional value at risk';
box.dispatchEvent(new Event('input'));
const found = [...document.querySelectorAll('#found a')].map(a => a.getAttribute('href'));
box.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}));
const moved = document.activeElement === document.querySelector('#found a');
box.value = 'zzzz';
box.dispatchEvent(new Event('input'));
return {focused, found, moved, none: document.querySelector('#found').innerText};'''

LAYOUT = '''
const loose = [...document.querySelectorAll('body *')].filter(e => !e.closest('pre, table, math, .sourceCode'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1);
return {scroll: document.documentElement.scrollWidth, loose: loose.map(e => e.tagName + ' ' + e.className),
  background: getComputedStyle(document.documentElement).backgroundColor,
  nav: getComputedStyle(document.querySelector('nav.pages')).display,
  broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
  images: document.images.length};'''

in_browser = pytest.mark.skipif(bool(ABSENT), reason=f'no {ABSENT} here; search and layout are not checked')


@in_browser
def test_search_by_keyboard(site, browser):
    browser.show((site/'tutorials'/'coin_toss_to_cvar.html').as_uri())
    found = browser.run(SEARCH)
    assert found['focused'] and found['moved'] and found['none'] == 'Nothing found'
    assert any('glossary.html#cvar' in f or 'coin_toss' in f for f in found['found'])
    assert browser.console() == []


@in_browser
@pytest.mark.parametrize('page', ['index.html', 'core.html', 'tutorials/coin_toss_to_cvar.html', 'glossary.html'])
def test_pages_fit_and_load_nothing_else(site, browser, page):
    for width, scheme in ((390, 'dark'), (1280, 'light')):
        browser.show((site/page).as_uri(), width, scheme)
        seen = browser.run(LAYOUT)
        assert seen['scroll'] <= width and seen['loose'] == [] and seen['broken'] == 0
        assert seen['background'] == {'dark': 'rgb(21, 24, 28)', 'light': 'rgb(255, 255, 255)'}[scheme]
        assert browser.console() == []
        assert {u.rpartition('/')[2] for u in browser.requests()} == {Path(page).name, 'search.js', 'search-index.js'}


@in_browser
def test_paper_shows_the_text_only(site, browser):
    browser.show((site/'tutorials'/'coin_toss_to_cvar.html').as_uri(), media='print')
    assert browser.run(LAYOUT)['nav'] == 'none'
