"The file of a synthetic data set: bit for bit what was saved, or one clear line."
import json, os, pickle, random, zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file as numpy_load
from safetensors.torch import save_file

import rdd_nb.core
from rdd_nb.core import write_tensors
from rdd_nb.synthetic import FORMAT, SyntheticDataset, load, save, save_png

TENSORS = ('x', 'y', 'mean', 'std', 'initial', 'mass', 'weight')


def example(m=6, classes=3, shape=(1, 4, 4), seed=0, **kw):
    g = torch.Generator().manual_seed(seed)
    options = dict(classes=[f'class {c}' for c in range(classes)], initial=torch.randn(m, *shape, generator=g),
                   mass=torch.rand(m, generator=g), weight=torch.rand(m, generator=g),
                   provenance=dict(method='rdd-distance', seed=3,
                                   settings=dict(lr=5., risk="0.5*Mean() + 0.5*CVaR(tail=0.1)"), note='ünïcödé 数'))
    return SyntheticDataset(torch.randn(m, *shape, generator=g), torch.arange(m) % classes,
                            torch.rand(shape[0], generator=g), torch.rand(shape[0], generator=g) + .1, **options | kw)


def same(a, b):
    return (all((getattr(a, k) is None and getattr(b, k) is None) or torch.equal(getattr(a, k), getattr(b, k))
                for k in TENSORS)
            and a.classes == b.classes and a.provenance == b.provenance and a.hash() == b.hash())


def refused(path, *words):
    with pytest.raises(ValueError) as e: load(path)
    text = str(e.value)
    assert '\n' not in text and str(path) in text and len(text) < 500 + len(str(path)), text
    for word in words: assert word in text, text


# What is saved comes back

