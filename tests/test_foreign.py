"""What is no lesson about `rdd_nb.foreign`: oracles for whitening and unpacking, odd files, bad input."""
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from rdd_nb.core import generator
from rdd_nb.foreign import CONSTANTS, Whitening, read, read_runs, unpack, write
from rdd_nb.synthetic import SyntheticDataset, save


def made(m=6, c=1, h=8, n_classes=3, seed=0, soft=False):
    gen = generator(seed, 'made')
    probabilities = torch.rand(m, n_classes, generator=gen).softmax(1) if soft else None
    y = probabilities.argmax(1) if soft else torch.arange(m) * n_classes // m
    return SyntheticDataset(
        torch.randn(m, c, h, h, generator=gen),
        y,
        [0.4] * c,
        [0.3] * c,
        list('abcdefghij')[:n_classes],
        soft=probabilities,
    )


def dc(path, **entries):
    torch.save(entries, path)
    return path


# Round trips


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(['dc', 'idc', 'mtt', 'rfad']),
    m=st.integers(3, 9),
    c=st.sampled_from([1, 3]),
    h=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(tmp_path, format, m, c, h, seed):
    s = made(m, c, h, seed=seed)
    path = write(s, tmp_path / ('best.npz' if format == 'rfad' else 'images_0.pt'), format)
    back = read(path, mean=s.mean, std=s.std, classes=s.classes, zca=False)
    assert torch.equal(back.y, s.y) and back.classes == s.classes and back.soft is None
    assert torch.allclose(back.x, s.x, atol=1e-5) and (format == 'idc' or torch.equal(back.x, s.x))


def test_soft_labels_survive_where_the_format_holds_them(tmp_path):
    s = made(soft=True)
    back = read(write(s, tmp_path / 'best.npz', 'rfad'), mean=.4, std=.3)
    assert (
        torch.allclose(back.soft, s.soft, atol=1e-6)
        and torch.equal(back.y, s.y)
        and back.provenance['labels'] == 'soft'
    )
    for format in ('dc', 'idc', 'mtt'):
        with pytest.raises(ValueError, match='holds hard labels, and this set has soft ones'):
            write(s, tmp_path / 'images.pt', format)
    assert [p.name for p in tmp_path.iterdir()] == ['best.npz']


def test_published_constants_are_applied(tmp_path):
    s = SyntheticDataset(torch.rand(10, 3, 4, 4), torch.arange(10), [0.], [1.])
    path = write(s, tmp_path / 'res.pt', 'dc', data='cifar10')
    images = torch.load(path, weights_only=True)['data'][0][0]
    mean, std, _ = CONSTANTS['cifar10']
    assert torch.allclose(images, (s.x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), atol=1e-6)
    back = read(path, 'cifar10')
    assert (
        torch.allclose(back.pixels(), s.x, atol=1e-6)
        and len(back.classes) == 10
        and back.provenance['data'] == 'cifar10'
    )


def test_idc_pixels_are_raw_and_become_normalised(tmp_path):
    torch.save([pixels := torch.rand(10, 1, 28, 28), torch.arange(10)], tmp_path / 'data.pt')
    s = read(tmp_path / 'data.pt', 'mnist')
    assert torch.allclose(s.x, (pixels - .1307) / .3081, atol=1e-6)
    # without constants as they are, mean 0 and std 1
    assert torch.equal(read(tmp_path / 'data.pt').x, pixels)


def test_our_own_format_is_read_too(tmp_path):
    s = made()
    save(s, tmp_path / 's.safetensors')
    assert read(tmp_path / 's.safetensors').hash() == s.hash()


# Files as they are found

def test_several_runs_in_one_dc_file(tmp_path):
    runs = [[torch.full((2, 1, 4, 4), k / 4 - .25), torch.tensor([0, 1])] for k in range(3)]
    path = dc(tmp_path / 'res.pt', data=runs, accs_all_exps={'ConvNet': [np.float64(.5), np.float32(.25)]})
    for experiment, expected in ((-1, .25), (0, -.25), (1, 0.)):
        s = read(path, mean=0, std=1, experiment=experiment)
        assert (s.x == expected).all() and s.provenance['runs'] == 3 and s.provenance['experiment'] == 4 * expected + 1
    with pytest.raises(ValueError, match='experiment=3: .* holds 3'): read(path, mean=0, std=1, experiment=3)


