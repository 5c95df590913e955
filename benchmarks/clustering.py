"""k-means on one thread: `rdd_nb.kmeans.KMeans` beside scikit-learn, faiss and fast-pytorch-kmeans, in one run.

    OMP_NUM_THREADS=1 python benchmarks/clustering.py      # three minutes, writes benchmarks/results/clustering.json
    OMP_NUM_THREADS=1 python benchmarks/clustering.py --n 5000 --out /tmp/small.json

Every library gets the same float32 data, the same initial centres and the same number of iterations. CPU seconds of
the process are measured, not wall time, since other programs may share the machine. Libraries take turns and the least
of the repeats counts. Inertia is computed by one function for all. faiss (`faiss-cpu`) and `fast-pytorch-kmeans` (needs
`psutil`) are not dependencies of the package: where one is missing, its rows are left out, and the file says so. With a
GPU, our own implementation is also timed there against the roofline.
"""
import argparse
import importlib
import os
import time
import warnings
from importlib.metadata import version
from pathlib import Path

# before numpy and torch are imported
for name in ('OMP', 'MKL', 'OPENBLAS'): os.environ[f'{name}_NUM_THREADS'] = '1'

import sklearn
import sklearn.cluster
import torch
from threadpoolctl import threadpool_limits

from rdd_nb import kmeans
from rdd_nb.kmeans import KMeans, assign_nearest
from rdd_nb.core import generator, versions, write_json

CONFIGS = [dict(d=512, k=100, iterations=10), dict(d=512, k=500, iterations=5), dict(d=2048, k=100, iterations=5),
           dict(d=2048, k=500, iterations=3)]


def data(n, d, modes=200, seed=0):
    "Like features after a ReLU: a mixture, cut off at zero, with its mean off the origin. (n, d) float32."
    gen = generator(seed, 'benchmark', d)
    centres = torch.randn(modes, d, generator=gen) / 2
    return torch.relu(centres[torch.randint(modes, (n,), generator=gen)] + torch.randn(n, d, generator=gen))


def optional(name):
    try: return importlib.import_module(name)
    except ImportError: return None


def cpu_time(f):
    start = time.process_time()
    result = f()
    return time.process_time() - start, result


def inertia(x, centres):
    return float(assign_nearest(x, torch.as_tensor(centres))[1].double().sum())


def contestants(x, init, k, iterations, faiss, fast):
    "Name -> function that clusters and returns the centres. All start from `init`."
    X, I = x.numpy(), init.numpy()
    def with_faiss():
        km = faiss.Kmeans(x.shape[1], k, niter=iterations, max_points_per_centroid=len(x), verbose=False)
        km.train(X, init_centroids=I)
        km.index.search(X, 1)                     # the others end with an assignment as well
        return km.centroids
    def with_fast():
        km = fast.KMeans(k, max_iter=iterations, tol=0)
        km.fit_predict(x, centroids=init.clone())
        return km.centroids
    ways = {'scikit-learn': lambda: sklearn.cluster.KMeans(k, init=I, n_init=1, max_iter=iterations, tol=0,
                                                           algorithm='lloyd').fit(X).cluster_centers_,
            'rdd_nb': lambda: KMeans(k, init=init, max_iter=iterations, tol=0).fit(x).cluster_centers_}
    if faiss: ways['faiss'] = with_faiss
    if fast: ways['fast-pytorch-kmeans'] = with_fast
    return ways


def floor(x, init, iterations):
    "CPU seconds of the matrix products alone, in the same chunks: a floor for exact iterations without bounds."
    k, half = len(init), init.square().sum(1)[:, None] / 2
    def products():
        for _ in range(iterations + 1):
            for rows in x.split(kmeans._rows(x, k, 64)): torch.addmm(half, init, rows.T, alpha=-1)
    return min(cpu_time(products)[0] for _ in range(2))


