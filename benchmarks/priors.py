"""Priors at equal bytes: digits with a hidden minority, as many samples as each prior gets out of the budget.

    python benchmarks/priors.py --work FOLDER     # writes benchmarks/results/priors.json; about six minutes on one core

The budget is 6,400 numbers, 100 images of 64 pixels; whatever decoding needs is paid from it. Nothing is chosen:
every prior has the settings written here, and the step size of a method, which is for 10 images per class, is
multiplied by the number of images per class over 10, because each image moves a mean of n images by a share of 1/n
only. Every network gets the same number of updates, whatever the size of the set it is trained on. `--work` keeps
every run, and a stopped benchmark goes on from there; results are written after every seed, and `seconds` is the wall
time of all distillations together.
"""
import tempfile
from pathlib import Path

from rdd_nb.core import read_json, write_json
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.intervals import paired, summarise
from rdd_nb.methods import METHODS, as_method
from rdd_nb.priors import Frequencies, GeneratorLatents, LowRank, MultiFormation, Pixels
from rdd_nb.sources import load_data
from rdd_nb.synthetic import load

from common import options, write

BUDGET, CLASSES, STEPS, EPOCHS, BATCH = 6400, 10, 80, 200, 128
PRIORS = {
    'pixels': Pixels(), 'multi-formation 2': MultiFormation(2), 'frequencies .5': Frequencies(.5), 'frequencies .75':
    Frequencies(.75), 'low rank 16': LowRank(16), 'low rank 32': LowRank(32), 'generator 16':
    GeneratorLatents(latent=16, width=8)
}
ROWS = 'kmeans', 'distribution', 'rdd-distance'


def affordable(prior, train):
    "Stored samples per class that the budget pays for."
    def numbers(m): return prior.begin(train.x[:m * prior.per_sample], train.x, train.y).numbers
    one, two = numbers(1), numbers(2)
    return (BUDGET - (2 * one - two)) // (CLASSES * (two - one))


def row(splits, method, name, ipc, seed, out):
    "One row: as many updates of the network as for 100 samples, in batches as equal as can be."
    prior = PRIORS[name]
    images = ipc * prior.per_sample
    batches = -(-images * CLASSES // BATCH)
    training = Training(epochs=round(EPOCHS / batches), batch=-(-images * CLASSES // batches))
    slow = {} if method == 'kmeans' else dict(lr=METHODS[method].lr * images / 10, steps=STEPS)
    m = as_method(method, prior=prior, **slow)
    made, kept = out/'synthetic.safetensors', out/'evaluation.json'
    s = load(made) if made.exists() else distill(splits.train, m, ipc, seed, 'cpu', out, resume=True, progress=False)
    if not kept.exists(): write_json(kept, evaluate(s, splits.test, training, 1, seed, device='cpu'))
    own = dict(bytes=s.provenance['bytes'], samples=images * CLASSES, setting=repr(prior), lr=m.lr,
               epochs=training.epochs, batch=training.batch)
    return dict(method=f'{method}, {name}') | read_json(kept) | own | dict(seconds=s.provenance['seconds'])


def main():
    parser = options('priors', __doc__, 3)
    parser.add_argument('--work', type=Path, help='folder for the runs (default: a temporary one)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        splits, rows = load_data('digits'), []
        ipc = {name: affordable(p, splits.train) for name, p in PRIORS.items()}
        for seed in range(args.seeds):
            for name in PRIORS:
                for method in ROWS:
                    rows.append(row(splits, method, name, ipc[name], seed, work/'runs'/f'{method} {name} {seed}'))
                    groups = {k: round(v, 3) for k, v in rows[-1]['group_accuracy'].items()}
                    print(rows[-1]['method'], seed, rows[-1]['samples'], groups, flush=True)
            pairs = [
                p for m in ROWS for p in paired([r for r in rows if r['method'].startswith(m + ',')], [f'{m}, pixels'])
            ]
            for n in PRIORS:
                pairs += paired([r for r in rows if r['method'].endswith(f', {n}')],
                                [f'kmeans, {n}', f'distribution, {n}'])
            config = dict(budget=BUDGET, steps=STEPS, seeds=seed + 1, training=Training(epochs=EPOCHS,
                                                                                        batch=BATCH).describe(),
                          networks=1, ipc=ipc, command='python benchmarks/priors.py')
            write(args.out, config=config, seconds=round(sum(r['seconds'] for r in rows), 1), rows=rows,
                  summary=summarise(rows), paired=pairs)


if __name__ == '__main__': main()
