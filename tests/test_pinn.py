"PINN points: derivatives, reference solutions, hard conditions, the distillation gradient, files, the command and bad input."
import argparse
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rdd_nb.pinn import (PDES, PINN, AllenCahn, Burgers, Distillation, Exam, Heat, Helmholtz, PDE, Points, add_command, best_of, causal, compare_points, distill_points, fit,
                         fit_adam, inside, jets, load_points, make_pde, method_of_lines, outside, prepare, rad, rar, sample_points, sine_series)
from rdd_nb.risk import CVaR, Mean, WorstCase

F64 = torch.float64
linspace = lambda a, b, n: torch.linspace(a, b, n, dtype=F64)
draw = lambda *shape, seed=0: torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
everyone = pytest.mark.parametrize('name', PDES)


def coordinates(pde, n, seed=0):
    low, high = torch.tensor(pde.low, dtype=F64), torch.tensor(pde.high, dtype=F64)
    return low + (high - low) * draw(n, 2, seed=seed)


def network(pde, width=8):
    "One whose last layer is not zero."
    net = PINN.new(pde, 'test', width=width)
    net.theta[-2] = draw(1, width) - .5
    return net


# Residuals

@settings(max_examples=20)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(.2, 3), st.floats(-2, 2))
def test_residuals_agree_with_derivatives_on_paper(a, b, k, w):
    "u = a sin(kx + b) exp(wt): every derivative is known."
    q = coordinates(Burgers(), 8)
    x, t = q.T
    e, s, c = torch.exp(w * t), torch.sin(k * x + b), torch.cos(k * x + b)
    u, ux, ut, uxx, uyy = a * s * e, a * k * c * e, a * w * s * e, -a * k * k * s * e, a * w * w * s * e
    f = lambda q: a * torch.sin(k * q[:, 0] + b) * torch.exp(w * q[:, 1])
    for pde, paper in ((Heat(.3), ut - .3 * uxx), (Burgers(.02), ut + u * ux - .02 * uxx), (AllenCahn(.1, 2.), ut - .1 * uxx - 2 * (u - u**3)),
                       (Helmholtz(1.5), (uxx + uyy + 2.25 * u) / math.pi**2)):
        torch.testing.assert_close(pde.residual(jets(f, q, pde.orders)), paper, rtol=1e-9, atol=1e-9)


@everyone
def test_fast_jets_are_those_of_autograd(name):
    pde = make_pde(name)
    net, q, c = network(pde), coordinates(pde, 9), outside(pde, 9, 0)
    torch.testing.assert_close(net.jets(q, c), jets(lambda q: net(q, c), q, pde.orders), rtol=1e-10, atol=1e-11)


def test_jets_by_finite_differences():
    pde = Burgers()
    net, q, c, h = network(pde), coordinates(pde, 5) * .9, inside(pde, 5, 0), 1e-4
    u, ux, ut, uxx = net.jets(q, c)
    move = torch.tensor([[h, 0.]], dtype=F64)
    torch.testing.assert_close(ux, (net(q + move, c) - net(q - move, c)) / (2 * h), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uxx, (net(q + move, c) - 2 * u + net(q - move, c)) / h**2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ut, (net(q + move.flip(1), c) - net(q - move.flip(1), c)) / (2 * h), rtol=1e-5, atol=1e-6)


# Conditions built in

@everyone
def test_conditions_hold_for_any_weights(name):
    pde = make_pde(name)
    net, q, c = network(pde), coordinates(pde, 20), outside(pde, 20, 1)
    edges = [q.clone() for _ in range(4)]
    edges[0][:, 0], edges[1][:, 0], edges[2][:, 1], edges[3][:, 1] = pde.low[0], pde.high[0], pde.low[1], pde.high[1]
    left, right, first, last = (net(e, c) for e in edges)
    if name == 'allen-cahn':
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    else: assert max(left.abs().max(), right.abs().max()) < 1e-12
    at = pde.initial((q[:, 0] - pde.low[0]) / (pde.high[0] - pde.low[0]), c)
    if name in ('helmholtz', 'poisson'):
        assert first.abs().max() < 1e-12
        torch.testing.assert_close(last, at, rtol=0, atol=1e-12)
    else: torch.testing.assert_close(first, at, rtol=0, atol=1e-12)


# Reference solutions

