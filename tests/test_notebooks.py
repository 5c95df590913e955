"""Every notebook runs, and exporting and cleaning them leaves no difference."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))
RUN = [p for p in NOTEBOOKS if 'assignments' not in p.parts]   # see test_assignments.py
TUTORIALS = [p for p in NOTEBOOKS if 'tutorials' in p.parts]


def name(path): return path.relative_to(ROOT/'nbs').as_posix()


def environment():
    "That of a user's notebook, without a display and on one thread."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MPLBACKEND')} | {'OMP_NUM_THREADS': '1'}
    return env | ({'RDD_NB_DATA': str(Path(env['RDD_NB_DATA']).absolute())} if env.get('RDD_NB_DATA') else {})


def tool(command, *args, cwd):
    "Run one of nbdev's commands as a user would."
    done = subprocess.run([Path(sys.executable).parent / command, *args], cwd=cwd, env=environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Imports the libraries once and tests every notebook in a fork: half of the time of a process for each. Reads the path
# of a notebook, flags and the path of a file for what is printed, as JSON; answers with the exit code.
SERVER = r'''
import json, os, sys, traceback
import joblib, matplotlib.pyplot, pandas, scipy.optimize, scipy.stats, sklearn.cluster, sklearn.ensemble
import sklearn.linear_model, torch.func, torchvision
from nbdev.test import nbdev_test

for line in sys.stdin:
    path, flags, printed = json.loads(line)
    pid = os.fork()
    if not pid:
        code, out = 1, os.open(printed, os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        try: code = nbdev_test.__wrapped__(path, flags, n_workers=0) or 0
        except BaseException: traceback.print_exc()
        finally: sys.stdout.flush(), sys.stderr.flush(), os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


@pytest.fixture(scope='session')
def server():
    if sys.platform != 'linux': yield None; return
    p = subprocess.Popen([sys.executable, '-c', SERVER], cwd=ROOT, env=environment(), text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield p
    p.kill()


# the long ones first, so that no worker is left with one at the end
@pytest.mark.parametrize('path', sorted(RUN, key=lambda p: p not in TUTORIALS), ids=name)
def test_notebook_runs(path, server, tmp_path):
    flags, printed = 'data' if os.environ.get('RDD_NB_DATA') else '', tmp_path/'printed'
    if server is None: said = tool('nbdev_test', '--path', path, '--n_workers', '0', '--flags', flags, cwd=ROOT)
    else:
        print(json.dumps([str(path), flags, str(printed)]), file=server.stdin, flush=True)
        code, said = server.stdout.readline(), printed.read_text(encoding='utf-8')
        assert code == '0\n', said
    assert 'Success.' in said


def test_a_notebook_that_fails_is_noticed(server, tmp_path):
    if server is None: pytest.skip('the server of this file runs on Linux')
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source='assert 1 == 2')
    path = tmp_path/'wrong.ipynb'
    path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    print(json.dumps([str(path), '', str(tmp_path/'printed')]), file=server.stdin, flush=True)
    assert server.stdout.readline() == '1\n' and 'AssertionError' in (tmp_path/'printed').read_text()


def test_package_is_what_the_notebooks_export(tmp_path):
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs')
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'rdd_nb').mkdir()
    tool('nbdev_export', cwd=tmp_path)
    ours, exported = ({p.name: p.read_text(encoding='utf-8')
                       for p in (root / 'rdd_nb').glob('*.py')} for root in (ROOT, tmp_path))
    assert ours.keys() == exported.keys()
    assert [f for f in ours if ours[f] != exported[f]] == [], 'run nbdev_export'


def test_notebooks_are_clean(tmp_path):
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs')
    shutil.copy(ROOT/'settings.ini', tmp_path)
    tool('nbdev_clean', cwd=tmp_path)
    changed = [name(p) for p in NOTEBOOKS if p.read_bytes() != (tmp_path/p.relative_to(ROOT)).read_bytes()]
    assert changed == [], 'run nbdev_clean'


def outputs(path):
    return [out for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] for out in cell.get('outputs', [])]


def texts(out):
    "The pieces of a stored output that are text."
    data = out.get('data', {})
    return [''.join(out.get('text', ''))] + [''.join(v) for k, v in data.items() if k.startswith('text/')]


def test_tutorials_have_stored_outputs():
    assert TUTORIALS
    assert [name(p) for p in TUTORIALS if not outputs(p)] == [], 'run tools/run_notebooks.py'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_stored_outputs_are_presentable(path):
    for out in outputs(path):
        assert out['output_type'] != 'error'
        assert out.get('name') != 'stderr', texts(out)
        for text in texts(out):
            # pictures inside HTML are base64, which can contain anything
            found = re.search(r'(?<![\w.:/])/(home|Users|root|tmp|work|var/folders)/\S*',
                              re.sub(r'base64,[\w+/=\s]+', '', text))
            assert not found, f'a path of one machine in a stored output: {found}'
