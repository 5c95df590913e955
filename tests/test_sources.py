"""Loading data: by name, from folders, files and PyTorch data sets; broken and hostile input."""
import gzip
import hashlib
import lzma
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision import datasets as tv_datasets, transforms

from rdd_nb import sources
from rdd_nb.core import Cost
from rdd_nb.data import overlap, split
from rdd_nb.shifts import SHIFTS, as_shift, two_looks
from rdd_nb.sources import TASKS, from_folder, from_torch, load_data
from test_data import images, one_line

DATA = os.environ.get('RDD_NB_DATA')


def rows(x):
    "Each image as bytes, in the sixteenths that the digits come in."
    return [r.tobytes() for r in x.mul(16).round().byte().numpy()]


# ---- digits -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def seeds():
    return [load_data('digits', data_seed=s) for s in range(6)]


def test_digits_against_sklearn(seeds):
    "Every image is in exactly one part, with its own label; the test set holds each of its images in both looks."
    raw = load_digits()
    label = {x.astype(np.uint8).tobytes(): y for x, y in zip(raw.images, raw.target)}
    for s in seeds:
        assert [len(p) for p in s] == [1097, 200, 1000]
        met = []
        for part in s:
            rare = (part.group == 1)[:, None, None, None]
            undone = torch.where(rare, (1 - part.pixels()).transpose(2, 3), part.pixels())
            keys = rows(undone)
            assert [label[k] for k in keys] == part.y.tolist()
            met += keys if part is not s.test else keys[:500]
            if part is s.test: assert keys[:500] == keys[500:]
        assert len(met) == len(set(met)) == 1797 and set(met) == set(label)


def test_no_test_image_is_ever_trained_on(seeds):
    tested = set().union(*(rows(s.test.pixels()) for s in seeds))
    assert len(tested) == 1000
    for s in seeds: assert not tested & (set(rows(s.train.pixels())) | set(rows(s.val.pixels())))
    assert len({frozenset(rows(s.val.pixels())) for s in seeds}) == len(seeds)


def test_minority_moves_with_the_seed(seeds):
    "The same images are in the minority for one seed and in the majority for another, about as often as chance has it."
    minority = [set(rows((1 - s.train.pixels()[s.train.group == 1]).transpose(2, 3))) for s in seeds[:2]]
    assert len(minority[0]) == 110 and len(minority[0] & minority[1]) < 40


def test_shares_are_exact(seeds):
    for share in (0., .05, .1, 1 / 3, .5, 1.):
        s = load_data('digits', share=share)
        for part in s[:2]:
            for c in range(10):
                group = part.group[part.y == c]
                k = int(group.sum())
                assert abs(k - share * len(group)) <= .5 or (k == 1 and share * len(group) < .5), (share, c)
    assert all(s.test.counts().to_numpy().tolist() == seeds[0].test.counts().to_numpy().tolist() for s in seeds)
    assert seeds[0].test.counts()['majority'].equals(seeds[0].test.counts()['minority'])


def test_normalised_with_training_statistics(seeds):
    for s in seeds:
        raw = s.train.pixels().double()
        for part in s:
            assert abs(part.mean.item() - raw.mean()) < 1e-6 and abs(part.std.item() - raw.std(correction=0)) < 1e-6
        assert abs(s.train.x.double().mean()) < 1e-5 and abs(s.test.x.double().mean()) > .1


def test_nothing_but_the_attribute_tells_the_group(seeds):
    train = seeds[0].train.without_groups()
    assert train.group is None and train.groups is None and train.counts().columns.tolist() == ['all']
    assert all(len(item) == 2 for item in (train[0], seeds[0].train[0], next(iter(DataLoader(seeds[0].train, 7)))))
    group = seeds[0].train.group.double()
    halves = group[:548].mean(), group[549:].mean()
    assert all(.05 < h < .15 for h in halves)             # the minority is neither first nor last


def test_same_seed_same_bytes_in_another_process():
    code = "import rdd_nb.sources as s; print(*[p.hash() for p in s.load_data('digits', 'colour', data_seed=3)])"
    env = {**os.environ, 'PYTHONHASHSEED': '7'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env)
    out = done.stdout.split()
    assert out == [p.hash() for p in load_data('digits', shift='colour', data_seed=3)]
    assert out != [p.hash() for p in load_data('digits', shift='colour', data_seed=4)]


