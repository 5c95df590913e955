"""Comparisons and sweeps: what a grid means, what is refused, and that a failed or killed run costs only itself."""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import joblib
import pytest
import numpy as np
import torch
from hypothesis import given, strategies as st

from rdd_nb import commands, compare
from rdd_nb.data import from_arrays, split
from rdd_nb.report import read_comparison, to_html
from rdd_nb.sweep import plan, read_grid, settle, sweep

BASE = dict(seeds=1, ipc=2, networks=1, training=dict(epochs=2, width=4), also=['random'])


@pytest.fixture(scope='module')
def splits():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat_interleave(40)
    x = (torch.rand(120, 1, 8, 8, generator=g) + y.view(-1, 1, 1, 1) / 3).clamp(0, 1.7) / 1.7
    return split(from_arrays(x, y, group=torch.arange(120) % 5 // 4, name='made up'), .2, .25)


def run(asked, splits, out, **kw):
    return sweep(plan(asked), out, device='cpu', jobs=1, progress=False, splits=splits, **kw)


# The plan

def test_every_combination_once_and_in_order():
    found = plan(dict(seeds=[4, 2], grid=dict(method=['distribution', 'gradient'], risk=['none', 'cvar(0.2)'],
        risk_at=['target', 'distance'])))
    assert [c['name'] for c in found.runs][::2] == ['distribution', 'distribution cvar(0.2) at target',
        'distribution cvar(0.2) at distance',
                                                     'gradient', 'gradient cvar(0.2) at target',
                                                         'gradient cvar(0.2) at distance']
    assert [c['seed'] for c in found.runs] == [4, 2] * 6
    by_name = {c['name']: c['method'] for c in found.runs}
    assert by_name['gradient'].risk is None and by_name['gradient'].risk_at is None
    assert by_name['gradient cvar(0.2) at target'].risk_at == 'target'


def test_a_risk_can_be_taken_away_from_a_method_that_has_one():
    m = plan(dict(grid=dict(method='rdd-target', risk='none'))).runs[0]['method']
    assert m.risk is None and m.risk_at is None


def test_combinations_that_cannot_be_are_left_out_with_their_reason():
    found = plan(dict(seeds=1, grid=dict(method='gradient', risk=['cvar(0.2)', 'twolevel(mean, max)'],
        risk_at=['target', 'distance'])))
    assert len(found.runs) == 3 and len(found.left_out) == 1
    assert found.left_out[0].startswith('gradient twolevel(mean, max) at distance (') and 'left out: ' in repr(found)


def test_several_grids_and_sizes():
    found = plan(dict(seeds=1, ipc=[1, 5], also=['full', 'kmeans'], grid=[dict(method='gradient', lr=[.1]),
        dict(method='distribution', lr=[1., 5.])]))
    assert [c['name'] for c in found.runs] == ['full', 'kmeans ipc=1', 'kmeans ipc=5'] + [f'{n} ipc={i}'
        for n in ('gradient lr=0.1', 'distribution lr=1.0', 'distribution lr=5.0') for i in (1, 5)]
    assert [c['ipc'] for c in found.runs][1:3] == [1, 5] and len({c['folder'] for c in found.runs}) == len(found.runs)


@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=5, unique=True))
def test_folders_are_plain_and_different(names):
    slugs = [compare.slug(n) for n in names]
    assert len(set(slugs)) == len(slugs)
    assert all('/' not in s and ' ' not in s and s[0] not in '.-' and len(s) < 80 for s in slugs)


def test_dotted_keys_change_one_setting_of_a_part(monkeypatch):
    "`network.width` reaches `as_method` as a table, after the part itself."
    asked = []
    monkeypatch.setattr('rdd_nb.sweep.as_method', lambda m, **changes: asked.append(changes) or m, raising=True)
    settle('gradient', {'network.width': 8, 'network': 'mlp', 'steps': 3, 'batch.size': 2})
    assert asked == [dict(network='mlp'), dict(steps=3, network=dict(width=8), batch=dict(size=2))]


def test_a_file_from_windows(tmp_path):
    "With a byte order mark."
    (tmp_path/'grid.toml').write_bytes(b'\xef\xbb\xbfalso = ["kmeans"]')
    assert [r['name'] for r in read_grid(tmp_path/'grid.toml').runs] == ['kmeans'] * 3


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no such file'): read_grid(tmp_path/'grid.toml')


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path/'grid.toml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='not a TOML file'): read_grid(tmp_path/'grid.toml')


# The runs

GRID = BASE | dict(grid=dict(method='distribution', steps=3, lr=[1., 1e38]))


