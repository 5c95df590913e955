"""Do named methods still give the same images, bit for bit?

    python benchmarks/identity.py --write   # keep the hashes of today's images in benchmarks/results/identity.json
    python benchmarks/identity.py           # compare with the hashes that are kept

Floating-point sums differ between processors, thread counts and releases of torch, so hashes are only compared where
these agree.
"""
import argparse, hashlib, os, platform
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from rdd_nb.core import read_json, write_json
from rdd_nb.sources import load_data
from rdd_nb.distill import distill
from rdd_nb.methods import METHODS

PATH = Path(__file__).parent/'results'/'identity.json'
SHORT = dict(trajectory=dict(steps=2), unrolled=dict(steps=4))
VARIANTS = {
    'gradient, cvar at target': ('gradient', dict(risk='cvar(tail=0.2)', risk_at='target')),
    'gradient, nearest at distance': ('gradient', dict(risk='cvar(tail=0.5)', risk_at='distance')),
    'gradient, initial at distance':
    ('gradient', dict(risk='cvar(tail=0.5)', risk_at='distance', clustering='nearest(moving=False)')),
    'distribution, errors at distance': ('rdd-distance', dict(clustering='kmeans(4, errors, steps=10)')),
    'distribution, features at distance': ('rdd-distance', dict(clustering='kmeans(4, features, steps=10)')),
    'distribution, groups at target': ('cobra', dict(base='density')),
    'kernel, two levels at target': ('kernel', dict(risk='twolevel(mean, max)', risk_at='target',
                                                    clustering='kmeans(3)')),
    'kernel, cvar at distance, learned labels':
    ('kernel', dict(risk='cvar(tail=0.5)', risk_at='distance', clustering='kmeans(3)', labels='learned')),
    'moments, cvar at distance': ('moments', dict(risk='cvar(tail=0.5)', risk_at='distance', clustering='kmeans(2)')),
    'batch-norm, cvar at distance': ('batch-norm',
                                     dict(risk='cvar(tail=0.5)', risk_at='distance', clustering='kmeans(2)')),
    'unrolled, cvar at target': ('unrolled', dict(risk='cvar(tail=0.5)', risk_at='target')),
    'trajectory, cvar at target': ('trajectory', dict(risk='cvar(tail=0.5)', risk_at='target', steps=2)),
    'distribution, frequencies': ('distribution', dict(prior='frequencies(keep=0.5)', optimizer='sgd(0.9)')),
    'patches from clusters': ('patches', dict(start='patches(10, 2)', labels='teacher(10)')),
}


def digest(s):
    h = hashlib.sha256()
    for t in (s.x, s.y, s.soft):
        if t is not None: h.update(t.contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def hashes():
    torch.set_num_threads(1)
    train = load_data('digits', 'minority').train
    jobs = {m: (m, SHORT.get(m, dict(steps=6) if METHODS[m].objective else {})) for m in METHODS}
    jobs |= {k: (m, dict(steps=4) | c) if METHODS[m].objective else (m, c) for k, (m, c) in VARIANTS.items()}
    return {
        k: digest(distill(train, m, ipc=3, seed=1, device='cpu', progress=False, **c))
        for k, (m, c) in jobs.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='keep the hashes of today')
    args = parser.parse_args()
    where, now = dict(torch=torch.__version__, processor=platform.processor() or platform.machine(),
                      threads=1), hashes()
    if args.write: return print(write_json(PATH, dict(where=where, hashes=now)))
    kept = read_json(PATH)
    if kept['where'] != where: print(f'not comparable: kept on {kept["where"]}, this is {where}')
    for k in {**kept['hashes'], **now}:
        print(f'{"same" if kept["hashes"].get(k) == now.get(k) else "DIFFERENT":9}  {k}')


if __name__ == '__main__': main()