def test_numpy_scalars_as_numpy_1_wrote_them(tmp_path):
    path = tmp_path / 'res.pt'
    torch.save(
        dict(data=[[torch.rand(2, 1, 4, 4) - 0.1, torch.tensor([0, 1])]], accs_all_exps={'ConvNet': [np.float64(0.5)]}),
        path,
        _use_new_zipfile_serialization=False,
    )
    content = path.read_bytes()
    if b'numpy._core' in content: path.write_bytes(content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    assert b'numpy.core.multiarray' in path.read_bytes()
    assert len(read(path, mean=0, std=1)) == 2


def test_a_pair_instead_of_a_list_of_pairs(tmp_path):
    path = dc(tmp_path / 'res.pt', data=(torch.rand(4, 1, 4, 4) - .1, torch.tensor([0, 0, 1, 1])))
    assert read(path, mean=0, std=1).y.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('dtype, scale', [(torch.float16, 1), (torch.float64, 1), (torch.uint8, 255)])
def test_types_of_images(tmp_path, dtype, scale):
    x = torch.linspace(0, 1, 32).view(2, 1, 4, 4)
    torch.save(
        [(x * scale).round().to(dtype) if dtype is torch.uint8 else x.to(dtype), torch.tensor([0, 1])],
        tmp_path / 'data.pt',
    )
    s = read(tmp_path / 'data.pt')
    assert s.x.dtype is torch.float32 and torch.allclose(s.x, x, atol=2e-3)


def test_labels_of_an_mtt_file(tmp_path):
    images = torch.randn(20, 1, 28, 28)
    torch.save(images, tmp_path / 'images_best.pt')
    assert torch.equal(read(tmp_path / 'images_best.pt', 'mnist').y, torch.arange(10).repeat_interleave(2))
    with pytest.raises(ValueError, match='no labels_best.pt beside it'):
        read(tmp_path / 'images_best.pt', mean=0, std=1)
    torch.save(y := torch.arange(20) % 10, tmp_path / 'labels_best.pt')
    assert torch.equal(read(tmp_path / 'images_best.pt', 'mnist').y, y)
    torch.save(y.flip(0), tmp_path / 'other.pt')
    assert torch.equal(read(tmp_path / 'images_best.pt', 'mnist', labels=tmp_path / 'other.pt').y, y.flip(0))
    assert torch.equal(read(tmp_path / 'images_best.pt', 'mnist', labels=y * 0).y, y * 0)
    torch.save(images[:3], tmp_path / 'labels_best.pt')
    with pytest.raises(ValueError, match='labels have shape'): read(tmp_path / 'images_best.pt', 'mnist')


def test_rfad_labels_become_probabilities_without_changing_the_class(tmp_path):
    gen = generator(0, 'rfad')
    labels = torch.randn(50, 10, generator=gen)
    np.savez(
        tmp_path / 'best.npz',
        images=torch.randn(50, 1, 8, 8, generator=gen).numpy(),
        labels=labels.numpy(),
        k=np.float64(0),
        jit=5e-3,
        best_iter=np.int64(40),
    )
    s = read(tmp_path / 'best.npz', 'mnist')
    assert torch.equal(s.y, labels.argmax(1)) and torch.equal(s.soft.argmax(1), s.y)
    assert torch.allclose(s.soft.sum(1), torch.ones(50)) and (s.soft >= 0).all()


# Oracles

def test_whitening_by_singular_values():
    raw = torch.rand(200, 3, 4, 4, generator=generator(0, 'raw')) * torch.linspace(.2, 1, 16).view(4, 4)
    flat = raw.flatten(1).double()
    u, s, _ = torch.linalg.svd((flat - flat.mean(0)).T @ (flat - flat.mean(0)) / 199)
    assert torch.allclose(
        Whitening(raw).apply(raw).flatten(1).double(), (flat - flat.mean(0)) @ (u * (s + 0.1).rsqrt() @ u.T), atol=1e-5
    )
    standard = (raw - raw.mean((0, 2, 3), keepdim=True)) / raw.std((0, 2, 3), keepdim=True)
    z = standard.flatten(1).double()
    covariance = z.T @ z / 200
    u, s, _ = torch.linalg.svd(covariance + .1 * covariance.trace() / 48 * torch.eye(48, dtype=torch.double))
    assert torch.allclose(Whitening(raw, 'rfad').apply(raw).flatten(1).double(), z @ (u * s.rsqrt() @ u.T), atol=1e-5)


@pytest.mark.parametrize('kind', ['mtt', 'rfad'])
def test_whitening_in_batches_and_back(kind):
    raw = torch.rand(90, 1, 5, 5, generator=generator(1, 'raw'))
    zca = Whitening(raw, kind, batch=17, progress=False)
    assert torch.allclose(zca.matrix, Whitening(raw, kind).matrix, atol=1e-9)
    new = torch.rand(4, 1, 5, 5, generator=generator(2, 'raw')) * 3 - 1
    assert torch.allclose(zca.undo(zca.apply(new)), new, atol=1e-5)
    with pytest.raises(ValueError, match='fitted on'): zca.apply(raw[..., :4])


def test_whitened_colour_images_are_undone_or_warned_of(tmp_path):
    raw = torch.rand(60, 3, 4, 4, generator=generator(3, 'raw'))
    s = SyntheticDataset((raw[:6] - .5) / .25, torch.arange(6) % 3, [.5] * 3, [.25] * 3)
    for kind, name, format in (('rfad', 'best.npz', 'rfad'), ('mtt', 'images_best.pt', 'mtt')):
        zca = Whitening(raw, kind)
        path = write(SyntheticDataset(zca.apply(s.pixels()), s.y, [0.], [1.]), tmp_path / name, format)
        back = read(path, mean=[.5] * 3, std=[.25] * 3, zca=zca)
        assert (
            torch.allclose(back.pixels(), raw[:6], atol=1e-5)
            and torch.allclose(back.x, s.x, atol=1e-4)
            and back.provenance['zca'] == f'undone ({kind})'
        )
        with pytest.warns(UserWarning, match='whitened and stay so'):
            kept = read(path, zca=None if kind == 'rfad' else True, labels=s.y if kind == 'mtt' else None)
        assert torch.allclose(kept.pixels(), zca.apply(raw[:6]), atol=1e-5) and kept.mean.item() == 0


@pytest.mark.parametrize('factor, h', [(2, 28), (3, 28), (3, 32), (2, 7)])
def test_tiles_as_upsampled_crops(factor, h):
    x = torch.rand(2, 3, h, h)
    size = math.ceil(h / factor)
    big = torch.full((2, 3, size * factor, size * factor), .5)
    big[..., :h, :h] = x
    out = unpack(x, factor).view(2, factor, factor, 3, h, h)
    for i in range(factor):
        for j in range(factor):
            crop = big[..., i * size:(i + 1) * size, j * size:(j + 1) * size]
            assert torch.allclose(out[:, i, j], torch.nn.Upsample(size=h, mode='bilinear')(crop), atol=1e-6)


def test_packed_file_repeats_labels_and_counts_what_is_stored(tmp_path):
    torch.save([torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])], tmp_path / 'data.pt')
    s = read(tmp_path / 'data.pt', mean=.5, std=.5, factor=2)
    assert s.y.tolist() == [0] * 8 + [1] * 8 and s.provenance['bytes'] == 4 * 64 * 4 + 4


