"The distillation loop: killed and resumed, full disks, seeds, groups that no method sees, and input that does not fit."
import dataclasses
import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdd_nb.core
import rdd_nb.distill
from rdd_nb.core import read_state, write_state
from rdd_nb.data import GroupedDataset, from_arrays
from rdd_nb.distill import Distiller, distill
from rdd_nb.matching import DistributionMatching, GradientMatching
from rdd_nb.methods import METHODS, Method, as_method, idle
from rdd_nb.models import MODELS
from rdd_nb.parts import Part
from rdd_nb.risk import CVaR, GroupDRO, Mean, Regret, TwoLevel
from rdd_nb.synthetic import load
from rdd_nb.teacher import BatchNormAlignment

STEPS = 6
TENSORS = ('x', 'y', 'mean', 'std', 'initial', 'mass', 'weight', 'soft')
FILES = {'config.json', 'images.png', 'metrics.jsonl', 'synthetic.safetensors'}
every_method = pytest.mark.parametrize('name', METHODS)
TOLD = 'group-balanced', 'fairdd', 'cobra'      # the methods that are given the groups


def toy(n=45, classes=3, groups=True, seed=0, shape=(1, 8, 8)):
    "A few noisy images per class, every fifth of them inverted."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    raw = (torch.rand(classes, *shape, generator=g)[y] * .7 + .3 * torch.rand(n, *shape, generator=g)).clamp(0, 1)
    odd = torch.arange(n) % 5 == 0
    raw[odd] = 1 - raw[odd]
    return from_arrays(raw, y, odd.long() if groups else None, groups=['many', 'few'] if groups else None, name='toy')


def small(name, **changes):
    "A named method at toy size, with changes; selections have nothing to shrink."
    m = METHODS[name]
    if name == 'patches':
        return as_method(m, **dict(start='patches(10)', labels='teacher(10)', network=dict(width=4, batch=16))
                         | changes)
    if not m.objective: return as_method(m, **changes)
    return as_method(as_method(m, steps=STEPS, **shrunk(m, 8)), **changes)


def shrunk(m, size, life=4):
    "Settings that make a method small, as far as they can act."
    still = set(idle(m))
    plan = dict(width=4, batch=16, life=min(m.network.life, life))
    plan = {k: v for k, v in plan.items() if f'network.{k}' not in still}
    own = dict(objective='batchnorm(steps=20)') if isinstance(m.objective, BatchNormAlignment) else {}
    return own | (dict(network=plan) if plan else {}) | ({} if 'batch' in still else dict(batch=dict(size=size)))


def run(method, data=None, out=None, seed=0, ipc=2, **kw):
    return distill(toy() if data is None else data, small(method) if isinstance(method, str) else method, ipc, seed,
                   'cpu', out, progress=False, **kw)


def same(a, b):
    return all((getattr(a, k) is None and getattr(b, k) is None) or torch.equal(getattr(a, k), getattr(b, k))
               for k in TENSORS)


def one_line(e):
    text = str(e.value)
    return '\n' not in text and 0 < len(text) < 400


# Resume: interrupted at every step, at every write, and at random moments

@pytest.mark.parametrize('name', ['gradient', 'rdd-network', 'rdd-target', 'rdd-distance'])
def test_stopped_before_any_step_and_resumed(name, tmp_path, monkeypatch):
    whole = run(name, out=tmp_path/'whole')
    step = Distiller.step
    for k in range(STEPS):
        def interrupted(self):
            if self.step_number == k: raise KeyboardInterrupt
            return step(self)
        with monkeypatch.context() as m:
            m.setattr(Distiller, 'step', interrupted)
            with pytest.raises(KeyboardInterrupt): run(name, out=tmp_path/f'{k}', checkpoint_every=2)
        left = {p.name for p in (tmp_path/f'{k}').iterdir()} if (tmp_path/f'{k}').exists() else set()
        assert left == (set() if k < 2 else {'config.json', 'checkpoint.pt', 'metrics.jsonl'})
        assert same(run(name, out=tmp_path/f'{k}', resume=True, checkpoint_every=3), whole)
        assert (tmp_path/f'{k}'/'metrics.jsonl').read_bytes() == (tmp_path/'whole'/'metrics.jsonl').read_bytes()
        assert {p.name for p in (tmp_path/f'{k}').iterdir()} == FILES


@pytest.mark.parametrize('what', [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))],
                         ids=['ctrl-c', 'full'])