def same_start(n, config, repeats, faiss, fast):
    d, k, iterations = config['d'], config['k'], config['iterations']
    x = data(n, d)
    init = x[torch.randperm(n, generator=generator(0, 'init', d, k))[:k]].clone()
    ways, seconds, values = contestants(x, init, k, iterations, faiss, fast), {}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            t, centres = cpu_time(way)
            seconds.setdefault(name, []).append(t)
            values[name] = inertia(x, centres)
    best = {name: min(t) for name, t in seconds.items()}
    least = floor(x, init, iterations)
    for name in ways:
        yield dict(n=n, **config, library=name, cpu_seconds=round(best[name], 3),
                   all_cpu_seconds=[round(t, 3) for t in seconds[name]],
                   ratio=round(best[name] / best['scikit-learn'], 3),
                   inertia_ratio=round(values[name] / values['scikit-learn'], 6),
                   products_alone=round(least, 3), gflops=round(2e-9 * n * d * k * (iterations + 1) / best[name], 1))


def shortcuts(n, faiss, d=512, k=100, batch=4096):
    "Ways to do without ten full iterations, each with its own seeding and stopping rule: CPU seconds and inertia."
    x = data(n, d)
    X = x.numpy()
    init = x[torch.randperm(n, generator=generator(0, 'init', d, k))[:k]]
    def ten(**start): return KMeans(k, max_iter=10, tol=0, **start).fit(x).cluster_centers_
    ways = {'rdd_nb, 10 iterations, random start': lambda: ten(init=init),
            'rdd_nb, 10 iterations, k-means++': ten,
            f'scikit-learn, batches of {batch}, random start': lambda: sklearn.cluster.MiniBatchKMeans(
                k, init=init.numpy(), n_init=1, batch_size=batch, random_state=0).fit(X).cluster_centers_}
    if faiss:
        def defaults():
            km = faiss.Kmeans(d, k, niter=10, verbose=False)
            km.train(X)
            return km.centroids
        ways['faiss, 10 iterations, defaults (256 samples per centre)'] = defaults
    found = {name: min((cpu_time(way) for _ in range(2)), key=lambda r: r[0]) for name, way in ways.items()}
    reference = inertia(x, next(iter(found.values()))[1])
    return [dict(n=n, d=d, k=k, way=name, cpu_seconds=round(t, 3), inertia_ratio=round(inertia(x, c) / reference, 5))
            for name, (t, c) in found.items()]


def seeding(n, fast, d=512, k=100):
    "CPU seconds and inertia of the seeds alone."
    x = data(n, d)
    X = x.numpy()
    ways = {'random samples': lambda: x[torch.randperm(n, generator=generator(0, 'random seeds'))[:k]],
            'rdd_nb': lambda: x[kmeans._seeds(x, k, generator(0, 'seeds'))],
            'scikit-learn': lambda: sklearn.cluster.kmeans_plusplus(X, k, random_state=0)[0]}
    if fast:
        from fast_pytorch_kmeans.init_methods import init_methods
        torch.manual_seed(0)
        if 'kmeans++' in init_methods: ways['fast-pytorch-kmeans'] = lambda: init_methods['kmeans++'](x, k, None)
    found = {name: cpu_time(way) for name, way in ways.items()}
    reference = inertia(x, found['scikit-learn'][1])
    return [dict(n=n, d=d, k=k, library=name, cpu_seconds=round(t, 3),
                 inertia_ratio=round(inertia(x, c) / reference, 5)) for name, (t, c) in found.items()]


def tricks(n, d=512, k=100, iterations=10):
    """What usual accelerations could save, in iterations 2, 3, ...: the share of rows whose nearest centre Hamerly's
    bounds prove without a product, and the share that moves; CPU seconds of one pass and of three ways to sum."""
    x = data(n, d)
    centres = x[torch.randperm(n, generator=generator(0, 'init', d, k))[:k]].clone()
    skipped, moved, ids = [], [], None
    for _ in range(iterations):
        two = torch.cat([torch.cdist(rows, centres).topk(2, 1, largest=False)[0] for rows in x.split(4096)])
        near = assign_nearest(x, centres)[0]
        if ids is not None:
            half = torch.cdist(centres, centres).fill_diagonal_(torch.inf).min(1).values / 2
            skipped.append(round(float((upper < torch.maximum(lower, half[ids])).float().mean()), 4))
            moved.append(round(float((ids != near).float().mean()), 4))
        ids = near
        new = kmeans._one_pass(x, centres, None, 64)
        new = (new[1] / new[2].clamp(min=1)[:, None]).float()
        shift = (new - centres).norm(dim=1)
        upper, lower, centres = two[:, 0] + shift[ids], two[:, 1] - shift.max(), new
    half, parts = centres.square().sum(1)[:, None] / 2, list(zip(x.split(384), ids.split(384)))
    total = torch.zeros_like(centres)
    ways = {'products': lambda: [torch.addmm(half, centres, rows.T, alpha=-1) for rows, _ in parts],
            'products and nearest': lambda: kmeans._nearest(x, centres, 64),
            'products, nearest and sums by index': lambda: kmeans._one_pass(x, centres, None, 64),
            'sums by index alone': lambda: [total.index_add_(0, near, rows) for rows, near in parts],
            'sums by indicator product alone': lambda: [kmeans._add_by_product(total, rows, near, None)
                                                        for rows, near in parts],
            'sums of sorted rows alone': lambda: torch.segment_reduce(x[ids.argsort()], 'sum',
                                                                      lengths=ids.bincount(minlength=k))}
    return dict(n=n, d=d, k=k, skipped=skipped, moved=moved,
                one_pass={name: round(min(cpu_time(way)[0] for _ in range(3)), 4) for name, way in ways.items()})


