"""Where does the risk help? Families of distillation x risks x places, on digits and on coloured MNIST.

    # writes benchmarks/results/grid.json; more than an hour on one core
    python benchmarks/grid.py --work grid
    python benchmarks/grid.py --work grid --minutes 5 --only "digits/DM"    # a slice; finished rows stay

Rows are named `family, risk, place`. Step sizes are chosen on validation data (for the digits shown in both looks as
in tune.py), one for each place, with the uniform risk standing for all; KRR and MTT keep those of `METHODS`. Then the
seeds are run and the test set is read once. Plain rows, rows with the true groups and baselines stand beside them. A
row is known by those of its settings that are not the defaults of `Method`; rows that tune.py and digits.py have
measured with the same settings are taken from there. Coloured MNIST needs the environment variable RDD_NB_DATA.
"""
import json, re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from rdd_nb.compare import FULL
from rdd_nb.core import generator, read_json
from rdd_nb.data import Splits
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate, fit_clusters
from rdd_nb.intervals import paired, summarise
from rdd_nb.methods import METHODS, Method, as_method
from rdd_nb.sources import load_data

from common import RESULTS, Rows, TimeIsUp, commit, options, write
from tune import both_looks

SEEDS = range(5)
PLACES = 'network', 'target', 'distance'
RISKS = {                              # at the network and the target; over the distances of clusters
    'uniform': ('twolevel(mean, mean)', 'mean'),
    'CVaR': ('cvar(tail=0.5)', 'cvar(tail=0.5)'),
    'two-level': ('twolevel(cvar(tail=0.5), 0.5*mean + 0.5*max)', '0.5*mean + 0.5*max'),
}
TRAINED = dict(life=10, steps=2, lr=.05)   # networks that learn between the updates


@dataclass(frozen=True)
class Family:
    plain: Method
    # changes of the network plan that a risk on the network needs; {} where the networks are trained anyway
    trained: dict
    lrs: tuple            # step sizes to choose from; a single one is that of `METHODS`
    choice: tuple         # seeds of the choice: draws of the data on digits, of the distillation on coloured MNIST
    clusters: str = 'kmeans(3)'
    places: tuple = PLACES
    risks: tuple = tuple(RISKS)


DISTRIBUTION, PIXELS, EARLY = METHODS['distribution'], 'kmeans(3)', 'kmeans(4, errors)'
FAMILIES = {
    'digits': {
        'DM': Family(DISTRIBUTION, TRAINED, (5., 20.), (10,)),
        'KRR': Family(replace(METHODS['kernel'], steps=100), {}, (.03,), ()),
        'DC': Family(METHODS['gradient'], {}, (.02, .2), (10,)),
        'MTT': Family(as_method('trajectory', steps=30), {}, (200.,), (), places=PLACES[:2]),
    },
    'colour': {
        'DM':
        Family(as_method('distribution', steps=60, batch='random(64)', network=dict(width=32)), TRAINED, (5., 20.),
               (10,), EARLY, PLACES[1:]),
        'KRR':
        Family(as_method('kernel', steps=60, network=dict(width=32)), {}, (.03,), (), EARLY, PLACES[1:2]),
    },
}
BASELINES = {
    m: METHODS[m]
    for m in ('random', 'stratified', 'herding', 'k-center', 'kmeans', 'group-balanced', 'rdd-distance')
}
BASELINES |= {'full': None, 'full-risk': None}


@cache
def digits(seed): return load_data('digits', data_seed=seed)


@cache
def colour(seed, train=5000, val=1000, test=2000):
    "MNIST at 16 x 16 in the colours of the classes, 10 % of each class in another colour; a part of it."
    splits = load_data('mnist', 'colour', size=16)
    part = lambda d, n, of: d.subset(torch.randperm(len(d), generator=generator(0, 'grid', of))[:n].sort().values)
    return Splits(part(splits.train, train, 'train'), part(splits.val, val, 'val'), part(splits.test, test, 'test'))


SETS = {'digits': (digits, Training()), 'colour': (colour, Training(width=32, epochs=100))}


@cache
def clusters(name):
    splits = SETS[name][0](0)
    return dict(cluster=fit_clusters(splits.train, splits.test))


def variant(family, risk, place, lr):
    "The family's method with a risk at a place; risk None: plain, with trained networks at the place 'network'."
    trained = dict(network=family.trained) if place == 'network' and family.trained else {}
    m = as_method(family.plain, lr=lr, **trained)
    if risk is None: return m
    measure = RISKS['uniform' if risk == 'true groups' else risk.split(' in ')[0]][place == 'distance']
    where = 'groups' if risk == 'true groups' else PIXELS if risk.endswith('in pixels') else family.clusters
    looks = place == 'distance' or measure.startswith('twolevel')          # at samples alone, clusters cannot act
    batch = dict(
        batch='random(16)') if family.plain.objective == METHODS['trajectory'].objective and place == 'target' else {}
    return as_method(m, risk=measure, risk_at=place, **dict(clustering=where) if looks else {}, **batch)


def grid(family, name, choice):
    "All rows of a family: {name: function that returns the method}; `choice(risk, place)` gives the step size."
    def row(risk, place, at=('same',), **changes):
        "One row; its step size is that of risk and place `at`."
        risk_at = (risk, place) if at == ('same',) else at
        return lambda: as_method(variant(family, risk, place, choice(*risk_at)), **changes)
    rows = {f'{name}, mean': row(None, None)}
    if family.trained and 'network' in family.places:
        rows[f'{name}, mean, network'] = row(None, 'network', ('uniform', 'network'))
    if name == 'DM': rows |= {'DM, mean, density weights': row(None, None, base='density'),
                              'DM, mean, k-centre start': row(None, None, start='kcenter'),
                              'DM, CVaR, distance, k-centre start': row('CVaR', 'distance', start='kcenter')}
    for place in family.places:
        for risk in family.risks: rows[f'{name}, {risk}, {place}'] = row(risk, place)
        if family.clusters != PIXELS:
            rows[f'{name}, uniform in pixels, {place}'] = row('uniform in pixels', place, ('uniform', place))
        if place != 'network':
            rows[f'{name}, true groups, {place}'] = row('true groups', place, ('uniform', place))  # COBRA, FairDD
    return rows


