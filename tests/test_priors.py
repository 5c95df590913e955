"Priors against scipy, least squares and finite differences; cuts of decoders; files that are no generators."
import math
import os
import pickle
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch import nn

from rdd_nb import priors
from rdd_nb.priors import (Frequencies, GeneratorLatents, LowRank, MultiFormation, Normalise, Parametrisation, Pixels,
                           Prior, dct_matrix,
                           load_generator, trust)

F64 = torch.float64
QUICK = GeneratorLatents(latent=5, width=4, train_steps=20, steps=10)
ALL = [Pixels(), MultiFormation(2), MultiFormation(3), Frequencies(.5), LowRank(4), QUICK,
       GeneratorLatents(layer='fold', latent=3, width=2, train_steps=5, steps=3)]
every_prior = pytest.mark.parametrize('prior', ALL, ids=lambda p: repr(p)[:30])


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(prior, shape=(2, 7, 6), stored=3, dtype=F64):
    return draw(stored * prior.per_sample, *shape, dtype=dtype), draw(40, *shape, seed=1,
                                                                      dtype=dtype), torch.arange(40) % 4


def small(bypass=None, size=(1, 4, 4), batchnorm=False):
    "A decoder of one's own: 3 latents, layers in an order of their own."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last,self.first,self.middle = nn.Linear(6, math.prod(size)),nn.Linear(3, 5),nn.Linear(5, 6)
            self.norm = nn.BatchNorm1d(6) if batchnorm else nn.Identity()
        def forward(self, z):
            h = self.norm(self.middle(torch.tanh(self.first(z))))
            if bypass: h = h + bypass(z)
            return self.last(torch.sin(h)).reshape(-1, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


# The protocol

@every_prior
def test_protocol(prior):
    images, x, y = problem(prior)
    before = images.clone()
    p = prior.begin(images, x, y, seed=3)
    assert isinstance(p, Parametrisation) and p.decode().shape == images.shape and p.decode().dtype == images.dtype
    assert all(q.is_leaf and q.requires_grad and q.is_contiguous() for q in p.parameters)
    assert torch.equal(images, before)
    with torch.no_grad():
        for q in p.parameters: q.add_(1.)
    assert torch.equal(images, before)                    # the parameters are copies
    shown = p.decode().detach()
    kept = shown.clone()
    with torch.no_grad():
        for q in p.parameters: q.add_(1.)
    assert torch.equal(shown, kept)                       # and so is what was decoded


@every_prior
def test_the_same_arguments_give_the_same(prior):
    images, x, y = problem(prior)
    state = torch.random.get_rng_state()
    a = prior.begin(images, x, y, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)   # nobody else's randomness is touched
    torch.rand(5)
    b = prior.begin(images, x, y, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters, b.parameters)) and torch.equal(a.decode(), b.decode())
    with torch.no_grad():                                     # what a resumed run does
        for p, q in zip(a.parameters, b.parameters):
            p.add_(.3); q.copy_(p)
    assert torch.equal(a.decode(), b.decode())


@every_prior
def test_gradient(prior):
    images, x, y = problem(prior, (1, 4, 4), 1)
    p = prior.begin(images, x, y)
    weights = draw(*images.shape, seed=5)
    assert torch.autograd.gradcheck(lambda *z: (p._decode(*z).sin() * weights).sum(),
                                    [q.detach().requires_grad_() for q in p.parameters], eps=1e-6, atol=1e-5)


@every_prior
def test_numbers(prior):
    m = 3
    images, x, y = problem(prior, stored=m)
    p = prior.begin(images, x, y)
    decoder = (5 + 1) * 4 * 4 + (4 * 9 + 1) * 4 + (4 * 9 + 1) * 2
    expected = dict(zip(ALL, (m * 84, m * 84, m * 84, m * 2 * 4 * 3, m * 4 + 84 * 5, m * 5 + decoder, m * 2 * 4
                              + (2 * 9 + 1) * 2 + (2 * 9 + 1) * 2)))
    assert p.numbers == sum(q.numel() for q in p.parameters) + p.shared == expected[prior]


@every_prior
def test_text_and_equality(prior):
    assert Prior.read(repr(prior)) == prior and hash(Prior.read(repr(prior))) == hash(prior)
    assert pickle.loads(pickle.dumps(prior)) == prior
    assert [q == prior for q in ALL].count(True) == 1 and prior != None and not prior == 'Pixels()'