# Bad input

BAD = {
    'its images have shape': [torch.randn(4, 8, 8), torch.zeros(4).long()],
    'expected one': [torch.randn(4, 1, 8, 8), torch.zeros(3).long()],
    'not all finite': [torch.full((2, 1, 4, 4), math.nan), torch.zeros(2).long()],
    'labels run from -1': [torch.randn(2, 1, 4, 4), torch.tensor([-1, 0])],
    'labels run from 0 to 12, expected 0 to 9': [torch.randn(2, 1, 28, 28), torch.tensor([0, 12])],
    'labels are not whole numbers': [torch.randn(2, 1, 28, 28), torch.tensor([0., .5])],
    'labels have 3 columns, expected 10': [torch.randn(2, 1, 28, 28), torch.rand(2, 3)],
    'type torch.int64': [torch.zeros(2, 1, 4, 4).long(), torch.zeros(2).long()],
    'mean and std have 3 and 3 values': [torch.randn(2, 2, 4, 4), torch.zeros(2).long()],
}

@pytest.mark.parametrize('message', BAD)
def test_damaged_contents_are_named_in_one_line(tmp_path, message):
    path, content = tmp_path / 'data.pt', BAD[message]
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as e:
        read(path, 'cifar10' if message.startswith('mean') else 'mnist', format='idc')
    assert '\n' not in str(e.value) and 'data.pt' in str(e.value)


