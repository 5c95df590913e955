"The commands: real processes from nothing to a report, their figures recomputed, stopped and resumed, and one line for every mistake."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy import stats
from sklearn.datasets import load_digits

from rdd_nb import data
from rdd_nb.sources import load_data
from rdd_nb.cli import DEMO, main, parser
from rdd_nb.distill import METHODS
from rdd_nb.evaluation import Training, train
from rdd_nb.synthetic import SyntheticDataset, load, save

NAMES = ['random', 'k-center', 'kmeans', 'gradient', 'distribution', 'rdd-network', 'rdd-target', 'rdd-distance', 'full']
RUN_FILES = {'synthetic.safetensors', 'config.json', 'metrics.jsonl', 'images.png'}
SMALL_DEMO = ['demo', '--seeds', '1', '--steps', '2', '--epochs', '2', '--networks', '1']
QUICK = ['--ipc', '2', '--steps', '3', '--device', 'cpu']
COMMAND = [sys.executable, '-c', 'import sys; from rdd_nb.cli import main; sys.exit(main())']
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'PYTHONPATH': str(Path(data.__file__).parents[1])}      # the package that is tested, wherever a process starts
COSTS = ('seconds', 'peak_mb', 'evaluation_seconds', 'evaluation_peak_mb')


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    "Runs a command in this process, inside an empty folder: exit code, standard output, standard error."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)      # `main` replaces it
    def run(*argv):
        capsys.readouterr()
        try: code = main([str(a) for a in argv])
        except SystemExit as e: code = e.code
        out, err = capsys.readouterr()
        return code, out, err
    return run


def npz(path='toy.npz', n=60, **arrays):
    rng = np.random.default_rng(0)
    np.savez(path, **dict(x=rng.random((n, 8, 8)), y=np.arange(n) % 3) | arrays)
    return path


def refused(result, *words):
    "Exit code 2 and one line on standard error with these words."
    code, _, err = result
    assert code == 2 and err.startswith('rdd-nb: ') and err.count('\n') == 1 and err.endswith('\n') and len(err) < 400, (code, err)
    for word in words: assert word in err, err


# The demo, as a newcomer runs it

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "The folder of a small demo that ran in a process of its own."
    out = tmp_path_factory.mktemp('demo')/'out'
    p = subprocess.run([*COMMAND, *SMALL_DEMO, '--jobs', '1', '--out', str(out)], capture_output=True, text=True, env=ENV, timeout=400)
    assert p.returncode == 0, p.stderr[-2000:]
    assert 'Traceback' not in p.stderr and 'Warning' not in p.stderr and all(f'\n{m} ' in p.stdout for m in NAMES)
    assert str(out/'report.html') in p.stdout
    return out


@pytest.fixture(scope='module')
def report(demo): return json.loads((demo/'report.json').read_text())


def test_the_demo_leaves_what_the_report_needs(demo):
    assert {'report.json', 'report.md', 'report.html', 'config.json', 'runs'} <= {p.name for p in demo.iterdir()}
    assert {p.name for p in (demo/'runs').iterdir()} == {f'{m}-seed0' for m in NAMES}
    for m in NAMES:
        files = {p.name for p in (demo/'runs'/f'{m}-seed0').iterdir()}
        assert files == {'report.json'} | (RUN_FILES if m != 'full' else set())
    assert not [p for p in demo.rglob('*') if p.suffix == '.tmp' or p.name == 'checkpoint.pt']