@settings(max_examples=10)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.floats(.01, .5))
def test_heat_against_a_sum_of_modes(b, k):
    modes = lambda z, c: sum(v * torch.sin((i + 1) * math.pi * z) for i, v in enumerate(b))
    x, t = linspace(0, 1, 13), linspace(0, 1, 5)
    exact = sum(v * torch.sin((i + 1) * math.pi * x)[:, None] * torch.exp(-k * ((i + 1) * math.pi)**2 * t) for i, v in enumerate(b))
    torch.testing.assert_close(Heat(k, initial=modes).reference(x, t, torch.zeros(1, 3, dtype=F64))[0], exact, rtol=0, atol=1e-10)


def test_sine_series_of_a_parabola():
    b = sine_series(lambda z: (z * (1 - z))[None])[0, :9]
    n = torch.arange(1, 10, dtype=F64)
    torch.testing.assert_close(b, torch.where(n % 2 == 1, 8 / (n * math.pi)**3, 0.), rtol=0, atol=1e-8)


@pytest.mark.parametrize('pde', [Heat(), Burgers()], ids=lambda p: p.name)
def test_method_of_lines_converges_to_the_analytic_solution(pde):
    x, t, c = linspace(pde.low[0], pde.high[0], 15), linspace(0, .8, 5), inside(pde, 3, 0)
    exact = pde.reference(x, t, c)
    coarse, fine = ((method_of_lines(pde, x, t, c, n) - exact).abs().max() for n in (40, 80))
    assert fine < coarse / 2.5 and fine < 5e-3


@pytest.mark.parametrize('pde', [Heat(), Helmholtz(), Burgers(), AllenCahn()], ids=lambda p: p.name)
def test_references_satisfy_the_equation(pde):
    "By finite differences of the reference itself; conditions outside included."
    h, c = 1e-2, torch.cat([inside(pde, 2, 3), outside(pde, 2, 3)])
    x0, y0 = pde.low[0] + .37 * (pde.high[0] - pde.low[0]), .43
    x, y = (torch.tensor([v - h, v, v + h], dtype=F64) for v in (x0, y0))
    if pde.orders[1] == 1: y = torch.cat([torch.zeros(1, dtype=F64), y])
    u = pde.reference(x, y, c)[..., -3:]
    centre = u[:, 1, 1]
    parts = [centre, (u[:, 2, 1] - u[:, 0, 1]) / (2 * h), (u[:, 1, 2] - u[:, 1, 0]) / (2 * h), (u[:, 2, 1] - 2 * centre + u[:, 0, 1]) / h**2]
    if pde.orders[1] == 2: parts.append((u[:, 1, 2] - 2 * centre + u[:, 1, 0]) / h**2)
    assert pde.residual(torch.stack(parts)).abs().max() < .03


def test_an_exact_network_would_have_error_zero():
    pde = Heat(initial=lambda z, c: c[:, 0] * torch.sin(math.pi * z))
    exam = Exam(pde, inside(pde, 4, 0))
    assert exam.errors(lambda q, c: c[:, 0] * torch.sin(math.pi * q[:, 0]) * torch.exp(-.1 * math.pi**2 * q[:, 1])).max() < 1e-10
    torch.testing.assert_close(exam.errors(lambda q, c: 0 * q[:, 0]), torch.ones(4, dtype=F64))


needs_data = pytest.mark.skipif('RDD_NB_DATA' not in os.environ or not Path(os.environ.get('RDD_NB_DATA', '.'), 'pinn-references').is_dir(),
                                reason='needs the published reference solutions: set RDD_NB_DATA to a folder that holds pinn-references')


@needs_data
@pytest.mark.parametrize('file, tolerance', [('burgers_shock.mat', 1e-4), ('AC.mat', 1e-3)])
def test_published_solutions(file, tolerance):
    from scipy.io import loadmat
    mat = loadmat(Path(os.environ['RDD_NB_DATA'])/'pinn-references'/file)
    one = torch.tensor([[1., 0, 0]], dtype=F64)
    if 'usol' in mat:
        u = Burgers(.01 / math.pi).reference(torch.from_numpy(mat['x'][::8, 0]), torch.from_numpy(mat['t'][::33, 0]), one, n=4096)
        assert np.abs(u[0].numpy() - mat['usol'][::8, ::33]).max() < tolerance
    else:
        pde = AllenCahn(1e-4, 5., initial=lambda z, c: (2 * z - 1)**2 * torch.cos(math.pi * (2 * z - 1)))
        u = pde.reference(torch.from_numpy(mat['x'][0, ::16]), torch.from_numpy(mat['tt'][0, ::50]), one, n=512)
        assert np.abs(u[0].numpy() - mat['uu'][::16, ::50]).max() < tolerance


