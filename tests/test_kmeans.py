"""What is no lesson about `rdd_nb.kmeans`: oracles, properties and inputs that break a naive implementation."""
import numpy as np
import pandas as pd
import pickle
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings, strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from rdd_nb import kmeans
from rdd_nb.coresets import class_medoids, k_center_greedy, random_per_class
from rdd_nb.core import generator
from rdd_nb.kmeans import KMeans, assign_balanced, assign_nearest, cell_mass


def blobs(seed, n=1000, d=20, k=10, spread=2., offset=0.):
    gen = generator(seed, 'blobs')
    centres = torch.randn(k, d, generator=gen) * spread
    return centres[torch.randint(k, (n,), generator=gen)] + torch.randn(n, d, generator=gen) + offset


def exact(x, centres):
    return (torch.as_tensor(x).double()[:, None] - torch.as_tensor(centres).double()[None]).square().sum(2)


# scikit-learn as the oracle

NOT_EQUIVALENT = {'check_sample_weight_equivalence_on_dense_data': 'repeated rows in another order are another random '
                                                                   'draw'}

@parametrize_with_checks([KMeans(3), KMeans(3, init='random', n_init=2)],
                         expected_failed_checks=lambda e: NOT_EQUIVALENT)
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('weighted', [False, True])
def test_inertia_from_the_same_centres(seed, weighted):
    x = blobs(seed, spread=.5 + seed / 5).numpy()
    init = x[::50][:12]
    w = np.random.default_rng(seed).random(len(x)) if weighted else None
    ours = KMeans(12, init=init, tol=0).fit(x, sample_weight=w)
    ref = sklearn.cluster.KMeans(12, init=init, n_init=1, tol=0).fit(x, sample_weight=w)
    assert ours.inertia_ == pytest.approx(ref.inertia_, rel=1e-5)
    assert ours.n_iter_ == ref.n_iter_
    np.testing.assert_array_equal(ours.labels_, ref.labels_)
    np.testing.assert_allclose(ours.cluster_centers_, ref.cluster_centers_, atol=1e-4)
    np.testing.assert_allclose(ours.transform(x), ref.transform(x), atol=1e-3)


def test_tol_and_max_iter_mean_what_they_mean_in_scikit_learn():
    x = blobs(3, n=2000, spread=.5).numpy()
    for kwargs in (dict(max_iter=3, tol=0), dict(tol=1e-2), dict(tol=1e-3)):
        ours = KMeans(15, init=x[:15], **kwargs).fit(x)
        ref = sklearn.cluster.KMeans(15, init=x[:15], n_init=1, **kwargs).fit(x)
        assert ours.n_iter_ == ref.n_iter_ and ours.inertia_ == pytest.approx(ref.inertia_, rel=1e-5)
        np.testing.assert_array_equal(ours.labels_, ours.predict(x))


PROBLEMS = [(seed, 300 + 37*seed, 2 + 3*seed % 40, 3 + seed % 12, .3 + seed % 5) for seed in range(20)]

def test_own_seeding_is_as_good_as_scikit_learns():
    ratios = []
    for seed, n, d, k, spread in PROBLEMS:
        x = blobs(seed, n, d, k, spread).numpy()
        ours = KMeans(k, n_init=10).fit(x).inertia_
        ratios.append(ours / sklearn.cluster.KMeans(k, n_init=10, random_state=seed).fit(x).inertia_)
    assert max(ratios) < 1.005, ratios
    assert np.mean(ratios) < 1.001


def test_pipeline_pandas_and_pickle():
    x = blobs(0)
    pipe = make_pipeline(StandardScaler(), KMeans(4)).fit(x.numpy())
    assert pipe.transform(x.numpy()).shape == (1000, 4)
    table = pd.DataFrame(x.numpy(), columns=[f'f{i}' for i in range(20)])
    km = KMeans(4).fit(table)
    assert list(km.feature_names_in_) == list(table.columns) and list(km.get_feature_names_out()) == [f'kmeans{i}'
        for i in range(4)]
    assert isinstance(KMeans(4).set_output(transform='pandas').fit(table).transform(table), pd.DataFrame)
    again = pickle.loads(pickle.dumps(km))
    np.testing.assert_array_equal(again.predict(table), km.labels_)