values = st.floats(-2.**99, 2.**99, width=32)
plain = st.recursive(st.none() | st.booleans() | st.integers(-2**50, 2**50)
                     | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
                     lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@st.composite
def sets(draw):
    m, shape = draw(st.integers(1, 5)), draw(st.sampled_from([(1, 2, 2), (3, 1, 2), (4,), (1,)]))
    n = m * int(np.prod(shape))
    tensor = lambda size, elements: torch.tensor(draw(st.lists(elements, min_size=size, max_size=size)))
    channels = draw(st.sampled_from([1, shape[0]]))
    optional = lambda make: make() if draw(st.booleans()) else None
    y = tensor(m, st.integers(0, 3))
    return SyntheticDataset(tensor(n, values).view(m, *shape), y, tensor(channels, st.floats(-100, 100, width=32)),
                            tensor(channels, st.floats(.125, 100, width=32)),
                            optional(lambda: draw(st.lists(st.text(max_size=6), min_size=4, max_size=6))),
                            optional(lambda: tensor(n, values).view(m, *shape)),
                            optional(lambda: tensor(m, st.floats(0, 1, width=32))),
                            optional(lambda: tensor(m, st.floats(0, 1, width=32))),
                            draw(st.dictionaries(st.text(max_size=6), plain, max_size=4)))


@settings(max_examples=60)
@given(sets())
def test_round_trip(tmp_path_factory, s):
    path = tmp_path_factory.getbasetemp()/'round.safetensors'
    save(s, path)
    back = load(path)
    assert same(s, back) and back.x.dtype == torch.float32 and back.y.dtype == torch.int64
    raw = numpy_load(path)      # another reader sees the same
    assert (raw['x'] == s.x.numpy()).all() and (raw['y'] == s.y.numpy()).all()
    assert set(raw) == {k for k in TENSORS if getattr(s, k) is not None}
    save(back, path)
    assert same(load(path), s)


def test_the_metadata_can_be_read_without_the_package(tmp_path):
    s = example()
    save(s, tmp_path/'s.safetensors')
    with safe_open(tmp_path/'s.safetensors', 'np') as f: about = json.loads(f.metadata()['rdd_nb'])
    assert about['format'] == FORMAT and about['classes'] == s.classes and about['provenance'] == s.provenance
    assert about['hash'] == s.hash()


@pytest.mark.parametrize('change', [lambda x: x.double(), lambda x: x.half(), lambda x: x.bfloat16(),
                                    lambda x: x.requires_grad_(True), lambda x: x.transpose(2, 3),
                                    lambda x: x[:1].expand(6, -1, -1, -1),
                                    lambda x: x.to(memory_format=torch.channels_last), lambda x: (x * 10).int()],
                         ids=range(8))
def test_tensors_of_any_kind(change, tmp_path):
    x = change(example(shape=(3, 4, 4)).x)
    s = SyntheticDataset(x, torch.arange(6) % 3, .5, .25)
    save(s, tmp_path/'s.safetensors')
    assert torch.equal(load(tmp_path/'s.safetensors').x, x.detach().float()) and not s.x.requires_grad


def test_tensors_that_share_memory(tmp_path):
    "The same tensor twice, and parts of one tensor."
    x, half, share = torch.randn(4, 1, 4, 4), torch.tensor([.5]), torch.full((4,), .25)
    save(SyntheticDataset(x, torch.tensor([0, 0, 1, 1]), half, half, initial=x, mass=share, weight=share),
         tmp_path/'s.safetensors')
    back = load(tmp_path/'s.safetensors')
    assert torch.equal(back.initial, x) and torch.equal(back.weight, share) and torch.equal(back.mean, back.std)
    both = torch.randn(8, 1, 4, 4)
    save(SyntheticDataset(both[:4], torch.tensor([0, 0, 1, 1]), half, half, initial=both[4:]), tmp_path/'t.safetensors')
    assert torch.equal(load(tmp_path/'t.safetensors').initial, both[4:])
    assert (tmp_path/'t.safetensors').stat().st_size < 4000


def test_pixels_undo_the_normalisation():
    raw = torch.rand(6, 3, 4, 4)
    mean, std = torch.tensor([.1, .5, .7]), torch.tensor([.2, .3, .4])
    s = SyntheticDataset((raw - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1), torch.arange(6) % 2, mean, std)
    torch.testing.assert_close(s.pixels(), raw)
    table = torch.randn(6, 3) * 50
    t = SyntheticDataset((table - mean) / std, torch.arange(6) % 2, mean, std)
    torch.testing.assert_close(t.pixels(), table, rtol=1e-5, atol=1e-4)
    one = SyntheticDataset(raw * 2 - 1, torch.arange(6) % 2, .5, .5)      # one number for all channels
    torch.testing.assert_close(one.pixels(), raw)


def test_hash():
    s = example()
    assert s.hash() == example().hash() and len(s.hash()) == 64
    assert s.hash() != example(seed=1).hash() != example(shape=(1, 2, 8)).hash()
    changed = example()
    changed.y[0] = 2
    assert changed.hash() != s.hash()


# Files that are damaged

@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp('raw')/'s.safetensors'
    save(example(), path)
    return path.read_bytes()


def test_cut_at_any_place(raw, tmp_path):
    path, rng = tmp_path/'cut.safetensors', random.Random(0)
    header = 8 + int.from_bytes(raw[:8], 'little')
    places = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(raw) - 1, *rng.sample(range(header), 20),
              *rng.sample(range(header, len(raw)), 25)}
    assert len(places) > 45
    for n in places:
        path.write_bytes(raw[:n])
        refused(path)
    path.write_bytes(raw + b'more')
    refused(path)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    "In images, soft labels, initial images, weights or provenance: 300 places, and the whole header."
    path, rng = tmp_path/'flipped.safetensors', random.Random(1)
    save(example(soft=torch.full((6, 3), 1 / 3)), path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], 'little')
    for at in [*range(header), *rng.sample(range(header, len(raw)), 300)]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1:])
        refused(path)
    path.write_bytes(raw)
    load(path)


FALSE_OFFSETS = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,99]}}'


@pytest.mark.parametrize('content', [b'', b'\0' * 8, b'\xff' * 8, b'\xff' * 100, b'{}', b'\2\0\0\0\0\0\0\0{}',
                                     b'\x89PNG\r\n\x1a\n' + bytes(100), pickle.dumps([1, 2]), os.urandom(3000),
                                     (100).to_bytes(8, 'little') + FALSE_OFFSETS.ljust(100) + bytes(8),
                                     (2**62).to_bytes(8, 'little') + b'{}'], ids=range(11))
def test_files_that_are_something_else(content, tmp_path):
    path = tmp_path/'other.safetensors'
    path.write_bytes(content)
    refused(path)


