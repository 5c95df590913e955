"""Samples that are read when they are used: the same results as from floats in memory, and much less memory."""
import os, sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ReferenceKMeans

import rdd_nb.core
import rdd_nb.rows
from rdd_nb.coresets import class_kmeans_ids, class_medoids, density_weights, herding, k_center_greedy
from rdd_nb.core import Cost, OutOfMemory, generator
from rdd_nb.data import GroupedDataset, from_arrays, split
from rdd_nb.distill import Distiller, distill
from rdd_nb.training import Training, train
from rdd_nb.evaluation import evaluate, fit_clusters, reference_clusters
from rdd_nb.kmeans import KMeans, assign_nearest
from rdd_nb.methods import METHODS, as_method
from rdd_nb.models import make_model
from rdd_nb.priors import LowRank
from rdd_nb.rows import Rows, take
from rdd_nb.sources import load_data
from rdd_nb.teacher import select_patches
from rdd_nb.trajectory import _hash

SMALL = dict(steps=2, network=dict(width=8), batch=dict(size=16))


def photos(n=240, channels=3, size=8):
    "Bytes and labels of three classes with two looks each."
    g = generator('photos', n)
    y, dark = torch.arange(n) % 3, torch.arange(n) % 7 == 0
    x = torch.randint(128, (n, channels, size, size), generator=g) + 30 * y[:, None, None, None]
    return torch.where(dark[:, None, None, None], x // 4, x).byte(), y


@pytest.fixture
def data(tmp_path):
    "The same data set three times: floats, bytes, and bytes on disk."
    x, y = photos()
    np.save(tmp_path / 'x.npy', x.numpy())
    of_bytes, on_disk = from_arrays(x, y), from_arrays(np.load(tmp_path / 'x.npy', mmap_mode='r'), y)
    floats = GroupedDataset(of_bytes.x, y, mean=of_bytes.mean, std=of_bytes.std)
    return dict(floats=floats, bytes=from_arrays(x, y), disk=on_disk)


@pytest.fixture
def no_room(monkeypatch):
    "Everything counts as too large to be held at once."
    monkeypatch.setattr(rdd_nb.rows, '_WHOLE_MB', 0)


@pytest.mark.parametrize('kind', ['bytes', 'disk'])
@pytest.mark.parametrize('method, changes', [
    ('rdd-distance', {}), ('gradient', {}), ('rdd-distance', dict(clustering='kmeans(2, features, steps=2)')),
    ('rdd-distance', dict(clustering='nearest')), ('density', dict(start='kcenter')),
    ('rdd-distance', dict(clustering='sklearn(AgglomerativeClustering, n_clusters=2)')),
    ('distribution', dict(prior='lowrank(4)')), ('kernel', dict(objective='kernel(rbf)'))])
def test_a_distillation_from_bytes_is_that_from_floats(data, no_room, kind, method, changes):
    small = SMALL if method != 'kernel' else dict(steps=2)
    one, other = (distill(data[k], method, 2, device='cpu', progress=False, **small | changes)
                  for k in ('floats', kind))
    assert torch.allclose(one.x, other.x, atol=1e-5) and torch.allclose(one.mass, other.mass)
    assert data[kind]._x is None                       # it was never converted as a whole


CHEAP = {'patches': dict(start='patches(3)', labels='teacher(3)'),
         'batch-norm': dict(objective='batchnorm(steps=3, width=4)')}
UNTOLD = [k for k, m in METHODS.items() if not m.sees_groups and k not in ('rows', 'rdd-rows')]


@pytest.mark.parametrize('name', UNTOLD)
def test_every_method_reads_samples_from_disk(data, no_room, name):
    short = CHEAP.get(name, {}) | (dict(steps=1) if METHODS[name].objective else {})
    one, other = (distill(data[k], name, 2, device='cpu', progress=False, **short) for k in ('floats', 'disk'))
    assert torch.allclose(one.x, other.x, atol=1e-4)


@pytest.mark.parametrize('kind', ['bytes', 'disk'])
def test_selections_and_clusters_see_the_same_samples(data, no_room, kind):
    x, y = data['floats'].x, data['floats'].y
    rows = data[kind].samples()
    assert isinstance(rows, Rows)
    for choose in (class_medoids, k_center_greedy): assert torch.equal(choose(x, y, 3), choose(rows, y, 3))
    assert torch.equal(herding(x, y, 3), herding(rows, y, 3))
    assert torch.equal(class_kmeans_ids(x, y, 2), class_kmeans_ids(rows, y, 2))
    assert torch.allclose(density_weights(x, y), density_weights(rows, y))
    for a, b in zip(assign_nearest(x, x[:9], y, y[:9]), assign_nearest(rows, x[:9], y, y[:9])): assert torch.equal(a, b)
    a, b = (KMeans(5).fit(t) for t in (x, rows))
    assert torch.equal(a.labels_, b.labels_) and torch.allclose(a.cluster_centers_, b.cluster_centers_, atol=1e-5)
    assert torch.equal(a.labels_, b.predict(rows))


def test_experts_of_the_same_samples_have_the_same_fingerprint(data, no_room):
    assert _hash(data['floats'].x) == _hash(data['disk'].samples())


def test_empty_clusters_of_rows_are_refilled(no_room):
    x = torch.cat([torch.zeros(50, 1, 2, 2), torch.full((3, 1, 2, 2), 200.)]).byte()
    rows = Rows(x, lambda part: part.float())
    start = torch.tensor([[0.] * 4, [500.] * 4])
    a, b = (KMeans(2, init=start).fit(t).labels_.bincount().tolist() for t in (rows, x.float()))
    assert a == b and min(a) > 0


def test_training_and_evaluation_read_batches(data, monkeypatch):
    recipe = Training(epochs=2, width=4, batch=50)
    monkeypatch.setattr(rdd_nb.rows, '_WHOLE_MB', 0)
    nets = [train(d.samples(), d.y, 3, recipe, device='cpu') for d in (data['floats'], data['disk'])]
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in nets)))
    found = []
    for d, room in (data['bytes'], 256), (data['disk'], 0):
        monkeypatch.setattr(rdd_nb.rows, '_WHOLE_MB', room)
        parts = split(d, seed=1)
        clusters = dict(cluster=fit_clusters(parts.train, parts.test, 4))
        found.append(evaluate(parts.train, parts.test, recipe, 1, clusters=clusters, device='cpu', progress=False))
    seen = [{k: v for k, v in row.items() if not k.startswith('evaluation_')} for row in found]
    assert seen[0] == seen[1]