@pytest.mark.parametrize('prior', [Pixels(), LowRank(3), GeneratorLatents(latent=2, width=2, train_steps=3, steps=2)],
                         ids=repr)
def test_tables(prior):
    images, x, y = problem(prior, (9,))
    assert prior.begin(images, x, y).decode().shape == images.shape


@pytest.mark.parametrize('prior', [MultiFormation(1), Frequencies(1), Frequencies(1.), LowRank(84)], ids=repr)
def test_what_loses_nothing_is_exact(prior):
    images, _, y = problem(prior)
    x = draw(100, 2, 7, 6, seed=9)
    torch.testing.assert_close(prior.begin(images, x, y).decode().detach(), images, rtol=0, atol=1e-9)


def test_pixels_are_the_images_bit_for_bit():
    images = draw(4, 1, 3, 3, dtype=torch.float32)
    assert torch.equal(Pixels().begin(images).decode(), images)


# Linear priors: the projection is the best one

def jacobian(p):
    z, = p.parameters
    z = z.detach()
    flat = torch.func.jacrev(lambda v: p._decode(v.reshape(z.shape)).flatten())(torch.zeros_like(z).flatten())
    return flat, p._decode(torch.zeros_like(z)).flatten()


@pytest.mark.parametrize('prior', ALL[:5], ids=repr)
def test_encoding_is_least_squares(prior):
    images, x, y = problem(prior, (2, 5, 4), 2)
    p = prior.begin(images, x, y)
    J, offset = jacobian(p)
    best = np.linalg.lstsq(J.numpy(), (images.flatten() - offset).numpy(), rcond=None)[0]
    np.testing.assert_allclose(p.parameters[0].detach().flatten().numpy(), best, atol=1e-8)
    np.testing.assert_allclose((J.square().sum() / J.shape[1]).item(), 1, atol=1e-9)    # one step size for all


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 2))
@settings(max_examples=40)
def test_multi_formation_enlarges_its_parts(h, w, factor, stored):
    prior = MultiFormation(factor)
    images = draw(stored * factor**2, 2, h, w)
    if factor > min(h, w):
        with pytest.raises(ValueError, match=f'factor={factor}: images of {h}x{w}'): prior.begin(images)
        return
    p = prior.begin(images)
    z = p.parameters[0].detach()
    assert p.numbers == stored * 2 * h * w
    parts = [F.interpolate(piece, (h, w), mode='bilinear') for row in z.tensor_split(factor, 2)
             for piece in row.tensor_split(factor, 3)]
    expected, got = torch.stack(parts, 1).flatten(0, 1), p.decode().detach()
    scale = (got * expected).sum() / expected.square().sum()
    torch.testing.assert_close(got, scale * expected, atol=1e-9, rtol=0)


@given(st.integers(1, 11), st.integers(1, 11), st.floats(.01, 1))
@settings(max_examples=40)
def test_frequencies_are_scipys(h, w, keep):
    images = draw(3, 2, h, w)
    p = Frequencies(keep).begin(images)
    a, b = (max(1, round(keep * s)) for s in (h, w))
    full = dctn(images.numpy(), axes=(2, 3), norm='ortho')
    np.testing.assert_allclose(p.parameters[0].detach().numpy(), full[..., :a, :b], atol=1e-9)
    lost = (images - p.decode().detach()).square().sum().item()
    np.testing.assert_allclose(lost, (full**2).sum() - (full[..., :a, :b]**2).sum(), atol=1e-8)    # Parseval


def test_low_rank_is_the_svd():
    x, images = draw(50, 1, 4, 5, seed=1) * torch.linspace(1, 3, 20, dtype=F64).reshape(1, 4, 5), draw(6, 1, 4, 5)
    mean = x.mean(0)
    basis = np.linalg.svd((x - mean).flatten(1).numpy())[2][:7]
    expected = (images - mean).flatten(1).numpy() @ basis.T @ basis
    got = (LowRank(7).begin(images, x).decode().detach() - mean).flatten(1).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)


# Decoders

