"""The project around the notebooks: who imports whom, the README and its commands, the wheel."""
import ast, os, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CONFIG['DEFAULT']
MODULES = {p.stem: p.read_text(encoding='utf-8') for p in (ROOT/'rdd_nb').glob('*.py') if not p.stem.startswith('_')}

# from the top of the house to the ground; a module imports from lower floors only, never from its own
FLOORS = [
    'cli', 'commands', 'sweep sites', 'report', 'report_images compare merge collocation',
    'findings auto distributed estimate',
    'distill runs surrogates evaluation', 'methods training tasks pinn',
    'bilevel trajectory moments teacher foreign blocks',
    'matching synthetic metrics regression sources equations plots', 'clustering', 'shifts coresets tabular hands_on',
    'data tables learners models augment corruptions intervals kmeans risk priors spectral', 'cvar',
    'parts rows profiling',
    'core pictures lending'
]
HEIGHT = {module: -depth for depth, floor in enumerate(FLOORS) for module in floor.split()}


# Imports

def imported(source):
    "Dotted names of everything that `source` imports, at any place; `from a import b` gives `a.b`."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['rdd_nb' if node.level else None, node.module]))
            yield from (f'{base}.{alias.name}' for alias in node.names)


def climbs(modules):
    "Imports between `modules`, a dict of name to source, that do not go down."
    return [f'{name} imports {other}' for name, source in modules.items()
            for other in sorted({dotted.split('.')[1] for dotted in imported(source) if dotted.startswith('rdd_nb.')})
            if other in HEIGHT and HEIGHT[other] >= HEIGHT[name]]


def test_imports_go_down():
    assert MODULES.keys() <= HEIGHT.keys(), 'give the new module a floor'
    assert climbs(MODULES) == []


@pytest.mark.parametrize('source, found', [
    ('from rdd_nb.models import ConvNet', 'risk imports models'),   # the same floor
    ('def f():\n    from .distill import distill', 'risk imports distill'),
    ('from . import cli', 'risk imports cli'),
    ('import numpy, rdd_nb.report as r', 'risk imports report'),
    ('from rdd_nb import core, plots', 'risk imports plots'),
])
def test_an_import_that_goes_up_is_found(source, found):
    assert climbs({'risk': source, 'core': 'import torch'}) == [found]


def test_imports_that_go_down_are_fine():
    assert climbs({'risk': 'from rdd_nb.core import generator', 'cli': 'from . import report'}) == []


def test_imports_are_declared():
    "The package imports the standard library, itself and its runtime requirements; in particular never nbdev."
    names = re.findall(r'(?:^|\s)([\w-]+)', CFG['requirements'])
    allowed = {'scikit-learn': 'sklearn', 'pillow': 'PIL'}
    allowed = {allowed.get(n, n) for n in names} | set(sys.stdlib_module_names) | {'rdd_nb'}
    assert {f'{module}: {dotted}' for module, source in MODULES.items() for dotted in imported(source)
            if dotted.split('.')[0] not in allowed} == set()


# README