def gpu_seconds(f, repeats=5):
    f()
    best = float('inf')
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def on_gpu(n, config):
    "Seconds on the GPU beside the roofline: the larger of operations / measured rate and bytes / measured bandwidth."
    d, k, iterations = config['d'], config['k'], config['iterations']
    x = data(n, d).cuda()
    init = x[torch.randperm(n, generator=generator(0, 'init', d, k))[:k].cuda()].clone()
    a = torch.randn(8192, 8192, device='cuda')
    rate = 2 * 8192**3 / gpu_seconds(lambda: a @ a)
    big = torch.empty(2**28, device='cuda')
    bandwidth = 2 * 4 * 2**28 / gpu_seconds(lambda: big.clone())
    flops = 2 * n * d * k * (2 * iterations + 1)           # distances, and sums as products with indicators
    moved = 4 * n * d * (2 * iterations + 1) + 4 * n * k * 2 * (2 * iterations + 1)
    seconds = gpu_seconds(lambda: KMeans(k, init=init, max_iter=iterations, tol=0).fit(x))
    roof = max(flops / rate, moved / bandwidth)
    return dict(n=n, **config, seconds=round(seconds, 5), roofline_seconds=round(roof, 5),
                share_of_roofline=round(roof / seconds, 3),
                bound='operations' if flops / rate > moved / bandwidth else 'bytes',
                float32_tflops=round(rate / 1e12, 1), gb_per_second=round(bandwidth / 1e9))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=50_000, help='samples')
    parser.add_argument('--repeats', type=int, default=2, help='the least time of so many counts')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'clustering.json')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    faiss, fast = optional('faiss'), optional('fast_pytorch_kmeans')
    missing = [name for name, module in (('faiss-cpu', faiss), ('fast-pytorch-kmeans', fast)) if module is None] + ([]
        if torch.cuda.is_available() else ['GPU'])
    if faiss: faiss.omp_set_num_threads(1)
    result = dict(versions=dict(versions(), sklearn=sklearn.__version__), device='CPU, 1 thread',
                  cpu=torch.backends.cpu.get_cpu_capability(),
                  config=dict(n=args.n, repeats=args.repeats, dtype='float32', tol=0, configs=CONFIGS), absent=missing,
                  rows=[], gpu=[])
    if faiss: result['versions']['faiss'] = faiss.__version__
    if fast:
        result['versions']['fast_pytorch_kmeans'] = version('fast-pytorch-kmeans')
    with threadpool_limits(1):
        for config in CONFIGS:
            for row in same_start(args.n, config, args.repeats, faiss, fast):
                result['rows'].append(row)
                print(row, flush=True)
        result['shortcuts'] = shortcuts(args.n, faiss)
        result['seeding'] = seeding(args.n, fast)
        result['tricks'] = tricks(args.n)
    if torch.cuda.is_available(): result['gpu'] = [on_gpu(args.n, config) for config in CONFIGS]
    print(result['tricks'])
    for part in ('shortcuts', 'seeding', 'gpu'):
        for row in result[part]: print(row)
    write_json(args.out, result)


if __name__ == '__main__': main()