# Determinism

def test_same_on_one_and_two_threads():
    x = blobs(1, n=1200, d=48, k=30, spread=4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append((KMeans(30, max_iter=4).fit(x), assign_nearest(x, x[:30])))
    finally: torch.set_num_threads(before)
    for other in found[1:]:
        (a, nearest), (b, again) = found[0], other
        assert torch.equal(a.labels_, b.labels_) and torch.equal(a.cluster_centers_,
                                                                 b.cluster_centers_) and a.inertia_ == b.inertia_
        assert all(torch.equal(s, t) for s, t in zip(nearest, again))


def test_seeds_and_global_state():
    x = blobs(2, spread=.3)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a, b, c = KMeans(10).fit(x), KMeans(10).fit(x), KMeans(10, random_state=1).fit(x)
    assert torch.equal(a.cluster_centers_, b.cluster_centers_) and not torch.equal(a.cluster_centers_,
        c.cluster_centers_)
    assert torch.equal(torch.random.get_rng_state(), state)
    y = torch.arange(1000) % 4
    for choose in (random_per_class, lambda y, ipc, seed: class_medoids(x, y, ipc, seed), lambda y, ipc,
                   seed: k_center_greedy(x, y, ipc, seed)):
        assert torch.equal(choose(y, 9, 3), choose(y, 9, 3)) and not torch.equal(choose(y, 9, 3), choose(y, 9, 4))
    for state in (torch.Generator().manual_seed(1), np.random.RandomState(1), np.random.default_rng(1), None,
                  np.int64(3)):
        assert KMeans(10, random_state=state).fit(x).inertia_ > 0
    with pytest.raises(ValueError, match="random_state='x': expected"): KMeans(3, random_state='x').fit(x)


def test_chunks_do_not_matter():
    x = blobs(4, n=3000, d=33)
    y, cy = torch.arange(3000) % 3, torch.arange(30) % 3
    for f in (assign_nearest, assign_balanced):
        for labels in ((), (y, cy)):
            whole, small = f(x, x[:30], *labels), f(x, x[:30], *labels, chunk_mb=.01)
            assert (whole[0] != small[0]).float().mean() < .002
            torch.testing.assert_close(whole[1].sum(), small[1].sum())
    assert KMeans(10, chunk_mb=.01).fit(x).inertia_ == pytest.approx(KMeans(10).fit(x).inertia_, rel=1e-4)


# Nearest centres

@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 9),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
       st.floats(-1e3, 1e3))
def test_nearest_against_brute_force(n, k, d, dtype, offset):
    x = (torch.randn(n, d, generator=generator(n, k, d)) + offset).to(dtype)
    c = (torch.randn(k, d, generator=generator(k, n)) + offset).to(dtype)
    ids, distance = assign_nearest(x, c)
    truth = exact(x, c)
    chosen = truth.gather(1, ids[:, None])[:, 0]
    assert ((chosen - truth.min(1).values) <= 1e-4 * (1 + truth.min(1).values)).all()
    torch.testing.assert_close(distance.double(), chosen, rtol=1e-3, atol=1e-3)