def test_stopped_at_any_write_and_resumed(what, tmp_path, monkeypatch):
    "The n-th rename fails, for every n: no half file under its name, no temporary file, and the rest can be resumed."
    whole, replace, n = run('rdd-target', out=tmp_path/'whole'), os.replace, 0
    while True:
        out, calls = tmp_path/f'{n}', []
        def failing(a, b):
            calls.append(b)
            if len(calls) == n + 1: raise what
            return replace(a, b)
        with monkeypatch.context() as m:
            m.setattr(rdd_nb.core.os, 'replace', failing)
            try: run('rdd-target', out=out, checkpoint_every=2)
            except (KeyboardInterrupt, OSError) as e: assert isinstance(e, type(what))
            else: break
        assert not list(out.glob('.*.tmp'))
        if out.exists(): assert_whole_files(out)
        assert same(run('rdd-target', out=out, resume=True), whole)
        assert {p.name for p in out.iterdir()} - {'checkpoint.pt'} == FILES
        n += 1
    assert n == 8      # config, twice checkpoint and metrics, then metrics, picture, result


def assert_whole_files(out):
    "Everything under a final name can be read."
    for p in out.iterdir():
        if p.name.startswith('.'): continue
        if p.suffix == '.json': json.loads(p.read_text())
        elif p.suffix == '.jsonl':
            steps = [json.loads(line)['step'] for line in p.read_text().splitlines()]
            assert steps == list(range(1, len(steps) + 1))
        elif p.suffix == '.pt': assert read_state(p)['step'] > 0
        elif p.suffix == '.safetensors': load(p)
        elif p.suffix == '.png':
            from PIL import Image
            Image.open(p).load()


@pytest.mark.skipif(sys.platform == 'win32', reason='needs resource limits')
def test_a_disk_that_is_full(tmp_path):
    "Files are limited in size, as on a full disk: what cannot be written is one clear error, no file is half there."
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole, failed = run('rdd-distance', out=tmp_path/'whole'), set()
    sizes = sorted({p.stat().st_size for p in (tmp_path/'whole').iterdir()})
    for limit in [0, 1, *(s + d for s in sizes for d in (-1, 0)), 20_000]:
        out = tmp_path/f'{limit}'
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            run('rdd-distance', out=out, checkpoint_every=3)
        except Exception as e:
            failed.add(limit)
            error = e
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if limit in failed:
            assert isinstance(error, OSError), f'{type(error).__name__} with files limited to {limit} bytes: {error}'
        if out.exists():
            assert not [p for p in out.iterdir() if p.suffix == '.tmp']
            assert_whole_files(out)
        assert same(run('rdd-distance', out=out, resume=True), whole)
        assert {p.name for p in out.iterdir()} - {'checkpoint.pt'} == FILES
    assert {0, 1} < failed and 20_000 > max(sizes)


DRIVER = r'''
import json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import test_distill as t

out = Path(sys.argv[2])
torch.manual_seed(int(sys.argv[3])); random.seed(int(sys.argv[3]))
found = {'hashes': {name: t.run(name).hash() for name in t.METHODS}, 'kills': {}, 'codes': []}

def work(folder, name):
    how = dict(resume=True, progress=False, checkpoint_every=1)
    t.distill(t.toy(), t.small(name, steps=40), 2, 0, 'cpu', folder, **how)

def attempt(folder, name, sig, delay):
    "A forked child that works in `folder` until the signal arrives; its exit code, or minus the signal."
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            work(folder, name)
            code = 0
        except KeyboardInterrupt: code = 130
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    time.sleep(delay)
    os.kill(pid, sig)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for name in ('rdd-network', 'rdd-target', 'rdd-distance'):
    whole, folder, kills = out/f'{name}-whole', out/name, 0
    start = time.perf_counter(); work(whole, name); duration = time.perf_counter() - start
    while True:
        delay = random.uniform(0, .35 * duration) if kills < 25 else 60
        code = attempt(folder, name, random.choice([signal.SIGKILL, signal.SIGINT]), delay)
        if folder.exists(): t.assert_whole_files(folder)
        if code == 0 and kills >= 3: break
        if code == 0: shutil.rmtree(folder); kills, duration = 0, duration / 2      # faster than at first: once more
        else:
            assert code in (130, -signal.SIGKILL), code
            kills += 1
    assert t.same(t.load(folder/'synthetic.safetensors'), t.load(whole/'synthetic.safetensors'))
    assert (folder/'metrics.jsonl').read_bytes() == (whole/'metrics.jsonl').read_bytes()
    assert (folder/'images.png').read_bytes() == (whole/'images.png').read_bytes()
    assert {p.name for p in folder.iterdir() if not p.name.startswith('.')} - {'checkpoint.pt'} == t.FILES
    found['kills'][name] = kills
print(json.dumps(found))
'''


@pytest.fixture(scope='module')
def other_process(tmp_path_factory):
    "A second Python that distils with all methods, and gets its own children killed at random moments."
    if not hasattr(os, 'fork'): pytest.skip('needs os.fork')
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONHASHSEED': '7', 'MPLBACKEND': 'Agg',
                        'PYTHONPATH': str(Path(rdd_nb.core.__file__).parents[1])}
    command = [sys.executable, '-c', DRIVER, str(Path(__file__).parent), str(tmp_path_factory.mktemp('kill')), '5']
    p = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(other_process):
    "SIGKILL and SIGINT, several times each run: the files of a run without, bit for bit (compared in that process)."
    assert min(other_process['kills'].values()) >= 3, other_process['kills']