def test_a_failed_run_is_kept_and_the_rest_goes_on(splits, tmp_path):
    with pytest.warns(UserWarning, match='lr=1e.38 seed 0 failed'): report = run(GRID, splits, tmp_path/'out')
    assert [r['method'] for r in report['rows']] == ['random', 'distribution steps=3 lr=1.0']
    (failed,) = report['failed']
    kept = tmp_path/'out'/failed['file']
    assert 'Traceback' in kept.read_text() and failed['error'].startswith('ValueError: ')
    page = to_html(read_comparison(tmp_path/'out'))
    assert 'failed' in page and 'distribution steps=3 lr=1e+38' in page
    assert (tmp_path/'out'/'report.md').is_file() and (tmp_path/'out'/'grid.toml').is_file()


def test_a_failed_run_is_tried_again(splits, tmp_path, monkeypatch):
    right = compare.evaluate

    def wrong(source, *args, **kw):
        if source.provenance['method'].startswith('dist'): raise MemoryError('no more of it')
        return right(source, *args, **kw)
    monkeypatch.setattr(compare, 'evaluate', wrong)
    asked = BASE | dict(grid=dict(method='distribution', steps=2))
    with pytest.warns(UserWarning, match='MemoryError: no more of it'): first = run(asked, splits, tmp_path/'out')
    assert len(first['failed']) == 1
    monkeypatch.setattr(compare, 'evaluate', right)
    second = run(asked, splits, tmp_path/'out', resume=True)
    assert 'failed' not in second and len(second['rows']) == 2
    assert not list((tmp_path/'out').rglob('error.txt'))


def test_where_nothing_worked_there_is_one_line(splits, tmp_path):
    asked = GRID | dict(also=[], grid=dict(method='distribution', steps=3, lr=1e38))
    with pytest.raises(ValueError, match='all 1 runs failed'): run(asked, splits, tmp_path/'out')


def test_finished_runs_are_read_and_a_grid_may_grow(splits, tmp_path, monkeypatch):
    asked = BASE | dict(grid=dict(method='distribution', steps=[1, 2]))
    first = run(asked, splits, tmp_path/'out')
    done, made = [], compare.distill
    monkeypatch.setattr(compare, 'distill', lambda *a, **kw: (done.append(kw['label']), made(*a, **kw))[1])
    more = asked | dict(seeds=2, grid=dict(method='distribution', steps=[1, 2, 3]))
    second = run(more, splits, tmp_path/'out', resume=True)
    assert sorted(done) == ['distribution steps=1', 'distribution steps=2', *['distribution steps=3'] * 2, 'random']
    assert len(second['rows']) == 2 * 4
    same = {(r['method'], r['seed']): r for r in second['rows']}
    assert all(same[r['method'], r['seed']] == r for r in first['rows'])


def test_what_did_not_change_is_kept(splits, tmp_path):
    "Another recipe keeps the distilled sets; other settings of a method are another folder; other data are refused."
    out, asked = tmp_path/'out', BASE | dict(grid=dict(method='distribution', steps=2))
    run(asked, splits, out)
    with pytest.raises(ValueError, match='already holds this comparison'): run(asked, splits, out)
    sets = {p: p.stat().st_mtime_ns for p in out.rglob('synthetic.safetensors')}
    again = run(asked | dict(training=dict(epochs=3, width=4)), splits, out, resume=True)
    assert [r['training']['epochs'] for r in again['rows']] == [3, 3]
    other = run(asked | dict(settings=dict(lr=2.)), splits, out, resume=True)
    assert {p: p.stat().st_mtime_ns for p in sets} == sets and len(list(out.rglob('synthetic.safetensors'))) == 3
    assert len(other['rows']) == 2
    changed = type(splits)(splits.train.subset(torch.arange(len(splits.train)).flip(0)), splits.val, splits.test)
    with pytest.raises(ValueError, match='another train_hash'): run(asked, changed, out, resume=True)