def settings(method):
    "What of a method (or of its description) is not the default, as text."
    if method is None: return None
    default, own = Method().describe(), method if isinstance(method, dict) else method.describe()
    return json.dumps({k: v for k, v in own.items() if v != default[k]}, sort_keys=True)


def key(r): return r['set'], r['on'], r['settings'] or r['method'], r['seed']


def run(name, method, set_name, on, seed):
    "One row: distil, train networks, test."
    load, training = SETS[set_name]
    splits = load(seed if on == 'val' and set_name == 'digits' else 0)
    test = both_looks(splits) if on == 'val' and set_name == 'digits' else getattr(splits, on)
    if method is None:
        source, made = splits.train, dict(seconds=0., peak_mb=0., steps=0)
        training = training if FULL[name] is None else replace(training, risk=FULL[name])
    else:
        source = distill(splits.train, method, seed=seed, device='cpu', progress=False)
        made = {k: source.provenance[k] for k in ('seconds', 'peak_mb', 'steps')}
    row = evaluate(source, test, training, 2, seed, clusters(set_name) if on == 'test' else None, 'cpu')
    return dict(set=set_name, on=on, method=name, settings=settings(method), seed=seed, commit=commit()) | row | made


def known():
    "What tune.py and digits.py measured under the same settings: {(set, on, settings or name, seed): row}."
    tuned = read_json(RESULTS / 'tune.json')['rows']
    found = {('digits', 'val', settings(as_method(r['method'], **r['setting'])), r['seed']): r for r in tuned}
    main = read_json(RESULTS / 'digits.json')
    described = {m: settings(d) if isinstance(d, dict) else m for m, d in main['config']['methods'].items()}
    return found | {('digits', 'test', described[r['method']], r['seed']): r for r in main['rows']}


def main():
    args = options('grid', __doc__, len(SEEDS), work=True).parse_args()
    rows, elsewhere = Rows(args.work / 'rows.json', key, args.minutes), known()

    def compute(name, method, set_name, on, seed):
        wanted = set_name, on, settings(method) or name, seed
        source = 'tune.json' if on == 'val' else 'digits.json'
        def made():
            row = run(name, method, set_name, on, seed)
            seconds = row['seconds'] + row['evaluation_seconds']
            print(f'{set_name} {on} {name} seed {seed}: {seconds:.0f} s, worst group {row["worst_group_accuracy"]:.3f}',
                  flush=True)
            return row
        if wanted not in elsewhere or wanted in rows.index: return rows.row(wanted, made)
        own = dict(set=set_name, on=on, method=name, settings=settings(method), seed=seed, commit=None, source=source)
        return rows.add(elsewhere[wanted] | own)

    def chooser(set_name, name):
        "Step size of a place: the best on validation data under the uniform risk, which stands for all risks there."
        family = FAMILIES[set_name][name]
        @cache
        def choice(risk, place):
            if len(family.lrs) == 1: return family.lrs[0]
            if risk not in (None, 'uniform'): return choice('uniform', place)
            row, scores = f'{name}, {risk or "mean"}' + (f', {place}' if place else ''), {}
            for lr in family.lrs:
                found = [
                    compute(row, variant(family, risk, place, lr), set_name, 'val', seed) for seed in family.choice
                ]
                scores[lr] = float(np.mean([r['balanced_accuracy'] for r in found]))
            return max(scores, key=scores.get)
        return choice

    todo = lambda set_name, name: re.search(args.only, f'{set_name}/{name}')
    try:
        for set_name, families in FAMILIES.items():
            for name, method in BASELINES.items():
                for seed in SEEDS[:args.seeds]:
                    absent = set_name == 'colour' and name in ('full', 'full-risk', 'rdd-distance')
                    if todo(set_name, name) and not absent: compute(name, method, set_name, 'test', seed)
            for name in families:
                table = {
                    row: method
                    for row, method in grid(families[name], name, chooser(set_name, name)).items()
                    if todo(set_name, row)
                }
                for seed in SEEDS[:args.seeds]:
                    for row, method in table.items(): compute(row, method(), set_name, 'test', seed)
    except TimeIsUp: print('time is up', flush=True)
    write_report(rows.rows, args.out)


def write_report(rows, out):
    "Rows, and for each set the summary and the paired differences that the grid is about."
    sets = {
        s: dict(training=t.describe(), families={n: f.plain.describe()
                                                 for n, f in FAMILIES[s].items()})
        for s, (_, t) in SETS.items()
    }
    kept = 'set', 'method', 'settings', 'seed', 'balanced_accuracy', 'worst_group_accuracy', 'seconds'
    report = dict(config=dict(seeds=list(SEEDS), risks=RISKS, sets=sets), rows=[r for r in rows if r['on'] == 'test'],
                  choice=[{k: r.get(k) for k in kept} for r in rows if r['on'] == 'val'])
    for s in SETS:
        own = [r for r in report['rows'] if r['set'] == s]
        plain = [f'{n}, mean' for n in FAMILIES[s]] + ['kmeans']
        compared = 'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy'
        report[s] = dict(summary=summarise(own), paired=paired(own, plain, compared)) if own else None
    write(out, **report)


if __name__ == '__main__': main()
