"Intervals against scipy and against simulations with a known truth."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rdd_nb.intervals import (accuracy_interval, bootstrap, chance_of_minimum, check_comparable, gap_interval, interval,
                              minimum_interval, paired, recipe_differences, summarise, variance_components, wilson)


def covered(interval_of, draw, truth, trials, seed=0):
    rng = np.random.default_rng(seed)
    ends = np.array([interval_of(draw(rng)) for _ in range(trials)])
    return np.mean((ends[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= ends[:, 1]))


def ends(found): return found['low'], found['high']


# Coverage: 95 % intervals hold the truth in 93 to 97 of 100 experiments

@pytest.mark.parametrize('n', [3, 5, 10])
def test_coverage_of_means_over_seeds(n):
    assert .93 <= covered(lambda v: ends(interval(v)), lambda rng: rng.normal(.8, .03, n), .8, 3000) <= .97


def rows_of(rng, n):
    "Two methods whose seeds move together; the second is better by .02."
    seed, noise = rng.normal(.7, .05, n), rng.normal(0, .01, (2, n))
    return [dict(method=m, seed=s, accuracy=seed[s] + d + noise[k, s], group_accuracy={})
            for k, (m, d) in enumerate((('kmeans', 0), ('rdd', .02))) for s in range(n)]


@pytest.mark.parametrize('n', [2, 3, 4, 5, 20])
def test_coverage_of_paired_differences(n):
    "For any number of seeds; as a mean of one method the interval would be several times as wide."
    rng = np.random.default_rng(n)
    found = np.array([ends(paired(rows_of(rng, n), ['kmeans'], ['accuracy'])[0]) for _ in range(2000)])
    assert .93 <= np.mean((found[:, 0] <= .02) & (.02 <= found[:, 1])) <= .97
    unpaired = [np.ptp(ends(interval([r['accuracy'] for r in rows_of(rng, n)[n:]]))) for _ in range(200)]
    assert np.median(unpaired) > 2 * np.median(np.ptp(found, axis=1))


@pytest.mark.parametrize('n', [8, 10, 20])
def test_coverage_of_the_bootstrap_over_seeds(n):
    draw = lambda rng: rng.normal(.8, .03, n)
    assert .93 <= covered(lambda v: ends(bootstrap(v, draws=500)), draw, .8, 1500) <= .97


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7])
def test_too_few_seeds_for_the_bootstrap(n):
    with pytest.raises(ValueError, match=f'at least 8, got {n}: use interval') as e: bootstrap(np.linspace(.7, .8, n))
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='at least 8'): bootstrap(np.linspace(.7, .8, n + 2), ['a', 'b', *'c' * n])


@pytest.mark.parametrize('level, sd', [(.5, .03), (.8, .05), (.9, .03), (.95, .03), (.97, .02), (.99, .01), (.1, .08)])
@pytest.mark.parametrize('n', [2, 3, 5, 10])
def test_coverage_of_accuracies_over_seeds(level, sd, n):
    "Skewed near 0 and 1, where Student's interval of the accuracies covers less and leaves [0, 1]."
    size = level * (1 - level) / sd**2 - 1
    rng = np.random.default_rng(n)
    found = np.array([ends(accuracy_interval(rng.beta(level * size, (1 - level) * size, n))) for _ in range(2000)])
    assert .92 <= np.mean((found[:, 0] <= level) & (level <= found[:, 1])) <= .97
    assert 0 <= found.min() and found.max() <= 1


