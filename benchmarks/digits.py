"""The main table: all methods on the digits with a hidden minority, five seeds, test set read once.

    python benchmarks/digits.py        # writes benchmarks/results/digits.json; about ten minutes on two cores

Beside the methods of `rdd-nb demo` it has the ablations that tell the parts apart: clusters without a risk, the paper's cells
around the synthetic images, the true groups in place of clusters (an upper row that uses labels), and training on all real
images under mean + CVaR.
"""
import argparse, tempfile
from pathlib import Path

from rdd_nb.sources import load_data
from rdd_nb.compare import compare
from rdd_nb.core import write_json
from rdd_nb.distill import METHODS, as_method
from rdd_nb.evaluation import Training

MAIN = 'random', 'kmeans', 'gradient', 'distribution', 'rdd-network', 'rdd-target', 'rdd-distance', 'full', 'full-risk'
ABLATIONS = {
    'gradient, step of rdd-target': as_method('gradient', lr=.2),
    'network, as in the paper': as_method('rdd-network', cells='synthetic', cells_per_class=None, risk='twolevel(cvar(tail=0.5), 0.5*mean + 0.5*max)'),
    'target, mean + CVaR over clusters': as_method('rdd-target', risk='twolevel(mean, 0.5*mean + 0.5*cvar(tail=0.5))', cells_per_class=4),
    'target, cells of synthetic images': as_method('rdd-target', cells='synthetic'),
    'target, true groups': as_method('rdd-target', cells='groups'),
    'distance, cells of synthetic images': as_method('rdd-distance', cells='synthetic'),
    'distance, mean over clusters': as_method('rdd-distance', risk='mean'),
    'distance, true groups': as_method('rdd-distance', cells='groups', risk='mean'),
    'gradient, random start': as_method('gradient', lr=.2, init='random'),
    'target, random start': as_method('rdd-target', init='random'),
    'distribution, random start': as_method('distribution', init='random'),
    'distance, random start': as_method('rdd-distance', init='random'),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--work', help='folder for the runs; a stopped benchmark goes on from there (default: a temporary one)')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'digits.json')
    parser.add_argument('--jobs', type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = compare(load_data('digits'), {m: METHODS.get(m) for m in MAIN} | ABLATIONS, range(args.seeds), args.work or Path(temporary) / 'runs', training=Training(),
                         source=dict(name='digits', shift='minority', share=.1, data_seed=0), device='cpu', jobs=args.jobs, resume=bool(args.work), command='python benchmarks/digits.py')
    write_json(args.out, report)


if __name__ == '__main__': main()