def test_formats_of_others(tmp_path):
    x, path = torch.zeros(2, 1, 4, 4), tmp_path/'other'
    torch.save(dict(x=x), path)
    refused(path)
    np.savez(tmp_path/'other.npz', x=x)
    refused(tmp_path/'other.npz')
    with zipfile.ZipFile(path, 'w') as z: z.writestr('x', 'y')
    refused(path)
    save_file(dict(weight=x), path)      # somebody's network
    refused(path, 'rdd_nb', 'weight')
    save_file({}, path)
    refused(path, 'rdd_nb')


def described(tmp_path, about):
    "Two samples whose metadata are `about`: a text, or changes to a right description (None: without that entry)."
    s, path = SyntheticDataset(torch.ones(2, 1, 4, 4), torch.tensor([0, 1]), .5, .5), tmp_path/'f.safetensors'
    tensors = dict(x=s.x, y=s.y, mean=s.mean, std=s.std.clone())
    if isinstance(about, dict):
        about = dict(format=FORMAT, classes=['a', 'b'], provenance={}) | about
        return write_tensors(path, tensors, {k: v for k, v in about.items() if v is not None})
    save_file(tensors, path, metadata=None if about is None else {'rdd_nb': about})
    return path


NO_DESCRIPTIONS = [None, 'not json', '', '[1]', '3', 'null', '"text"', '{}', '{"format": 1}', '[' * 50_000,
                   '{"digest": "0"}', '{"digest": "' + '0' * 64 + '"}', dict(format=FORMAT + 1), dict(format=1),
                   dict(format='1'), dict(format=None), dict(format='\x1b' * 10**5), dict(classes=5),
                   dict(classes=None), dict(classes=['only one']), dict(classes=[]), dict(provenance=None),
                   dict(provenance=[])]


@pytest.mark.parametrize('about', NO_DESCRIPTIONS, ids=lambda a: str(a)[:40])
def test_foreign_descriptions(about, tmp_path): refused(described(tmp_path, about))


def test_a_right_description(tmp_path):
    assert load(described(tmp_path, dict(more='of a later version'))).classes == ['a', 'b']


@pytest.mark.parametrize('change', [
    dict(x=torch.tensor(1.)), dict(x=torch.zeros(2)),
    dict(x=torch.zeros(0, 1, 4, 4), y=torch.zeros(0, dtype=torch.long)), dict(y=torch.zeros(3, dtype=torch.long)),
    dict(y=torch.zeros(2, 1, dtype=torch.long)),
    dict(y=torch.tensor([0, 2])), dict(y=torch.tensor([-1, 0])), dict(x=torch.full((2, 1, 4, 4), float('nan'))),
    dict(std=torch.zeros(1)), dict(std=torch.tensor([float('nan')])), dict(mean=torch.tensor([float('inf')])),
    dict(mean=torch.zeros(3)), dict(mean=torch.zeros(0), std=torch.zeros(0)), dict(initial=torch.zeros(2, 1, 4, 5)),
    dict(mass=torch.zeros(3)), dict(weight=torch.zeros(2, 2)), dict(x=None), dict(std=None),
], ids=' '.join)
def test_tensors_that_do_not_fit(change, tmp_path):
    "In a file whose digest is right, and handed to the constructor."
    tensors = dict(x=torch.ones(2, 1, 4, 4), y=torch.tensor([0, 1]), mean=torch.tensor([.5]),
                   std=torch.tensor([.5])) | change
    tensors = {k: v for k, v in tensors.items() if v is not None}
    write_tensors(tmp_path/'f.safetensors', tensors, dict(format=FORMAT, classes=['a', 'b'], provenance={}))
    refused(tmp_path/'f.safetensors')
    if {'x', 'std'} <= set(tensors):
        with pytest.raises(ValueError) as e: SyntheticDataset(**tensors, classes=['a', 'b'])
        assert '\n' not in str(e.value)