def test_intervals_of_accuracies():
    "Inside [0, 1], around the mean, with n; Wilson's for one seed, Student's far from the ends and with little spread."
    for values in ([.97, .99, 1.], [0., .02, .01], [1., 1., .5], [.5, .5]):
        found = accuracy_interval(values, 100)
        assert 0 <= found['low'] <= found['mean'] <= found['high'] <= 1
        assert found['mean'] == pytest.approx(np.mean(values)) and found['n'] == 100
    assert ends(accuracy_interval([.9], 50)) == wilson(45, 50) and 'n' not in accuracy_interval([.9])
    assert ends(accuracy_interval([1., 1.], 50)) == wilson(50, 50)
    assert ends(accuracy_interval([1., 1.])) == (None, None) == ends(accuracy_interval([.4]))
    near = np.array([.5, .501, .499, .5005])
    assert ends(accuracy_interval(near)) == pytest.approx(ends(interval(near)), abs=1e-5)
    assert ends(accuracy_interval([0., 1.], confidence=.99999)) == pytest.approx((0, 1))      # no overflow
    for bad in ([], [1.1], [-.1, .5], [float('nan')]):
        with pytest.raises(ValueError, match='values') as e: accuracy_interval(bad)
        assert '\n' not in str(e.value)


def test_summaries_keep_accuracies_inside():
    rows = [dict(method='a', seed=s, accuracy=a, seconds=100 * a, group_accuracy=dict(x=a), group_counts=dict(x=30))
            for s, a in enumerate((.97, .99, 1.))]
    found, = summarise(rows)
    assert found['accuracy'] == accuracy_interval([.97, .99, 1.], 30) == found['group_accuracy']['x']
    assert found['seconds'] == interval([97., 99., 100.]) and found['seconds']['high'] > 100


STRATA = np.repeat([0, 1, 2], [400, 200, 100])
LEVEL = np.array([.92, .8, .6])


@pytest.mark.parametrize('statistic, truth', [('mean', (STRATA.size, LEVEL[STRATA].mean())),
                                              ('balanced', (0, LEVEL.mean())),
                                              (lambda m: m[..., 2] / m[..., 0], (0, .6 / .92))],
                         ids=['mean', 'balanced', 'ratio'])
def test_coverage_of_the_stratified_bootstrap(statistic, truth):
    draw = lambda rng: (rng.random(STRATA.size) < LEVEL[STRATA]).astype(float)
    assert .93 <= covered(lambda v: ends(bootstrap(v, STRATA, statistic, 500)), draw, truth[1], 1500) <= .97


def test_coverage_of_the_difference_of_two_models_on_the_same_samples():
    def draw(rng):
        ease = rng.random(STRATA.size)
        return (ease < LEVEL[STRATA]).astype(float) - (ease < LEVEL[STRATA] - .05).astype(float)
    assert .93 <= covered(lambda v: ends(bootstrap(v, STRATA, 'mean', 500)), draw, .05, 1000) <= .97


@pytest.mark.parametrize('levels', [[.8] * 20, [.6] + [.9] * 19, [.5] * 5 + [.95] * 5, [.7, .9]], ids=str)
def test_coverage_of_the_true_minimum_and_gap(levels):
    "At least the promised share, whether the groups are equal or one is far below."
    levels, counts = np.array(levels), [50] * len(levels)
    draw = lambda rng: rng.binomial(50, levels) / 50
    assert covered(lambda a: minimum_interval(a, counts), draw, levels.min(), 600) >= .935
    assert covered(lambda a: gap_interval(a, counts), draw, np.ptp(levels), 600) >= .935


def test_extremes_without_these_tools():
    "The interval of the lowest group, and resampled gaps, hardly ever contain the truth of equal groups."
    naive = covered(lambda a: wilson(a.min() * 50, 50), lambda rng: rng.binomial(50, .8, 20) / 50, .8, 600)
    groups, draw = np.repeat(np.arange(20), 50), lambda rng: (rng.random(1000) < .8).astype(float)
    gap = covered(lambda v: ends(bootstrap(v, groups, lambda m: np.ptp(m, -1), 200)), draw, 0, 100)
    assert naive < .7 and gap == 0
    for extreme in ('min', 'gap'):
        with pytest.raises(ValueError, match='no valid bootstrap.*use minimum_interval or gap_interval') as e:
            bootstrap(draw(np.random.default_rng(0)), groups, extreme)
        assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_gap_interval():
    assert gap_interval([.5, .95], [1000, 1000])[0] > .39 and gap_interval([.5, .52], [100, 100])[0] == 0
    assert gap_interval([.8], [50])[0] == 0


# Formulas