def test_from_torch_takes_what_torchvision_gives():
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 5, 3), dtype=np.uint8)
    pil = [(Image.fromarray(x), i % 3) for i, x in enumerate(rgb)]
    want = torch.from_numpy(rgb.transpose(0, 3, 1, 2) / 255.).float()
    tensors = TensorDataset(want, torch.arange(9) % 3)
    arrays = [(x, np.int64(i % 3)) for i, x in enumerate(rgb)]
    more = [(transforms.ToTensor()(x), y, 'more') for x, y in pil]
    for source in (pil, tensors, Subset(tensors, range(9)), arrays, more):
        d = from_torch(source, normalise=False, channels_last=source is arrays)
        assert torch.allclose(d.x, want, atol=1e-6)
    assert from_torch([(im.convert('L'), y) for im, y in pil]).x.shape[1] == 1
    assert from_torch([(im.convert('RGBA'), y) for im, y in pil]).x.shape[1] == 3
    assert from_torch(tensors, group=[0, 1, 2] * 3, groups=list('abc')).counts().loc['1', 'b'] == 3


# ---- bad input ----------------------------------------------------------------------------------------------------

class Stream(IterableDataset):
    def __iter__(self): return iter([])


x8 = torch.rand(6, 1, 8, 8)


@pytest.mark.parametrize('make, words', [
    (lambda: from_torch(Stream()), ('map-style', 'Stream')),
    (lambda: from_torch(iter([])), ('map-style',)),
    (lambda: from_torch([]), ('empty',)),
    (lambda: from_torch([(x8[0], 0), (x8[1], 'one')]), ('dataset[1]', 'integer label')),
    (lambda: from_torch([x8[0]]), ('dataset[0]', 'integer label')),
    (lambda: from_torch([(x8[0], 0), (x8[1, :, :5], 1)]), ('dataset[1]', '(1, 5, 8)', '(1, 8, 8)')),
    (lambda: from_torch([(x - 1, i % 2) for i, x in enumerate(x8)]), ('not normalised',)),
    (lambda: load_data('mnits'), ("'mnits'", 'digits, mnist, fashion-mnist, cifar10, cifar100, svhn', 'c-mnist-fg')),
    (lambda: load_data(None), ('None is unknown',)),
    (lambda: load_data(['digits']), ("['digits'] is unknown",)),
    (lambda: load_data(''), ("'' is unknown",)),
    (lambda: load_data('caf\udce9'), ("'caf\\udce9' is unknown",)),
    (lambda: load_data('red\x1b[31m'), ("'red\\x1b[31m' is unknown",)),
    (lambda: load_data('a' * 10**5), ('is unknown',)),
    (lambda: load_data('nul\0.npz'), ('is unknown',)),
    (lambda: load_data(size=0), ('size=0',)),
    (lambda: load_data(size='8'), ("size='8'",)),
    (lambda: load_data(size=10**6), ('images of 1000000 x 1000000 need', 'GB of memory', 'choose a smaller size=')),
    (lambda: load_data(val=5000), ('val must be', '5000')),
    (lambda: load_data(limit=5000), ('limit=5000', 'from 1 to 1797')),
    (lambda: load_data(limit=.5), ('limit=0.5',)),
    (lambda: load_data(share=2), ('share=2',)),
    (lambda: load_data(data_seed=1.5), ('data_seed=1.5',)),
    (lambda: load_data(data_seed=True), ('data_seed=True',)),
    (lambda: load_data(shift='Minority'), ("'Minority'",)),
    (lambda: load_data('c-mnist-fg', 'blur'), ("c-mnist-fg has the shift 'foreground', got shift='blur'",)),
])
def test_bad_input(make, words):
    one_line(make, *words)


def test_a_root_that_is_not_there_is_refused(tmp_path):
    "Also for data that need none."
    for name in ('digits', str(write_folder(tmp_path / 'some')), 'mnist'):
        one_line(lambda: load_data(name, root=tmp_path / 'nowhere'), 'root', 'no such folder', error=FileNotFoundError)
    (tmp_path / 'file').write_text('')
    one_line(lambda: load_data(root=tmp_path / 'file'), 'root', 'is not a folder', error=FileNotFoundError)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits the memory of a process')
