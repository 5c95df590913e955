"""What the risk measures cost, forward and backward, beside `torch.topk` and `torch.sort` in the same run.

    OMP_NUM_THREADS=1 python benchmarks/risk.py                  # writes benchmarks/results/risk.json, under a minute
    python benchmarks/risk.py --device cuda --out FILE.json

CVaR is compared with the mean of the k largest losses, taken with `topk(k, sorted=False)` (the fastest that PyTorch
has) and with `sort(descending=True)`; k is ceil(tail * n). Times are the fastest of many rounds in which the
contestants take turns in changing order, so that a busy machine hits all of them alike. Exit status 1 if a ratio is
above its limit.
"""
import argparse, math, time
from pathlib import Path

import torch

from rdd_nb.core import versions, write_json
from rdd_nb.risk import (CVaR, ChiSquareDRO, CressieRead, DualPower, Entropic, EVaR, Mean, MeanUpperSemideviation,
                         SmoothedCVaR, TwoLevel, Wang, WorstCase)

TAILS = .01, .05, .0533, .5   # .0533: a fractional number of samples
LIMITS = {'to_topk': 1.5, 'to_sort': 1.2}


def seconds(contestants, losses, budget):
    "Fastest forward + backward of each contestant in seconds; they take turns for about `budget` seconds."
    sync = torch.cuda.synchronize if losses.is_cuda else (lambda: None)
    best, stop, rounds = dict.fromkeys(contestants, math.inf), time.perf_counter() + budget, 0
    order = list(contestants.items())
    while rounds < 20 or time.perf_counter() < stop:
        order.reverse()                                # nobody always comes after the same one
        for name, f in order:
            if len(losses) * rounds > 5_000_000 and name == 'sort': continue  # slow and steady: a few rounds are enough
            x = losses.clone().requires_grad_()
            sync()
            start = time.perf_counter()
            f(x).backward()
            sync()
            if rounds: best[name] = min(best[name], time.perf_counter() - start)  # the first round warms up
        rounds += 1
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'risk.json')
    parser.add_argument('--budget', type=float, default=1., help='seconds for each line of the table')
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)

    cvar = []
    for n in 1_000, 10_000, 100_000, 1_000_000:
        losses = torch.rand(n, generator=draw).to(args.device)
        for tail in TAILS:
            k = math.ceil(tail * n - 1e-6)
            t = seconds({'cvar': CVaR(tail), 'topk': lambda x: x.topk(k, sorted=False).values.mean(),
                         'sort': lambda x: x.sort(descending=True).values[:k].mean()}, losses, args.budget)
            row = {'n': n, 'tail': tail, 'fractional': abs(tail * n - k) > 1e-6,
                   **{f'{name}_seconds': s for name, s in t.items()},
                   'to_topk': t['cvar'] / t['topk'], 'to_sort': t['cvar'] / t['sort']}
            cvar.append(row)
            print(f"n {n:9,d}  tail {tail:<7} CVaR {t['cvar'] * 1e3:8.3f} ms   / topk {row['to_topk']:.2f}   / sort "
                  f"{row['to_sort']:.2f}", flush=True)

    n = 100_000
    losses, groups = torch.rand(n, generator=draw).to(args.device), (torch.arange(n) % 100).to(args.device)
    p = torch.rand(n, generator=draw).to(args.device)
    p /= p.sum()
    measures = {repr(m): m for m in (Mean(), WorstCase(), CVaR(.05), .5 * Mean() + .5 * CVaR(.1), Entropic(1.),
                                     MeanUpperSemideviation(), DualPower(4.),
                                     Wang(1.), ChiSquareDRO(.5), SmoothedCVaR(.05, .1), EVaR(.05), CressieRead(4., .5))}
    measures['CVaR(tail=0.05) with p'] = lambda x: CVaR(.05)(x, p=p)
    two = TwoLevel(CVaR(.2), .5 * Mean() + .5 * WorstCase())
    measures[f'{two!r}, 100 groups'] = lambda x: two(x, groups=groups)
    measures['sort'] = lambda x: x.sort(descending=True).values.mean()
    t = seconds(measures, losses, 8 * args.budget)
    others = [{'measure': name, 'n': n, 'seconds': s, 'to_sort': s / t['sort']} for name, s in t.items()]
    for row in others: print(f"{row['measure']:75s} {row['seconds'] * 1e3:8.2f} ms   / sort {row['to_sort']:.2f}")

    name = torch.cuda.get_device_name() if args.device.startswith('cuda') else 'cpu, 1 thread'
    write_json(args.out, {'device': name, 'versions': versions(),
                          'config': {'dtype': 'float32', 'budget_seconds': args.budget, 'seed': 0},
                          'limits': LIMITS, 'cvar': cvar, 'measures': others})
    over = [row for row in cvar for key, limit in LIMITS.items() if row[key] > limit
            and (key != 'to_topk' or row['tail'] <= .1)]
    for row in over: print('above its limit:', row)
    return 1 if over else 0


if __name__ == '__main__':
    raise SystemExit(main())