@pytest.mark.parametrize('layer', [None, 'first', 'middle', 'norm', 'last'])
def test_a_module_is_cut_anywhere(layer):
    net, z = small(batchnorm=True).eval(), draw(5, 3)
    rest = priors._after(net, layer, (3,))
    with torch.no_grad(): torch.testing.assert_close(rest(priors._at(net, layer, z)), net(z))
    for p in net.parameters(): p.requires_grad_(False)
    # 13: running mean, variance and counter
    cost = {None: 20 + 36 + 12 + 13 + 112, 'first': 36 + 12 + 13 + 112, 'middle': 12 + 13 + 112, 'norm': 112, 'last': 0}
    assert priors._stored(rest, priors._at(net, layer, z)) == cost[layer]
    assert not any(m._forward_hooks for m in net.modules()) and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize('layer', ['0', 'deep', 'deep.0', 'deep.1', 'end'])
def test_sequences_in_sequences(layer):
    net = nn.Sequential()
    for name, m in (('0', nn.Linear(3, 4)), ('deep', nn.Sequential(nn.Tanh(), nn.Linear(4, 6))),
                    ('end', nn.Unflatten(1, (1, 2, 3)))):
        net.add_module(name, m)
    z = draw(5, 3, dtype=torch.float32)
    with torch.no_grad(): torch.testing.assert_close(priors._after(net, layer, (3,))(priors._at(net, layer, z)), net(z))


def test_the_decoder_is_left_as_it_was():
    net = small(batchnorm=True).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    prior = GeneratorLatents(net, layer='middle', latent=3, steps=20)
    text = repr(prior)
    p = prior.begin(draw(4, 1, 4, 4), draw(9, 1, 4, 4))
    p.decode().sum().backward()
    assert net.training and all(q.requires_grad and q.grad is None for q in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and repr(prior) == text


def test_latents_reproduce_what_the_decoder_can_say():
    "In the range of an injective decoder, the images are found again; more updates come closer."
    net = small().eval()
    with torch.no_grad(): images = net(.7 * draw(6, 3, seed=4))
    lost = [(GeneratorLatents(net, latent=3, steps=s).begin(images, images).decode() - images).square().mean().item()
            for s in (0, 30, 300)]
    assert lost[2] < 1e-3 * images.var().item() and lost[0] > lost[1] > lost[2]


def test_latents_have_a_gain_of_about_one():
    images, x, y = problem(QUICK, (1, 6, 6), 30)
    p = QUICK.begin(images, x, y)
    J = torch.stack([torch.func.jacrev(p._decode)(z[None]).flatten(0, 3).squeeze(1) for z in p.parameters[0].detach()])
    assert .8 < (J.square().sum() / (30 * 5)).item() < 1.25


def test_text_follows_the_content_of_a_decoder():
    a, b = small(), small()
    prior = GeneratorLatents(a, latent=3)
    assert prior == GeneratorLatents(b, latent=3) != GeneratorLatents(b, latent=3, layer='last')
    with torch.no_grad(): b.first.bias[0] += 1e-6
    assert prior != GeneratorLatents(b, latent=3)


class Noisy(nn.Module):
    def __init__(self, noise): super().__init__(); self.linear,self.noise = nn.Linear(3, 16),noise
    def forward(self, z): return (self.linear(z) + self.noise * torch.rand_like(self.linear(z))).reshape(-1, 1, 4, 4)


@pytest.mark.parametrize('make, message', [
    (lambda: GeneratorLatents(small(), layer='nowhere', latent=3),
     "layer='nowhere': this decoder has last, first, middle"),
    (lambda: GeneratorLatents(nn.Flatten(), layer='x'), 'no layers to choose from'),
    (lambda: GeneratorLatents(small(size=(1, 5, 5)), latent=3),
     r'decoder: gives \(2, 1, 5, 5\) for two latents, but the samples have shape \(1, 4, 4\)'),
    (lambda: GeneratorLatents(small(), latent=4), 'decoder: fails on latents of shape .2, 4., is latent=4 right?'),
    (lambda: GeneratorLatents(small(bypass=lambda z: z.sum(1, keepdim=True)), layer='middle', latent=3),
     "layer='middle': something bypasses"),
    (lambda: GeneratorLatents(Noisy(1.), latent=3), 'must not draw random numbers'),
    (lambda: GeneratorLatents(nn.LSTM(3, 16), latent=3), 'decoder: gives tuple'),
    (lambda: GeneratorLatents(latent=0), 'latent=0'), (lambda: GeneratorLatents(latent=(3, 3)),
                                                       'takes a whole number'),
                                                       (lambda: GeneratorLatents(width=0), 'width=0'),
    (lambda: GeneratorLatents(steps=-1), 'steps=-1'), (lambda: GeneratorLatents(decoder=3),
                                                       'decoder=3: expected an nn.Module'),
                                                       (lambda: GeneratorLatents(layer='z', train_steps=1),
                                                        'this decoder has project'),
    (lambda: LowRank(17), 'rank=17'), (lambda: LowRank(0), 'rank=0'), (lambda: LowRank(1.5), 'rank=1.5'),
    (lambda: Frequencies(0), 'keep=0'), (lambda: Frequencies(float('nan')), 'keep=nan'),
    (lambda: Frequencies('all'), "keep='all'"), (lambda: MultiFormation(0), 'factor=0'),
    (lambda: MultiFormation(2.5), 'factor=2.5'), (lambda: MultiFormation(5), 'factor=5: images of 4x4'),
    (lambda: MultiFormation(3), 'multiple of factor')])
def test_one_line_for_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message) as e: make().begin(draw(8, 1, 4, 4), draw(20, 1, 4, 4))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('prior', [MultiFormation(2), Frequencies(.5)], ids=repr)
def test_image_priors_refuse_tables(prior):
    with pytest.raises(ValueError, match='needs images'): prior.begin(draw(4, 7))