@pytest.mark.parametrize(
    'content',
    [dict(weights=torch.zeros(3)), [torch.zeros(2)], 3, dict(data=[]), dict(data=[[torch.zeros(2)]]), dict(data='x')],
)
def test_foreign_contents_are_named_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / 'a.pt')
    with pytest.raises(ValueError) as e: read(tmp_path / 'a.pt', 'mnist')
    assert '\n' not in str(e.value) and (
        'not a distilled set' in str(e.value) or "'data' is not a list" in str(e.value)
    )


@pytest.mark.parametrize('name', ['a.pt', 'a.npz', 'a.safetensors'])
def test_damaged_files(tmp_path, name):
    for content in (b'', b'not a file of tensors', bytes(range(256)) * 10):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match='not a readable'): read(tmp_path / name, 'mnist')
    with pytest.raises(FileNotFoundError): read(tmp_path / ('b' + name), 'mnist')


def test_numbers_that_do_not_look_like_what_they_are_said_to_be(tmp_path):
    path = dc(tmp_path / 'res.pt', data=[[torch.randn(10, 1, 28, 28) * 40, torch.arange(10)]])
    with pytest.warns(UserWarning, match='far outside'): read(path, 'mnist')
    path = dc(tmp_path / 'raw.pt', data=[[torch.rand(10, 1, 28, 28), torch.arange(10)]])
    with pytest.warns(UserWarning, match='raw pixels'): read(path, 'mnist')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read(dc(tmp_path / 'good.pt', data=[[torch.randn(10, 1, 28, 28), torch.arange(10)]]), 'mnist')


def test_refusals_of_the_writer_leave_nothing(tmp_path):
    s = made()
    for kw, message in (
        (dict(path='a.npz', format='dc'), 'end in .pt'),
        (dict(path='a.pt', format='rfad'), 'end in .npz'),
        (dict(path='a.pt', format='mtt'), "has 'images' in it"),
        (dict(path='a.pt', format='hdf'), 'choose from dc, idc'),
        (dict(path='a.pt', data='nist'), 'no published constants'),
    ):
        with pytest.raises(ValueError, match=message): write(s, tmp_path / kw.pop('path'), **kw)
    with pytest.raises(ValueError, match='these formats hold images'):
        write(SyntheticDataset(torch.randn(2, 5), torch.tensor([0, 1]), [0.0], [1.0]), tmp_path / 'a.pt')
    assert not list(tmp_path.iterdir())


def test_unreadable_arguments():
    for kw, message in (
        (dict(kind='pca'), 'choose from mtt, rfad'),
        (dict(train=torch.rand(1, 1, 4, 4)), 'two at least'),
    ):
        with pytest.raises(ValueError, match=message): Whitening(**dict(train=torch.rand(5, 1, 4, 4)) | kw)
    with pytest.raises(ValueError, match='factor=0'): unpack(torch.rand(1, 1, 4, 4), 0)


# Files that claim more than they hold

def small(path, content, **kw):
    torch.save(content, path, **kw)
    assert path.stat().st_size < 10_000
    return path


@pytest.mark.parametrize('zipped', [True, False])
def test_tensors_larger_than_the_file_are_refused(tmp_path, zipped):
    y = torch.arange(2)
    endless = torch.zeros(1).expand(10**12, 1, 1, 1)
    lists = dict(ConvNet=torch.zeros(1).expand(10**13))
    for content in ([endless, endless[:, 0, 0, 0]], endless, dict(data=[[endless, y]]),
                    dict(data=[[torch.zeros(2, 1, 4, 4), y]], accs_all_exps=lists)):
        with pytest.raises(ValueError, match='more than it has room for') as e:
            read(small(tmp_path / 'images.pt', content, _use_new_zipfile_serialization=zipped), 'mnist')
        assert '\n' not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize('label', [10**11, 2**16, 2**62])
def test_labels_no_data_set_has_are_refused(tmp_path, label):
    path = small(tmp_path / 'data.pt', [torch.rand(2, 1, 4, 4), torch.tensor([0, label])])
    with pytest.raises(ValueError, match=f'labels run from 0 to {label}, expected 0 to 65535'): read(path)


def test_archives_that_unpack_to_far_more_are_refused(tmp_path):
    import zipfile
    np.savez_compressed(
        tmp_path / 'a.npz', images=np.zeros((100, 3, 512, 512), dtype=np.float32), labels=np.arange(100)
    )
    torch.save([torch.zeros(100, 3, 512, 512), torch.arange(100)], tmp_path / 'whole.pt')
    packed = zipfile.ZipFile(tmp_path / 'b.pt', 'w', zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / 'whole.pt') as whole, packed:
        for i in whole.infolist(): packed.writestr(i.filename, whole.read(i))
    for name in ('a.npz', 'b.pt'):
        assert (tmp_path / name).stat().st_size < 10**6
        with pytest.raises(ValueError, match='would unpack to 31') as e: read(tmp_path / name, 'cifar10')
        assert '\n' not in str(e.value)


