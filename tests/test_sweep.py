"""Sweeps: what a grid means, what is refused, and that a failed or killed run costs only itself."""
import argparse, json, os, signal, subprocess, sys, threading, time, tomllib
from pathlib import Path

import joblib
import pytest
import numpy as np
import torch
from hypothesis import given, strategies as st

from rdd_nb import compare, sweep as module
from rdd_nb.data import from_arrays, split
from rdd_nb.report import read_comparison, to_html
from rdd_nb.sweep import add_command, plan, read_grid, sweep

BASE = dict(seeds=1, ipc=2, networks=1, training=dict(epochs=2, width=4), settings=dict(width=4), also=['random'])


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
    found = plan(dict(seeds=[4, 2], grid=dict(method=['distribution', 'gradient'], risk=['none', 'cvar(0.2)'], risk_at=['target', 'distance'])))
    assert [c['name'] for c in found.cells][::2] == ['distribution', 'distribution cvar(0.2) at target', 'distribution cvar(0.2) at distance',
                                                     'gradient', 'gradient cvar(0.2) at target', 'gradient cvar(0.2) at distance']
    assert [c['seed'] for c in found.cells] == [4, 2] * 6
    by_name = {c['name']: c['method'] for c in found.cells}
    assert by_name['gradient'].risk is None and by_name['gradient'].risk_at is None
    assert by_name['gradient cvar(0.2) at target'].risk_at == 'target'


def test_a_risk_can_be_taken_away_from_a_method_that_has_one():
    m = plan(dict(grid=dict(method='rdd-target', risk='none'))).cells[0]['method']
    assert m.risk is None and m.risk_at is None


def test_combinations_that_cannot_be_are_left_out_with_their_reason():
    found = plan(dict(seeds=1, grid=dict(method='gradient', risk=['cvar(0.2)', 'twolevel(mean, max)'], risk_at=['target', 'distance'])))
    assert len(found.cells) == 3 and len(found.left_out) == 1
    assert found.left_out[0].startswith('gradient twolevel(mean, max) at distance (') and 'left out: ' in repr(found)


def test_several_grids_and_sizes():
    found = plan(dict(seeds=1, ipc=[1, 5], also=['full', 'kmeans'], grid=[dict(method='gradient', lr=[.1]), dict(method='distribution', lr=[1., 5.])]))
    assert [c['name'] for c in found.cells] == ['full', 'kmeans ipc=1', 'kmeans ipc=5'] + [f'{n} ipc={i}' for n in ('gradient lr=0.1', 'distribution lr=1.0', 'distribution lr=5.0') for i in (1, 5)]
    assert [c['ipc'] for c in found.cells][1:3] == [1, 5] and len({c['folder'] for c in found.cells}) == len(found.cells)


@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=5, unique=True))
def test_folders_are_plain_and_different(names):
    slugs = [module._slug(n) for n in names]
    assert len(set(slugs)) == len(slugs)
    assert all('/' not in s and ' ' not in s and s not in ('', '.', '..') for s in slugs)


