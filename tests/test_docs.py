"The HTML pages are built, without executing what stands in the notebooks."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOME = ['index.ipynb', '00_core.ipynb', '40_synthetic.ipynb', 'tutorials/25_cvar_training_loop.ipynb']
BOMB = dict(cell_type='code', id='bomb', metadata={}, outputs=[], execution_count=None,
            source=['import os\n', 'open("executed", "w").close()\n', 'raise RuntimeError("executed")'])


def project(folder):
    "A copy of the project with some notebooks, each with a cell that must not run."
    for name in SOME:
        nb = json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))
        nb['cells'].insert(len(nb['cells']) - 2, BOMB)
        (folder/'nbs'/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/'nbs'/name).write_text(json.dumps(nb), encoding='utf-8')
    for path in ('settings.ini', 'nbs/styles.css'): shutil.copy(ROOT/path, folder/path)
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
    assert found == {'index.html', 'core.html', 'synthetic.html', 'tutorials/cvar_training_loop.html'}


def test_pages_show_what_functions_take_and_say(site):
    core = (site/'core.html').read_text(encoding='utf-8')
    for text in ('missing folders are made', 'called with the temporary path', 'Write a file through',
                 'raise RuntimeError'):
        assert text in re.sub(r'<[^>]+>|\s+', lambda m: ' ' if m[0].isspace() else '', core), text
    assert 'SyntheticDataset.pixels' in (site/'synthetic.html').read_text(encoding='utf-8')


def test_pages_need_no_network_and_link_to_each_other(site):
    for page in site.rglob('*.html'):
        html = page.read_text(encoding='utf-8')
        assert '<nav class="pages">' in html and not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', html)
        links = re.findall(r'<nav class="pages">.*?</nav>', html, re.S)[0]
        assert all((page.parent/target).resolve().exists() for target in re.findall(r'href="([^"]+)"', links))
