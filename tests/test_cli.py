"The commands: real processes from nothing to a report, their figures recomputed, stopped, resumed, and full disks."
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

from rdd_nb import cli, commands, data
from rdd_nb.sources import load_data
from rdd_nb.cli import COMMANDS, main, parser
from rdd_nb.commands import DEMO
from rdd_nb.methods import METHODS
from rdd_nb.training import Training, train
from rdd_nb.synthetic import SyntheticDataset, load, save

NAMES = ['random', 'k-center', 'kmeans', 'gradient', 'distribution', 'rdd-network', 'rdd-target', 'rdd-distance',
    'full']
RUN_FILES = {'synthetic.safetensors', 'config.json', 'metrics.jsonl', 'images.png'}
SMALL_DEMO = ['demo', '--seeds', '1', '--steps', '2', '--epochs', '2', '--networks', '1']
QUICK = ['--ipc', '2', '--steps', '3', '--device', 'cpu']
COMMAND = [sys.executable, '-c', 'import sys; from rdd_nb.cli import main; sys.exit(main())']
# the package that is tested, wherever a process starts
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'PYTHONPATH': str(Path(data.__file__).parents[1])}
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
    assert code == 2 and err.startswith('rdd-nb: ') and len(err) <= 300, (code, err)
    assert err.count('\n') == 1 and err.endswith('\n'), err
    for word in words: assert word in err, err


# The demo, as a newcomer runs it

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "The folder of a small demo that ran in a process of its own."
    out = tmp_path_factory.mktemp('demo')/'out'
    p = subprocess.run([*COMMAND, *SMALL_DEMO, '--jobs', '1', '--out', str(out)], capture_output=True, text=True,
        env=ENV, timeout=400)
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
        assert set(r) >= {'method', 'seed', 'accuracy', 'worst_group_accuracy', 'group_accuracy', 'group_counts',
            'class_group_accuracy', 'cluster_min_accuracy', 'reference_cluster_min_accuracy', 'seconds', 'peak_mb',
                          'steps', 'images', 'bytes', 'worst_class_group_accuracy', 'worst_class_group'}
        assert set(r['group_accuracy']) == set(r['group_counts']) == {'majority',
            'minority'} and len(r['class_group_accuracy']) == 20
        assert all(0 <= r[k] <= 1 for k in ('accuracy', 'worst_group_accuracy', 'cluster_min_accuracy',
            'worst_class_group_accuracy'))
        assert r['seconds'] >= 0 and r['peak_mb'] >= 0 and r['images'] == (1097 if r['method'] == 'full' else 100)
        assert r['steps'] == (2 if r['method'] in NAMES[3:8] else 0)
    assert [s['method'] for s in report['summary']] == NAMES and all(s['n_seeds'] == 1 for s in report['summary'])
    for s in report['summary']:
        for metric in ('accuracy', 'worst_group_accuracy', 'cluster_min_accuracy', 'worst_class_group_accuracy',
            'seconds', 'peak_mb'): assert {'mean', 'low', 'high'} <= set(s[metric])
    assert all(set(p) == {'method', 'baseline', 'metric', 'difference', 'low', 'high', 'n_seeds'}
        for p in report['paired'])
    assert {('rdd-target', 'gradient'), ('rdd-distance', 'distribution'),
        ('rdd-distance', 'kmeans')} <= {(p['method'], p['baseline']) for p in report['paired']}
    config = report['config']
    assert config['seeds'] == [0] and config['versions']['torch'] == torch.__version__
    assert set(config['methods']) == set(NAMES)


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
    assert row['group_accuracy'] == pytest.approx(by_group) and row['group_counts'] == {'majority': 500,
        'minority': 500} and row['worst_group_accuracy'] == pytest.approx(min(by_group.values()))
    both = {f'{c}|{g}': hit[(y == c) & (group == i)].mean() for c in range(10) for i, g in enumerate(names)}
    assert row['class_group_accuracy'] == pytest.approx(both)
    assert row['worst_class_group_accuracy'] == pytest.approx(min(both.values()))
    worst = row['worst_class_group']
    assert both[worst['name']] == pytest.approx(min(both.values()))
    expected = stats.binomtest(round(both[worst['name']] * worst['n']), worst['n']).proportion_ci(.95, method='wilson')
    assert (worst['low'], worst['high']) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_summary_and_pairs_follow_from_the_rows(report):
    value = {r['method']: r for r in report['rows']}
    for s in report['summary']:
        mean = value[s['method']]['accuracy']
        assert s['accuracy']['mean'] == pytest.approx(mean) and s['accuracy']['low'] < mean < s['accuracy']['high']
        own = value[s['method']]['group_accuracy']['minority']
        assert s['group_accuracy']['minority']['mean'] == pytest.approx(own)
    for p in report['paired']:
        metric = p['metric'].split('|')
        of = (lambda r: r['group_accuracy'][metric[1]]) if len(metric) > 1 else (lambda r: r[metric[0]])
        assert p['difference'] == pytest.approx(of(value[p['method']]) - of(value[p['baseline']])) and p['n_seeds'] == 1