@pytest.mark.parametrize('text, said', [
    ('seeds = [0', 'not a TOML file'),
    ('seed = 3', "'seed' is not a key"),
    ('seeds = 0', 'seeds = 0: expected a whole number of at least 1'),
    ('seeds = [-1]', 'seeds = [-1]'),
    ('seeds = true', 'seeds = True'),
    ('ipc = [5, 5]', 'ipc = [5, 5]'),
    ('ipc = 2.5', 'ipc = 2.5'),
    ('networks = 0', 'networks = 0'),
    ('on = "train"', "on = 'train': expected 'test' or 'val'"),
    ('also = "full"', "also = 'full': expected a list"),
    ('also = ["ful"]', "also: 'ful' is not known"),
    ('data = 3', '[data]: expected a table, got 3'),
    ('[data]\nnam = "digits"', "[data]: 'nam' is not a key; the keys are name"),
    ('[training]\nepochs = 0', '[training]: epochs=0'),
    ('[training]\nepochs = "many"', '[training]: epochs='),
    ('[settings]\nsteps = -1\n[grid]\nmethod = "gradient"', 'steps=-1'),
    ('[settings]\nstep = 1\n[grid]\nmethod = "gradient"', "[settings]: 'step' is not a key"),
    ('[risks]\ntail = "cvar(2)"', "[risks]: tail = 'cvar(2)'"),
    ('[grid]\nrisk = "max"', "[grid]: 'method' is missing"),
    ('[grid]\nmethod = []', '[grid]: method is an empty list'),
    ('[grid]\nmethod = "gradient"\nrisk = "cvar(0.2)"', "risk = 'cvar(0.2)' cannot be used"),
    ('[grid]\nmethod = "gradient"\nrisk = ["none", "worst"]\nrisk_at = "target"', "risk = 'worst' cannot be used"),
    ('[grid]\nmethod = "gradient"\nobjective = "x"', "'objective' is not a key"),
    ('[[grid]]\nmethod = "gradient"\n[[grid]]\nmethod = "gradeint"', "[[grid]] number 2: method = 'gradeint' cannot be used"),
    ('', 'nothing to do'),
])
def test_mistakes_are_one_line_that_names_the_key(text, said, tmp_path):
    path = tmp_path/'grid.toml'
    path.write_text(text)
    with pytest.raises(ValueError) as e: read_grid(path)
    assert said in str(e.value) and '\n' not in str(e.value) and str(e.value).startswith(str(path))


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
    with pytest.raises(ValueError, match='all 1 runs failed'): run(GRID | dict(also=[], grid=dict(method='distribution', steps=3, lr=1e38)), splits, tmp_path/'out')


def test_finished_cells_are_read_and_a_grid_may_grow(splits, tmp_path, monkeypatch):
    asked = BASE | dict(grid=dict(method='distribution', steps=[1, 2]))
    first = run(asked, splits, tmp_path/'out')
    done, made = [], compare.distill
    monkeypatch.setattr(compare, 'distill', lambda *a, **kw: (done.append(kw['label']), made(*a, **kw))[1])
    second = run(asked | dict(seeds=2, grid=dict(method='distribution', steps=[1, 2, 3])), splits, tmp_path/'out', resume=True)
    assert sorted(done) == ['distribution steps=1', 'distribution steps=2', *['distribution steps=3'] * 2, 'random']   # seed 1, and steps=3 for both
    assert len(second['rows']) == 2 * 4
    same = {(r['method'], r['seed']): r for r in second['rows']}
    assert all(same[r['method'], r['seed']] == r for r in first['rows'])


def test_what_all_cells_share_has_to_stay(splits, tmp_path):
    run(BASE, splits, tmp_path/'out')
    with pytest.raises(ValueError, match='already holds this comparison'): run(BASE, splits, tmp_path/'out')
    with pytest.raises(ValueError, match='another networks'): run(BASE | dict(networks=2), splits, tmp_path/'out', resume=True)
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'thesis.tex').write_text('x')
    with pytest.raises(ValueError, match='is not empty'): run(BASE, splits, tmp_path/'other')
    assert [p.name for p in (tmp_path/'other').iterdir()] == ['thesis.tex']


def test_impossible_sizes_are_refused_before_anything_is_written(splits, tmp_path):
    with pytest.raises(ValueError, match='ipc=1000 is more than'): run(BASE | dict(ipc=1000), splits, tmp_path/'out')
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('backend, where', [('threading', 'elsewhere'), ('sequential', 'here')])
def test_the_backend_of_the_user_runs_the_cells(splits, tmp_path, monkeypatch, backend, where):
    "Whatever joblib is told to use; what the cells leave is the same."
    seen, attempt = [], compare._attempt
    monkeypatch.setattr(compare, '_attempt', lambda *args: (seen.append(threading.current_thread() is threading.main_thread()), attempt(*args))[1])
    with joblib.parallel_config(backend, n_jobs=2): found = sweep(plan(BASE | dict(seeds=2)), tmp_path/'out', device='cpu', progress=False, splits=splits)
    assert seen == [where == 'here'] * 2 and [r['seed'] for r in found['rows']] == [0, 1]