def test_folders_of_others_are_left_alone(splits, tmp_path):
    (tmp_path/'thesis.tex').write_text('x')
    with pytest.raises(ValueError, match='is not empty'): run(BASE, splits, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_everything_is_checked_before_anything_is_written(splits, tmp_path):
    "What the last network would meet is found before the first step."
    for change, said in [(dict(training=dict(model='resnet')), 'resnet'),
        (dict(training=dict(augment='flipp')), 'flipp'),
                         (dict(training=dict(epochs=10**22)), 'epochs')]:
        with pytest.raises(ValueError, match=said): run(BASE | change, splits, tmp_path/'out')
    for change, said in [(dict(jobs=0), 'jobs=0'), (dict(jobs=1.5), 'jobs=1.5'), (dict(seeds=[]), 'seeds'),
        (dict(seeds=[1.5]), 'seeds=1.5'),
                         (dict(networks=0), 'networks=0'), (dict(on='train'), 'on='), (dict(methods=[]), 'methods'),
                             (dict(ipc=99), 'ipc=99'),
                         (dict(methods={'': 'random'}), 'method name'), (dict(methods={3: 'random'}), 'method name'),
                             (dict(out=''), "out=''")]:
        settings = dict(methods=['random'], seeds=[0], out=tmp_path/'out', device='cpu') | change
        with pytest.raises(ValueError, match=said): compare.compare(splits, **settings)
    assert not list(tmp_path.iterdir())


def test_names_cannot_lead_outside(splits, tmp_path):
    options = dict(ipc=1, training=compare.Training(epochs=1, width=4), networks=1, device='cpu', jobs=1,
        progress=False)
    names = ['../../evil', '..', '/', 'a/b', '.hidden', '-rf', 'x' * 300]
    found = compare.compare(splits, {n: compare.as_method('random') for n in names}, [0], tmp_path/'a'/'b', **options)
    assert [r['method'] for r in found['rows']] == names
    assert [p.name for p in tmp_path.iterdir()] == ['a'] and [p.name for p in (tmp_path/'a').iterdir()] == ['b']
    assert len(list((tmp_path/'a'/'b'/'runs').iterdir())) == len(names)


def test_impossible_sizes_are_refused_before_anything_is_written(splits, tmp_path):
    with pytest.raises(ValueError, match='ipc=1000 is more than'): run(BASE | dict(ipc=1000), splits, tmp_path/'out')
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('backend, where', [('threading', 'elsewhere'), ('sequential', 'here')])
def test_the_backend_of_the_user_runs_everything(splits, tmp_path, monkeypatch, backend, where):
    "Whatever joblib is told to use; what the runs leave is the same."
    seen, attempt = [], compare._attempt
    def watched(*args):
        seen.append(threading.current_thread() is threading.main_thread())
        return attempt(*args)
    monkeypatch.setattr(compare, '_attempt', watched)
    with joblib.parallel_config(backend, n_jobs=2):
        found = sweep(plan(BASE | dict(seeds=2)), tmp_path/'out', device='cpu', progress=False, splits=splits)
    assert seen == [where == 'here'] * 2 and [r['seed'] for r in found['rows']] == [0, 1]


# The command

SMALL = """ipc = 1
networks = 1
[data]
name = "mine.npz"
[training]
epochs = 1
width = 4
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder with 120 images in three classes, as a user's own .npz file."
    monkeypatch.chdir(tmp_path)
    y = np.arange(3).repeat(40)
    np.savez('mine.npz', x=np.random.default_rng(0).random((120, 8, 8), dtype=np.float32), y=y)
    return tmp_path


def test_dry_run_writes_nothing(here, capsys):
    Path('grid.toml').write_text('seeds = 2\nalso = ["kmeans"]\n' + SMALL)
    commands.sweep('grid.toml', dry_run=True)
    assert '2 runs: 1 methods x 2 seeds' in capsys.readouterr().out
    assert {p.name for p in here.iterdir()} == {'grid.toml', 'mine.npz'}


def test_the_command_loads_runs_and_reports(here, capsys):
    Path('mine.toml').write_text('seeds = 1\nalso = ["kmeans"]\n' + SMALL)
    commands.sweep('mine.toml', jobs=1, device='cpu')
    source = json.loads(Path('mine-sweep/report.json').read_text())['config']['source']
    assert source == dict(name='mine.npz', shift='none', share=.1, data_seed=0)
    assert 'mine-sweep/report.html' in capsys.readouterr().out and Path('mine-sweep/report.html').is_file()


def test_a_failure_is_in_the_exit_of_the_command(here):
    grid = '[grid]\nmethod = "distribution"\nsteps = 3\nlr = 1e38\n'
    Path('grid.toml').write_text('seeds = 1\nalso = ["random"]\n' + SMALL + grid)
    said = '1 of 2 runs failed, the first in grid-sweep/runs/'
    with pytest.warns(UserWarning, match='failed'), pytest.raises(ValueError, match=said):
        commands.sweep('grid.toml', jobs=1, device='cpu')
    assert Path('grid-sweep/report.html').is_file()


# Processes

COMMAND = [sys.executable, '-c', 'import sys; from rdd_nb.cli import main; sys.exit(main())']
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(compare.__file__).parents[1])}
TIMED = ('seconds', 'peak_mb', 'evaluation_seconds', 'evaluation_peak_mb')
LONG = '[grid]\nmethod = "distribution"\nsteps = 100000\n'


def start(*argv):
    return subprocess.Popen([*COMMAND, 'sweep', *map(str, argv), '--device', 'cpu'], env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, process=None, seconds=240):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until and (process is None or process.poll() is None), process and process.communicate()
        time.sleep(.05)


def workers(pid):
    "Processes that joblib started for the process `pid`."
    def parent(p): return int(p.read_text().rpartition(')')[2].split()[1])
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if parent(p/'stat') == pid and b'LokyProcess' in (p/'cmdline').read_bytes(): found.append(int(p.name))
        except OSError: pass
    return found


def alive(pids):
    "Those that still run; a zombie does not."
    def state(p):
        try: return Path(f'/proc/{p}/stat').read_text().rpartition(')')[2].split()[0]
        except OSError: return 'Z'
    return [p for p in pids if state(p) not in 'ZX']


def rows(folder): return [{k: v for k, v in r.items() if k not in TIMED}
    for r in json.loads((folder/'report.json').read_text())['rows']]


needs_proc = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks at processes through /proc')


@needs_proc
@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_stopped_sweep(here, how):
    """However it is stopped: SIGTERM ends like Ctrl-C, and after SIGKILL the workers notice within a second or two.
    There are never more of them than there is work, or cores."""
    Path('grid.toml').write_text('seeds = 3\n' + SMALL + LONG)
    p, expected = start('grid.toml', '--out', 'out', '--jobs', 1000), min(3, joblib.cpu_count())
    wait_for(lambda: len(list(Path('out/runs').glob('.*.begun'))) == expected, p)
    own = workers(p.pid)
    assert len(own) == expected
    p.send_signal(how)
    _, err = p.communicate(timeout=60)
    if how == signal.SIGTERM: assert p.returncode == 130 and '--resume' in err.splitlines()[-1], err
    assert 'Traceback' not in err, err
    wait_for(lambda: not alive(own), seconds=30)


@needs_proc
def test_a_killed_worker_is_a_failed_run_and_the_others_go_on(here):
    Path('grid.toml').write_text('seeds = 2\nalso = ["random", "kmeans"]\n' + SMALL + LONG)
    p = start('grid.toml', '--out', 'out', '--jobs', 2)
    wait_for(lambda: len(list(Path('out/runs').glob('.*.begun'))) == 2, p)       # the two long runs go first
    os.kill(workers(p.pid)[0], signal.SIGKILL)
    _, err = p.communicate(timeout=240)
    report = json.loads(Path('out/report.json').read_text())
    assert p.returncode == 2 and '2 of 6 runs failed' in err.splitlines()[-1] and 'Traceback' not in err, err
    assert [r['method'] for r in report['rows']] == ['random', 'random', 'kmeans', 'kmeans']
    assert {f['error'] for f in report['failed']} == {compare.LOST}
    assert not list(Path('out/runs').glob('.*'))


def test_a_killed_sweep_goes_on(here):
    "Killed in the middle, the rest of it gives what an undisturbed sweep gives."
    Path('grid.toml').write_text('seeds = 2\nalso = ["random", "kmeans"]\n' + SMALL)
    first = start('grid.toml', '--out', 'a', '--jobs', 1)
    wait_for(lambda: list(Path('a').glob('runs/*/report.json')) or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = start('grid.toml', '--out', 'a', '--jobs', 1, '--resume')
    said = second.communicate(timeout=240)[1]
    assert second.returncode == 0, said
    sweep('grid.toml', here/'b', device='cpu', jobs=1, progress=False)
    assert rows(here/'a') == rows(here/'b')


MINE = """
import torch
from rdd_nb.risk import Risk

class Worst2(Risk):
    "The mean of the two largest losses."
    def _weights(self, l, p): return torch.zeros_like(l).scatter(-1, l.topk(2).indices, .5)

def zeros(y, prediction, group): return (prediction == 0).mean()
"""


def test_parts_of_a_users_file_reach_the_workers(here):
    "A risk and a metric, in two processes, then resumed and grown; without the file the name is unknown."
    Path('mine.py').write_text(MINE)
    grid = '[grid]\nmethod = "distribution"\nsteps = 2\nrisk = "worst2"\nrisk_at = "target"\n'
    Path('grid.toml').write_text('seeds = 2\n' + SMALL + grid)
    with pytest.raises(ValueError, match='worst2'): sweep('grid.toml', here/'out', device='cpu', progress=False)
    assert not Path('out').exists()
    mine = '--parts', 'mine.py', '--metrics', 'zeros'
    first = start('grid.toml', '--out', 'out', '--jobs', 2, *mine)
    said = first.communicate(timeout=240)[1]
    assert first.returncode == 0, said
    before = rows(here/'out')
    Path('grid.toml').write_text('seeds = 3\n' + SMALL + grid)
    second = start('grid.toml', '--out', 'out', '--jobs', 1, *mine, '--resume')
    said = second.communicate(timeout=240)[1]
    assert second.returncode == 0 and rows(here/'out')[:2] == before and len(rows(here/'out')) == 3, said
    assert 'Worst2()' in Path('out/config.json').read_text()
    confusion = np.array(before[0]['confusion'])
    assert before[0]['metrics'] == {'zeros': pytest.approx(confusion[:, 0].sum() / confusion.sum())}
    assert 'zeros' in Path('out/report.md').read_text()