# The family

@everyone
def test_inside_and_outside(name):
    pde = make_pde(name)
    assert pde.distance(inside(pde, 40, 0)).max() == 0
    assert pde.distance(outside(pde, 40, 0)).min() > 0 and pde.distance(outside(pde, 40, 0, reach=.3)).max() <= .3
    torch.testing.assert_close(pde.unscaled(pde.scaled(outside(pde, 5, 0))), outside(pde, 5, 0))
    assert not torch.equal(inside(pde, 8, 'train'), inside(pde, 8, 'validation'))


# Training and its derivative

def test_training_reaches_the_points():
    pde = Heat()
    points = sample_points(pde, 20, labels=5)
    net = fit(pde, points, 0, steps=25, damping=(10., 1e-7))
    assert net.residual(points.q, points.c)[5:].abs().max() < 1e-6
    torch.testing.assert_close(net(points.q, points.c)[:5], points.target[:5], rtol=0, atol=1e-6)


def test_a_heavy_point_is_fitted_more_closely():
    pde = Burgers()
    points = sample_points(pde, 30)
    heavy = dataclasses.replace(points, weight=torch.where(torch.arange(30) < 3, 1e4, 1.).double())
    close = lambda p: fit(pde, p, 0, damping=(10., 1.)).residual(points.q, points.c)[:3].abs().max()
    assert close(heavy) < .1 * close(points)


def test_the_order_of_points_does_not_matter():
    pde, order = Heat(), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    points = sample_points(pde, 16)
    mixed = dataclasses.replace(points, **{f: getattr(points, f)[order] for f in ('q', 'c', 'value', 'target', 'weight')})
    for a, b in zip(fit(pde, points, 0).theta, fit(pde, mixed, 0).theta): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', ['heat', 'helmholtz', 'burgers', 'allen-cahn'])
@pytest.mark.parametrize('risk', [Mean(), CVaR(.5)], ids=repr)
def test_gradient_of_the_distillation_objective(name, risk):
    pde = make_pde(name)
    start, exam = sample_points(pde, 5, seed=2, labels=1), Exam(pde, inside(pde, 4, 'g'), 6, 4)
    names = 'q', 'c', 'target', 'weight'
    leaves = [getattr(start, f).clone().requires_grad_() for f in names]
    value = lambda leaves: risk(exam.errors(fit(pde, dataclasses.replace(start, **dict(zip(names, leaves))), 'g', steps=3, damping=(10., 1.), width=4, unroll=3)))
    grads = torch.autograd.grad(value(leaves), leaves)
    for i, leaf in enumerate(leaves):
        v = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i), dtype=F64)
        shifted = lambda s: value([l.detach() + s * v if j == i else l.detach() for j, l in enumerate(leaves)])
        numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert (grads[i] * v).sum().item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-7), names[i]


def test_tail_one_is_the_mean():
    quick = lambda risk: distill_points('heat', 6, how=Distillation(steps=2, risk=risk, conditions=4), progress=False)
    a, b, c = quick('cvar(tail=1)'), quick(Mean()), quick(WorstCase())
    torch.testing.assert_close(a.q, b.q)
    assert not torch.equal(a.q, c.q)


# Distillation

@pytest.mark.parametrize('changes', [{}, dict(objective='residual'), dict(learn='points targets'), dict(unroll=15)], ids=str)
def test_distillation_is_a_function_of_its_seed(changes):
    make = lambda seed: distill_points('burgers', 8, seed, labels=2, how=Distillation(steps=2, conditions=4, **changes), progress=False)
    a, b, other = make(1), make(1), make(2)
    for f in ('q', 'c', 'target', 'weight'): assert torch.equal(getattr(a, f), getattr(b, f))
    assert not torch.equal(a.q, other.q)
    assert a.value.sum() == 2 and len(a) == 8


def test_distilled_conditions_stay_in_the_family_and_honest_targets_stay_zero():
    pde = Burgers()
    made = distill_points(pde, 12, how=Distillation(steps=12, lr=2., conditions=4), progress=False)
    assert pde.distance(made.c).max() == 0 and (made.weight > 0).all()
    assert made.target.abs().max() == 0
    history = [h['risk'] for h in made.provenance['history']]
    assert [h['step'] for h in made.provenance['history']] == [0, 10, 12] and min(history) <= history[0]