def test_classes_with_any_labels_and_no_samples():
    x, c = blobs(0, n=50), blobs(1, n=8)
    y, cy = torch.randint(3, (50,), generator=generator(0)) * 7, torch.tensor([0, 0, 7, 7, 14, 14, 99, 99])
    ids, distance = assign_nearest(x, c, y, cy)
    assert torch.equal(cy[ids], y)
    masked = exact(x, c).masked_fill(y[:, None] != cy, torch.inf)
    assert torch.equal(ids, masked.argmin(1))
    mass = cell_mass(ids, 8, cy)
    assert mass[6:].sum() == 0 and mass[:2].sum() == pytest.approx(1) and mass.isfinite().all()
    with pytest.raises(ValueError, match='y has shape'): assign_nearest(x, c, y[:-1], cy)
    with pytest.raises(ValueError, match='got one of them'): assign_nearest(x, c, y)
    with pytest.raises(ValueError, match='mass has shape'): assign_balanced(x, c, mass=[1.])


def test_images_gradients_and_autocast():
    x = torch.randn(40, 3, 8, 8, generator=generator(0), requires_grad=True)
    ids, distance = assign_nearest(x, x[:5])
    assert not distance.requires_grad and torch.equal(ids[:5], torch.arange(5)) and distance[:5].abs().max() == 0
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(KMeans(5).fit(x).labels_, KMeans(5).fit(x.detach().double().float()).labels_)
    assert KMeans(5).fit(x.detach().numpy()).cluster_centers_.shape == (5, 192)


def test_precision_switches_are_put_back():
    x = blobs(0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        want = exact(x, x[:9]).argmin(1)
        assert torch.equal(assign_nearest(x, x[:9])[0], want)
        with pytest.raises(ValueError): assign_nearest(x, x[:9, :3])
        assert torch.get_float32_matmul_precision() == 'medium'
    finally: torch.set_float32_matmul_precision(before)


def test_a_switch_of_one_backend_alone():
    if not hasattr(torch.backends.cuda.matmul, 'fp32_precision'): pytest.skip('this torch has one switch for all')
    x = blobs(0)
    try:
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
        assert torch.equal(assign_nearest(x, x[:9])[0], exact(x, x[:9]).argmin(1))
        assert torch.backends.cuda.matmul.fp32_precision == 'tf32'
    finally: torch.backends.cuda.matmul.fp32_precision = 'ieee'


# Inputs that break a naive k-means

@pytest.mark.parametrize('init', ['k-means++', 'random'])
def test_adversarial(init):
    make = lambda k, **kwargs: KMeans(k, init=init, **kwargs)
    x = blobs(0, n=200, d=5)
    one_each = make(200).fit(x)                                             # k = n
    assert one_each.inertia_ < 1e-6 * x.square().sum() and len(one_each.labels_.unique()) == 200
    with pytest.warns(ConvergenceWarning, match='1 clusters of n_clusters=3'):
        constant = make(3).fit(torch.full((50, 4), 7.))
    assert constant.inertia_ == 0 and constant.cluster_centers_.isfinite().all()
    copies = x[:5].repeat(40, 1)                                            # five places, 200 rows
    with pytest.warns(ConvergenceWarning): many = make(8).fit(copies)
    assert many.inertia_ < 1e-6
    five = make(5, n_init=10).fit(copies)
    assert five.inertia_ < 1e-6 and torch.equal(five.labels_.bincount(), torch.full((5,), 40))
    far = torch.cat([x, torch.full((1, 5), 1e6)])                           # one far outlier
    found = make(10, n_init=5).fit(far)
    assert len(found.labels_.unique()) == 10 and found.cluster_centers_.isfinite().all()
    if init == 'k-means++':
        assert (found.labels_ == found.labels_[-1]).sum() == 1 and found.inertia_ < 1.2 * make(9,
            n_init=5).fit(x).inertia_


def test_empty_clusters_are_relocated():
    x = blobs(0, n=500, d=3, k=5, spread=6)
    start = torch.cat([x[:1].expand(4, 3), torch.full((3, 3), 1e3) * torch.tensor([[1.], [-1.], [2.]])])
    km = KMeans(7, init=start).fit(x)
    assert len(km.labels_.unique()) == 7
    assert km.inertia_ < 1.3 * KMeans(7, n_init=10).fit(x).inertia_
    w = torch.zeros(500); w[:40] = 1                                        # a sample of weight 0 is nobody's reserve
    km = KMeans(7, init=start).fit(x, sample_weight=w)
    assert len(km.labels_[:40].unique()) == 7
    torch.testing.assert_close(km.cluster_centers_, KMeans(7, init=start).fit(x[:40]).cluster_centers_)
    ref = sklearn.cluster.KMeans(7, init=start.numpy(), n_init=1).fit(x.numpy())
    assert KMeans(7, init=start).fit(x).inertia_ < 1.001 * ref.inertia_


@pytest.mark.parametrize('offset', [1e4, -1e4])
def test_far_from_the_origin(offset):
    # coarse enough that x + offset is exact in float32
    x = (blobs(5, d=30).double() * 512).round() / 512
    at_home, away = KMeans(10).fit(x), KMeans(10).fit((x + offset).float())
    assert torch.equal((x + offset).float().double(), x + offset)
    assert away.inertia_ == pytest.approx(at_home.inertia_, rel=1e-3)
    assert (away.labels_ == at_home.labels_).float().mean() > .99
    assert torch.equal(away.predict((x + offset).float()), away.labels_)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_types(dtype):
    x = (blobs(6).clamp(-7, 7) * 16 + 127).to(dtype)
    km = KMeans(10).fit(x)
    assert km.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert km.inertia_ == pytest.approx(KMeans(10).fit(x.double()).inertia_, rel=1e-3)
    if dtype != torch.bfloat16: assert KMeans(10).fit(x.numpy()).inertia_ == pytest.approx(km.inertia_, rel=1e-6)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e30])