def test_parts_of_a_file_stay_in_the_file(data, tmp_path):
    parts = split(data['disk'], val=.2)
    assert all(isinstance(p.bytes, Rows) for p in parts) and parts.train._x is None
    for a, b in zip(parts, split(data['bytes'], val=.2)): assert a.hash() == b.hash()
    np.save(tmp_path / 'y.npy', data['disk'].y.numpy())
    loaded = load_data(tmp_path)
    assert isinstance(loaded.train.bytes, Rows) and len(loaded.train) + len(loaded.val) + len(loaded.test) == 240
    assert loaded.train.hash() == split(data['bytes'], val=.1, test=.25).train.hash()


def test_a_folder_of_arrays_says_what_is_missing(data, tmp_path):
    with pytest.raises(FileNotFoundError, match='y.npy'): load_data(tmp_path)
    (tmp_path / 'y.npy').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='y.npy: not a readable .npy file'): load_data(tmp_path)


def test_a_file_that_got_shorter_is_one_line(tmp_path):
    x, _ = photos()
    np.save(tmp_path / 'x.npy', x.numpy())
    rows = Rows(np.load(tmp_path / 'x.npy', mmap_mode='r'))
    os.truncate(tmp_path / 'x.npy', 1000)
    with pytest.raises(ValueError, match='shorter than when it was opened'): rows[[100]]


def blocks_only(rows, most, monkeypatch):
    "Reading more than `most` rows at once fails."
    read = Rows._made
    def some(self, index):
        part = read(self, index)
        assert len(part) <= most, f'{len(part)} rows were read at once'
        return part
    monkeypatch.setattr(Rows, '_made', some)
    return rows


