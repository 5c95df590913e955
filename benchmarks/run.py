"""Run all benchmarks, or some, and write their result files.

    python benchmarks/run.py                         # all of them, cheapest first: hours on two cores
    python benchmarks/run.py --only 'steps|risk'     # those whose name matches
    python benchmarks/run.py --minutes 5             # of those that go on where they stopped: so many minutes each

Prints one line for each and exits with 1 if any failed. Rows that are already in a result file are kept by the
benchmarks that can go on; the others measure again. `tools/gpu.py` runs what wants a GPU.
"""
import argparse, os, re, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent
CHEAPEST_FIRST = 'risk steps clustering cifar evaluation faithfulness architectures digits work'.split()
NOT_TIMED = {'common', 'run', 'identity', 'claims'}     # identity compares, claims reads: they write nothing


def benchmarks():
    "Names of the benchmarks, those named above first."
    found = sorted(p.stem for p in HERE.glob('*.py') if p.stem not in NOT_TIMED)
    return [n for n in CHEAPEST_FIRST if n in found] + [n for n in found if n not in CHEAPEST_FIRST]


def command(name, work, minutes):
    "What runs a benchmark; one that goes on where it stopped gets a folder, and minutes if it takes them."
    source = (HERE / f'{name}.py').read_text(encoding='utf-8')
    takes = lambda option: 'work=True' in source or f"'--{option}'" in source
    given = dict(work=work / name, minutes=minutes)
    return [sys.executable, str(HERE / f'{name}.py'),
            *(text for k, v in given.items() if v is not None and takes(k) for text in (f'--{k}', str(v)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='regular expression for names')
    parser.add_argument('--minutes', type=float, help='for each benchmark that can be stopped')
    parser.add_argument('--work', type=Path, help='folder for finished rows (default: a temporary one)')
    args = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    work, failed = args.work or Path(tempfile.mkdtemp(prefix='benchmarks-')), 0
    for name in (n for n in benchmarks() if re.search(args.only, n)):
        start = time.time()
        (work / name).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command(name, work, args.minutes), cwd=HERE.parent, capture_output=True, text=True)
        failed += done.returncode != 0
        print(f'{"ok  " if done.returncode == 0 else "FAIL"} {time.time() - start:7.1f} s  {name}', flush=True)
        if done.returncode: print((done.stdout + done.stderr)[-1500:], flush=True)
    sys.exit(failed > 0)


if __name__ == '__main__': main()