@settings(max_examples=50)
@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([.8, .95, .99]))
def test_wilson_is_that_of_scipy(n, share, confidence):
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(confidence, method='wilson')
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize('p, n', [([.7, .8, .9, .8], [20, 30, 50, 7]), ([.5, .95], [10, 200]),
                                  ([.8] * 15, [25] * 15)], ids=str)
def test_chance_of_a_minimum_by_simulation(p, n):
    rng, n = np.random.default_rng(0), np.array(n)
    accuracy = np.round(np.array(p) * n) / n
    pooled = (accuracy * n).sum() / n.sum()
    lowest = (rng.binomial(n, pooled, (20_000, len(n))) / n).min(1)
    assert chance_of_minimum(accuracy, n) == pytest.approx((lowest <= accuracy.min() + 1e-9).mean(), abs=.01)
    assert chance_of_minimum([.3], [10]) == 1


def held(draw, trials):
    rng = np.random.default_rng(0)
    pairs = (draw(rng) for _ in range(trials))
    return np.mean([found['low'] - 1e-12 <= truth <= found['high'] + 1e-12 for found, truth in pairs])


# Counts come in steps, and so does coverage at one level: every repetition has levels of its own around those named

@pytest.mark.parametrize('sizes, levels, statistic', [((400, 40), (.95, .95), 'balanced'),
                                                      ((400, 40), (.95, .9), 'balanced'),
                                                      ((40,) * 4, (.95,) * 4, 'balanced'),
                                                      ((40,) * 10, (.9,) * 10, 'mean'),
                                                      ((100, 20, 20), (.9, .9, .9), 'balanced')], ids=str)
def test_coverage_of_the_bootstrap_over_groups_of_forty(sizes, levels, statistic):
    strata, sizes = np.repeat(np.arange(len(sizes)), sizes), np.array(sizes)
    def draw(rng):
        p = np.clip(levels + rng.uniform(-.03, .03, len(sizes)), 0, .995)
        truth = dict(balanced=p.mean(), mean=p @ sizes / sizes.sum())[statistic]
        return bootstrap((rng.random(len(strata)) < p[strata]).astype(float), strata, statistic, 500,
                         seed=int(rng.integers(1e9))), truth
    assert .93 <= held(draw, 1000) <= .97


@pytest.mark.parametrize('n, shared, a, b', [(40, .9, .9, .85), (40, .5, .9, .8), (100, .9, .9, .85),
                                             (100, .9, .9, .9)])
def test_coverage_of_the_difference_of_two_models_on_few_samples(n, shared, a, b):
    def draw(rng):
        (p, q), (ease, other) = (a, b) + rng.uniform(-.03, .03, 2), rng.random((2, n))
        return bootstrap(ease < p, minus=np.where(rng.random(n) < shared, ease, other) < q, draws=500,
                         seed=int(rng.integers(1e9))), p - q
    assert .93 <= held(draw, 1000) <= .97


def test_hits_alone_are_no_certainty():
    assert bootstrap(np.ones(40))['estimate'] == 1 == bootstrap(np.ones(40))['high']
    assert .85 < bootstrap(np.ones(40))['low'] < .96
    assert bootstrap(np.zeros(40))['low'] == 0 < bootstrap(np.zeros(40))['high'] < .15
    one = np.arange(40) < 38
    better = bootstrap(np.ones(40), minus=one)                       # better on two samples, worse on none
    assert better['low'] < 0 < better['estimate'] == .05 < better['high'] and bootstrap(1 - one)['low'] >= 0
    assert bootstrap(np.full(40, .5)) == dict(estimate=.5, low=.5, high=.5)      # no hits


def test_bootstrap_of_means_is_the_normal_interval_for_many_values():
    v = np.random.default_rng(0).normal(size=1000)
    found = bootstrap(v, draws=4000)
    assert found['estimate'] == pytest.approx(v.mean())
    assert ends(found) == pytest.approx((v.mean() - 1.96 * v.std() / 1000**.5, v.mean() + 1.96 * v.std() / 1000**.5),
                                        abs=.006)


