"Every prior under every place of the risk: runs, resumes exactly, and writes down what it stored."
import json

import pytest
import torch

import rdd_nb.distill
from rdd_nb.data import from_arrays
from rdd_nb.distill import Distiller, distill
from rdd_nb.methods import Method, as_method
from rdd_nb.priors import Frequencies, GeneratorLatents, LowRank, MultiFormation, Pixels
from rdd_nb.risk import CVaR, Mean, TwoLevel
from rdd_nb.synthetic import load

STEPS, IPC, CLASSES = 4, 2, 3
PRIORS = [Pixels(), MultiFormation(2), Frequencies(.5), LowRank(4),
          GeneratorLatents(latent=3, width=2, train_steps=10, steps=5),
          GeneratorLatents(latent=3, width=2, layer='fold', train_steps=10, steps=5)]
NUMBERS = [6 * 64, 6 * 64, 6 * 16, 6 * 4 + 5 * 64, 6 * 3 + 4 * 8 + 19 * 2 + 19, 6 * 8 + 19 * 2 + 19]
PLACES = {'plain': {},
          'target': dict(risk=TwoLevel(Mean(), Mean()), risk_at='target', clustering='kmeans(2)'),
          'distance': dict(risk=.5 * Mean() + .5 * CVaR(.5), risk_at='distance', clustering='kmeans(2)'),
          'distance, nearest': dict(risk=CVaR(.5), risk_at='distance', clustering='nearest')}
OBJECTIVES = {'gradient': dict(objective='gradient', lr=.1, network='convnet(width=4, batch=16, life=3, steps=1)'),
              'distribution': dict(objective='distribution', lr=1., network='convnet(width=4)')}
every_prior = pytest.mark.parametrize('prior, numbers', list(zip(PRIORS, NUMBERS)), ids=[repr(p)[:32] for p in PRIORS])


def toy(seed=0):
    "Eight by eight, 15 images of each class, every fifth inverted."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(15 * CLASSES) % CLASSES
    means, noise = (torch.rand(k, 1, 8, 8, generator=g) for k in (CLASSES, len(y)))
    raw = (means[y] * .7 + .3 * noise).clamp(0, 1)
    odd = torch.arange(len(y)) % 5 == 0
    raw[odd] = 1 - raw[odd]
    return from_arrays(raw, y, odd.long(), groups=['many', 'few'], name='toy')


DATA = toy()


def method(prior, objective='distribution', place='plain', **changes):
    fields = dict(steps=STEPS, batch='random(8)', prior=prior) | OBJECTIVES[objective] | PLACES[place] | changes
    return Method(**fields)


def run(m, **kw): return distill(DATA, m, IPC, 0, 'cpu', progress=False, **kw)