def test_memory_that_runs_out_is_one_line():
    code = """
import resource
from rdd_nb import sources
sources.load_data(size=9)                    # everything is imported
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
sources._room = lambda *_: None              # as if the machine had room
try: sources.load_data(size=2000)
except ValueError as e: print(e)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith('; try fewer images (limit=) or smaller ones (size=)\n'), done.stderr
    assert done.stdout.startswith('there is not enough memory') and done.stdout.count('\n') == 1


# ---- the record of what was asked for ---------------------------------------------------------------------------

def test_the_record_loads_the_same_data(tmp_path):
    root = write_folder(tmp_path / 'all', [(8, 8)] * 80)
    for asked in (dict(), dict(shift='blur', share=.3, data_seed=2), dict(limit=900, size=12, val=.2, test=50),
                  dict(name=root, test=.2), dict(name=str(root), shift='noise', limit=60)):
        a = load_data(**asked)
        b = load_data(**a.source)
        assert [p.hash() for p in a] == [p.hash() for p in b] and a.source == b.source
    assert load_data().source == dict(name='digits', shift='minority', share=.1, data_seed=0)
    assert load_data(root).source['shift'] == 'none' and load_data(root).train.group is None


def test_a_limit_takes_the_same_images_for_every_seed():
    parts = [load_data(limit=800, data_seed=s) for s in range(3)]
    whole = {r for p in load_data(limit=800, shift='none') for r in rows(p.pixels())}
    assert len(whole) == 800
    for s in parts: assert {r for p in (s.train, s.val) for r in rows(p.pixels()[p.group == 0])} < whole
    assert [len(p) for p in parts[0]] == [100, 200, 1000]
    assert max(parts[0].test.counts()['minority']) - min(parts[0].test.counts()['minority']) <= 3      # stratified


# ---- folders of images --------------------------------------------------------------------------------------------

def write_folder(root, sizes=((8, 8),) * 6, mode='RGB', classes=('ant', 'bee'), seed=0):
    rng = np.random.default_rng(seed)
    for i, (h, w) in enumerate(sizes):
        path = Path(root, classes[i % len(classes)], f'{i:03}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode).save(path)
    return Path(root)


def test_folder_round_trip(tmp_path):
    d = split(images(60, 3, (3, 8, 8))._with(classes=['x', 'y', 'z']), val=.2, test=.2)
    for part, name in zip(d, d._fields):
        for i, pixels in enumerate(part.pixels()):
            path = tmp_path / name / part.classes[part.y[i]] / f'{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)
    (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
    back = load_data(tmp_path)
    assert [len(p) for p in back] == [36, 12, 12] and back.test.classes == ['x', 'y', 'z']
    assert back.train.name == f'{tmp_path.name}/train'
    for was, now in zip(d, back):
        assert overlap(was, now) == len(was) and was.y.bincount().equal(now.y.bincount())
        assert (was.pixels()[was.y.argsort(stable=True)] - now.pixels()).abs().max() <= .5 / 255 + 1e-6
    oracle = tv_datasets.ImageFolder(tmp_path / 'test', transforms.ToTensor())
    assert back.test.pixels().equal(torch.stack([x for x, _ in oracle])) and back.test.y.tolist() == oracle.targets
    flat = load_data(str(tmp_path / 'train'), shift='minority', share=.25, val=6, test=12)
    assert [len(p) for p in flat] == [18, 6, 24] and flat.test.groups == ['majority', 'minority']


def test_folder_sizes_and_greys(tmp_path):
    mixed = write_folder(tmp_path / 'mixed', [(8, 8), (8, 8), (12, 9), (8, 20), (30, 31), (16, 16)])
    one_line(lambda: from_folder(mixed), '002.png', '9 x 12 pixels', 'size=')
    assert from_folder(mixed, size=8).x.shape == (6, 3, 8, 8)
    assert from_folder(mixed, size=8, grey=True).x.shape == (6, 1, 8, 8)
    grey = write_folder(tmp_path / 'grey', mode='L')
    assert from_folder(grey).x.shape[1] == 1 and from_folder(grey, grey=False).x.shape[1] == 3
    one_line(lambda: from_folder(mixed, size='8'), "size='8'", 'whole number')


def test_bad_folders(tmp_path):
    one_line(lambda: load_data(tmp_path / 'none'), 'none', 'there is no such folder', error=FileNotFoundError)
    one_line(lambda: load_data(str(tmp_path / 'none')), 'there is no such folder', error=FileNotFoundError)
    one_line(lambda: load_data(tmp_path), str(tmp_path), 'no class folders', error=FileNotFoundError)
    (tmp_path / 'a').mkdir()
    one_line(lambda: load_data(tmp_path), str(tmp_path), 'a', error=FileNotFoundError)
    root = write_folder(tmp_path / 'half')
    (root / 'wasp').mkdir()
    one_line(lambda: load_data(root), 'wasp', error=FileNotFoundError)
    (root / 'wasp' / 'fake.png').write_bytes(b'\x89PNG\r\n\x1a\n not really')
    one_line(lambda: load_data(root), 'fake.png', 'not a readable image')
    whole = (root / 'ant' / '000.png').read_bytes()
    (root / 'wasp' / 'fake.png').write_bytes(whole[:len(whole) // 2])
    one_line(lambda: load_data(root), 'fake.png', 'not a readable image')
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / 'wasp' / 'fake.png')
    one_line(lambda: load_data(root), 'fake.png', '8 bits')
    file = root / 'ant' / '000.png'
    one_line(lambda: load_data(file), 'is not a folder', error=FileNotFoundError)
    write_folder(tmp_path / 'two' / 'train')
    write_folder(tmp_path / 'two' / 'test', classes=('ant', 'moth'))
    one_line(lambda: load_data(tmp_path / 'two'), "'moth'", 'training')


def test_copies_in_a_test_folder_are_refused(tmp_path):
    write_folder(tmp_path / 'train', [(8, 8)] * 12)
    write_folder(tmp_path / 'test', [(8, 8)] * 6)              # the same random images
    one_line(lambda: load_data(tmp_path), 'test: 6 of its 6 samples also occur in the training data')
    write_folder(tmp_path / 'test', [(8, 8)] * 6, seed=1)
    one_line(lambda: load_data(tmp_path, test=.5), 'test=0.5', 'whole number from 1 to 6')
    assert [len(p) for p in load_data(tmp_path, test=4, val=2)] == [10, 2, 4]
    write_folder(tmp_path / 'val', [(8, 8)] * 4, seed=1)
    one_line(lambda: load_data(tmp_path), 'val: 4 of its 4 samples also occur in the test data')


def test_what_is_no_regular_file_of_its_class(tmp_path):
    "Links to elsewhere, pipes, the whole disk: one line, at once."
    root = write_folder(tmp_path / 'some')
    inside = root / 'ant' / 'again.png'
    inside.symlink_to('000.png')
    assert len(from_folder(root).y) == 7                       # a link to a file of the same class
    inside.unlink()
    outside = write_folder(tmp_path / 'other') / 'bee' / '001.png'
    for target in (root / 'bee' / '001.png', outside, '..', '.', root, tmp_path, '/', '/dev/zero', 'nowhere.png'):
        for name in ('again', 'again.png'):
            link = root / 'ant' / name
            link.symlink_to(target)
            if name.endswith('png') or link.is_dir(): one_line(lambda: load_data(root), repr(name), 'no regular file')
            link.unlink()
    os.mkfifo(root / 'ant' / 'x.png')
    one_line(lambda: load_data(root), "'x.png' is no regular file")
    (root / 'ant' / 'x.png').unlink()
    (root / 'cat').symlink_to('.')
    one_line(lambda: load_data(root), "class 'cat' is a link")
    for everything in ('/', '/proc/self', '/proc', '/dev', '/sys'): one_line(lambda: load_data(everything), error=None)


def test_a_walk_ends(tmp_path, monkeypatch):
    deep = write_folder(tmp_path / 'deep') / 'ant' / '/'.join('abcdefgh')
    deep.mkdir(parents=True)
    Image.new('L', (8, 8)).save(deep / 'x.png')
    one_line(lambda: load_data(tmp_path / 'deep'), 'too deep')
    (deep / 'x.png').rename(deep.parents[1] / 'x.png')
    assert len(from_folder(tmp_path / 'deep')) == 7
    monkeypatch.setattr(sources, 'ENTRIES', 5)
    one_line(lambda: load_data(tmp_path / 'deep'), 'too many entries')


def test_names_that_are_no_text(tmp_path):
    root = write_folder(tmp_path / 'some')
    for name in (b'caf\xe9', b'red\x1b[31m', b'two\nlines'):
        path = os.fsencode(root) + b'/' + name
        os.mkdir(path)
        one_line(lambda: load_data(root), repr(os.fsdecode(name)), 'its name is no text')
        os.rmdir(path)
    (root / 'ant' / os.fsdecode(b'caf\xe9.png')).write_bytes(b'no image')
    one_line(lambda: load_data(root), 'caf\\udce9.png', 'not a readable image')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_folder_without_permission(tmp_path):
    root = write_folder(tmp_path / 'closed')
    root.chmod(0)
    try:
        one_line(lambda: load_data(root), 'closed', 'permission denied')
        one_line(lambda: load_data('mnist', root=root), 'closed', 'permission denied')
    finally: root.chmod(0o755)
    inner = root / 'ant' / '000.png'
    inner.chmod(0)
    try: one_line(lambda: load_data(root), '000.png', 'not a readable image')
    finally: inner.chmod(0o644)


# ---- arrays in a file ---------------------------------------------------------------------------------------------

def npz(path, **arrays):
    with open(path, 'wb') as f: np.savez(f, **arrays)
    return path


def test_npz(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    for name in ('a.npz', 'b.NPZ', 'c.Npz'):
        s = load_data(str(npz(tmp_path / name, x=x, y=y, group=y % 2, more=np.zeros(9))))
        assert s.train.bytes.dtype == torch.uint8 and s.train.groups == ['0', '1']
        assert s.train.name == f'{name[0]}/train'
    big = npz(tmp_path / 'big.npz', x=x.astype('>f4') / 255, y=y.astype('>i8'))
    small = npz(tmp_path / 'd.npz', x=x, y=y)
    assert [p.y.tolist() for p in load_data(big)] == [p.y.tolist() for p in load_data(small)]


def lying(path, shape, dtype='<f4', data=b'', method=zipfile.ZIP_STORED):
    "An .npz file whose array `x` says it has `shape` and holds `data`."
    head = str(dict(descr=dtype, fortran_order=False, shape=shape)).encode()
    head += b' ' * (117 - len(head)) + b'\n'
    with zipfile.ZipFile(path, 'w', method) as f:
        f.writestr('x.npy', b'\x93NUMPY\x01\x00' + len(head).to_bytes(2, 'little') + head + data)
        f.writestr('y.npy', (path.parent / 'y.npy').read_bytes())
    return path


def test_npz_that_lies(tmp_path):
    "Petabytes in the head, gigabytes of zeros, pickles, a zip of something else: one line, little memory."
    np.save(tmp_path / 'y.npy', np.arange(6) % 2)
    assert len(load_data(lying(tmp_path / 'ok.npz', (6, 1, 2, 2), '|u1', bytes(range(24))), val=1, test=1).train) == 4
    for shape in ((10**15,), (10**6, 10**9), (6, 1, 2**40, 2**40), (-1, 2), (6, 1, 2, 3)):
        with Cost() as cost: one_line(lambda: load_data(lying(tmp_path / 'x.npz', shape)), 'x.npz')
        assert cost.peak_mb < 200
    with open(tmp_path / 'o.npz', 'wb') as f: np.savez(f, x=np.array([object()] * 4), y=np.arange(4))
    one_line(lambda: load_data(tmp_path / 'o.npz'), 'o.npz', 'not an .npz file of plain arrays')
    np.save(open(tmp_path / 'array.npz', 'wb'), np.zeros(3))
    one_line(lambda: load_data(tmp_path / 'array.npz'), 'array.npz', 'not an .npz file')
    os.mkfifo(tmp_path / 'pipe.npz')
    one_line(lambda: load_data(tmp_path / 'pipe.npz'), 'pipe.npz', 'no such file', error=FileNotFoundError)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    "What the archive says it holds is compared with the memory before a byte is unpacked."
    np.save(tmp_path / 'y.npy', np.arange(6) % 2)
    path = lying(tmp_path / 'bomb.npz', (6, 1, 5000, 5000), '|u1', bytes(6 * 5000**2), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    monkeypatch.setattr(os, 'sysconf', lambda name: 1 if 'SIZE' in name else 10**8)         # a machine with 100 MB
    monkeypatch.setattr(np, 'load', lambda *_, **__: pytest.fail('unpacked'))
    one_line(lambda: load_data(path), 'bomb.npz', 'the values of x need 0.279 GB of memory')


# ---- torchvision's sets -------------------------------------------------------------------------------------------

def idx(path, array):
    "A file in the format of MNIST."
    head = bytes([0, 0, 8, array.ndim]) + b''.join(n.to_bytes(4, 'big') for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def tiny_mnist(root, folder='MNIST', n=200):
    rng = np.random.default_rng(0)
    for part, k in (('train', n), ('t10k', n // 2)):
        idx(root / folder / 'raw' / f'{part}-images-idx3-ubyte', rng.integers(0, 256, (k, 28, 28)))
        idx(root / folder / 'raw' / f'{part}-labels-idx1-ubyte', np.arange(k) % 10)
    return root


def test_torchvision_layout(tmp_path):
    root = tiny_mnist(tmp_path)
    s = load_data('mnist', 'minority', root=root)
    assert [len(p) for p in s] == [180, 20, 200]
    assert [len(p) for p in load_data('mnist', root=root, test=50, val=0)] == [200, 0, 50]
    oracle = tv_datasets.MNIST(root, train=False, transform=transforms.ToTensor())
    assert s.test.pixels()[:100].equal(torch.stack([x for x, _ in oracle]))
    assert s.test.y[:100].tolist() == [y for _, y in oracle] and s.train.classes == oracle.classes
    assert load_data('mnist', 'colour', root=root, size=14).train.x.shape[1:] == (3, 14, 14)
    task = load_data('c-mnist-bg', root=root)
    assert task.train.bytes.shape[1:] == (3, 32, 32)
    assert task.source == dict(name='c-mnist-bg', shift='background', share=.1, data_seed=0)


def test_torchvision_absent_or_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('RDD_NB_DATA', raising=False)
    one_line(lambda: load_data('mnist'), 'mnist', 'MNIST/raw', 'download=True', 'RDD_NB_DATA', error=FileNotFoundError)
    words = 'cifar-10-batches-py', str(tmp_path), 'download=True'
    one_line(lambda: load_data('cifar10', root=tmp_path), *words, error=FileNotFoundError)
    one_line(lambda: load_data('mnist', root=tmp_path / 'no'), "root", 'no such folder', error=FileNotFoundError)
    monkeypatch.setenv('RDD_NB_DATA', str(tmp_path / 'gone'))
    one_line(lambda: load_data('mnist'), 'RDD_NB_DATA', 'gone', 'no such folder', error=FileNotFoundError)
    raw = tiny_mnist(tmp_path / 'torn') / 'MNIST' / 'raw'
    whole = (raw / 'train-images-idx3-ubyte').read_bytes()
    for torn in (whole[:1000], whole[:3], b'', b'<html>not found</html>'):
        (raw / 'train-images-idx3-ubyte').write_bytes(torn)
        one_line(lambda: load_data('mnist', root=tmp_path / 'torn'), 'mnist', 'incomplete or damaged', 'torn')
    (raw / 'train-images-idx3-ubyte').unlink()
    one_line(lambda: load_data('mnist', root=tmp_path / 'torn'), 'mnist', 'incomplete or damaged', 'torn')
    (tmp_path / 'cifar-10-batches-py').mkdir()
    one_line(lambda: load_data('cifar10', root=tmp_path), 'cifar10', 'incomplete or damaged')


def packed_mnist(root, n=200):
    "`tiny_mnist` as four .gz files, and its MD5 sums."
    raw, sums = tiny_mnist(root / 'made', n=n) / 'MNIST' / 'raw', []
    (root / 'mnist').mkdir()
    for part in ('train', 't10k'):
        both = [(raw / f'{part}-{rest}-ubyte').read_bytes() for rest in ('images-idx3', 'labels-idx1')]
        for rest, data in zip(('images-idx3', 'labels-idx1'), both):
            (root / 'mnist' / f'{part}-{rest}-ubyte.gz').write_bytes(gzip.compress(data))
        sums.append(hashlib.md5(both[0][16:] + both[1][8:]).hexdigest())
    return tuple(sums)


def test_packed_sets_are_read_and_nothing_is_executed(tmp_path, monkeypatch):
    root = tmp_path / 'packed'
    monkeypatch.setitem(sources._MD5, 'mnist', packed_mnist(root))
    for script in ('unpack.py', 'mnist/unpack.py', 'mnist/__init__.py', 'MNIST.py'):
        (root / script).write_text(f'open({str(tmp_path / "executed")!r}, "w")')
    s, oracle = load_data('mnist', root=root), load_data('mnist', root=root / 'made')
    assert [a.hash() for a in s] == [b.hash() for b in oracle] and s.train.classes == oracle.train.classes
    monkeypatch.setenv('RDD_NB_DATA', str(root))
    assert load_data('mnist').train.hash() == s.train.hash()
    assert not (tmp_path / 'executed').exists()
    for script in root.rglob('*.py'): script.unlink()
    assert sorted(p.name for p in root.iterdir()) == ['made', 'mnist']                  # nothing was written there


def test_packed_sets_that_are_damaged_or_foreign(tmp_path, monkeypatch):
    root = tmp_path / 'packed'
    sums = packed_mnist(root)
    one_line(lambda: load_data('mnist', root=root), 'mnist', 'incomplete or damaged', 'not the published images')
    monkeypatch.setitem(sources._MD5, 'mnist', sums)
    file = root / 'mnist' / 'train-images-idx3-ubyte.gz'
    whole = file.read_bytes()
    for torn in (whole[:1000], whole[:3], b'', b'<html>no</html>', gzip.compress(b''), gzip.compress(bytes(10**6))):
        file.write_bytes(torn)
        one_line(lambda: load_data('mnist', root=root), 'mnist', 'incomplete or damaged')
    bomb = zlib.compressobj(1, wbits=31)
    with open(file, 'wb') as f:                                # a gigabyte of zeros in a few megabytes
        for _ in range(64): f.write(bomb.compress(bytes(2**24)))
        f.write(bomb.flush())
    with Cost() as cost: one_line(lambda: load_data('mnist', root=root), 'incomplete or damaged')
    assert cost.peak_mb < 400
    file.unlink()
    one_line(lambda: load_data('mnist', root=root), 'mnist', 'incomplete or damaged', 'FileNotFoundError')
    (root / 'cifar10').mkdir()
    one_line(lambda: load_data('cifar10', root=root), 'cifar10', 'incomplete or damaged')
    one_line(lambda: load_data('svhn', root=root), 'svhn', 'train_32x32.mat', error=FileNotFoundError)


def test_packed_cifar10_tiles(tmp_path, monkeypatch):
    "Four tiles of 50 x 50 images for each batch, and a table of labels."
    rng = np.random.default_rng(0)
    for file in ['test_batch']:
        for part in range(1, 5):
            tile = rng.integers(0, 256, (50, 50, 1, 1, 3), dtype=np.uint8).repeat(32, 2).repeat(32, 3)
            image = Image.fromarray(tile.transpose(0, 2, 1, 3, 4).reshape(1600, 1600, 3))
            (tmp_path / 'cifar10').mkdir(exist_ok=True)
            image.save(tmp_path / 'cifar10' / f'{file}_part{part}.webp', lossless=True, quality=0, method=0)
            if (file, part) == ('test_batch', 2): second = tile[:, :, 0, 0].reshape(2500, 3)
    batches = ['test_batch'] + [f'data_batch_{k}' for k in range(1, 6)]
    lines = ['batch,label,filename'] + [f'{b},{i % 10},{i}.png' for b in batches for i in range(10000)]
    with lzma.open(tmp_path / 'cifar10' / 'index.csv.xz', 'wt', preset=0) as f: f.write('\n'.join(lines))
    x, y = sources._tiles(tmp_path / 'cifar10', False)
    assert x.shape == (10000, 3, 32, 32) and y.tolist() == list(range(10)) * 1000
    assert (x[2500:5000] == second[:, :, None, None]).all()
    one_line(lambda: load_data('cifar10', root=tmp_path), 'incomplete or damaged', 'train_batch1_part1.webp')
    monkeypatch.setattr(sources, '_tiles', lambda *_: (x, y))
    one_line(lambda: load_data('cifar10', root=tmp_path), 'not the published images')


def test_download_that_fails(tmp_path, monkeypatch):
    def offline(self): raise OSError('no route to host\nsecond line')
    monkeypatch.setattr(tv_datasets.MNIST, 'download', offline)
    one_line(lambda: load_data('mnist', root=tmp_path, download=True), 'could not be downloaded', 'no route to host')


needs_data = pytest.mark.skipif(not DATA, reason='set RDD_NB_DATA to a folder with MNIST, Fashion-MNIST and CIFAR-10')


@needs_data
@pytest.mark.parametrize('name', ['mnist', 'fashion-mnist', 'cifar10'])
def test_real_sets(name):
    s, shape = load_data(name), (3, 32, 32) if name == 'cifar10' else (1, 28, 28)
    assert s.train.bytes.shape[1:] == shape and len(s.test) == 10000 and len(s.train) == 9 * len(s.val)
    assert overlap(s.train, s.val) == 0 and s.train.n_classes == 10
    raw = s.test.bytes.numpy().tobytes() + s.test.y.byte().numpy().tobytes()
    assert hashlib.md5(raw).hexdigest() == sources._MD5[name][1]           # the published images


@needs_data
@pytest.mark.parametrize('task', list(TASKS))
def test_real_tasks(task):
    "The sizes and the balance of the published tasks."
    s = load_data(task, val=0)
    assert [len(s.train), len(s.test)] == ([50000, 20000] if task == 'cifar10-s' else [60000, 10000])
    assert s.train.bytes.shape[1:] == (3, 32, 32) and s.train.n_classes == 10
    table = s.test.counts()
    assert (table.min(axis=1) >= .9 * table.max(axis=1)).all()
    table = s.train.counts().to_numpy()
    if task == 'cifar10-s': assert table.tolist() == [[4500, 500]] * 5 + [[500, 4500]] * 5
    else: assert [row[c] for c, row in enumerate(table)] == [int(.9 * row.sum()) for row in table]


@needs_data
@pytest.mark.parametrize('name', ['mnist', 'fashion-mnist'])
@pytest.mark.parametrize('shift, share', [*(('minority', s) for s in (.1, .05, .02)), ('blur', .05), ('noise', .05)])
def test_a_hidden_share_of_real_sets(name, shift, share):
    s = load_data(name, shift, share, limit=6000, test=500)
    hidden = s.train.counts().iloc[:, 1]
    assert [abs(k - share * n) <= .5 for k, n in zip(hidden, s.train.y.bincount().tolist())] == [True] * 10
    assert s.test.counts().to_numpy().tolist() == [[50, 50]] * 10 or name == 'mnist'


@needs_data
@pytest.mark.parametrize('factor', [10, 100])
def test_long_tailed_cifar10(factor):
    s = load_data('cifar10', 'long-tail', 1 / factor, val=0)
    kept = s.train.y.bincount().tolist()
    assert kept == [max(round(5000 * factor ** (-c / 9)), 1) for c in range(10)] and kept[0] == factor * kept[9]
    assert len(s.test) == 10000 and s.train.groups == ['head', 'medium', 'tail']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_the_gpu():
    on_cpu, on_gpu = load_data(), load_data().train.to('cuda')
    assert on_gpu.hash() == on_cpu.train.hash() and on_gpu.pixels().is_cuda and on_gpu.class_indices(3).is_cuda
    for shift in set(SHIFTS) - {'half-grey', 'noise'}:
        cpu, gpu = (split(d.without_groups(), shift=as_shift(shift)) for d in (on_cpu.train, on_gpu))
        for a, b in zip(cpu, gpu):
            assert a.y.equal(b.y.cpu()) and a.group.equal(b.group.cpu()), shift
            assert torch.allclose(a.x, b.x.cpu(), atol=.05), shift
    assert on_gpu.subset([1, 2]).x.is_cuda and overlap(on_gpu, on_cpu.train) == len(on_gpu)