def test_strata_keep_their_sizes():
    "Values that differ between the strata but not inside them leave nothing to chance; without strata there is plenty."
    strata = np.array(['a'] * 30 + ['b'] * 3)
    values = np.where(strata == 'a', .9, .2)
    found = bootstrap(values, strata)
    assert [found[k] for k in ('low', 'high', 'estimate')] == pytest.approx([(30 * .9 + 3 * .2) / 33] * 3)
    alone = bootstrap(values)
    assert alone['high'] - alone['low'] > .1
    assert bootstrap(values, strata, 'balanced')['estimate'] == pytest.approx(.55)


def test_bootstrap_is_reproducible_and_small_ones_are_wider_than_the_plain_quantiles():
    v = np.random.default_rng(3).normal(size=8)
    assert bootstrap(v) == bootstrap(v) != bootstrap(v, seed=1)
    rng = np.random.default_rng(0)
    plain = np.quantile(rng.choice(v, (4000, 8)).mean(1), (.025, .975))
    found = bootstrap(v)
    assert found['low'] < plain[0] and found['high'] > plain[1]
    assert bootstrap([1.]) == dict(estimate=1, low=None, high=None)


@pytest.mark.parametrize('args, word', [(([],), 'values'), (([1, float('nan')],), 'values'), (([[1, 2]],), 'values'),
                                        (([1, 2], [0]), 'strata'), (([1, 2], None, 'median'), 'median'),
                                        (([1, 2], None, 'mean', 9, .95, 0, [0]), 'minus')], ids=str)
def test_bootstrap_says_what_it_cannot_use(args, word):
    with pytest.raises(ValueError, match=word) as e: bootstrap(*args)
    assert '\n' not in str(e.value)


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(2, 6), st.integers(0, 999))
def test_variance_components_fit_the_analysis_of_variance(seeds, networks, seed):
    v = np.random.default_rng(seed).normal(size=(seeds, networks)) + np.random.default_rng(seed + 1).normal(
        size=(seeds, 1))
    found = variance_components(v)
    f = stats.f_oneway(*v).statistic
    if f >= 1: assert 1 + networks * found['between']**2 / found['within']**2 == pytest.approx(f)
    else: assert found['between'] == 0
    # as if one network per seed were all one had
    if f >= 1: assert found['error'] == pytest.approx(v.mean(1).std(ddof=1) / seeds**.5)
    assert found['mean'] == pytest.approx(v.mean())
    assert (found['n_seeds'], found['n_networks']) == (seeds, seeds * networks)


def test_variance_components_of_unequal_numbers():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 5, 3]
    found = [variance_components([rng.normal() * .3 + rng.normal(size=k) * .1 for k in sizes]) for _ in range(2000)]
    assert np.mean([f['within']**2 for f in found]) == pytest.approx(.01, rel=.06)
    assert np.mean([f['between']**2 for f in found]) == pytest.approx(.09, rel=.1)
    for bad in ([[1., 2.]], [[1.], [2.]], [[1., 2.], []]):
        with pytest.raises(ValueError, match='values'): variance_components(bad)


# The same recipe for all

def test_recipes():
    def row(method, labels='hard', networks=2, **training):
        return dict(method=method, labels=labels, networks=networks,
                    training=dict(epochs=200, lr=.05, risk=None) | training)
    same = [row('a'), row('b'), row('a')]
    assert recipe_differences(same) == [] and check_comparable(same) is None
    for other, word in ((row('c', epochs=300), 'epochs'), (row('c', lr=.1), 'lr'), (row('c', 'soft'), 'labels'),
                        (row('c', networks=5), 'networks'), (row('c', risk='CVaR(tail=0.1)'), 'risk'),
                        (row('c', precision='bfloat16') , None)):
        differences = recipe_differences(same + [other])
        assert len(differences) == (word is not None) and all(word in d and 'for c' in d for d in differences)
        if word:
            with pytest.raises(ValueError, match=word) as e: check_comparable(same + [other])
            assert '\n' not in str(e.value)
            check_comparable(same + [other], ignore=[word])
    # rows of earlier versions say nothing
    assert recipe_differences([dict(method='old', accuracy=.5)]) == [] == recipe_differences([])