def test_residual_objective_never_solves(monkeypatch):
    "The references of the exams are computed but the solution has no say: another one gives the same points."
    run = lambda: distill_points('heat', 6, how=Distillation(steps=2, objective='residual', conditions=4), progress=False)
    before = run()
    monkeypatch.setattr(Heat, 'reference', lambda self, x, t, c: torch.ones(len(c), len(x), len(t), dtype=F64))
    torch.testing.assert_close(before.q, run().q, rtol=0, atol=0)


def test_an_exam_on_another_device_is_the_same():
    pde = AllenCahn()
    a, b = Exam(pde, inside(pde, 4, 0), 7, 5), Exam(pde, inside(pde, 4, 0), 7, 5).to('cpu')
    assert a.report(network(pde)) == b.report(network(pde))
    moved = Exam(pde, inside(pde, 4, 0), 7, 5).to('meta')
    assert {k for k, v in vars(moved).items() if torch.is_tensor(v) and not v.is_meta} == {'x', 'y'}          # of these two only the spacing is used


# Competitors

def test_adaptive_rules():
    pde = Burgers()
    seen = []
    watch = lambda change: lambda k, net, points: seen.append(change(k, net, points)) or seen[-1]
    fit(pde, sample_points(pde, 10), 0, change=watch(rar(pde, 20, 0)))
    assert len(seen[0]) == 10 and len(seen[-1]) == 20 and torch.equal(seen[-1].q[:10], seen[0].q)
    seen.clear()
    fit(pde, sample_points(pde, 20, labels=3), 0, change=watch(rad(pde, 20, 0)))
    assert len(seen[-1]) == 20 and torch.equal(seen[-1].q[:3], seen[0].q[:3]) and not torch.equal(seen[-1].q[3:], seen[0].q[3:])
    points = sample_points(pde, 20)
    weight = causal()(0, PINN.new(pde, 0), points).weight
    order = points.q[:, 1].argsort()
    assert weight[order][0] == 1 and (weight[order].diff() <= 0).all() and weight.min() < 1


def test_best_of_is_the_best_of_what_was_tried():
    pde, how = Heat(), Distillation(conditions=4)
    exam = Exam(pde, inside(pde, 4, 7, 'train'), 15, 9)
    tried = [sample_points(pde, 8, 'sobol', (7, i)) for i in range(3)]
    risks = [how.risk(exam.errors(fit(pde, p, 7, 'try', i))).item() for i, p in enumerate(tried)]
    assert torch.equal(best_of(pde, 8, 7, tries=3, how=how).q, tried[int(np.argmin(risks))].q)


def test_comparison_has_equal_points():
    pde = Heat()
    rows = compare_points(pde, ['untrained', 'uniform', 'lhs', 'sobol', 'rar', 'rad', 'causal'], {'in': Exam(pde, inside(pde, 4, 0), 7, 5)}, n=8, networks=1)
    assert [r['points'] for r in rows] == [8] * 7
    at_once = [prepare(pde, m, n=8) for m in ('rar at once', 'rad at once')]
    for points, how in at_once:
        seen = [points]
        fit(pde, points, 0, change=lambda k, net, p: seen.append(how['change'](k, net, p)) or seen[-1])
        assert len(seen[-1]) == 8 and not torch.equal(seen[-1].q[-1], points.q[-1])
    assert all(math.isfinite(r[k]) for r in rows for k in ('in mean', 'in worst', 'in tail', 'in residual', 'in energy'))
    assert all(r['in mean'] <= r['in tail'] + 1e-12 <= r['in worst'] + 2e-12 for r in rows)


def test_adam_trains_too():
    pde = Heat()
    points = sample_points(pde, 16)
    size = lambda net: net.residual(points.q, points.c).square().mean()
    assert size(fit_adam(pde, points, 0, steps=100)) < .3 * size(PINN.new(pde, 0))


# Files and the command

def test_files(tmp_path):
    points = sample_points(Burgers(), 8, labels=2)
    again = load_points(points.save(tmp_path/'p.safetensors'))
    assert all(torch.equal(getattr(points, f), getattr(again, f)) for f in ('q', 'c', 'value', 'target', 'weight')) and again.provenance == points.provenance
    (tmp_path/'no.safetensors').write_bytes(b'nothing')
    save_file({'x': torch.zeros(2)}, tmp_path/'other.safetensors')
    bad = dataclasses.replace(points, weight=-points.weight)
    bad.save(tmp_path/'bad.safetensors')
    for name, text in (('no', 'not a readable safetensors file'), ('other', 'not a set of PINN points'), ('bad', 'damaged')):
        with pytest.raises(ValueError, match=text): load_points(tmp_path/f'{name}.safetensors')
    with pytest.raises(FileNotFoundError, match='no such file'): load_points(tmp_path/'none')


