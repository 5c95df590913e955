"""Steps per second and peak memory of plain matching and of RDD, beside an eager loop as in published code.

    # writes benchmarks/results/steps-cpu.json, some minutes
    OMP_NUM_THREADS=1 python benchmarks/steps.py
    python benchmarks/steps.py --device cuda                       # writes benchmarks/results/steps-cuda.json
    python benchmarks/steps.py --sizes digits --seconds 2          # a quick look

The published loops go class by class: real batch, gradient; synthetic batch, gradient with graph; layer by layer and
row by row the distance; one backward pass at the end. They are written again here in that style and timed in turns
with ours, on random pixels and the same network, batch and number of synthetic images. Networks are not trained in
between.
"""
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F

from rdd_nb import data
from rdd_nb.core import Cost, generator
from rdd_nb.distill import Distiller
from rdd_nb.methods import as_method
from rdd_nb.models import make_model

from common import RESULTS, options, write

# shape, width, real samples per class
SIZES = dict(digits=((1, 8, 8), 32, 64), mnist=((1, 28, 28), 128, 64), cifar=((3, 32, 32), 128, 64))
METHODS = 'gradient', 'rdd-target', 'distribution', 'rdd-distance'
IPC, CLASSES = 10, 10


def eager_gradient_step(net, x, y, images, sy, optimizer):
    "Gradient matching class by class and row by row, as in the published scripts."
    parameters, loss = list(net.parameters()), 0.
    for c in range(CLASSES):
        real = torch.autograd.grad(F.cross_entropy(net(x[y == c]), y[y == c]), parameters)
        synthetic = torch.autograd.grad(F.cross_entropy(net(images[sy == c]), sy[sy == c]), parameters,
                                        create_graph=True)
        for a, b in zip(real, synthetic):
            if a.dim() == 1: continue
            a, b = a.detach().flatten(1), b.flatten(1)
            loss = loss + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def eager_distribution_step(net, x, y, images, sy, optimizer):
    "Distribution matching class by class."
    loss = 0.
    for c in range(CLASSES):
        loss = loss + (net.features(x[y == c]).detach().mean(0) - net.features(images[sy == c]).mean(0)).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def contestants(shape, width, batch, device):
    "A function that does one step, for each method and each eager loop."
    g, n = generator('steps', shape), CLASSES * batch * 2
    x, y = torch.randn(n, *shape, generator=g), torch.arange(CLASSES).repeat_interleave(batch * 2)
    train = data.GroupedDataset(x, y, torch.arange(n) % 2, groups=['a', 'b'])
    small = dict(steps=10**6, network=dict(width=width, steps=0, life=10**6), batch=dict(size=batch), start='random')
    steps = {m: Distiller(train, as_method(m, **small), IPC, 0, device).step for m in METHODS}
    fewer = as_method('rdd-distance', **small | dict(batch=f'balanced({batch // 4})'))
    steps['rdd-distance, balanced quarter'] = Distiller(train, fewer, IPC, 0, device).step
    net = make_model('convnet', shape, CLASSES, width=width).to(device)
    images = torch.randn(CLASSES * IPC, *shape, device=device, requires_grad=True)
    sy = torch.arange(CLASSES, device=device).repeat_interleave(IPC)
    optimizer = torch.optim.SGD([images], .1, momentum=.5)
    xd, yd = x.to(device), y.to(device)
    def eager(f):
        def step():
            i = torch.cat([c * 2 * batch + torch.randperm(2 * batch)[:batch] for c in range(CLASSES)]).to(device)
            f(net, xd[i], yd[i], images, sy, optimizer)
        return step
    return steps | {'eager gradient': eager(eager_gradient_step), 'eager distribution': eager(eager_distribution_step)}


def fastest(steps, device, seconds):
    "Fastest step of each, in turns for about `seconds` in all, after a step to warm up."
    best, stop = dict.fromkeys(steps, float('inf')), 0
    while time.perf_counter() < stop or not stop:
        for name, step in steps.items():
            if not stop: step()
            with Cost(device) as cost: step()
            best[name] = min(best[name], cost.seconds)
        stop = stop or time.perf_counter() + seconds
    return best


def peak(size, name, device):
    "Memory in MB that the first step of one contestant needs; a process keeps what it had, so each has its own."
    if device == 'cpu': torch.set_num_threads(1)
    shape, width, batch = SIZES[size]
    step = contestants(shape, width, batch, device)[name]
    with Cost(device) as cost: step()
    return cost.peak_mb


def main():
    parser = options('steps-cpu', __doc__)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--sizes', nargs='+', default=list(SIZES), choices=list(SIZES))
    parser.add_argument('--seconds', type=float, default=20, help='for each size, after two steps of everybody')
    args = parser.parse_args()
    kind = args.device.split(':')[0]
    if kind != 'cpu' and args.out == RESULTS / 'steps-cpu.json': args.out = RESULTS / f'steps-{kind}.json'
    rows = []
    for size in args.sizes:
        shape, width, batch = SIZES[size]
        best = fastest(contestants(shape, width, batch, args.device), args.device, args.seconds)
        for name in best:
            with ProcessPoolExecutor(1, get_context('spawn')) as fresh:
                mb = fresh.submit(peak, size, name, args.device).result()
            base = best['eager gradient' if name in ('gradient', 'rdd-target',
                                                     'eager gradient') else 'eager distribution']
            rows.append(dict(size=size, shape=shape, width=width, batch=batch, ipc=IPC, method=name, seconds=best[name],
                             steps_per_second=1 / best[name], to_eager=best[name] / base, peak_mb=round(mb, 1)))
            print(
                f"{size:7} {name:30} {1 / best[name]:8.2f} steps/s time / eager {best[name] / base:5.2f}  {mb:7.1f} MB",
                flush=True)
    write(args.out, config=dict(device=args.device, threads=torch.get_num_threads(), seconds=args.seconds), rows=rows)


if __name__ == '__main__': main()