def test_a_header_that_promises_more_than_the_array(tmp_path):
    import io, zipfile
    np.save(buffer := io.BytesIO(), np.zeros((2, 1, 4, 4), dtype=np.float32))
    head = buffer.getvalue().replace(b'(2, 1, 4, 4)', b'(10**14, 1,)')
    for claim in (b'(9999999999, )', b'(2, 1, 4, 999999999)'):
        content = buffer.getvalue().replace(b'(2, 1, 4, 4), }' + b' ' * (len(claim) - 12), claim + b', }', 1)
        assert content != buffer.getvalue()
        with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as z:
            z.writestr('images.npy', content)
            z.writestr('labels.npy', head)
        with pytest.raises(ValueError, match='not a readable .npz file'): read(tmp_path / 'a.npz', 'mnist')


def test_a_list_that_holds_itself_many_times(tmp_path):
    "2**40 paths through 41 lists; each is looked at once."
    nested = [torch.zeros(1)]
    for _ in range(40): nested = [nested, nested]
    with pytest.raises(ValueError, match='not a distilled set'): read(small(tmp_path / 'a.pt', dict(a=nested)), 'mnist')


# Runs, and what their authors measured

def test_all_runs_are_read(tmp_path):
    runs = [[torch.full((2, 1, 4, 4), k / 4 - .25), torch.tensor([0, 1])] for k in range(3)]
    path = dc(
        tmp_path / 'res.pt',
        data=runs,
        accs_all_exps=dict(ConvNet=[np.float64(0.5), np.float32(0.75)], MLP=[], LeNet=[math.nan], VGG11='x'),
    )
    found = read_runs(path, mean=0, std=1, classes=['a', 'b'])
    assert [s.x[0, 0, 0, 0].item() for s in found] == [-0.25, 0, 0.25] and [
        s.provenance['experiment'] for s in found
    ] == [0, 1, 2]
    assert all(
        s.classes == ['a', 'b'] and s.provenance['measured'] == dict(ConvNet=dict(mean=0.625, sd=0.125, n=2))
        for s in found
    )
    save(found[0], tmp_path / 's.safetensors')
    assert (
        len(read_runs(tmp_path / 's.safetensors')) == 1
        and len(read_runs(write(found[0], tmp_path / 'a.pt', 'idc'))) == 1
    )
    for lists in ({}, [], 3, None, dict(ConvNet=3), dict(ConvNet=[[]]), {3: [.5]}):
        s = read(dc(tmp_path / 'odd.pt', data=runs, accs_all_exps=lists), mean=0, std=1)
        assert s.provenance['measured'] == (dict([('3', dict(mean=.5, sd=0., n=1))]) if lists == {3: [.5]} else {})


OTHERS = Path(os.environ.get('RDD_NB_DATA', '.')) / 'distilled-sets'


@pytest.mark.skipif(not OTHERS.is_dir(), reason='needs RDD_NB_DATA/distilled-sets')
@pytest.mark.parametrize(
    'path', sorted(p for p in OTHERS.glob('*') if p.suffix in ('.pt', '.npz')), ids=lambda p: p.name
)
def test_published_files(path):
    "Each is read with all its runs, or refused in one line."
    name = (
        'mnist'
        if 'MNIST' in path.name or path.name.startswith('ka')
        else 'cifar100' if 'CIFAR100' in path.name else 'cifar10'
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if path.name.startswith('gn_'):
            with pytest.raises(ValueError, match='its images have shape') as e: read_runs(path, name)
            assert '\n' not in str(e.value)
            return
        found = read_runs(path, name)
    # as plain as can be, for files we know
    held = torch.load(path, weights_only=False) if path.name.startswith('dg_') else None
    if held:
        assert len(found) == len(held['data']) and all(torch.equal(s.x, x) for s, (x, _) in zip(found, held['data']))
        for a, values in held['accs_all_exps'].items():
            if len(values): assert found[0].provenance['measured'][a]['mean'] == pytest.approx(np.mean(values))
            else: assert a not in found[0].provenance['measured']
    assert all(len(s.classes) == CONSTANTS[name][2] for s in found)