@pytest.mark.slow
@every_method
def test_another_process_makes_the_same(other_process, name):
    torch.manual_seed(123)
    assert run(name).hash() == other_process['hashes'][name]


# Seeds and randomness

@every_method
def test_the_seed_decides(name):
    ipc = 5 if METHODS[name].prior.per_sample == 1 and name != 'patches' else 3
    a, b, c = (run(name, seed=s, ipc=ipc) for s in (3, 3, 4))
    assert same(a, b)
    assert torch.equal(a.x, c.x) == (name == 'herding')          # which leaves nothing to chance
    if METHODS[name].objective: assert not torch.equal(a.x, run(small(name, steps=STEPS + 1), seed=3, ipc=ipc).x)


@every_method
def test_the_global_generator_is_left_alone(name):
    torch.manual_seed(0); np.random.seed(0)
    before, np_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = run(name)
    assert torch.equal(before, torch.get_rng_state()) and (np_before == np.random.get_state()[1]).all()
    torch.manual_seed(99)
    assert same(first, run(name))


def test_the_data_are_left_alone():
    data = toy()
    before = data.hash()
    run('rdd-distance', data)
    assert data.hash() == before


def test_numpy_integers_are_integers(tmp_path):
    "Seeds and sizes often come out of `np.arange`."
    assert same(run('rdd-distance', seed=np.int64(1), ipc=np.int64(2), out=tmp_path/'a'),
                run('rdd-distance', seed=1, ipc=2))
    assert json.loads((tmp_path/'a'/'config.json').read_text())['seed'] == 1


# Groups are for evaluation

@pytest.mark.parametrize('method', [*((n, m) for n, m in METHODS.items() if n not in TOLD),
                                    *((f'{n} {c}', as_method(n, clustering=c))
                                      for n in ('rdd-network', 'rdd-target', 'rdd-distance')
                                      for c in ('nearest', 'nearest(moving=False)'))],
                         ids=lambda m: m[0])
@settings(max_examples=3)
@given(seed=st.integers(0, 1000), n_groups=st.integers(1, 5))
def test_group_ids_never_influence(method, seed, n_groups):
    name, m = method
    m = as_method(m, steps=2, **shrunk(m, 8)) if m.objective else small(name)
    plain = toy(groups=False)
    ids = torch.randint(n_groups, (len(plain),), generator=torch.Generator().manual_seed(seed))
    grouped = GroupedDataset(plain.x, plain.y, ids, groups=[str(i) for i in range(n_groups)], mean=plain.mean,
                             std=plain.std)
    expected = run(m, plain)
    assert same(run(m, grouped), expected) and same(run(m, grouped.without_groups()), expected)