def test_report_json_has_the_promised_keys(report):
    assert set(report) >= {'config', 'rows', 'summary', 'paired'} and list(DEMO) == NAMES
    assert [(r['method'], r['seed']) for r in report['rows']] == [(m, 0) for m in NAMES]
    for r in report['rows']:
        assert set(r) >= {'method', 'seed', 'accuracy', 'worst_group_accuracy', 'group_accuracy', 'group_counts', 'class_group_accuracy', 'cluster_min_accuracy', 'reference_cluster_min_accuracy', 'seconds', 'peak_mb',
                          'steps', 'images', 'bytes', 'worst_class_group_accuracy', 'worst_class_group'}
        assert set(r['group_accuracy']) == set(r['group_counts']) == {'majority', 'minority'} and len(r['class_group_accuracy']) == 20
        assert all(0 <= r[k] <= 1 for k in ('accuracy', 'worst_group_accuracy', 'cluster_min_accuracy', 'worst_class_group_accuracy'))
        assert r['seconds'] >= 0 and r['peak_mb'] >= 0 and r['images'] == (100 if r['method'] != 'full' else 1097) and r['steps'] == (2 if r['method'] in NAMES[3:8] else 0)
    assert [s['method'] for s in report['summary']] == NAMES and all(s['n_seeds'] == 1 for s in report['summary'])
    for s in report['summary']:
        for metric in ('accuracy', 'worst_group_accuracy', 'cluster_min_accuracy', 'worst_class_group_accuracy', 'seconds', 'peak_mb'): assert set(s[metric]) == {'mean', 'low', 'high'}
    assert all(set(p) == {'method', 'baseline', 'metric', 'difference', 'low', 'high', 'n_seeds'} for p in report['paired'])
    assert {('rdd-target', 'gradient'), ('rdd-distance', 'distribution'), ('rdd-distance', 'kmeans')} <= {(p['method'], p['baseline']) for p in report['paired']}
    assert report['config']['seeds'] == [0] and report['config']['versions']['torch'] == torch.__version__ and set(report['config']['methods']) == set(NAMES)


def own_digits():
    "Test images from scikit-learn: each as it is, and inverted and transposed."
    raw = load_digits()
    known = {image.tobytes(): int(label) for image, label in zip((raw.images / 16).astype(np.float32), raw.target)}
    test = load_data('digits', 'minority').test
    x, y, group = test.pixels().numpy(), test.y.numpy(), test.group.numpy()
    back = np.where(group[:, None, None, None] == 1, (1 - x).transpose(0, 1, 3, 2), x)
    assert [known[(np.round(image[0] * 16) / 16).astype(np.float32).tobytes()] for image in back] == y.tolist()
    return x, y, group


@pytest.mark.parametrize('method', ['rdd-distance', 'gradient', 'kmeans', 'full'])
def test_the_figures_follow_from_the_files(demo, report, method):
    "A network trained on the saved file, and everything else in numpy."
    row = next(r for r in report['rows'] if r['method'] == method)
    x, y, group = own_digits()
    if method == 'full':
        source = load_data('digits', 'minority').train
        sx, sy, mean, std = source.x, source.y, source.mean.numpy(), source.std.numpy()
    else:
        raw = load_file(demo/'runs'/f'{method}-seed0'/'synthetic.safetensors')
        sx, sy, mean, std = torch.tensor(raw['x']), torch.tensor(raw['y']), raw['mean'], raw['std']
        assert sx.shape == (100, 1, 8, 8) and np.bincount(raw['y']).tolist() == [10] * 10
    net = train(sx, sy, 10, Training(epochs=2), (0, 0), 'cpu')
    with torch.no_grad(): predicted = net(torch.tensor((x - mean) / std)).argmax(1).numpy()
    hit = (predicted == y).astype(float)
    assert row['accuracy'] == pytest.approx(hit.mean())
    names = ['majority', 'minority']
    by_group = {g: hit[group == i].mean() for i, g in enumerate(names)}
    assert row['group_accuracy'] == pytest.approx(by_group) and row['group_counts'] == {'majority': 500, 'minority': 500} and row['worst_group_accuracy'] == pytest.approx(min(by_group.values()))
    cells = {f'{c}|{g}': hit[(y == c) & (group == i)].mean() for c in range(10) for i, g in enumerate(names)}
    assert row['class_group_accuracy'] == pytest.approx(cells) and row['worst_class_group_accuracy'] == pytest.approx(min(cells.values()))
    worst = row['worst_class_group']
    assert cells[worst['name']] == pytest.approx(min(cells.values()))
    expected = stats.binomtest(round(cells[worst['name']] * worst['n']), worst['n']).proportion_ci(.95, method='wilson')
    assert (worst['low'], worst['high']) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_summary_and_pairs_follow_from_the_rows(report):
    value = {r['method']: r for r in report['rows']}
    for s in report['summary']:
        assert s['accuracy'] == dict(mean=pytest.approx(value[s['method']]['accuracy']), low=None, high=None)
        assert s['group_accuracy']['minority']['mean'] == pytest.approx(value[s['method']]['group_accuracy']['minority'])
    for p in report['paired']:
        metric = p['metric'].split('|')
        of = (lambda r: r['group_accuracy'][metric[1]]) if len(metric) > 1 else (lambda r: r[metric[0]])
        assert p['difference'] == pytest.approx(of(value[p['method']]) - of(value[p['baseline']])) and p['n_seeds'] == 1


