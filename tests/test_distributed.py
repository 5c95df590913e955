"""Two processes give the result of one; a lost process ends the other with a line, and the run goes on without it."""
import os, socket, subprocess, sys

import pytest
import torch

from rdd_nb.data import GroupedDataset
from rdd_nb.core import generator
from rdd_nb.distill import distill
from rdd_nb.distributed import distill_ranks
from rdd_nb.synthetic import load

JOB = """
import os, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from rdd_nb.distributed import ShardedDistiller, distill_ranks
from test_distributed import METHODS, SMALL, toy

for name, changes in METHODS.items():
    distill_ranks(toy(), *changes[:1], 2, out=name, **SMALL | changes[1])
done = ShardedDistiller.step
def step(self):
    if self.rank == 1 and self.step_number == 2: os._exit(1)
    return done(self)
ShardedDistiller.step = step
try: distill_ranks(toy(), 'rdd-target', 2, out='lost', checkpoint_every=1, **SMALL)
except ValueError as e: print('said', e)
os._exit(0)     # gloo's threads still wait for the lost process
"""
SMALL = dict(steps=4, network=dict(width=4, life=2), batch=dict(size=12), device='cpu', progress=False)
METHODS = {
    'distance': ('rdd-distance', dict(clustering='kmeans(2)')), 'target': ('rdd-target', {}),
    'nearest': ('rdd-distance', dict(clustering='nearest')), 'balanced': ('rdd-distance', dict(batch='balanced(12)')),
    'frequencies': ('distribution', dict(prior='frequencies(keep=0.5)', optimizer='adam', lr=.1)),
}


def toy():
    "Three classes, so that two processes have different shares."
    g = generator('toy')
    y = torch.arange(90) % 3
    level = y + 3. * (torch.arange(90) % 7 == 0)
    x = torch.randn(90, 1, 8, 8, generator=g) + level[:, None, None, None]
    return GroupedDataset(x, y)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What two processes wrote; `said` is what the first one said when the other was lost."
    tmp = tmp_path_factory.mktemp('ranks')
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE='2')
    command = [sys.executable, '-c', JOB.format(here=os.path.dirname(__file__))]
    both = [subprocess.Popen(command, cwd=tmp, env=env | dict(RANK=str(r)), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for r in range(2)]
    out = [p.communicate(timeout=200) for p in both]
    assert 'said' in out[0][0], out
    (tmp/'said').write_text(out[0][0])
    return tmp


@pytest.mark.parametrize('name', METHODS)
def test_two_processes_give_the_result_of_one(folder, name):
    method, changes = METHODS[name]
    one, two = distill(toy(), method, 2, **SMALL | changes), load(folder/name/'synthetic.safetensors')
    assert (one.x - one.initial).abs().max() > .01
    assert torch.allclose(one.x, two.x, atol=1e-5)
    if one.weight is not None: assert torch.allclose(one.weight, two.weight, atol=1e-5)
    losses = [(folder/name/'metrics.jsonl').read_text().count('loss')]
    assert losses == [4] and two.provenance['settings'] == one.provenance['settings']


def test_a_lost_process_is_one_line_and_the_run_goes_on_with_another_number(folder):
    said = (folder/'said').read_text()
    assert 'a process of this distillation is gone' in said and said.strip().endswith('with resume=True')
    assert (folder/'lost'/'checkpoint.pt').exists() and not (folder/'lost'/'synthetic.safetensors').exists()
    resumed = distill(toy(), 'rdd-target', 2, out=folder/'lost', checkpoint_every=1, resume=True, **SMALL)
    whole = distill(toy(), 'rdd-target', 2, **SMALL)
    assert torch.allclose(resumed.x, whole.x, atol=1e-5) and torch.allclose(resumed.weight, whole.weight, atol=1e-5)


def test_what_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(ValueError, match='start the script with torchrun'): distill_ranks(toy(), device='cpu')
    port = socket.socket()
    port.bind(('localhost', 0))
    free = port.getsockname()[1]
    port.close()
    env = dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR='localhost', MASTER_PORT=free)
    for k, v in env.items(): monkeypatch.setenv(k, str(v))
    try:
        for method, changes in ('moments', {}), ('trajectory', {}), ('rdd-network', {}):
            with pytest.raises(ValueError, match='can be divided among processes'):
                distill_ranks(toy(), method, 2, device='cpu', progress=False, steps=2, **changes)
        monkeypatch.setattr('rdd_nb.distributed.dist.get_world_size', lambda: 4)
        with pytest.raises(ValueError, match='4 processes for 3 classes'):
            distill_ranks(toy(), 'rdd-distance', 2, device='cpu')
    finally: torch.distributed.destroy_process_group()