@pytest.mark.parametrize('name', ['rdd-network', 'rdd-target', 'rdd-distance', *TOLD])
def test_group_ids_influence_where_they_are_asked_for(name):
    data, changes = toy(), {} if name in TOLD else dict(clustering='groups')
    m = small(name, **changes) if METHODS[name].objective else METHODS[name]
    other = GroupedDataset(data.x, data.y, (torch.arange(len(data)) // 3) % 2, groups=data.groups, mean=data.mean,
                           std=data.std)
    assert not torch.equal(run(m, data).x, run(m, other).x)
    with pytest.raises(ValueError, match='group ids') as e: run(m, toy(groups=False))
    assert one_line(e)


# What comes out

@every_method
def test_the_result_says_what_it_is(name, tmp_path):
    data = toy()
    s = run(name, data, out=tmp_path/'run', source=dict(name='toy', share=.2))
    each = METHODS[name].prior.per_sample
    assert s.x.shape == (6 * each, 1, 8, 8) and s.y.tolist() == [c for c in range(3) for _ in range(2 * each)]
    assert s.classes == data.classes
    assert torch.equal(s.mean, data.mean) and torch.equal(s.std, data.std)
    assert same(s, load(tmp_path/'run'/'synthetic.safetensors'))
    p = s.provenance
    assert p['data_hash'] == data.hash() and p['seed'] == 0 and p['ipc'] == 2
    assert p['source'] == dict(name='toy', share=.2) and p['versions']['torch'] == torch.__version__
    assert p['seconds'] >= 0 and p['peak_mb'] >= 0 and p['steps'] == small(name).steps
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['method'] == small(name).describe() == p['settings']
    rows = [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in rows] == list(range(1, small(name).steps + 1))
    assert all(math.isfinite(r['loss']) for r in rows)
    if name == 'patches': return                       # its images are packed of parts
    real = {tuple(v.flatten().tolist()): c for v, c in zip(data.x, data.y.tolist())}
    # real samples of the right class, all different
    assert [real[tuple(v.flatten().tolist())] for v in s.initial] == s.y.tolist()
    assert len({tuple(v.flatten().tolist()) for v in s.initial}) == len(s)
    assert torch.equal(s.x, s.initial) == (METHODS[name].objective is None)


@every_method
def test_mass_is_the_share_of_the_class(name):
    data, run_ = toy(), Distiller(toy(), small(name), 2, 0, 'cpu')
    if METHODS[name].objective: run_.step()
    # far from where they started
    with torch.no_grad(): run_.images.mul_(.5).add_(run_.images.flip(0), alpha=.3)
    s = run_.result(None, data.mean, data.std)
    x, y = data.x.flatten(1).double().numpy(), data.y.numpy()
    centres = s.x.flatten(1).double().numpy()
    for c in range(3):
        own = np.where(s.y.numpy() == c)[0]
        nearest = ((x[y == c][:, None] - centres[own]) ** 2).sum(2).argmin(1)
        np.testing.assert_allclose(s.mass.numpy()[own], np.bincount(nearest, minlength=2) / (y == c).sum(), atol=1e-6)
    if METHODS[name].risk is None: assert s.weight is None
    else:
        assert (s.weight >= 0).all()
        np.testing.assert_allclose(s.weight.view(3, 2).sum(1).numpy(), 1, atol=1e-5)


def test_step_sizes_and_networks_come_and_go():
    "A cosine from `lr` towards 0, and a new network every `network.life` steps, never the same twice."
    run_ = Distiller(toy(), small('gradient', steps=8, network=dict(life=3), lr=.2), 2, 0, 'cpu')
    rates, networks = [], []
    for _ in range(8):
        run_.step()
        rates.append(run_.optimizer.param_groups[0]['lr'])
        networks.append(id(run_.network))
    np.testing.assert_allclose(rates, [.1 * (1 + math.cos(math.pi * t / 8)) for t in range(8)], rtol=1e-6)
    changes = [t for t in range(1, 8) if networks[t] != networks[t - 1]]
    assert changes == [3, 6]
    first, later = Distiller(toy(), small('gradient'), 2, 0, 'cpu'), Distiller(toy(), small('gradient'), 2, 0, 'cpu')
    later.step_number = 3
    later._draw_network()
    assert not torch.equal(first.network.head.weight, later.network.head.weight)


def test_batches_are_drawn_anew():
    "Those of the network too: no two alike, over steps and within one."
    run_, seen = Distiller(toy(), small('rdd-network', network=dict(steps=2)), 2, 0, 'cpu'), []
    clusters = run_.clusters
    run_.clusters = lambda index: (seen.append(tuple(index.tolist())), clusters(index))[1]
    for _ in range(4): run_.step()
    assert len(seen) == len(set(seen)) == 8 and len(set().union(*seen)) > 35


@pytest.mark.parametrize('clustering', ['nearest', 'nearest(moving=False)', 'kmeans', 'groups'])
def test_clusters_never_cross_classes(clustering):
    data = toy()
    run_ = Distiller(data, small('rdd-target', clustering=clustering), 3, 0, 'cpu')
    run_.step()
    ids = run_.clusters(torch.arange(len(data)))
    assert torch.equal(run_.assigned.owner[ids], data.y)
    assert len(run_.assigned.owner) == 3 * (2 if clustering == 'groups' else 3)


def test_nearest_clusters_follow_the_images():
    "Only those of `nearest`; the others are made once."
    data, index = toy(), torch.arange(45)
    for clustering in ('nearest', 'nearest(moving=False)', 'kmeans(2)', 'groups'):
        run_ = Distiller(data, small('rdd-distance', clustering=clustering), 2, 0, 'cpu')
        before = run_.clusters(index)
        # the two images of a class change places
        with torch.no_grad():
            run_.stored.parameters[0].copy_(run_.images.flip(0).view(3, 2, -1).flip(0).reshape(run_.images.shape))
        after, x = run_.clusters(index), data.x.flatten(1).double()
        if clustering != 'nearest': assert torch.equal(before, after)
        else:
            distance = torch.cdist(x, run_.images.detach().flatten(1).double())
            distance = distance.masked_fill(data.y[:, None] != run_.sy, torch.inf)
            assert torch.equal(after, distance.argmin(1)) and not torch.equal(before, after)


def test_kmeans_may_have_its_own_number_of_clusters():
    data = toy()
    for place, name in (('target', 'rdd-target'), ('distance', 'rdd-distance'), ('network', 'rdd-network')):
        run_ = Distiller(data, small(name, clustering='kmeans(5)'), 2, 0, 'cpu')
        run_.step()
        assert len(run_.assigned.owner) == 15
        assert torch.equal(run_.assigned.owner[run_.clusters(torch.arange(len(data)))], data.y)
        np.testing.assert_allclose(run_.result(None, data.mean, data.std).weight.view(3, 2).sum(1).numpy(), 1,
                                   atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_every_network_can_be_matched(name):
    for matcher in (DistributionMatching(), GradientMatching()):
        if isinstance(matcher, GradientMatching) and name not in ('convnet', 'mlp'): continue      # takes seconds
        method = Method(matcher, None, .5 * Mean() + .5 * CVaR(.5), 'distance', steps=1, lr=.1, batch='random(3)',
                        network=name)
        assert torch.isfinite(run(method, toy(18), ipc=1).x).all()


# Input that does not fit: one line, and nothing is written

def refused(tmp_path, call, *words):
    "The call raises a `ValueError` of one line with these words, before it touches the folder `out`."
    out = tmp_path/'out'
    with pytest.raises(ValueError) as e: call(out)
    assert one_line(e), str(e.value)
    for word in words: assert word in str(e.value), str(e.value)
    assert not out.exists()


@every_method
@pytest.mark.parametrize('ipc', [0, -1, 2.5, '3', None, 10 ** 6, 16])
def test_impossible_ipc(name, ipc, tmp_path): refused(tmp_path, lambda out: run(name, out=out, ipc=ipc), 'ipc')


@every_method
@pytest.mark.parametrize('empty', [0, 1, 2])
def test_a_class_without_samples(name, empty, tmp_path):
    data = toy()
    data = data.subset(data.y != empty)
    assert data.n_classes == 3
    refused(tmp_path, lambda out: run(name, data, out=out), f'class {empty}', 'no samples')


@every_method
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_values_that_are_no_numbers(name, value, tmp_path):
    data = toy()
    data.x[4, 0, 3, 3] = value                            # behind the constructor's back
    refused(tmp_path, lambda out: run(name, data, out=out), 'x', 'NaN')
    with pytest.raises(ValueError, match='sample 4') as e: GroupedDataset(data.x, data.y)
    assert one_line(e)


def test_data_of_the_wrong_kind(tmp_path):
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    for data in ((x, y), x, None, 'digits', np.zeros((3, 8, 8))):
        refused(tmp_path, lambda out: distill(data, out=out), 'data', 'GroupedDataset')
    refused(tmp_path, lambda out: run('idc', from_arrays(torch.rand(30, 5), y), out=out), 'made for images')
    refused(tmp_path, lambda out: run('rdd-distance', from_arrays(torch.rand(30, 1, 2, 2), y), out=out), '2x2')
    for labels, word in ((y + 1, '0..C-1'), (y * 2, '0..C-1'), (y - 1, '0..'), (y[:-1], '30'),
                         (y.float() + .5, 'integers'), (y[:, None], 'shape')):
        with pytest.raises(ValueError, match=word) as e: from_arrays(x, labels)
        assert one_line(e)
    for images in (x * 255, x - .5, x[:, :, :, :, None], x[0, 0, 0]):
        with pytest.raises(ValueError) as e: from_arrays(images, y)
        assert one_line(e)


@pytest.mark.parametrize('changes, word', [
    (dict(risk='cvar(tail=0.2)', risk_at=None), 'place'), (dict(risk=None, risk_at='distance'), 'place'),
    (dict(risk_at='pixels'), 'network, target, distance'), (dict(risk='cvr(.2)'), 'cvar'),
    (dict(risk='cvar(2)'), 'tail'),
    (dict(risk=3), 'risk'), (dict(risk=[]), 'risk'), (dict(clustering='voronoi'), 'nearest'),
    (dict(start='noise'), 'kmeans'), (dict(objective='gradientt'), 'objective'), (dict(objective=7), 'objective'),
    (dict(steps=-1), 'steps'), (dict(steps='abc'), 'steps'), (dict(steps=2.5), 'steps'), (dict(steps=None), 'steps'),
    (dict(steps=[1]), 'steps'), (dict(lr=0), 'lr'), (dict(lr=-1.), 'lr'), (dict(lr='x'), 'lr'),
    (dict(lr=float('nan')), 'lr'), (dict(lr=float('inf')), 'lr'), (dict(optimizer='sgd(momentum=-1)'), 'momentum'),
    (dict(optimizer='adam(1.5)'), 'momentum'), (dict(batch=0), 'batch'), (dict(batch='x'), 'batch'),
    (dict(batch='random(2.5)'), 'size'),
    (dict(network=dict(life=0)), 'life'), (dict(network='convnet(life=1.5)'), 'life'),
    (dict(network=dict(steps=-1)), 'steps'), (dict(network=dict(lr=-1)), 'lr'), (dict(network=dict(lr='a')), 'lr'),
    (dict(network=dict(batch=0)), 'batch'), (dict(network=dict(width=0)), 'width'),
    (dict(network=dict(width=True)), 'width'), (dict(network=dict(width=10**6)), 'width'),
    (dict(network='convnett'), 'convnet'), (dict(network=3), 'network'),
    (dict(augment='flipp'), 'flipp'), (dict(augment=3), 'augment'), (dict(clustering='kmeans(-3)'), 'k=-3'),
    (dict(clustering='kmeans(16)'), 'k=16'), (dict(clustering='given(nowhere.npy)'), 'clustering'),
    (dict(risk_at='network'), 'network.steps'), (dict(risk_at='network', network=dict(steps=2)), 'network.life'),
    (dict(risk=TwoLevel(Mean(), Mean()), risk_at='distance'), 'distance'),
    (dict(objective=None, risk=None, steps=3), 'objective'), (dict(stepz=3), 'stepz'), (dict(ipc_=3), 'ipc_'),
], ids=str)
def test_settings_that_cannot_be_meant(changes, word, tmp_path):
    refused(tmp_path, lambda out: run('rdd-distance', out=out, **changes), word)


@pytest.mark.parametrize('name', ['magic', 'RDD', '', 'full', None, 3, []])
def test_unknown_methods(name, tmp_path):
    with pytest.raises(ValueError) as e: distill(toy(), name, 2, device='cpu', out=tmp_path/'out')
    assert one_line(e) and 'rdd-network' in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('risk', [GroupDRO(6), Regret(GroupDRO(6), [0] * 6), .5 * Mean() + .5 * GroupDRO(6)], ids=repr)
@pytest.mark.parametrize('place', ['network', 'target'])
def test_risks_with_a_memory(risk, place, tmp_path):
    "A risk whose weights depend on earlier batches learns, with its state in the checkpoint, or it is refused."
    refused(tmp_path, lambda out: run(small('gradient', risk=risk, risk_at=place, network=dict(steps=2)), out=out),
            'risk')


@every_method
def test_no_such_device(name, tmp_path):
    refused(tmp_path, lambda out: distill(toy(), name, 2, device='tpu', out=out), 'device', 'tpu')


def test_a_step_size_that_is_too_large(tmp_path):
    "A run that explodes says so and leaves no result."
    for name in ('rdd-distance', 'rdd-target', 'distribution'):
        with pytest.raises(ValueError, match='lr') as e:
            run(small(name, lr=1e38, steps=4), out=tmp_path/name, checkpoint_every=1)
        assert one_line(e) and not (tmp_path/name).exists()


# Run folders

def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    first = run('rdd-distance', out=tmp_path)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    monkeypatch.setattr(Distiller, 'step', None)
    assert same(run('rdd-distance', out=tmp_path, resume=True), first)
    with pytest.raises(ValueError, match='resume') as e: run('rdd-distance', out=tmp_path)
    assert one_line(e) and {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == times


@pytest.mark.parametrize('other, word', [
    (dict(seed=1), 'seed'), (dict(ipc=3), 'ipc'), (dict(steps=STEPS + 1), 'steps'), (dict(lr=2.), 'lr'),
    (dict(risk='cvar(tail=0.5)'), 'risk'), (dict(clustering='nearest'), 'clustering'),
    (dict(data=toy(seed=1)), 'data_hash'),
    (dict(data=toy(groups=False)), 'data_hash'),
], ids=lambda o: str(o) if isinstance(o, dict) and 'data' not in o else None)
def test_a_folder_with_another_run(other, word, tmp_path):
    run('rdd-distance', out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for resume in (True, False):
        with pytest.raises(ValueError, match=word) as e: run('rdd-distance', out=tmp_path, resume=resume, **other)
        assert one_line(e) and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_of_another_version_of_the_package(tmp_path):
    "A setting that has gone, and one that is new."
    run('rdd-distance', out=tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    for change in (dict(gone=1), dict(lr=None)):
        method = {k: v for k, v in (config['method'] | change).items() if v is not None}
        (tmp_path/'config.json').write_text(json.dumps(config | dict(method=method)))
        with pytest.raises(ValueError, match=next(iter(change))) as e: run('rdd-distance', out=tmp_path, resume=True)
        assert one_line(e)


@pytest.mark.parametrize('text', ['[1, 2]', '{}', '3', 'null', '{"data": "toy"}', '{', '', '\x00\xff', '"config"'])
@pytest.mark.parametrize('resume', [True, False])
def test_a_foreign_config(text, resume, tmp_path):
    (tmp_path/'config.json').write_text(text)
    with pytest.raises(ValueError) as e: run('rdd-distance', out=tmp_path, resume=resume)
    assert one_line(e) and str(tmp_path) in str(e.value)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('config.json', text)]


@pytest.mark.parametrize('resume', [True, False])
def test_a_folder_with_something_else(resume, tmp_path):
    (tmp_path/'thesis.tex').write_text('years of work')
    with pytest.raises(ValueError, match='not empty') as e: run('rdd-distance', out=tmp_path, resume=resume)
    assert one_line(e) and [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('resume', [True, False])
def test_a_folder_that_is_a_file(resume, tmp_path):
    (tmp_path/'file').write_text('x')
    for out in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises((ValueError, OSError)): run('rdd-distance', out=out, resume=resume)
    assert (tmp_path/'file').read_text() == 'x'


@pytest.mark.parametrize('left', [[], ['.config.json.99.tmp']],
                         ids=['empty', 'killed while the first file was written'])
@pytest.mark.parametrize('resume', [True, False])
def test_a_folder_without_a_run(left, resume, tmp_path):
    for name in left: (tmp_path/name).write_text('{"da')
    assert same(run('rdd-distance', out=tmp_path, resume=resume), run('rdd-distance'))


@pytest.mark.skipif(os.name == 'nt' or (hasattr(os, 'geteuid') and os.geteuid() == 0),
                    reason='root may write everywhere')
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(PermissionError): run('rdd-distance', out=tmp_path/'locked'/'run')


# Checkpoints

def stopped(folder, at=4, seed=0, **changes):
    "A run folder with a checkpoint, as Ctrl-C leaves it."
    step = Distiller.step
    def interrupted(self):
        if self.step_number == at: raise KeyboardInterrupt
        return step(self)
    Distiller.step = interrupted
    try: run(small('rdd-distance', **changes), out=folder, seed=seed, checkpoint_every=2)
    except KeyboardInterrupt: pass
    finally: Distiller.step = step
    return folder/'checkpoint.pt'


class Payload:
    "Code that runs when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


# torch's remarks on the foreign files
@pytest.mark.filterwarnings('ignore:Detected pickle', 'ignore:Using a non-tuple')
def test_a_checkpoint_that_is_none(tmp_path):
    path = stopped(tmp_path/'run')
    state, raw = read_state(path), path.read_bytes()
    images = state['stored'][0]
    foreign = [[1, 2], None, 5, 'text', torch.zeros(3), {}, dict(step=1), state | dict(history=[1.]),
               state | dict(stored=[images[:1]]), state | dict(stored=[]), state | dict(stored=None),
               state | dict(optimizer={}), state | dict(network={}),
               {k: v for k, v in state.items() if k != 'seconds'}, state | dict(weight=state['weight'][:2]),
               state | dict(step='a')]
    contents = [lambda p, o=o: write_state(p, o) for o in foreign] + [lambda p: torch.save(state, p)]
    cuts = (0, 1, 100, len(raw) // 2, len(raw) - 100, len(raw) - 1)
    contents += [lambda p, n=n: p.write_bytes(raw[:n]) for n in cuts]
    contents += [lambda p: p.write_bytes(b'not a checkpoint'), lambda p: p.write_bytes(os.urandom(5000)),
                 lambda p: p.write_bytes(pickle.dumps(Payload(tmp_path/'pwned'))),
                 lambda p: torch.save(dict(state=Payload(tmp_path/'pwned')), p), lambda p: (p.unlink(), p.mkdir())]
    for write in contents:
        write(path)
        with pytest.raises(ValueError, match='checkpoint') as e: run('rdd-distance', out=tmp_path/'run', resume=True)
        assert one_line(e) and 'checkpoint.pt' in str(e.value)
    assert not (tmp_path/'pwned').exists() and not (tmp_path/'run'/'synthetic.safetensors').exists()
    shutil.rmtree(path)
    # without it, the run starts again
    assert same(run('rdd-distance', out=tmp_path/'run', resume=True), run('rdd-distance'))


@pytest.mark.parametrize('other', [dict(seed=1), dict(lr=2.), dict(steps=STEPS + 2)], ids=str)
def test_a_checkpoint_of_another_configuration(other, tmp_path):
    "Shapes fit, nothing else does."
    path, foreign = stopped(tmp_path/'run'), stopped(tmp_path/'other', **other)
    shutil.copy(foreign, path)
    with pytest.raises(ValueError, match='checkpoint') as e: run('rdd-distance', out=tmp_path/'run', resume=True)
    assert one_line(e)


def test_state_survives_a_round_trip():
    "A copy of the state is not touched by further steps, and brings a fresh `Distiller` to the same place."
    a = Distiller(toy(), small('rdd-network'), 2, 0, 'cpu')
    for _ in range(3): a.step()
    state = a.state_dict()
    kept = state['stored'][0].clone()
    losses = [a.step() for _ in range(3)]
    assert torch.equal(state['stored'][0], kept)
    b = Distiller(toy(), small('rdd-network'), 2, 0, 'cpu')
    b.load_state_dict(state)
    assert [b.step() for _ in range(3)] == losses and torch.equal(a.images, b.images) and a.history == b.history
    assert torch.equal(a.weight, b.weight)


# Methods as values

def test_methods_are_cards():
    for name, m in METHODS.items():
        assert as_method(name) == m == as_method(m)
        card = m.describe()
        assert json.loads(json.dumps(card)) == card and set(card) == {f.name for f in dataclasses.fields(Method)}
        assert Method(**card) == m                            # the text says it all
    assert as_method('gradient', steps=3).steps == 3 and METHODS['gradient'].steps != 3
    with pytest.raises(dataclasses.FrozenInstanceError): METHODS['gradient'].steps = 3


def test_zero_steps_is_the_start():
    for name in METHODS.keys() - {'rdd-network'}:           # whose network is never trained then
        s = run(small(name, **dict(steps=0) if METHODS[name].objective else {}))
        # packed images have lost detail
        assert torch.equal(s.x, s.initial) == (METHODS[name].prior.per_sample == 1)
        assert s.weight is None or not s.weight.any()


# Labels, optimisers, spaces for the clusters

@pytest.mark.parametrize('name, changes', [('gradient', dict(labels='learned')),
                                           ('rdd-target', dict(labels='learned')),
                                           ('rdd-distance', dict(labels='teacher(20)')),
                                           ('gradient', dict(optimizer='adam', lr=.01)),
                                           ('rdd-target', dict(clustering='kmeans(3, errors, steps=5)')),
                                           ('rdd-distance', dict(clustering='kmeans(3, features, steps=5)')),
                                           ('rdd-network', dict(clustering='kmeans(3, errors, steps=5)')),
                                           ('rdd-target', dict(batch='representative(5)')),
                                           ('gradient', dict(network=dict(mix=.9))),
                                           ('rdd-distance', dict(clustering='sklearn(DBSCAN, eps=2.0)')),
                                           ('distribution', dict(base='density')),
                                           ('rdd-distance', dict(start='herding')),
                                           ('rdd-target', dict(start='kcenter'))], ids=str)
def test_variants_resume_exactly(name, changes, tmp_path):
    method = small(name, **changes)
    whole, step = run(method), Distiller.step
    def interrupted(self):
        if self.step_number == 3: raise KeyboardInterrupt
        return step(self)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Distiller, 'step', interrupted)
        with pytest.raises(KeyboardInterrupt): run(method, out=tmp_path/'a', checkpoint_every=1)
    resumed = run(method, out=tmp_path/'a', resume=True)
    assert resumed.hash() == whole.hash() == load(tmp_path/'a'/'synthetic.safetensors').hash() != run(name).hash()
    assert Method(**resumed.provenance['settings']) == method


def test_learned_labels_are_probabilities_that_move_and_hard_labels_stay():
    plain, soft = run(small('gradient')), run(small('gradient', labels='learned(20.0)'))
    assert plain.soft is None
    start = (5 * torch.nn.functional.one_hot(soft.y, 3).float()).softmax(1)
    assert torch.allclose(soft.soft.sum(1), torch.ones(len(soft)), atol=1e-5) and (soft.soft - start).abs().max() > 1e-4
    assert soft.provenance['bytes'] == 4 * soft.x.numel() + 4 * soft.soft.numel()
    assert plain.provenance['bytes'] == 4 * plain.x.numel() + len(plain)


def test_a_teacher_knows_the_classes_and_leaves_the_images_alone():
    hard, taught = (run(small('rdd-distance', labels=k)) for k in ('hard', 'teacher(150)'))
    assert torch.equal(hard.x, taught.x) and taught.soft.argmax(1).eq(taught.y).float().mean() > .6
    assert not torch.equal(taught.soft, taught.soft.round())


def test_labels_without_a_use_are_refused(tmp_path):
    for method in ('distribution', 'kmeans'):
        with pytest.raises(ValueError, match='labels') as e:
            if method == 'kmeans': run(method, out=tmp_path/'out', labels='learned')
            else: run(small(method, labels='learned'))
        assert one_line(e)
    with pytest.raises(ValueError, match='known: .*hard.*learned.*teacher'): as_method('gradient', labels='smooth')


def test_clusters_of_errors_are_those_of_an_early_network():
    data = toy(90)
    ids = {k: Distiller(data,
                        small('rdd-target', clustering=f'kmeans(3, {k}{"" if k == "pixels" else ", steps=10"})'), 2,
                        0, 'cpu').assigned.ids for k in ('pixels', 'features', 'errors')}
    assert all(v.shape == (90,) and torch.equal(v // 3, data.y) for v in ids.values())
    assert not torch.equal(ids['pixels'], ids['errors']) and not torch.equal(ids['features'], ids['errors'])