def test_a_prior_without_begin(): pytest.raises(NotImplementedError, Prior().begin, None, None, None)


# Files

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('decoders')
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 16),
                        nn.Unflatten(1, (1, 4, 4))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.export.save(torch.export.export(net, (torch.zeros(3, 3),), dynamic_shapes=({0: torch.export.Dim('n')},)),
                          folder/'net.pt2')
        torch.jit.script(net).save(folder/'net.ts')
        torch.jit.trace(small().float().eval(), torch.zeros(2, 3)).save(folder/'whole.ts')
        torch.jit.script(nn.ModuleDict({'a': nn.Linear(3, 3)})['a']).save(folder/'linear.ts')
    from safetensors.torch import save_model
    save_model(net, folder/'net.safetensors')
    torch.save(net, folder/'pickle.pt'); torch.save(net, folder/'pickle.pt2'); torch.save(net.state_dict(),
        folder/'state.pth')
    return folder, net


OLD_EXPORT = pytest.mark.xfail(torch.__version__.startswith('2.6'),
                               reason='torch 2.6 refuses to load this program of its own export')

@pytest.mark.parametrize('name', [pytest.param('net.pt2', marks=OLD_EXPORT), 'net.ts'])
def test_programs_are_loaded_and_cut(files, name):
    folder, net = files
    images, x = draw(4, 1, 4, 4, dtype=torch.float32), draw(9, 1, 4, 4, dtype=torch.float32)
    own, prior = (GeneratorLatents(d, layer='2', latent=3, steps=20) for d in (net, folder/name))
    a = own.begin(images, x)
    with trust(): loaded, b = load_generator(folder/name), prior.begin(images, x)
    with torch.no_grad():
        torch.testing.assert_close(loaded(draw(7, 3, dtype=torch.float32)), net(draw(7, 3, dtype=torch.float32)))
    torch.testing.assert_close(a.decode(), b.decode(), atol=1e-4, rtol=1e-3)
    assert a.numbers == b.numbers == 4 * 6 + 7 * 16
    assert prior == GeneratorLatents(str(folder/name), layer='2', latent=3,
                                     steps=20) == pickle.loads(pickle.dumps(prior)) == Prior.read(repr(prior))
    with pytest.raises(ValueError, match='--trust'): prior.begin(images, x)                  # trust ends with its block


def test_a_class_and_its_numbers(files):
    folder, net = files
    def blank():
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 16),
                             nn.Unflatten(1, (1, 4, 4))).eval()
    loaded = load_generator(folder/'net.safetensors', blank)
    assert torch.equal(loaded(draw(2, 3, dtype=torch.float32)), net(draw(2, 3, dtype=torch.float32)))


def test_a_torchscript_that_is_no_sequence_is_used_whole(files):
    with trust(): net = load_generator(files[0]/'whole.ts')
    images = draw(4, 1, 4, 4, dtype=torch.float32)
    assert GeneratorLatents(net, latent=3, steps=2).begin(images, images).numbers == 12 + 20 + 36 + 112
    with pytest.raises(ValueError, match='only be cut between the members of a sequence'):
        GeneratorLatents(net, layer='middle', latent=3)


