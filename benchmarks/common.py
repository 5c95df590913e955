"""What all benchmarks share: where results go, what is written beside them, and how a stopped benchmark goes on.

A benchmark imports this file by name, since Python puts the folder of the script on its path.
"""
import argparse, subprocess, time
from pathlib import Path

import torch

from rdd_nb.core import read_json, versions, write_json

HERE = Path(__file__).parent
RESULTS = HERE / 'results'


def commit():
    "The commit that is checked out, or None outside a repository."
    found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip() or None


def options(name, description, seeds=None, work=False):
    "A parser with `--out`; on request `--seeds`, and `--work`, `--only`, `--minutes` for work in slices."
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('--out', type=Path, default=RESULTS / f'{name}.json', help='result file (default: %(default)s)')
    if seeds: parser.add_argument('--seeds', type=int, default=seeds, help='how many (default: %(default)s)')
    if work:
        parser.add_argument('--work', type=Path, required=True,
                            help='folder for finished rows; a stopped benchmark goes on from there')
        parser.add_argument('--only', default='', help='regular expression for the rows to compute')
        parser.add_argument('--minutes', type=float, default=float('inf'), help='start no further row after so many')
    torch.set_num_threads(1)
    return parser


def write(out, **content):
    "Write a result file with the versions, the processor and the commit beside what was measured."
    return write_json(out, content | dict(versions=versions(), commit=commit()))


class TimeIsUp(Exception): "No further row is started."


class Rows:
    "Finished rows in one file, each found by a key; `row(key, make)` returns the one that is there or makes it."
    def __init__(self, path, key, minutes=float('inf'), before=()):
        self.path, self.key, self.stop = Path(path), key, time.perf_counter() + 60 * minutes
        self.rows = read_json(self.path) if self.path.exists() else list(before)
        self.index = {key(r): r for r in self.rows}

    def add(self, row):
        self.index[self.key(row)] = row
        self.rows.append(row)
        write_json(self.path, self.rows)
        return row

    def row(self, key, make):
        if key in self.index: return self.index[key]
        if time.perf_counter() > self.stop: raise TimeIsUp
        return self.add(make())