def commands():
    "The commands that README.md shows as shell blocks with a new virtual environment."
    blocks = re.findall(r'^``` ?sh\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)
    return [b.strip() for b in blocks if 'venv' in b]


def test_readme_is_made_from_the_index(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    from make_docs import readme_text
    made = readme_text(ROOT/'nbs'/CFG['readme_nb'])
    assert made == (ROOT/'README.md').read_text(encoding='utf-8'), 'run python tools/make_docs.py --readme'


def test_readme_has_two_commands_of_one_line():
    demo, test = commands()
    assert '\n' not in demo + test
    assert demo.endswith('rdd-nb demo') and '[dev]' in test and 'pytest' in test


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r'\]\(([^)#\s]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert [t for t in targets if ':' not in t and not (ROOT/t).exists()] == []


def test_ci_runs_the_command_of_the_readme():
    shown = subprocess.run([ROOT/'.ci'/'run', '--print'], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == commands()[1]


# The wheel

def build(folder, kind):
    "Build an `sdist` or a `wheel` in `folder` with the setuptools that is installed, without network."
    run = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, '-c', run], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder/'dist'/done.stdout.split()[-1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel built from the sdist, so that what the sdist lacks is missed."
    tmp = tmp_path_factory.mktemp('build')
    for path in ['settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE']:
        shutil.copy(ROOT / path, tmp)
    for path in ['rdd_nb', 'nbs', 'tests']:   # nbs with the solutions of the assignments
        shutil.copytree(ROOT / path, tmp / path, ignore=shutil.ignore_patterns('__pycache__'))
    sdist = build(tmp, 'sdist')
    with tarfile.open(sdist) as packed:
        if hasattr(tarfile, 'data_filter'): packed.extraction_filter = tarfile.data_filter     # not in Python 3.11.2
        packed.extractall(tmp/'unpacked')
    assert not list((tmp/'unpacked').rglob('_source'))
    return zipfile.ZipFile(build(next((tmp/'unpacked').iterdir()), 'wheel'))


def test_wheel_holds_package_and_tutorials(wheel):
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT/'rdd_nb').glob('*.py')}
    expected |= {'rdd_nb/' + p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs'/'tutorials').rglob('*.ipynb')
                 if '.ipynb_checkpoints' not in p.parts}
    release = ROOT/'nbs'/'assignments'/'release'
    expected |= {'rdd_nb/assignments/' + p.relative_to(release).as_posix() for p in release.rglob('*.ipynb')
                 if '.ipynb_checkpoints' not in p.parts}
    files = {f for f in wheel.namelist() if '.dist-info/' not in f}
    assert files == expected
    assert any(f.startswith('rdd_nb/tutorials/') for f in files) and 'rdd_nb/_modidx.py' in files
    assert 'rdd_nb/assignments/1_cvar/1_cvar.ipynb' in files
    assert not any(b'BEGIN SOLUTION' in wheel.read(f) or b'BEGIN HIDDEN' in wheel.read(f) for f in files)


def test_wheel_metadata(wheel):
    info = f"rdd_nb-{CFG['version']}.dist-info"
    meta = message_from_string(wheel.read(f'{info}/METADATA').decode())
    assert (meta['Name'], meta['Version'], meta['Requires-Python']) == ('rdd-nb', CFG['version'], '>=3.11')
    assert meta['License'] == 'Apache-2.0' or meta['License-Expression'] == 'Apache-2.0'
    assert meta.get_payload().strip() == (ROOT/'README.md').read_text(encoding='utf-8').strip()
    requires = meta.get_all('Requires-Dist')
    at_run_time = [r for r in requires if 'extra ==' not in r]
    assert len(at_run_time) == len(CFG['requirements'].split())
    assert len(requires) - len(at_run_time) == len(CFG['dev_requirements'].split())
    assert not any('nbdev' in r or 'execnb' in r for r in at_run_time)
    assert 'rdd-nb = rdd_nb.cli:main' in wheel.read(f'{info}/entry_points.txt').decode()


def test_wheel_works_without_nbdev(wheel, tmp_path):
    wheel.extractall(tmp_path)
    script = f'''
import sys
sys.path.insert(0, {str(tmp_path)!r})
# as if they were not there
sys.modules.update(dict.fromkeys(['nbdev', 'execnb', 'ghapi', 'IPython', 'pytest', 'hypothesis', 'cvxpy']))
from importlib import import_module
for name in {sorted(MODULES)}:
    assert import_module('rdd_nb.' + name).__file__.startswith({str(tmp_path)!r})
sys.argv = ['rdd-nb', '--help']
sys.exit(import_module('rdd_nb.cli').main())
'''
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'demo' in done.stdout


def test_the_installed_package_lends_tutorials_and_assignments(wheel, tmp_path):
    wheel.extractall(tmp_path/'site')
    start = 'import sys; from rdd_nb.cli import main; sys.exit(main())'

    def call(*argv):
        env = os.environ | {'PYTHONPATH': str(tmp_path/'site')}
        return subprocess.run([sys.executable, '-c', start, *argv], cwd=tmp_path, env=env, capture_output=True,
                              text=True)
    for kind in 'tutorial', 'assignment':
        listed = call(kind, 'list')
        names = re.findall(r'^(\S+)$', listed.stdout, re.M)
        assert listed.returncode == 0
        assert len(names) == len([f for f in wheel.namelist() if f.startswith(f'rdd_nb/{kind}s/')])
        assert all(line.strip() for line in listed.stdout.splitlines())
        got = call(kind, 'get', names[0], 'mine')
        assert got.returncode == 0 and (tmp_path/'mine'/f'{names[0]}.ipynb').is_file(), got.stderr
        (mine := tmp_path/'mine'/f'{names[0]}.ipynb').write_text('my work')
        again = call(kind, 'get', names[0], 'mine')
        assert again.returncode == 2 and 'exists already' in again.stderr and mine.read_text() == 'my work'
    assert '1_cvar' in call('assignment', 'get', 'cvar', 'mine').stderr