def command(*args):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    a = parser.parse_args(['pinn', *map(str, args)])
    return a.do(a)


def test_command(tmp_path, capsys):
    out = tmp_path/'new'/'run'
    command('--pde', 'poisson', '--points', 6, '--steps', 1, '--networks', 1, '--out', out)
    assert sorted(p.name for p in out.iterdir()) == ['points.csv', 'points.png', 'points.safetensors', 'result.json']
    assert 'distilled' in capsys.readouterr().out
    result = json.loads((out/'result.json').read_text())
    assert result['rows'][-1]['method'] == 'distilled' and result['provenance']['seed'] == 0
    assert len(load_points(out/'points.safetensors')) == 6
    with pytest.raises(ValueError, match='is there already'): command('--out', out)
    assert [p.name for p in out.parent.iterdir()] == ['run']


@pytest.mark.parametrize('args, text', [
    (['--pde', 'navier-stokes'], "pde: got 'navier-stokes', expected one of heat"), (['--points', 0], 'points: got 0'), (['--points', -3], 'points: got -3'),
    (['--device', 'cuda:99'], "device='cuda:99' is not available"), (['--labels', 70], 'labels: got 70, expected at most'), (['--labels', -1], 'labels: got -1'), (['--risk', 'worst'], 'unknown risk'), (['--risk', 'cvar(tail=2)'], 'tail'),
    (['--risk', 'twolevel(mean, max)'], 'risk: got'), (['--objective', 'beauty'], 'objective: got'), (['--steps', -1], 'steps: got -1'), (['--networks', 0], 'networks: got 0'), (['--seed', -1], 'seed: got -1')])
def test_the_command_refuses_in_one_line(args, text, tmp_path):
    with pytest.raises(ValueError, match=text.replace('(', r'\(')) as e: command(*args, '--out', tmp_path/'x')
    assert '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('call, text', [
    (lambda: make_pde('wave'), 'pde: got'), (lambda: Heat(math.inf), 'diffusivity: got inf'), (lambda: Heat(-1), 'diffusivity'), (lambda: Burgers(math.nan), 'viscosity: got nan'),
    (lambda: Burgers(True), 'viscosity'), (lambda: AllenCahn(reaction=0), 'reaction'), (lambda: Helmholtz(math.pi), 'wavenumber'), (lambda: Helmholtz(math.nan), 'wavenumber'),
    (lambda: Heat(initial=lambda z, c: 1 + 0 * z), '^heat, initial: is 1 at the left end .* boundary condition there is 0$'), (lambda: Burgers(initial=lambda z, c: z), 'right end'),
    (lambda: Heat(initial=lambda z, c: z * math.nan), 'initial: is nan'), (lambda: AllenCahn(initial=lambda z, c: z), '^allen-cahn, initial: .* boundary condition is periodic$'),
    (lambda: Heat(family=dict(amplitude=(1, 1), frequency=(0, 1), shape=(0, 1))), 'family: amplitude'), (lambda: Heat(family=dict(amplitude=(0, math.inf), frequency=(0, 1), shape=(0, 1))), 'family'),
    (lambda: Heat().check([[1., 2.]]), 'conditions: got shape'), (lambda: Heat().check([[1., math.nan, 0]]), 'conditions: row 0'), (lambda: outside(Heat(), 3, 0, along='colour'), 'along: got'),
    (lambda: sample_points(Heat(), 2.5), 'points: got 2.5'), (lambda: sample_points(Heat(), True), 'points: got True'), (lambda: prepare(Heat(), 'magic'), 'method: got'),
    (lambda: prepare(Helmholtz(), 'causal'), 'need a time'), (lambda: Distillation(conditions=1), 'conditions: got 1'), (lambda: Distillation(lr=0), 'lr: got 0'),
    (lambda: Distillation(learn=()), 'learn'), (lambda: Distillation(start='grid'), 'start'), (lambda: fit(Heat(), sample_points(Heat(), 4), steps=-1), 'steps: got -1')])
def test_bad_input_is_refused_in_one_line(call, text):
    with pytest.raises(ValueError, match=text) as e: call()
    assert '\n' not in str(e.value)