def test_paths(tmp_path):
    for path in (tmp_path/'nowhere', tmp_path, tmp_path/'a'/'b'):
        with pytest.raises(FileNotFoundError, match='no such file') as e: load(path)
        assert str(path) in str(e.value)
    save(example(), tmp_path/'new'/'folder'/'s.safetensors')
    assert [p.name for p in (tmp_path/'new'/'folder').iterdir()] == ['s.safetensors']
    (tmp_path/'file').write_text('x')
    for path in (tmp_path/'file'/'s.safetensors', tmp_path/'new'):
        with pytest.raises(OSError): save(example(), path)
    assert (tmp_path/'file').read_text() == 'x' and {p.name for p in tmp_path.iterdir()} == {'new', 'file'}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'s.safetensors'
    save(example(), path)
    def fail(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(rdd_nb.core.os, 'replace', fail)
    with pytest.raises(OSError, match='s.safetensors'): save(example(seed=1), path)
    monkeypatch.undo()
    assert same(load(path), example()) and len(list(tmp_path.iterdir())) == 1


def test_provenance_is_a_copy_of_plain_values():
    p = dict(a=[1, 2], b=(3, 4))
    s = example(provenance=p)
    p['a'].append(5)
    assert s.provenance == dict(a=[1, 2], b=[3, 4])
    with pytest.raises(TypeError): example(provenance=dict(x=torch.zeros(2)))


# Pictures

@pytest.mark.parametrize('shape', [(1, 4, 4), (3, 4, 4), (2, 4, 6), (1, 1, 1)])
def test_pictures(shape, tmp_path):
    from PIL import Image
    import matplotlib.pyplot as plt
    s = example(shape=shape)
    ax = s.show()
    sheet = np.asarray(ax.images[0].get_array())
    assert sheet.shape == (3 * (shape[1] + 1) + 1, 2 * (shape[2] + 1) + 1, 3) and 0 <= sheet.min() and sheet.max() <= 1
    first = s.pixels()[s.y == 1][0].clamp(0, 1)
    np.testing.assert_allclose(sheet[shape[1] + 2:2 * (shape[1] + 1), 1:shape[2] + 1, 0], first[0], rtol=1e-5,
                               atol=1e-6)
    assert [t.get_text() for t in ax.get_yticklabels()] == s.classes
    plt.close('all')
    save_png(s, tmp_path/'images.png')
    image = Image.open(tmp_path/'images.png')
    image.load()
    assert image.format == 'PNG' and min(image.size) > 20 and not plt.get_fignums()
    save_png(s, tmp_path/'again.png')
    assert (tmp_path/'images.png').read_bytes() == (tmp_path/'again.png').read_bytes()


def test_pictures_where_classes_are_missing(tmp_path):
    s = SyntheticDataset(torch.zeros(3, 1, 4, 4), torch.tensor([0, 2, 2]), .5, .5, classes=['a', 'b', 'c'])
    assert [t.get_text() for t in s.show().get_yticklabels()] == ['a', 'c']
    save_png(s, tmp_path/'images.png')
    with pytest.raises(ValueError, match='only images'): SyntheticDataset(torch.zeros(3, 4), [0, 1, 1], .5, .5).show()


def test_class_names_are_no_mathematics(tmp_path):
    s = SyntheticDataset(torch.zeros(2, 1, 4, 4), [0, 1], .5, .5, classes=['income $20_$30', r'$\frac{'])
    assert [t.get_text() for t in s.show().get_yticklabels()] == s.classes
    save_png(s, tmp_path/'images.png')


def test_repr():
    assert repr(example()) == 'SyntheticDataset of 6 samples (1, 4, 4), 3 classes, by rdd-distance'
    assert 'by' not in repr(example(provenance={}))


def test_soft_labels_are_kept_hashed_and_checked(tmp_path):
    x, y, one = torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 0, 1]), torch.ones(1)
    soft = torch.tensor([[.9, .1], [.2, .8], [.6, .4], [0., 1.]])
    s = SyntheticDataset(x, y, 0 * one, one, soft=soft)
    save(s, tmp_path/'s.safetensors')
    back = load(tmp_path/'s.safetensors')
    assert torch.equal(back.soft, soft) and back.hash() == s.hash() != SyntheticDataset(x, y, 0 * one, one).hash()
    for bad in (soft[:3], soft[:, :1], soft * 2, soft - .5, soft * float('nan')):
        with pytest.raises(ValueError, match='soft'): SyntheticDataset(x, y, 0 * one, one, soft=bad)