@every_prior
@pytest.mark.parametrize('objective', OBJECTIVES)
@pytest.mark.parametrize('place', PLACES)
def test_runs_and_resumes_exactly(prior, numbers, objective, place):
    m = method(prior, objective, place)
    whole = Distiller(DATA, m, IPC, device='cpu')
    start = whole.images
    for _ in range(STEPS): whole.step()
    half = Distiller(DATA, m, IPC, device='cpu')
    for _ in range(STEPS // 2): half.step()
    rest = Distiller(DATA, m, IPC, device='cpu')                  # calls begin once more
    rest.load_state_dict(half.state_dict())
    for _ in range(STEPS - STEPS // 2): rest.step()
    assert torch.equal(rest.images, whole.images) and rest.history == whole.history and len(set(whole.history)) == STEPS
    assert whole.images.shape == (CLASSES * IPC * prior.per_sample, 1, 8, 8) and not torch.equal(whole.images, start)
    for p, q in zip(whole.stored.parameters, Distiller(DATA, m, IPC, device='cpu').stored.parameters):
        assert p.abs().max() < 1e4 and not torch.equal(p, q)
    assert torch.isfinite(whole.weight).all() and (whole.weight.sum() > 0) == (place != 'plain')


@every_prior
def test_the_record(prior, numbers, tmp_path):
    s = run(method(prior), out=tmp_path/'run')
    again = load(tmp_path/'run'/'synthetic.safetensors')
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    for settings in (again.provenance['settings'], s.provenance['settings'], config['method']):
        assert settings['prior'] == repr(prior)
    # float32, and a byte for each label
    assert again.provenance['bytes'] == 4 * numbers + CLASSES * IPC * prior.per_sample
    assert torch.equal(again.x, s.x) and len(s) == len(s.initial) == CLASSES * IPC * prior.per_sample
    assert s.y.tolist() == sorted(s.y.tolist()) and torch.bincount(s.y).tolist() == [IPC * prior.per_sample] * CLASSES
    # initial images are real ones
    if prior.per_sample > 1:
        assert all((DATA.x == image).flatten(1).all(1).any() for image in s.initial)


@every_prior
def test_stopped_on_the_way_and_resumed(prior, numbers, tmp_path, monkeypatch):
    m = method(prior, place='distance')
    whole, step = run(m), Distiller.step
    def stop(self):
        if self.step_number == 3: raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(Distiller, 'step', stop)
    with pytest.raises(KeyboardInterrupt): run(m, out=tmp_path/'run', checkpoint_every=2)
    monkeypatch.undo()
    assert (tmp_path/'run'/'checkpoint.pt').exists()
    other = Frequencies(.25) if prior != Frequencies(.25) else Pixels()
    with pytest.raises(ValueError, match='prior='):
        run(method(other, place='distance'), out=tmp_path/'run', resume=True)
    resumed = run(m, out=tmp_path/'run', resume=True, checkpoint_every=2)
    assert torch.equal(resumed.x, whole.x) and torch.equal(resumed.weight, whole.weight)


@every_prior
def test_without_steps_the_initial_images_are_stored(prior, numbers):
    "The baselines in a prior: what it can say of the medoids."
    s = run(as_method('kmeans', prior=prior))
    expected = prior.begin(s.initial, DATA.x, DATA.y, 0).decode().detach()
    assert torch.equal(s.x, expected) and s.provenance['bytes'] == 4 * numbers + len(s)


def test_pixels_are_the_default():
    "A method that says nothing of priors gives what it gave before there were any."
    m = method(Pixels())
    assert as_method('distribution').prior == Pixels()
    assert as_method('distribution', prior='pixels') == as_method('distribution')
    run_ = Distiller(DATA, m, IPC, device='cpu')
    images = run_.initial.clone().requires_grad_(True)
    loss, q, index = run_._loss()
    g, = torch.autograd.grad(loss, run_.stored.parameters)
    run_.step()
    assert torch.allclose(run_.images, images - m.lr * g)             # the first step of SGD


def test_prior_by_text():
    assert run(method('multiformation(factor=2)')).x.shape[0] == 4 * CLASSES * IPC
    with pytest.raises(ValueError, match='unknown prior'): method('fractal')


@pytest.mark.parametrize('prior, ipc, message', [
    (MultiFormation(2), 4, 'ipc=4 times 4'), (MultiFormation(9), 1, 'ipc=1 times 81'), (LowRank(65), 2, 'rank=65'),
    (GeneratorLatents(layer='x', train_steps=1), 2, 'this decoder has'),
    (GeneratorLatents(torch.nn.Linear(3, 8), latent=3), 2, 'decoder: gives'),
], ids=lambda v: type(v).__name__ if hasattr(v, 'begin') else repr(v))
def test_one_line_before_anything_is_written(prior, ipc, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        distill(DATA, method(prior), ipc, 0, 'cpu', tmp_path/'run', progress=False)
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()


def test_a_label_goes_with_its_image():
    "Multi-formation packs images of one class only: the decoded images have the labels of the images they stand for."
    m = as_method('kmeans', prior=MultiFormation(2))
    s = run(m)
    d = torch.cdist(s.x.flatten(1), s.initial.flatten(1))
    assert (s.y[d.argmin(1)] == s.y).all()


@pytest.mark.parametrize('prior', [MultiFormation(2), Frequencies(.5), LowRank(8)], ids=repr)
def test_the_loss_goes_down_in_every_prior(prior):
    "Matching means in one fixed network: the same network and the whole data at each step."
    m = method(prior, steps=30, batch='random(15)', network='convnet(width=4, life=1000)', lr=1.)
    run_ = Distiller(DATA, m, IPC, device='cpu')
    for _ in range(30): run_.step()
    assert run_.history[-1] < .7 * run_.history[0]