def test_numbers_that_cannot_be_squared(value):
    x = blobs(0)
    bad = x.clone()
    bad[7, 3] = value
    for call in (lambda: KMeans(3).fit(bad), lambda: KMeans(3).fit(bad.numpy()), lambda: KMeans(3).fit(x).predict(bad),
                 lambda: assign_nearest(bad, x[:5]), lambda: assign_nearest(x, bad[5:9]),
                 lambda: assign_balanced(bad, x[:5]),
                 lambda: class_medoids(bad, torch.zeros(1000).long(), 3), lambda: KMeans(3, init=bad[6:9]).fit(x)):
        with pytest.raises(ValueError, match='NaN') as e: call()
        assert '\n' not in str(e.value)
    # distances are computed in float64, where 1e30 has a square
    if value != 1e30:
        with pytest.raises(ValueError, match='NaN'): KMeans(3).fit(x).transform(bad)


@pytest.mark.parametrize('kwargs, message', [
    (dict(n_clusters=0), 'n_clusters=0: expected a whole number of at least 1'),
    (dict(n_clusters=2.5), 'n_clusters=2.5'),
    (dict(n_clusters=1001), 'n_clusters=1001 is more than n_samples=1000'), (dict(n_init=0), 'n_init=0'),
    (dict(max_iter=0), 'max_iter=0'), (dict(tol=-1), 'tol=-1'), (dict(chunk_mb=0), 'chunk_mb=0'),
    (dict(init='kmeans'), "init='kmeans'"), (dict(init=torch.zeros(3, 2)),
                                             r'init has shape \(3, 2\): expected \(8, 20\)')])
def test_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message): KMeans(**kwargs).fit(blobs(0))


@pytest.mark.parametrize('weight, message', [([1.]*3, 'sample_weight has shape'), (torch.zeros(1000), 'not all zero'),
                                             (-torch.ones(1000), 'weights >= 0'),
                                             (torch.full((1000,), torch.nan), 'finite weights')])
def test_weights(weight, message):
    with pytest.raises(ValueError, match=message): KMeans(3).fit(blobs(0), sample_weight=weight)


