"""How well do clusters find groups that nobody has labelled? Several feature spaces, digits and coloured MNIST.

    # a few minutes, writes benchmarks/results/latent_groups.json
    OMP_NUM_THREADS=1 python benchmarks/latent_groups.py

The data are training sets with a planted minority (`rdd_nb.sources.load_data`). Group labels are used for the scores
only. Samples are clustered inside each class. Feature spaces: pixels; a ConvNet that has just been initialised; the
same after training (George, Sohoni et al. 2020, clusters in such features), early and late; gradients of the loss
with respect to the scores and to the last layer; the loss itself. Two methods that make two groups without
clustering: errors of an early network (the first stage of JTT, Liu et al. 2021) and environment inference (EIIL,
Creager et al. 2021). MNIST is looked for where `RDD_NB_DATA` says; without it there are only digits.
"""
import argparse
import os
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')       # before torch is imported

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from rdd_nb.coresets import class_kmeans_ids, random_per_class
from rdd_nb.core import generator, versions, write_json
from rdd_nb.sources import load_data
from rdd_nb.models import make_model

TASKS = {
    'digits': dict(shift='minority', width=32, early=4, late=40), 'mnist': dict(shift='colour', width=32, early=1,
                                                                                late=12)
}


def train(net, data, epochs, seed, batch=64, lr=2e-3):
    "Plain training (Adam, mean cross-entropy) for `epochs` more epochs; `seed` names the order of the batches."
    opt = torch.optim.Adam(net.parameters(), lr)
    net.train()
    for epoch in range(epochs):
        for i in torch.randperm(len(data), generator=generator(seed, 'order', epoch)).split(batch):
            opt.zero_grad()
            F.cross_entropy(net(data.x[i]), data.y[i]).backward()
            opt.step()
    return net.eval()


@torch.no_grad()
def outputs(net, data):
    "Features (n, d), scores (n, C)."
    f = torch.cat([net.features(x) for x in data.x.split(512)])
    return f, net.head(f)


def spaces(net, data, when):
    "Feature spaces that a network offers."
    f, scores = outputs(net, data)
    error = scores.softmax(1) - F.one_hot(data.y, scores.shape[1])          # the gradient with respect to the scores
    return {
        f'{when} network': f, f'score gradient, {when}': error, f'last-layer gradient, {when}':
        (error[:, :, None] * f[:, None]).flatten(1), f'loss, {when}': F.cross_entropy(scores, data.y,
                                                                                      reduction='none')[:, None]
    }


def mistakes(net, data):
    "The first stage of JTT: what an early network gets wrong is one group, the rest the other."
    return (outputs(net, data)[1].argmax(1) != data.y).long()


def environments(net, data, steps=400):
    "EIIL: two soft environments that maximise the IRM penalty of the network, then cut at one half."
    scores = outputs(net, data)[1]
    with torch.enable_grad():
        scale = torch.ones(len(scores), 1, requires_grad=True)
        slope, = torch.autograd.grad(F.cross_entropy(scores * scale, data.y, reduction='sum'), scale)
        slope = slope[:, 0].detach()
        slope = slope / slope.abs().mean()                                  # only the scale of the penalty
        q = torch.randn(len(scores), generator=generator(0, 'environments')).requires_grad_()
        opt = torch.optim.Adam([q], 1e-1)
        for _ in range(steps):
            p = q.sigmoid()
            penalty = ((p * slope).mean() ** 2 + ((1 - p) * slope).mean() ** 2)
            opt.zero_grad()
            (-penalty).backward()
            opt.step()
    return (q > 0).long()


def score(ids, y, group):
    """Means over classes of: adjusted Rand index against the groups; purity, the share of samples in their cluster's
    commonest group; recall, the share of minority samples in clusters where they are more than half; precision, the
    share of the minority in those clusters (None without such clusters)."""
    rows = []
    for c in y.unique().tolist():
        i, g = ids[y == c], group[y == c]
        table = pd.crosstab(i.numpy(), g.numpy()).reindex(columns=[0, 1], fill_value=0).to_numpy()
        found = table[table[:, 1] > table[:, 0]]
        rows.append(
            dict(ari=adjusted_rand_score(g.numpy(), i.numpy()), purity=table.max(1).sum() / table.sum(),
                 recall=found[:, 1].sum() / max(1, table[:, 1].sum()),
                 precision=found[:, 1].sum() / found.sum() if len(found) else None))
    # without the classes that have no such cluster
    means = pd.DataFrame(rows).astype(float).mean()
    return {name: None if means.isna()[name] else round(float(means[name]), 4) for name in rows[0]}


def study(name, seed, n, ks):
    "All rows of one data set and seed."
    task = TASKS[name]
    data = load_data(name, task['shift'], data_seed=seed).train
    if n and n < len(data): data = data.subset(random_per_class(data.y, n // data.n_classes, seed))
    shape = data.x.shape[1:]
    net = make_model('convnet', shape, data.n_classes, seed=seed, width=task['width']).eval()
    found = {'pixels': data.x.flatten(1), 'random network': outputs(net, data)[0]}
    train(net, data, task['early'], seed)
    found.update(spaces(net, data, 'early'))
    pairs = {'JTT, errors of the early network': mistakes(net, data), 'EIIL, early network': environments(net, data)}
    train(net, data, task['late'] - task['early'], seed + 1000)
    late = spaces(net, data, 'late')
    found.update({key: late[key] for key in ('late network', 'score gradient, late')})
    base = dict(data=name, seed=seed, n=len(data), minority=round(float((data.group == 1).float().mean()), 4))
    for space, f in found.items():
        for k in ks:
            yield dict(base, space=space, k=k, **score(class_kmeans_ids(f, data.y, k, seed), data.y, data.group))
    for space, ids in pairs.items(): yield dict(base, space=space, k=2, **score(ids, data.y, data.group))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--n', type=int, default=5000, help='samples of MNIST, the same number of each class')
    parser.add_argument('--ks', type=int, nargs='+', default=[2, 5, 10], help='clusters per class')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'latent_groups.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = dict(versions=versions(), device='CPU, 1 thread', config=dict(seeds=args.seeds, n=args.n, ks=args.ks,
                                                                           share=.1, tasks=TASKS), absent=[], rows=[])
    for name in TASKS:
        try: load_data(name, 'none')
        except FileNotFoundError as e:
            result['absent'].append(name)
            print(f'{name} left out: {e}')
            continue
        for seed in range(args.seeds):
            start = time.process_time()
            rows = list(study(name, seed, args.n, args.ks))
            result['rows'] += rows
            print(f'{name}, seed {seed}: {time.process_time() - start:.0f} CPU s')
            if seed == 0:
                print(
                    pd.DataFrame(rows).drop(columns=['data', 'seed', 'n', 'minority']).to_string(index=False),
                    flush=True)
    write_json(args.out, result)


if __name__ == '__main__': main()
