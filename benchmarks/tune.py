"""Choose settings on validation data: which step size, how many clusters, which risk?

    python benchmarks/tune.py          # writes benchmarks/results/tune.json; about ten minutes on two cores

Every setting is distilled on three draws of the digits task (split and minority redrawn; the test images are the same
in all of them and are not touched). The score is the balanced accuracy on validation images shown in both looks, so it
uses knowledge of the groups on validation data, as is usual for group-robust methods. Rows that are already in the
result file are not computed again.
"""
import itertools, json

import joblib
import numpy as np
import torch

from rdd_nb import shifts
from rdd_nb.core import read_json
from rdd_nb.data import GroupedDataset
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.sources import load_data

from common import options, write

SEEDS = 10, 11, 12   # of the data draw and of the distillation

MEAN_CVAR, SOFTER, HARDER = (f'0.5*mean + 0.5*cvar(tail={tail})' for tail in (.5, .7, .1))
UNIFORM = 'twolevel(mean, mean)'


def grid(method, **choices):
    return [(method, dict(zip(choices, values))) for values in itertools.product(*choices.values())]


def k(*sizes): return [f'kmeans({size})' for size in sizes]


SETTINGS = [
    ('kmeans', {}), ('random', {}), *grid('distribution', lr=[1., 5., 20.]),
    *grid('rdd-distance', lr=[1., 5., 20.], risk=[MEAN_CVAR], clustering=k(3)),
    *grid('rdd-distance', lr=[5.], risk=[MEAN_CVAR], clustering=k(2, 4, 6)),
    *grid('rdd-distance', lr=[5.], risk=['mean', SOFTER, HARDER], clustering=k(3)),
    *grid('rdd-distance', lr=[5.], risk=['mean', HARDER], clustering=['nearest']),
    *grid('gradient', lr=[.02, .05, .2, .5]), *grid('rdd-target', lr=[.05, .2, .5], risk=[UNIFORM], clustering=k(3)),
    *grid('rdd-target', lr=[.2], risk=[f'twolevel(mean, {SOFTER})', f'twolevel(mean, {MEAN_CVAR})'], clustering=k(3)),
    *grid('rdd-target', lr=[.2], risk=[UNIFORM], clustering=k(2, 6)),
    *grid('rdd-target', lr=[.2], risk=[f'twolevel(mean, {MEAN_CVAR})'], clustering=k(4, 6)),
    *grid('rdd-distance', lr=[5.], risk=['mean', SOFTER], clustering=k(4)),
    *grid('rdd-target', lr=[.2], risk=[UNIFORM], clustering=['nearest']),
    *grid('rdd-network', lr=[.2], risk=[UNIFORM, f'twolevel(mean, {MEAN_CVAR})'], clustering=k(3))
]


def both_looks(splits):
    "The validation images, each once as it was and once inverted and transposed."
    raw, planted = splits.val.pixels(), splits.val.group.bool().view(-1, 1, 1, 1)
    raw = raw.where(~planted, shifts.invert_transpose(raw))        # the look is its own inverse
    x, y, group = shifts.SHIFTS['minority'](raw, splits.val.y, splits.val.n_classes, .5, None, test=True)
    both = GroupedDataset(x, y, group, splits.val.classes, splits.val.groups, name='validation in both looks')
    return both.renormalise(splits.train.mean, splits.train.std)


def run(method, setting, seed):
    torch.set_num_threads(1)
    splits = load_data('digits', data_seed=seed)
    s = distill(splits.train, method, seed=seed, device='cpu', progress=False, **setting)
    row = evaluate(s, both_looks(splits), Training(), networks=2, seed=seed, device='cpu')
    return dict(method=method, setting=setting, seed=seed, seconds=s.provenance['seconds'],
                **{k: row[k] for k in ('balanced_accuracy', 'group_accuracy', 'worst_class_group_accuracy')})


def main():
    parser = options('tune', __doc__)
    parser.add_argument('--jobs', type=int, default=-1)
    args = parser.parse_args()
    rows = read_json(args.out)['rows'] if args.out.exists() else []
    key = lambda method, setting, seed: json.dumps([method, setting, seed], sort_keys=True)
    done = {key(r['method'], r['setting'], r['seed']) for r in rows}
    todo = [(m, s, seed) for m, s in SETTINGS for seed in SEEDS if key(m, s, seed) not in done]
    for row in joblib.Parallel(args.jobs, return_as='generator_unordered')(joblib.delayed(run)(*c) for c in todo):
        rows.append(row)
        write(args.out, config=dict(seeds=SEEDS, training=Training().describe(), score='balanced_accuracy'), rows=rows)
    for m, s in SETTINGS:
        own = [r for r in rows if (r['method'], r['setting']) == (m, s)]
        found = dict(balanced=[r['balanced_accuracy'] for r in own],
                     **{g: [r['group_accuracy'][g] for r in own] for g in ('majority', 'minority')},
                     worst=[r['worst_class_group_accuracy'] for r in own])
        print(f'{m:13} {json.dumps(s):105}', *(f'{k} {np.mean(v):.3f}' for k, v in found.items()), sep='  ')


if __name__ == '__main__': main()
