"""Known numbers again: random images, distribution matching and gradient matching on MNIST and Fashion-MNIST, ConvNet-3 of width 128.

    python benchmarks/reproduce.py --work reproduce        # writes benchmarks/results/reproduce.json; about an hour on one core
    python benchmarks/reproduce.py --work reproduce --minutes 5 --only "random.*ipc1 "   # a slice; rows that are there stay

Networks are trained as in the published tables (DC, Zhao et al. 2021, and its code): SGD with momentum .9 and weight decay
5e-4, batches of 256, 301 epochs, step size .01 and a tenth of it after epoch 151 with a fresh state, images normalised with the
published constants and zero-padded to 32 x 32, which is what a padding of 3 in the first layer amounts to. MNIST, and only
MNIST, is augmented: each image is shifted, scaled or rotated. What is less than there: repetitions, the number of
iterations (20,000 of DM, 1,000 of DC and DSA there), real images in a step, DM's own 1,000 epochs with DSA augmentation (here the protocol above for every row), and matrix products in bfloat16.
Needs the environment variable RDD_NB_DATA.
"""
import argparse, re, time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from rdd_nb.sources import load_data
from rdd_nb.coresets import random_per_class
from rdd_nb.core import generator, read_json, versions, write_json
from rdd_nb.data import GroupedDataset
from rdd_nb.distill import Method, distill
from rdd_nb.foreign import CONSTANTS
from rdd_nb.matching import DistributionMatching, GradientMatching
from rdd_nb.models import make_model

PUBLISHED = {   # accuracy in percent; `memory`: quoted from memory, the others were read in the source
    ('random', 'mnist', 1): (64.9, 'DC/DSA papers, table 1', True), ('random', 'mnist', 10): (95.1, 'DC/DSA papers, table 1', True),
    ('random', 'fashion-mnist', 1): (51.4, 'DC/DSA papers, table 1', True), ('random', 'fashion-mnist', 10): (73.8, 'DC/DSA papers, table 1', True),
    ('DM', 'mnist', 1): (89.7, 'DM paper', True), ('DM', 'mnist', 10): (97.5, 'DM paper', True),
    ('DC', 'mnist', 1): (91.7, 'README of the DC/DSA code', False), ('DC', 'fashion-mnist', 1): (70.5, 'README of the DC/DSA code', False),
    ('DSA', 'mnist', 1): (88.7, 'README of the DC/DSA code', False),
}
METHODS = {
    'DM': Method(DistributionMatching(), init='random', steps=150, lr=10., batch=64, network='convnet', width=128),
    'DC': Method(GradientMatching(), init='random', steps=150, lr=.2, batch=32, network='convnet', width=128),
    'DSA': Method(GradientMatching(), init='random', steps=150, lr=.2, batch=32, network='convnet', width=128, augment='crop cutout scale rotate'),
}
PLAN = [('random', name, 1, 5) for name in ('mnist', 'fashion-mnist')] + [('random', name, 10, 2) for name in ('mnist', 'fashion-mnist')] \
     + [('DM', 'mnist', 1, 2), ('DM', 'fashion-mnist', 1, 2), ('DM', 'mnist', 10, 1), ('DM', 'fashion-mnist', 10, 1)] \
     + [('DC', 'mnist', 1, 1), ('DC', 'fashion-mnist', 1, 1), ('DSA', 'mnist', 1, 1)]   # method, set, ipc, seeds


@cache
def load(name):
    "Training and test part, normalised with the published constants and padded to 32 x 32."
    splits = load_data(name, 'none', val=100)
    mean, std, _ = CONSTANTS[name]
    part = lambda d: GroupedDataset(F.pad((d.pixels() - mean[0]) / std[0], (2, 2, 2, 2)), d.y, mean=mean, std=std, classes=d.classes, name=name)
    return part(splits.train), part(splits.test)


def crop_scale_rotate(x, g):
    "Each image shifted by up to 4 pixels, scaled by up to 20 % in each direction, or rotated by up to 45 degrees."
    n, kind, u = len(x), torch.randint(3, (len(x),), generator=g), torch.rand(len(x), 2, generator=g) * 2 - 1
    shift, scale, angle = u * 8 / 32 * (kind == 0)[:, None], 1 + .2 * u * (kind == 1)[:, None], u[:, 0] * torch.pi / 4 * (kind == 2)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos / scale[:, 0], -sin, shift[:, 0]], 1), torch.stack([sin, cos / scale[:, 1], shift[:, 1]], 1)], 1)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)     # outside: 0, the mean


def train(x, y, augmented, seed, epochs=301):
    net = make_model('convnet', x.shape[1:], 10, seed=('reproduce', seed), width=128)
    for epoch in range(epochs):
        if epoch in (0, epochs // 2 + 2): optimizer = torch.optim.SGD(net.parameters(), .01 if epoch == 0 else .001, momentum=.9, weight_decay=5e-4)
        g = generator('reproduce', seed, epoch)
        for i in torch.randperm(len(y), generator=g).split(256):
            with torch.autocast('cpu', torch.bfloat16): out = net(crop_scale_rotate(x[i], g) if augmented else x[i])
            optimizer.zero_grad()
            F.cross_entropy(out.float(), y[i]).backward()
            optimizer.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net, test):
    with torch.autocast('cpu', torch.bfloat16): return torch.cat([net(x).argmax(1) for x in test.x.split(250)]).eq(test.y).float().mean().item()


def run(method, name, ipc, seed):
    train_set, test = load(name)
    start = time.perf_counter()
    if method == 'random': x, y = (t[random_per_class(train_set.y, ipc, seed)] for t in (train_set.x, train_set.y))
    else:
        s = distill(train_set, METHODS[method], ipc, seed, 'cpu', progress=False)
        x, y = s.x, s.y
    made = time.perf_counter() - start
    found = accuracy(train(x, y, name == 'mnist', seed), test)
    return dict(method=method, set=name, ipc=ipc, seed=seed, accuracy=found, distill_seconds=round(made, 1), seconds=round(time.perf_counter() - start, 1))


def table(rows):
    for method, name, ipc, n in PLAN:
        own = [100 * r['accuracy'] for r in rows if (r['method'], r['set'], r['ipc']) == (method, name, ipc)]
        value, source, memory = PUBLISHED.get((method, name, ipc), (None, None, None))
        if own: yield dict(method=method, set=name, ipc=ipc, runs=len(own), ours=round(np.mean(own), 1), sd=round(np.std(own, ddof=1), 1) if len(own) > 1 else None,
                           published=value, source=source, from_memory=memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, required=True, help='folder for the rows; a stopped benchmark goes on from there')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'reproduce.json')
    parser.add_argument('--only', default='', help='regular expression for "method set ipcN seed"')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='start no further row after so many')
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, cache_file = time.perf_counter(), args.work / 'rows.json'
    rows = read_json(cache_file) if cache_file.exists() else []
    done = {(r['method'], r['set'], r['ipc'], r['seed']) for r in rows}
    todo = [(m, s, ipc, seed) for m, s, ipc, n in PLAN for seed in range(n) if re.search(args.only, f'{m} {s} ipc{ipc} {seed}') and (m, s, ipc, seed) not in done]
    for cell in tqdm(todo, desc='runs'):
        if time.perf_counter() - start > 60 * args.minutes: break
        rows.append(run(*cell))
        write_json(cache_file, rows)
        print(rows[-1], flush=True)
    write_json(args.out, dict(config=dict(methods={n: m.describe() for n, m in METHODS.items()}, published='percent; `from_memory` marks figures that were not read again'), versions=versions(), rows=rows, table=list(table(rows))))


if __name__ == '__main__': main()