def test_principal_components_patches_and_reference_clusters_are_read_in_blocks(no_room, monkeypatch):
    x, y = photos(2400)
    data = from_arrays(x, y)
    floats = GroupedDataset(data.x, y, mean=data.mean, std=data.std)
    data._x, net = None, make_model('convnet', (3, 8, 8), 3, width=4)
    rank, images = LowRank(5), data.x[:6]
    want = rank.begin(images, floats.x).decode(), *select_patches(net, floats.x, y, 2, crops=3)
    data._x = None
    rows = blocks_only(data.samples(), 1024, monkeypatch)
    found = rank.begin(images, rows).decode(), *select_patches(net, rows, y, 2, crops=3)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(want, found))
    part = torch.randperm(2400, generator=generator('reference'))[:1000]
    fit = ReferenceKMeans(10, random_state=0).fit(floats.x[part].flatten(1).numpy())
    monkeypatch.setattr('rdd_nb.evaluation._REFERENCE_MB', 4 * 192 * 1000 / 2**20)
    assert reference_clusters(data).tolist() == fit.predict(floats.x.flatten(1).numpy()).tolist()


# Memory: 16,000 images of 3 x 32 x 32 are 49 MB as bytes and 197 MB as floats

def peak(x):
    "MB that a distillation from `x` and its evaluation need."
    with Cost() as cost:
        d = from_arrays(x, np.arange(len(x)) % 10)
        small = dict(steps=1, network=dict(width=4), batch=dict(size=4), clustering='kmeans(2)')
        s = distill(d, 'rdd-distance', 1, progress=False, device='cpu', **small)
        test = d.subset(slice(0, len(x) // 3))
        clusters = dict(cluster=fit_clusters(d, test, 2))
        evaluate(s, test, Training(epochs=1, width=4), 1, clusters=clusters, progress=False, device='cpu')
    return cost.peak_mb


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak of a process is only measured on Linux')
@pytest.mark.filterwarnings('ignore:class of fewer')
def test_memory_is_that_of_the_bytes_and_flat_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(rdd_nb.rows, '_WHOLE_MB', 128)  # of 16,000 images, as 256 MB are of 32,000
    for n in 16_000, 4_000:
        x = (60 * (np.arange(n) // 10 % 4) + np.arange(n) % 10).astype(np.uint8)
        np.save(tmp_path / f'{n}.npy', np.broadcast_to(x[:, None, None, None], (n, 3, 32, 32)))
    def on_disk(n): return np.load(tmp_path / f'{n}.npy', mmap_mode='r')
    peak(on_disk(4_000)[:100])                          # what is loaded on first use does not count
    small, large = peak(on_disk(4_000)), peak(on_disk(16_000))
    in_memory = peak(np.load(tmp_path / '16000.npy'))
    assert in_memory < 197 and large < 120              # not even once all of them as floats, 197 MB
    assert large < small + 30


# Memory that runs out

def full_once(monkeypatch, times):
    "The first `times` calls of the objective find no memory."
    left, real = [times], Distiller._loss
    def loss(self):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 36 bytes")
        return real(self)
    monkeypatch.setattr(Distiller, '_loss', loss)
    monkeypatch.setattr(rdd_nb.core, '_divisor', [1])


def test_memory_that_runs_out_once_changes_nothing(monkeypatch, data):
    same = distill(data['bytes'], 'rdd-distance', 2, device='cpu', progress=False, **SMALL)
    full_once(monkeypatch, 1)
    found = distill(data['bytes'], 'rdd-distance', 2, device='cpu', progress=False, **SMALL)
    assert rdd_nb.core.chunk(800) == 100 and torch.allclose(same.x, found.x, atol=1e-5)


def test_memory_that_runs_out_twice_is_one_line_and_keeps_the_run(monkeypatch, data, tmp_path):
    run = Distiller(data['bytes'], as_method('rdd-distance', **SMALL), 2, device='cpu')
    full_once(monkeypatch, 2)
    with pytest.raises(OutOfMemory, match=r'36 bytes more; try a smaller ipc, batch.size or network.width'): run.step()
    assert run.step_number == 0 and not run.weight.any()
    out, options = tmp_path / 'run', dict(device='cpu', progress=False, out=tmp_path / 'run', checkpoint_every=1)
    monkeypatch.undo()
    whole = distill(data['bytes'], 'rdd-distance', 2, device='cpu', progress=False, **SMALL)
    real = Distiller.step
    def second(self):
        if self.step_number: full_once(monkeypatch, 2)
        return real(self)
    monkeypatch.setattr(Distiller, 'step', second)
    with pytest.raises(OutOfMemory): distill(data['bytes'], 'rdd-distance', 2, **options, **SMALL)
    monkeypatch.undo()
    assert (out / 'checkpoint.pt').exists()
    assert torch.equal(distill(data['bytes'], 'rdd-distance', 2, resume=True, **options, **SMALL).x, whole.x)
