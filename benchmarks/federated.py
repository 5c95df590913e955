"""What does a merge lose where sites hand out distilled rows instead of their own?

    python benchmarks/federated.py --work FOLDER    # writes benchmarks/results/federated.json

`central` merges the training rows of all sites. For `federated`, each site distils its own training rows first, and
these distilled tables are merged. `pooled` puts the distilled tables of the sites together and merges nothing. All
train the same models for every site on the columns it has, with the site's own intercept, and are tested on its other
rows. The settings of `MergeTables` are its defaults; nothing was tuned. A stopped run goes on from the rows in FOLDER.
"""
import argparse, os, warnings
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from merge import PARTS

from rdd_nb.core import read_json, versions, write_json
from rdd_nb.intervals import interval
from rdd_nb.learners import default_models
from rdd_nb.merge import MergeTables
from rdd_nb.sites import site_metrics, split_sites

MODELS = {k: m for k, m in default_models().items() if k != 'mlp'}


def tables_of(part, train, seed, **settings):
    "Method -> a merge whose `synthetic_` it trains on."
    same = dict(seed=seed, progress=False, **settings)
    central = MergeTables(accept=part.accept, **same).fit(train, part.target)
    known = lambda k, t: [k, *t.columns.drop(part.target)]                # each site has looked at its columns
    parts = {k: MergeTables(accept=known(k, t), **same).fit({k: t}, part.target).synthetic_ for k, t in train.items()}
    every = [c for k, t in parts.items() for c in known(k, t)]
    federated = MergeTables(accept=every, **same).fit(parts, part.target)
    pooled = MergeTables(accept=every, **same | dict(steps=0, choose=0)).fit(parts, part.target)
    pooled.synthetic_ = pd.concat(parts.values(), ignore_index=True)
    return dict(central=central, federated=federated, pooled=pooled)


def one(name, seed, **settings):
    "Metrics of every method, model and site on one split."
    part, rows = PARTS[name], []
    train, test = split_sites(part.load(seed), part.target, seed)
    for method, merge in tables_of(part, train, seed, **settings).items():
        for (model, m), site in product(MODELS.items(), train):
            fitted = merge.model(m, train[site])
            p = fitted.predict_proba(test[site])[:, fitted.positive]
            y = (test[site][part.target].astype(str) == str(merge.schema_.target.levels[1])).to_numpy()
            rows.append(dict(part=name, seed=seed, method=method, model=model, site=site, **site_metrics(y, p)))
    return rows


def collect(rows):
    "Differences to the central merge: means over the sites, then over splits, with intervals over splits."
    t = pd.DataFrame(rows).groupby(['part', 'model', 'method', 'seed'])[['auroc', 'brier']].mean()
    found = []
    for (part, model), own in t.groupby(level=[0, 1]):
        own = own.droplevel([0, 1])
        for method, metric in product(('federated', 'pooled'), ('auroc', 'brier')):
            gap = own.loc[method, metric] - own.loc['central', metric]
            found.append(dict(part=part, model=model, method=method, metric=metric, splits=len(gap),
                              central=float(own.loc['central', metric].mean()), **interval(gap)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, default=Path('federated-work'))
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'federated.json')
    parser.add_argument('--splits', type=int, default=3)
    parser.add_argument('--parts', default='hospitals heart', help='of benchmarks/merge.py (default: %(default)s)')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    used = [p for p in args.parts.split() if p == 'hospitals' or os.environ.get('RDD_NB_DATA')]
    for seed, part in product(range(args.splits), used):
        path = args.work/f'{part}-{seed}.json'
        if not path.exists(): write_json(path, one(part, seed)); print(path.name, flush=True)
    rows = [r for p in sorted(args.work.glob('*.json')) for r in read_json(p)]
    write_json(args.out, dict(summary=collect(rows), rows=rows, versions=versions()))


if __name__ == '__main__': main()