@pytest.mark.parametrize('name, options, error, message', [
    ('none.pt2', {}, FileNotFoundError, 'no such file'), ('pickle.pt', {}, ValueError, 'pickles'),
    ('pickle.pt2', {}, ValueError, 'pickles'), ('state.pth', {}, ValueError, 'pickles'),
    ('net.safetensors', {}, ValueError, 'cls=None'), ('net.safetensors', dict(cls=nn.Flatten), ValueError,
                                                      'does not fit Flatten'),
                                                      ('net.pt2', dict(cls=nn.Flatten), ValueError,
                                                       'goes with .safetensors')])
def test_what_is_no_generator(files, name, options, error, message):
    with trust(), pytest.raises(error, match=message) as e: load_generator(files[0]/name, **options)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['net.pt2', 'net.ts', 'net.safetensors'])
def test_cut_files(files, tmp_path, name):
    content = (files[0]/name).read_bytes()
    for share in 0, .3, .9, .999:
        (tmp_path/name).write_bytes(content[:int(share * len(content))])
        with trust(), pytest.raises(ValueError) as e:
            load_generator(tmp_path/name, **(dict(cls=nn.Flatten) if 'safe' in name else {}))
        assert '\n' not in str(e.value)


def crafted(folder, program):
    "`program` with a text in place of its symbolic shapes that makes a folder when torch evaluates it."
    mark = folder/'evaluated'
    text = f'"expr_str": "__import__(\'os\').mkdir(\'{mark}\')"'.encode()
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(folder/'evil.pt2', 'w') as new:
        for n in old.namelist(): new.writestr(n, re.sub(rb'"expr_str": ?"[^"]*"', text, old.read(n)))
    return folder/'evil.pt2', mark


def test_reading_a_text_opens_no_file_and_a_program_needs_trust(files, tmp_path, monkeypatch):
    path, mark = crafted(tmp_path, files[0]/'net.pt2')
    images = draw(4, 1, 4, 4, dtype=torch.float32)
    prior = Prior.read(f'generatorlatents({str(path)!r}, latent=3)')
    assert (repr(prior), hash(prior)) == (repr(Prior.read(repr(prior))), hash(Prior.read(repr(prior))))
    for name in 'RDD_NB_TRUST', 'TRUST': monkeypatch.setenv(name, '1')
    for attempt in (lambda: prior.begin(images, images), lambda: load_generator(path),
                    lambda: load_generator(files[0]/'net.ts')):
        with pytest.raises(ValueError, match='--trust') as e: attempt()
        assert '\n' not in str(e.value)
    assert not mark.exists()
    with trust(), pytest.raises(ValueError, match='cannot be loaded'): load_generator(path)
    assert mark.exists()                                   # the file is live: what was refused above would have run


def test_a_missing_file_is_named_when_the_prior_begins():
    prior = Prior.read("generatorlatents('nowhere.pt2', latent=3)")
    with pytest.raises(FileNotFoundError, match='nowhere.pt2'): prior.begin(draw(4, 1, 4, 4), draw(4, 1, 4, 4))


def test_normalise():
    s = torch.rand(5, 3, 2, 2)
    mean, std = torch.tensor([.1, .2, .3]), torch.tensor([1., 2., 4.])
    expected = (s - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    torch.testing.assert_close(Normalise(mean, std)(s), expected)
    torch.testing.assert_close(Normalise(mean, std, -1, 1)(2 * s - 1), expected)
    assert Normalise([.5], [2.])(torch.ones(2, 1, 4, 4)).unique().item() == .25


# By name

@pytest.mark.parametrize('text, message', [
    ('pixls', 'did you mean .pixels'), ('lowrank(rank=0)', 'rank=0'), ('lowrank(16, 17)', 'LowRank'),
    ('', 'cannot read'), ('a.b()', 'cannot read'),
    ('frequencies(keep=__import__("os"))', 'unknown prior'), ('lowrank(**{})', 'cannot read'),
    ('pixels\npixels', 'cannot read'), (object(), 'expected a prior'), (None, 'expected a prior')])
def test_texts_that_are_no_priors(text, message):
    with pytest.raises(ValueError, match=message) as e: Prior.read(text)
    assert len(str(e.value).splitlines()) == 1


def test_a_prior_is_passed_on():
    assert Prior.read(ALL[3]) is ALL[3] and Prior.read(' FREQUENCIES( 0.25 )') == Frequencies(.25)


def test_the_cosine_matrix_of_one_number(): assert dct_matrix(1).tolist() == [[1.]]