# The command

def parsed(*args):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(['sweep', *map(str, args)])


def save_arrays(path):
    "120 images in three classes, as a user's own .npz file."
    y = np.arange(3).repeat(40)
    np.savez(path, x=np.random.default_rng(0).random((120, 8, 8), dtype=np.float32), y=y)


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('grid.toml').write_text('seeds = 2\nalso = ["kmeans"]\n')
    a = parsed('grid.toml', '--dry-run')
    a.do(a)
    assert '2 runs: 1 methods x 2 seeds' in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ['grid.toml']


def test_the_command_loads_runs_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('mine.toml').write_text('seeds = 1\nipc = 1\nnetworks = 1\nalso = ["kmeans"]\n[data]\nname = "mine.npz"\n[training]\nepochs = 1\nwidth = 4\n')
    save_arrays('mine.npz')
    a = parsed('mine.toml', '--jobs', 1, '--device', 'cpu')
    a.do(a)
    assert json.loads(Path('mine-sweep/report.json').read_text())['config']['source'] == dict(name='mine.npz', shift='none', share=.1, data_seed=0)
    assert 'mine-sweep/report.html' in capsys.readouterr().out and Path('mine-sweep/report.html').is_file()


def test_a_failure_is_in_the_exit_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_arrays('mine.npz')
    Path('grid.toml').write_text('seeds = 1\nipc = 2\nnetworks = 1\nalso = ["random"]\n[data]\nname = "mine.npz"\n[training]\nepochs = 1\nwidth = 4\n[settings]\nwidth = 4\n[grid]\nmethod = "distribution"\nsteps = 3\nlr = 1e38\n')
    a = parsed('grid.toml', '--jobs', 1, '--device', 'cpu')
    with pytest.warns(UserWarning, match='failed'), pytest.raises(ValueError, match='1 of 2 runs failed, the first in grid-sweep/runs/'): a.do(a)
    assert Path('grid-sweep/report.html').is_file()


def test_a_killed_sweep_goes_on(tmp_path):
    "Killed in the middle, the rest of it gives what an undisturbed sweep gives."
    grid = tmp_path/'grid.toml'
    grid.write_text('seeds = 2\nipc = 1\nnetworks = 1\nalso = ["random", "kmeans"]\n[data]\nname = "digits"\n[training]\nepochs = 1\nwidth = 4\n')
    def start(out, *more):
        script = f'import argparse; from rdd_nb.sweep import add_command; p = argparse.ArgumentParser(); add_command(p.add_subparsers()); a = p.parse_args(); a.do(a)'
        return subprocess.Popen([sys.executable, '-c', script, 'sweep', str(grid), '--out', str(out), '--jobs', '1', '--device', 'cpu', *more], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = start(tmp_path/'a')
    until = time.time() + 120
    while not list((tmp_path/'a').glob('runs/*/report.json')) and first.poll() is None and time.time() < until: time.sleep(.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path/'a'/'report.json').exists()
    second = start(tmp_path/'a', '--resume')
    said = second.communicate(timeout=240)[1]
    assert second.returncode == 0, said
    whole = sweep(grid, tmp_path/'b', device='cpu', jobs=1, progress=False)
    rows = json.loads((tmp_path/'a'/'report.json').read_text())['rows']
    timed = ('seconds', 'peak_mb', 'evaluation_seconds', 'evaluation_peak_mb')
    assert [{k: v for k, v in r.items() if k not in timed} for r in rows] == [{k: v for k, v in r.items() if k not in timed} for r in whole['rows']]