def test_the_saved_sets_say_where_they_come_from(demo, report):
    for m in NAMES[:-1]:
        s = load(demo/'runs'/f'{m}-seed0'/'synthetic.safetensors')
        assert s.provenance['method'] in (m, 'custom') and s.provenance['seed'] == 0
        assert s.provenance['data_hash'] == report['config']['train_hash'] == load_data('digits',
            'minority').train.hash()
        rows = [json.loads(line) for line in (demo/'runs'/f'{m}-seed0'/'metrics.jsonl').read_text().splitlines()]
        assert [r['step'] for r in rows] == list(range(1, (2 if METHODS[m].objective else 0) + 1))


def test_the_page_needs_no_network(demo):
    page = (demo/'report.html').read_text()
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//',
        page) and '<script src' not in page and 'data:image/png' in page
    for m in NAMES: assert m in page and m in (demo/'report.md').read_text()


def comparable(report): return [{k: v for k, v in r.items() if k not in COSTS} for r in report['rows']]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs process groups')
def test_a_demo_that_was_stopped_goes_on(report, call, tmp_path):
    "Ctrl-C reaches the workers too: no traceback, exit code 130; then the same rows as without. (Kills: `test_sweep`.)"
    out = tmp_path/'out'
    p = subprocess.Popen([*COMMAND, *SMALL_DEMO, '--jobs', '2', '--out', str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
    while p.poll() is None and not list(out.glob('runs/*/report.json')): time.sleep(.005)
    if p.poll() is None: os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    if p.returncode != 0:                                                  # it may have been done already
        assert p.returncode == 130 and '--resume' in err and 'Traceback' not in err, err[-2000:]
    for p in out.glob('runs/*/*.json'): json.loads(p.read_text())
    code, _, err = call(*SMALL_DEMO, '--jobs', 1, '--out', out, '--resume')
    assert code == 0, err
    assert comparable(json.loads((out/'report.json').read_text())) == comparable(report)


def test_a_finished_demo_can_be_reread(demo, report, call, tmp_path):
    "With `--resume` nothing is done again; without, and for other methods, it is refused, as is evaluating its runs."
    out = tmp_path/'copy'
    shutil.copytree(demo, out)
    refused(call(*SMALL_DEMO, '--jobs', 1, '--out', out), '--resume')
    for other, word in ((['--ipc', 3], 'ipc'), (['--steps', 3], 'methods')):
        refused(call(*SMALL_DEMO, *other, '--jobs', 1, '--out', out, '--resume'), word)
    refused(call('evaluate', out/'runs'/'kmeans-seed0', '--epochs', 1, '--networks', 1, '--device', 'cpu'),
        'comparison')      # its row would change under the table
    code, shown, err = call(*SMALL_DEMO, '--jobs', 1, '--out', out, '--resume')
    assert code == 0 and all(m in shown for m in NAMES), err
    assert comparable(json.loads((out/'report.json').read_text())) == comparable(report)


# distill, evaluate, report

def test_one_run_from_arrays_to_a_report(call, tmp_path):
    npz(group=np.arange(60) % 4 // 3)
    code, out, err = call('distill', 'toy.npz', *QUICK, '--method', 'rdd-target', '--out', 'run', '--seed', 3,
                          '--set', 'augment=crop rotate', '--set', 'steps=4', '--risk', 'twolevel(cvar(tail=0.3), max)')
    assert code == 0 and 'rdd-nb evaluate run' in out, err
    run = tmp_path/'run'
    assert {p.name for p in run.iterdir()} == RUN_FILES
    config = json.loads((run/'config.json').read_text())
    method = config['method']
    assert (config['seed'], config['ipc'], method['steps'], method['augment']) == (3, 2, 4, 'crop rotate')
    assert method['risk'].startswith('TwoLevel(inner=CVaR(tail=0.3)')
    code, out, err = call('evaluate', 'run', '--epochs', 2, '--networks', 1, '--device', 'cpu')
    assert code == 0 and 'accuracy' in out, err
    row, = json.loads((run/'report.json').read_text())['rows']
    assert row['seed'] == 3 and set(row['group_accuracy']) == {'0', '1'} and f'{row["accuracy"]:.3f}' in out
    code, out, err = call('report', 'run')
    assert code == 0 and out.strip() == str(Path('run')/'report.html') and (run/'report.md').exists(), err
    assert call('distill', 'toy.npz', *QUICK, '--out', 'other')[0] == call('evaluate', 'other', 'run', '--epochs', 1,
        '--networks', 1, '--device', 'cpu')[0] == 0
    assert call('report', 'run', 'other', '--out', 'both')[0] == 0 and (tmp_path/'both'/'report.html').exists()
    assert call('evaluate', 'run/synthetic.safetensors', '--on', 'val', '--epochs', 1, '--networks', 1, '--device',
        'cpu')[0] == 0      # a file instead of a folder
    assert json.loads((run/'synthetic.report.json').read_text())['config']['on'] == 'val'


def test_the_default_folder_and_a_second_time(call, tmp_path):
    npz()
    kmeans = ['distill', 'toy.npz', '--ipc', 2, '--device', 'cpu', '--method', 'kmeans']
    assert call(*kmeans)[0] == 0
    assert (tmp_path/'runs'/'toy-kmeans-ipc2-seed0'/'synthetic.safetensors').exists()
    refused(call(*kmeans), '--resume')
    assert call(*kmeans, '--resume')[0] == 0
    refused(call('distill', 'toy.npz', '--ipc', 2, '--device', 'cpu', '--method', 'random', '--out',
        'runs/toy-kmeans-ipc2-seed0', '--resume'), 'another')


def test_a_set_made_elsewhere(call, tmp_path):
    "Without provenance and costs: evaluated on the data that are named, and reported."
    d = data.from_arrays(np.random.default_rng(0).random((9, 8, 8)), np.arange(9) % 3)
    save(SyntheticDataset(d.x, d.y, d.mean, d.std), 'mine.safetensors')
    npz()
    refused(call('evaluate', 'mine.safetensors'), '--data')
    code, _, err = call('evaluate', 'mine.safetensors', '--data', 'toy.npz', '--epochs', 1, '--networks', 1,
        '--device', 'cpu')
    assert code == 0, err
    assert json.loads((tmp_path/'mine.report.json').read_text())['rows'][0]['images'] == 9


def test_every_network_from_the_command_line(call):
    npz()
    for network in ('resnet18', 'mlp'):
        code, _, err = call('distill', 'toy.npz', '--ipc', 1, '--steps', 1, '--device', 'cpu', '--set',
            f'network={network}',
                            '--out', network)
        assert code == 0, err


def test_help(call):
    code, out, _ = call('--help')
    assert code == 0 and all(re.search(rf'^ +{c} +\w', out, re.M) for c in COMMANDS)
    assert call('--version')[1].startswith('rdd-nb ')
    assert {'demo', 'distill', 'evaluate', 'report', 'sweep', 'merge', 'pinn'} <= set(COMMANDS)
    for name, command in COMMANDS.items():
        assert all(a.help for a in parser(command)._actions), name             # every flag says what it does
        code, out, _ = call(name, '--help')
        assert code == 0 and command.__doc__.split('.')[0] in ' '.join(out.split())
    assert parser(COMMANDS['demo']).get_default('seeds') == 3
    assert all(re.search(rf'^{m} ', call('methods')[1], re.M) for m in METHODS)


@pytest.mark.parametrize('argv', [['--help'], ['distill', '--help'], ['pinn', '--help'], ['--version'], ['nonsense']])
def test_help_loads_no_heavy_library(argv):
    code = f"""
import sys
from rdd_nb.cli import main
try: main({argv})
except SystemExit: pass
print(sorted({{'torch', 'torchvision', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'pandas'}} & set(sys.modules)))
"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV, timeout=60)
    assert p.stdout.splitlines()[-1] == '[]', p.stderr


def test_a_command_is_a_function(call, tmp_path):
    "What the command line does, a notebook can do."
    npz()
    s = commands.distill('toy.npz', 'kmeans', ipc=2, device='cpu', out='run')
    assert len(s) == 6 and (tmp_path/'run'/'synthetic.safetensors').exists()
    row, = commands.evaluate(['run'], epochs=1, networks=1, device='cpu')
    assert row['images'] == 6 and commands.report(['run']).name == 'report.html'
    with pytest.raises(ValueError, match='--jobs=0'): commands.evaluate(['run'], jobs=0)


# Mistakes

def test_a_mistake_in_a_real_process(tmp_path):
    p = subprocess.run([*COMMAND, 'distill', 'digits', '--method', 'magic'], capture_output=True, text=True, env=ENV,
        cwd=tmp_path, timeout=200)
    refused((p.returncode, p.stdout, p.stderr), 'magic', 'rdd-network')
    assert p.stdout == '' and not list(tmp_path.iterdir())


BAD_ARRAYS = dict(
    nan=(dict(x=np.full((60, 8, 8), np.nan)), 'NaN'), infinite=(dict(x=np.full((60, 8, 8), np.inf)), 'infinity'),
        range=(dict(x=np.full((60, 8, 8), 255.)), '[0, 1]'), negative=(dict(x=np.full((60, 8, 8), -.1)), '[0, 1]'),
    labels_from_one=(dict(y=np.arange(60) % 3 + 1), '0..C-1'), fractions=(dict(y=np.arange(60) / 60), 'integers'),
        words=(dict(y=np.array(['a', 'b', 'c'] * 20)), 'integers'), gap=(dict(y=np.arange(60) % 3 * 2), '0..C-1'),
    short=(dict(y=np.arange(50) % 3), '60'),
        objects=(dict(x=np.array([{}], dtype=object)), '.npz'), single=(dict(x=np.float64(1)), 'shape'),
            group=(dict(group=np.arange(7)), '60'),
    pixel=(dict(x=np.random.default_rng(0).random((60, 1, 1))), '1x1'),
        four=(dict(x=np.random.default_rng(0).random((4, 8, 8)), y=np.arange(4) % 3), 'class'))


@pytest.mark.parametrize('name', BAD_ARRAYS)
def test_arrays_that_do_not_fit(name, call):
    arrays, word = BAD_ARRAYS[name]
    npz(**arrays)
    refused(call('distill', 'toy.npz', *QUICK), word)


def test_damaged_arrays(call, tmp_path):
    raw = Path(npz()).read_bytes()
    for content in (b'', b'text', raw[:100], raw[:-200], raw[:5000] + bytes(60) + raw[5060:],
        raw[:40] + bytes(30) + raw[70:]):
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
    for more, word in ((['--model', 'convnettt'], 'convnettt'), (['--augment', 'flipp'], 'flipp'),
        (['--data', 'nowhere.npz'], 'nowhere.npz'), (['--shift', 'colour', '--data', 'digits'], 'classes')):
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
    "Ctrl-C while it works: exit code 130 and how to go on; then it goes on, to the result of an undisturbed run."
    npz()
    argv = ['distill', 'toy.npz', '--ipc', '2', '--steps', '300', '--device', 'cpu']
    p = subprocess.Popen([*COMMAND, *argv, '--out', 'run'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENV, cwd=tmp_path,
                         # a job in the background is born deaf to Ctrl-C
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while p.poll() is None and not (tmp_path/'run'/'checkpoint.pt').exists(): time.sleep(.002)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and '--resume' in err.splitlines()[-1] and 'Traceback' not in err, (p.returncode, err)
    assert {q.name for q in (tmp_path/'run').iterdir() if not q.name.startswith('.')} <= {'config.json',
        'checkpoint.pt', 'metrics.jsonl'}
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
    argv = ['distill', 'toy.npz', '--ipc', '2', '--steps', '60', '--device', 'cpu', '--out', str(tmp_path/'run')]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code, _, err = call(*argv)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = err.replace('\r', '\n').strip().splitlines()[-1]
    assert code == 2 and last.startswith('rdd-nb: ') and str(tmp_path/'run') in last and 'Traceback' not in err, err
    assert call(*argv, '--resume')[0] == 0


@pytest.mark.skipif(sys.platform == 'win32', reason='needs signals')
def test_sigterm_is_like_ctrl_c(tmp_path):
    npz(tmp_path/'toy.npz')
    argv = ['distill', 'toy.npz', '--ipc', '2', '--steps', '100000', '--device', 'cpu', '--out', 'run']
    p = subprocess.Popen([*COMMAND, *argv], stderr=subprocess.PIPE, text=True, env=ENV, cwd=tmp_path)
    while p.poll() is None and not (tmp_path/'run'/'checkpoint.pt').exists(): time.sleep(.01)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and '--resume' in err.splitlines()[-1] and 'Traceback' not in err, (p.returncode, err)


def test_ctrl_c_while_a_library_is_imported(call, monkeypatch):
    "Heavy imports happen inside a command, so an interrupt there is one line, not forty."
    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setitem(COMMANDS, 'methods', interrupted)
    monkeypatch.setattr(cli, 'docments', lambda *_, **__: {})
    code, _, err = call('methods')
    assert code == 130 and err.count('\n') == 1 and '--resume' in err


# The terminal and the environment

def test_a_terminal_without_umlauts(tmp_path):
    "Output in ASCII: what it lacks is spelled out, and success stays success."
    (tmp_path/'ü').mkdir()
    npz(tmp_path/'ü'/'toy.npz')
    argv = ['distill', 'ü/toy.npz', '--method', 'kmeans', '--ipc', '1', '--device', 'cpu', '--out', 'ü/run']
    p = subprocess.run([*COMMAND, *argv], capture_output=True, env=ENV | dict(PYTHONIOENCODING='ascii'), cwd=tmp_path,
        timeout=200)
    assert p.returncode == 0 and b'\\xfc/run' in p.stdout, p.stderr


def test_a_dry_run_says_the_cost_and_writes_nothing(call, tmp_path):
    npz(tmp_path/'toy.npz')
    code, out, _ = call('distill', 'toy.npz', *QUICK, '--dry-run', '--set', 'network.width=8')
    assert code == 0 and re.match(r'3 steps: \S+ operations, about \d+ s; 0 MB of data, and at most \d+ MB', out)
    assert {p.name for p in tmp_path.iterdir()} == {'toy.npz'}
    refused(call('distill', 'toy.npz', '--method', 'auto', '--dry-run'), 'need one method')


def test_a_profile_beside_the_run(call, tmp_path):
    npz(tmp_path/'toy.npz')
    code, out, _ = call('distill', 'toy.npz', *QUICK, '--profile', '--out', 'run')
    assert code == 0 and 'real side' in out and 'backward' in out
    assert {p.name for p in (tmp_path/'run').iterdir()} == RUN_FILES | {'trace.json', 'profile.txt'}
    call('distill', 'toy.npz', *QUICK, '--out', 'plain')
    one, two = (load(tmp_path/k/'synthetic.safetensors') for k in ('run', 'plain'))
    assert torch.equal(one.x, two.x)


def test_a_backend_that_does_not_exist(tmp_path):
    npz(tmp_path/'toy.npz')
    argv = ['distill', 'toy.npz', '--method', 'kmeans', '--ipc', '1', '--device', 'cpu', '--out', 'run']
    env = ENV | dict(MPLBACKEND='nonsense')
    p = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=200)
    refused((p.returncode, p.stdout, p.stderr), 'nonsense')
    assert {q.name for q in tmp_path.iterdir()} == {'toy.npz'}


@pytest.mark.parametrize('error', [MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't "
                                                              'allocate memory: you tried to allocate 36 bytes')])
def test_memory_is_one_line_that_names_settings(error, call, monkeypatch):
    def full():
        raise error
    monkeypatch.setitem(COMMANDS, 'methods', full)
    monkeypatch.setattr(cli, 'docments', lambda *_, **__: {})
    refused(call('methods'), 'memory', 'ipc')


def test_a_bug_stays_a_traceback(monkeypatch):
    def wrong():
        raise RuntimeError('a bug')
    monkeypatch.setitem(COMMANDS, 'methods', wrong)
    monkeypatch.setattr(cli, 'docments', lambda *_, **__: {})
    with pytest.raises(RuntimeError, match='a bug'): main(['methods'])