def test_the_saved_sets_say_where_they_come_from(demo, report):
    for m in NAMES[:-1]:
        s = load(demo/'runs'/f'{m}-seed0'/'synthetic.safetensors')
        assert s.provenance['method'] in (m, 'custom') and s.provenance['seed'] == 0 and s.provenance['data_hash'] == report['config']['train_hash'] == load_data('digits', 'minority').train.hash()
        rows = [json.loads(line) for line in (demo/'runs'/f'{m}-seed0'/'metrics.jsonl').read_text().splitlines()]
        assert [r['step'] for r in rows] == list(range(1, (2 if METHODS[m].objective else 0) + 1))


def test_the_page_needs_no_network(demo):
    page = (demo/'report.html').read_text()
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page) and '<script src' not in page and 'data:image/png' in page
    for m in NAMES: assert m in page and m in (demo/'report.md').read_text()


def comparable(report): return [{k: v for k, v in r.items() if k not in COSTS} for r in report['rows']]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs process groups')
def test_a_demo_that_was_stopped_goes_on(report, call, tmp_path):
    "Ctrl-C reaches the workers too: no traceback, exit code 130; then a hard kill; then the same rows as without all that."
    out = tmp_path/'out'
    for sign, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        resume = ['--resume'] if out.exists() else []
        p = subprocess.Popen([*COMMAND, *SMALL_DEMO, '--jobs', '2', '--out', str(out), *resume], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
        before = len(list(out.glob('runs/*/report.json')))
        while p.poll() is None and len(list(out.glob('runs/*/report.json'))) == before: time.sleep(.005)
        if p.poll() is None: os.killpg(p.pid, sign)
        _, err = p.communicate(timeout=60)
        if p.returncode != 0:                                                  # it may have been done already
            assert p.returncode == expected, err[-2000:]
            assert sign == signal.SIGKILL or ('--resume' in err and 'Traceback' not in err), err[-2000:]
    for p in out.glob('runs/*/*.json'): json.loads(p.read_text())
    code, _, err = call(*SMALL_DEMO, '--jobs', 1, '--out', out, '--resume')
    assert code == 0, err
    assert comparable(json.loads((out/'report.json').read_text())) == comparable(report)


def test_a_finished_demo_can_be_reread(demo, report, call, tmp_path):
    "With `--resume` nothing is done again; without, and with other settings, it is refused, and so is another evaluation of one of its runs."
    out = tmp_path/'copy'
    shutil.copytree(demo, out)
    refused(call(*SMALL_DEMO, '--jobs', 1, '--out', out), '--resume')
    for other, word in ((['--ipc', 3], 'ipc'), (['--epochs', 3], 'training'), (['--seeds', 2], 'seeds'), (['--steps', 3], 'methods'), (['--networks', 2], 'networks')):
        refused(call(*SMALL_DEMO, *other, '--jobs', 1, '--out', out, '--resume'), word)
    refused(call('evaluate', out/'runs'/'kmeans-seed0', '--epochs', 1, '--networks', 1, '--device', 'cpu'), 'comparison')      # its row would change under the table
    code, shown, err = call(*SMALL_DEMO, '--jobs', 1, '--out', out, '--resume')
    assert code == 0 and all(m in shown for m in NAMES), err
    assert comparable(json.loads((out/'report.json').read_text())) == comparable(report)


# distill, evaluate, report

def test_one_run_from_arrays_to_a_report(call, tmp_path):
    npz(group=np.arange(60) % 4 // 3)
    code, out, err = call('distill', 'toy.npz', *QUICK, '--method', 'rdd-target', '--out', 'run', '--seed', 3, '--set', 'batch=8', '--set', 'augment=crop rotate', '--set', 'width=8', '--risk', 'cvar(tail=0.3)')
    assert code == 0 and 'rdd-nb evaluate run' in out, err
    run = tmp_path/'run'
    assert {p.name for p in run.iterdir()} == RUN_FILES
    config = json.loads((run/'config.json').read_text())
    assert (config['seed'], config['ipc'], config['method']['steps'], config['method']['batch'], config['method']['risk'], config['method']['augment']) == (3, 2, 3, 8, 'CVaR(tail=0.3)', 'crop rotate')
    code, out, err = call('evaluate', 'run', '--epochs', 2, '--networks', 1, '--device', 'cpu')
    assert code == 0 and 'accuracy' in out, err
    row, = json.loads((run/'report.json').read_text())['rows']
    assert row['seed'] == 3 and set(row['group_accuracy']) == {'0', '1'} and f'{row["accuracy"]:.3f}' in out
    code, out, err = call('report', 'run')
    assert code == 0 and out.strip() == str(Path('run')/'report.html') and (run/'report.md').exists(), err
    assert call('distill', 'toy.npz', *QUICK, '--out', 'other', '--set', 'batch=8')[0] == call('evaluate', 'other', 'run', '--epochs', 1, '--networks', 1, '--device', 'cpu')[0] == 0
    assert call('report', 'run', 'other', '--out', 'both')[0] == 0 and (tmp_path/'both'/'report.html').exists()
    assert call('evaluate', 'run/synthetic.safetensors', '--on', 'val', '--epochs', 1, '--networks', 1, '--device', 'cpu')[0] == 0      # a file instead of a folder
    assert json.loads((run/'synthetic.report.json').read_text())['config']['on'] == 'val'


def test_the_default_folder_and_a_second_time(call, tmp_path):
    npz()
    kmeans = ['distill', 'toy.npz', '--ipc', 2, '--device', 'cpu', '--method', 'kmeans']
    assert call(*kmeans)[0] == 0
    assert (tmp_path/'runs'/'toy-kmeans-ipc2-seed0'/'synthetic.safetensors').exists()
    refused(call(*kmeans), '--resume')
    assert call(*kmeans, '--resume')[0] == 0
    refused(call('distill', 'toy.npz', '--ipc', 2, '--device', 'cpu', '--method', 'random', '--out', 'runs/toy-kmeans-ipc2-seed0', '--resume'), 'another')


def test_a_set_made_elsewhere(call, tmp_path):
    "Without provenance and costs: evaluated on the data that are named, and reported."
    d = data.from_arrays(np.random.default_rng(0).random((9, 8, 8)), np.arange(9) % 3)
    save(SyntheticDataset(d.x, d.y, d.mean, d.std), 'mine.safetensors')
    npz()
    refused(call('evaluate', 'mine.safetensors'), '--data')
    code, _, err = call('evaluate', 'mine.safetensors', '--data', 'toy.npz', '--epochs', 1, '--networks', 1, '--device', 'cpu')
    assert code == 0, err
    assert json.loads((tmp_path/'mine.report.json').read_text())['rows'][0]['images'] == 9


def test_every_network_from_the_command_line(call):
    npz()
    for network in ('resnet18', 'mlp'):
        code, _, err = call('distill', 'toy.npz', '--ipc', 1, '--steps', 1, '--device', 'cpu', '--set', f'network={network}', '--set', 'batch=4', '--set', 'cells_per_class=2', '--out', network)
        assert code == 0, err


def test_help(call):
    code, out, _ = call('--help')
    assert code == 0 and all(re.search(rf'^ +{c} +\w', out, re.M) for c in ('demo', 'distill', 'evaluate', 'report', 'sweep', 'merge', 'pinn'))
    assert call('--version')[1].startswith('rdd-nb ')
    commands = next(a for a in parser()._actions if a.dest == 'command').choices
    assert set(commands) == {'demo', 'distill', 'evaluate', 'report', 'sweep', 'merge', 'pinn'}
    for name, command in commands.items():
        assert all(a.help for a in command._actions), name                     # every option says what it does
        code, out, _ = call(name, '--help')
        assert code == 0 and len(out) > 300
    assert commands['demo'].get_default('seeds') == 3 and all(m in call('distill', '--help')[1] for m in METHODS)


@pytest.mark.parametrize('argv', [[], ['distil'], ['distill'], ['distill', 'digits', '--ipc', 'ten'], ['distill', 'digits', '--risk-at', 'pixels'], ['distill', 'digits', '--shift', 'sideways'], ['evaluate'], ['demo', '--colour']])
def test_words_that_the_parser_does_not_know(argv, call):
    code, out, err = call(*argv)
    assert code == 2 and 'usage: rdd-nb' in err and 'error: ' in err.splitlines()[-1] and not out


# Mistakes

def test_a_mistake_in_a_real_process(tmp_path):
    p = subprocess.run([*COMMAND, 'distill', 'digits', '--method', 'magic'], capture_output=True, text=True, env=ENV, cwd=tmp_path, timeout=200)
    refused((p.returncode, p.stdout, p.stderr), 'magic', 'rdd-target')
    assert p.stdout == '' and not list(tmp_path.iterdir())


@pytest.mark.parametrize('argv, words', [
    (['digit'], ['digit', 'digits, mnist']), (['nowhere/at/all'], ['nowhere/at/all', 'no such folder']), (['missing.npz'], ['missing.npz', 'no such file']), (['mnist', '--root', 'nowhere'], ['nowhere', 'no such folder']),
    (['toy.npz', '--method', 'magic'], ['magic', 'rdd-target']), (['toy.npz', '--risk', 'cvr(tail=0.2)'], ['cvr', 'cvar']), (['toy.npz', '--risk', 'cvar(tail=2)'], ['tail']), (['toy.npz', '--risk', '__import__("os")'], ['risk']),
    (['toy.npz', '--risk', 'twolevel(mean, mean)'], ['distance']), (['toy.npz', '--method', 'gradient', '--risk-at', 'target'], ['risk']), (['toy.npz', '--method', 'gradient', '--risk', 'mean'], ['risk_at']),
    (['toy.npz', '--cells', 'groups'], ['group']), (['toy.npz', '--ipc', '0'], ['ipc=0']), (['toy.npz', '--ipc', '-3'], ['ipc=-3']), (['toy.npz', '--ipc', '500'], ['ipc=500']), (['toy.npz', '--steps', '-1'], ['steps']),
    (['toy.npz', '--lr', 'nan'], ['lr']), (['toy.npz', '--lr', '0'], ['lr']), (['toy.npz', '--device', 'cuda:77'], ['cuda:77', 'cpu']), (['toy.npz', '--device', 'abacus'], ['abacus']),
    (['digits', '--share', '2'], ['share', '2']), (['digits', '--share', 'nan'], ['share']), (['toy.npz', '--set', 'stepz=1'], ['stepz', 'steps']), (['toy.npz', '--set', 'steps'], ['name=value']), (['toy.npz', '--set', '=3'], ['name=value']),
    (['toy.npz', '--set', 'steps=many'], ['steps', 'many']), (['toy.npz', '--set', 'batch=[1]'], ['batch']), (['toy.npz', '--set', 'network=foo'], ['foo', 'convnet']), (['toy.npz', '--set', 'augment=flipp'], ['flipp']),
    (['toy.npz', '--set', 'objective=gradient'], ['objective']), (['toy.npz', '--set', 'risk=3'], ['risk']), (['toy.npz', '--method', 'kmeans', '--steps', '3'], ['steps=3', 'objective']), (['toy.npz', '--set', 'width=0'], ['width']), (['toy.npz', '--out', 'toy.npz'], ['toy.npz']), (['toy.npz', '--out', 'toy.npz/run'], ['toy.npz']),
    (['toy.npz', '--out', 'full'], ['full', 'not empty']), (['empty'], ['empty']), (['notes'], ['notes']),
], ids=' '.join)
def test_distill_refuses(argv, words, call, tmp_path):
    npz()
    for folder in ('full', 'empty', 'notes/a'): (tmp_path/folder).mkdir(parents=True)
    (tmp_path/'full'/'thesis.tex').write_text('x')
    (tmp_path/'notes'/'a'/'todo.txt').write_text('x')
    before = sorted(tmp_path.rglob('*'))
    options = [v for o, v in (('--ipc', ['--ipc', '2']), ('--steps', ['--steps', '3']), ('--device', ['--device', 'cpu']), ('--out', ['--out', 'new'])) if o not in argv]
    refused(call('distill', *argv, *sum(options, [])), *words)
    assert sorted(tmp_path.rglob('*')) == before


BAD_ARRAYS = dict(
    nan=(dict(x=np.full((60, 8, 8), np.nan)), 'NaN'), infinite=(dict(x=np.full((60, 8, 8), np.inf)), 'infinity'), range=(dict(x=np.full((60, 8, 8), 255.)), '[0, 1]'), negative=(dict(x=np.full((60, 8, 8), -.1)), '[0, 1]'),
    labels_from_one=(dict(y=np.arange(60) % 3 + 1), '0..C-1'), fractions=(dict(y=np.arange(60) / 60), 'integers'), words=(dict(y=np.array(['a', 'b', 'c'] * 20)), 'integers'), gap=(dict(y=np.arange(60) % 3 * 2), '0..C-1'),
    short=(dict(y=np.arange(50) % 3), '60'), table=(dict(x=np.random.default_rng(0).random((60, 8))), '(8,)'), objects=(dict(x=np.array([{}], dtype=object)), '.npz'), single=(dict(x=np.float64(1)), 'shape'), group=(dict(group=np.arange(7)), '60'),
    pixel=(dict(x=np.random.default_rng(0).random((60, 1, 1))), '1x1'), four=(dict(x=np.random.default_rng(0).random((4, 8, 8)), y=np.arange(4) % 3), 'class'))


@pytest.mark.parametrize('name', BAD_ARRAYS)
def test_arrays_that_do_not_fit(name, call):
    arrays, word = BAD_ARRAYS[name]
    npz(**arrays)
    refused(call('distill', 'toy.npz', *QUICK), word)


def test_damaged_arrays(call, tmp_path):
    raw = Path(npz()).read_bytes()
    for content in (b'', b'text', raw[:100], raw[:-200], raw[:5000] + bytes(60) + raw[5060:], raw[:40] + bytes(30) + raw[70:]):
        (tmp_path/'bad.npz').write_bytes(content)
        refused(call('distill', 'bad.npz', *QUICK), 'bad.npz')
    np.savez('bad.npz', images=np.zeros(3))
    refused(call('distill', 'bad.npz', *QUICK), 'images')
    np.save('array.npy', np.zeros(3))
    shutil.move('array.npy', 'bad.npz')                                       # one array under the name of an archive
    refused(call('distill', 'bad.npz', *QUICK), 'bad.npz')


def test_evaluate_refuses(call, tmp_path):
    npz()
    assert call('distill', 'toy.npz', *QUICK, '--method', 'gradient', '--out', 'run')[0] == 0
    raw = (tmp_path/'run'/'synthetic.safetensors').read_bytes()
    fast = ['--epochs', 1, '--networks', 1, '--device', 'cpu']
    for name, content in dict(cut=raw[:len(raw) // 2], end=raw[:-1], junk=b'junk', none=b'').items():
        (tmp_path/f'{name}.safetensors').write_bytes(content)
        refused(call('evaluate', f'{name}.safetensors', *fast), f'{name}.safetensors')
    save_file(dict(weight=np.zeros(3)), 'network.safetensors')
    refused(call('evaluate', 'network.safetensors', *fast), 'network.safetensors', 'rdd_nb')
    torch.save(dict(x=torch.zeros(3)), 'old.pt')
    refused(call('evaluate', 'old.pt', *fast), 'old.pt')
    refused(call('evaluate', 'nowhere', *fast), 'nowhere')
    (tmp_path/'empty').mkdir()
    refused(call('evaluate', 'empty', *fast), 'synthetic.safetensors')
    for more, word in ((['--model', 'convnettt'], 'convnettt'), (['--augment', 'flipp'], 'flipp'), (['--data', 'nowhere.npz'], 'nowhere.npz'), (['--shift', 'colour', '--data', 'digits'], 'classes')):
        refused(call('evaluate', 'run', *fast, *more), word)
    refused(call('evaluate', 'run', '--networks', 0), 'networks')
    refused(call('evaluate', 'run', '--epochs', 0), 'epochs')
    s = load('run/synthetic.safetensors')
    for source in ('toy.npz', ['toy.npz'], 7, dict(name=3), dict(name='gone.npz')):
        save(SyntheticDataset(s.x, s.y, s.mean, s.std, provenance=dict(source=source)), 'odd.safetensors')
        refused(call('evaluate', 'odd.safetensors', *fast))
    npz('big.npz', x=np.random.default_rng(0).random((60, 12, 12)))
    refused(call('evaluate', 'run', '--data', 'big.npz', *fast), '(1, 12, 12)')
    assert not (tmp_path/'run'/'report.json').exists()


@pytest.mark.parametrize('text', ['{', '', '[]', '3', '{}', '{"rows": []}', '{"rows": {}}', '{"rows": [1]}', '{"rows": [{}], "summary": [], "paired": []}', '{"config": [], "rows": []}', '{"config": {"source": "toy"}, "rows": []}', '\x00'])
def test_report_refuses(text, call, tmp_path):
    (tmp_path/'run').mkdir()
    refused(call('report', 'run'), 'report.json')
    (tmp_path/'run'/'report.json').write_text(text)
    refused(call('report', 'run'), 'report.json')
    refused(call('report', 'nowhere'), 'nowhere')
    assert {p.name for p in (tmp_path/'run').iterdir()} == {'report.json'}


@pytest.mark.parametrize('more, word', [(['--seeds', 0], 'seeds'), (['--seeds', -2], 'seeds'), (['--ipc', 0], 'ipc=0'), (['--ipc', 500], 'ipc=500'), (['--networks', 0], 'networks'), (['--epochs', 0], 'epochs'), (['--steps', -1], 'steps'),
                                        (['--device', 'abacus'], 'abacus'), (['--out', 'full'], 'full'), (['--out', 'file'], 'file')], ids=str)
def test_demo_refuses(more, word, call, tmp_path):
    "At once, and before anything is written."
    (tmp_path/'full').mkdir()
    for name in ('full/thesis.tex', 'file'): (tmp_path/name).write_text('x')
    before = sorted(tmp_path.rglob('*'))
    refused(call(*SMALL_DEMO, '--jobs', 1, *more), word)
    assert sorted(tmp_path.rglob('*')) == before


def test_foreign_folders(call, tmp_path):
    "A config.json of another program."
    npz()
    for text in ('[1]', '{}', 'x', '{"method": 3}'):
        for folder in ('a', 'b'):
            (tmp_path/folder).mkdir(exist_ok=True)
            (tmp_path/folder/'config.json').write_text(text)
        for resume in ([], ['--resume']):
            refused(call('distill', 'toy.npz', *QUICK, '--out', 'a', *resume), 'a')
            refused(call(*SMALL_DEMO, '--jobs', 1, '--out', 'b', *resume), 'b')
        assert (tmp_path/'a'/'config.json').read_text() == text == (tmp_path/'b'/'config.json').read_text()


# Stopped from outside

@pytest.mark.skipif(sys.platform == 'win32', reason='needs signals')
def test_ctrl_c_and_resume(call, tmp_path):
    "Ctrl-C while it works: exit code 130 and how to go on; then it goes on, to the result of a run that was left alone."
    npz()
    argv = ['distill', 'toy.npz', '--ipc', '2', '--steps', '800', '--device', 'cpu', '--set', 'width=4', '--set', 'batch=4', '--set', 'cells_per_class=2']
    p = subprocess.Popen([*COMMAND, *argv, '--out', 'run'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, cwd=tmp_path,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # a job in the background is born deaf to Ctrl-C
    while p.poll() is None and not (tmp_path/'run'/'checkpoint.pt').exists(): time.sleep(.002)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and '--resume' in err.splitlines()[-1] and 'Traceback' not in err, (p.returncode, err)
    assert {q.name for q in (tmp_path/'run').iterdir() if not q.name.startswith('.')} <= {'config.json', 'checkpoint.pt', 'metrics.jsonl'}
    assert call(*argv, '--out', 'run', '--resume')[0] == call(*argv, '--out', 'whole')[0] == 0
    one, two = (load_file(tmp_path/name/'synthetic.safetensors') for name in ('run', 'whole'))
    assert set(one) == set(two) and all(np.array_equal(one[k], two[k]) for k in one)
    assert (tmp_path/'run'/'metrics.jsonl').read_bytes() == (tmp_path/'whole'/'metrics.jsonl').read_bytes()


@pytest.mark.parametrize('limit', [0, 300, 3000])
@pytest.mark.skipif(sys.platform == 'win32', reason='needs resource limits')
def test_a_full_disk_is_one_line(limit, call, tmp_path):
    "Files may grow to so many bytes only; the line names the file."
    import resource
    npz()
    argv = ['distill', 'toy.npz', '--ipc', '2', '--steps', '60', '--device', 'cpu', '--set', 'width=4', '--set', 'batch=4', '--set', 'cells_per_class=2', '--out', str(tmp_path/'run')]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code, _, err = call(*argv)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = err.replace('\r', '\n').strip().splitlines()[-1]
    assert code == 2 and last.startswith('rdd-nb: ') and str(tmp_path/'run') in last and 'Traceback' not in err, err
    assert call(*argv, '--resume')[0] == 0