def test_zero_weight_is_absence():
    x = blobs(0, n=300)
    w = torch.ones(300); w[200:] = 0
    for kwargs in (dict(), dict(init='random')):
        a, b = KMeans(6, tol=0, **kwargs).fit(x, sample_weight=w), KMeans(6, tol=0, **kwargs).fit(x[:200])
        torch.testing.assert_close(a.cluster_centers_, b.cluster_centers_)
    with pytest.raises(ValueError, match='n_clusters=201 is more than n_samples=200'):
        KMeans(201).fit(x, sample_weight=w)


def test_sums_by_product_are_the_sums():
    "The GPU's way to add up clusters, run here on the CPU."
    x, w = blobs(0), torch.rand(1000, generator=generator(0))
    ids, total, mass = kmeans._one_pass(x, x[:7], w, 64)
    other = torch.zeros(7, 20)
    torch.testing.assert_close(kmeans._add_by_product(other, x, ids, w), mass, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.double(), total, rtol=1e-5, atol=1e-4)


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8), share=st.floats(.01, 1))
def test_places_are_within_one_of_the_share(sizes, share):
    sizes, n = torch.tensor(sizes), max(1, int(share * sum(sizes)))
    for weights in sizes, sizes.double() / sizes.sum():
        places = kmeans._places(weights, n)
        assert places.sum() == n and (places <= sizes).all()
        assert ((places - n * sizes / sizes.sum()).abs() < 1 + 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.integers(1, 9), st.integers(0, 10**6),
       st.sampled_from(['spread', 'samples', 'centres', 'both', 'near']))
def test_balanced_clusters_have_their_places_whatever_is_identical(n, k, seed, kind):
    "Identical samples, or samples between identical centres, all went to one cluster."
    gen = generator(seed, 'balanced')
    x, c, mass = torch.randn(n, 3, generator=gen), torch.randn(k, 3, generator=gen), torch.rand(k, generator=gen) + .05
    if kind in ('samples', 'both'): x = x[:1].expand(n, 3)
    if kind == 'near': x = x[:1] + 1e-7 * x
    if kind in ('centres', 'both'): c = c[:1].expand(k, 3)
    ids, distance = assign_balanced(x, c, mass=mass)
    assert torch.equal(ids.bincount(minlength=k), kmeans._places(mass.double(), n))
    torch.testing.assert_close(distance.double(), exact(x, c).gather(1, ids[:, None])[:, 0], rtol=1e-4, atol=1e-5)


def test_balanced_clusters_are_nearly_the_best_ones():
    from scipy.optimize import linear_sum_assignment
    for seed, k in enumerate((1, 2, 9)):
        x = torch.randn(180, 8, generator=generator(seed))
        cost = exact(x, x[:k]).repeat_interleave(180 // k, dim=1).numpy()
        best = cost[linear_sum_assignment(cost)].sum()
        ids, distance = assign_balanced(x, x[:k])
        assert (ids.bincount(minlength=k) == 180 // k).all()
        assert best * (1 - 1e-5) <= distance.sum().item() < 1.02 * best


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_agrees():
    x = blobs(0, n=5000, d=64)
    for kwargs in (dict(), dict(init='random')):
        cpu, gpu, again = KMeans(10, **kwargs).fit(x), KMeans(10, **kwargs).fit(x.cuda()), KMeans(10,
            **kwargs).fit(x.cuda())
        assert gpu.labels_.is_cuda and gpu.inertia_ == pytest.approx(cpu.inertia_, rel=1e-4)
        assert torch.equal(gpu.cluster_centers_, again.cluster_centers_)
    y, cy = torch.arange(5000) % 5, torch.arange(50) % 5
    for f in (assign_nearest, assign_balanced):
        assert (f(x, x[:50], y, cy)[0] == f(x.cuda(), x[:50].cuda(), y, cy)[0].cpu()).float().mean() > .999
    assert torch.equal(class_medoids(x, y, 4), class_medoids(x.cuda(), y.cuda(), 4))
