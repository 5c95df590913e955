"Named streams, devices, messages, memory, and files: whole or absent, and no damage unnoticed."
import errno, json, multiprocessing, os, random, subprocess, sys, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rdd_nb import core
from rdd_nb.core import (Cost, atomic_write, enough_memory, generator, pick_device, printable, read_json, read_state,
                         read_tensors, seeded, versions, write_json, write_state, write_tensors)


def refused(read, path, *words):
    "Reading fails with one line that names the file."
    with pytest.raises(ValueError) as e: read(path)
    text = str(e.value)
    assert '\n' not in text and len(text) < 300 + len(str(path)) and str(path) in text, text
    for word in words: assert word in text


# Streams

def test_streams_are_the_same_in_another_process():
    code = 'import torch; from rdd_nb.core import generator as g; print(torch.rand(3, generator=g(1, "a", 2)).tolist())'
    env = os.environ | {'PYTHONHASHSEED': '5'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == str(torch.rand(3, generator=generator(1, 'a', 2)).tolist())


def test_seeded_restores_the_global_generator_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1): raise KeyError(torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())


# Devices, messages, memory

NO_DEVICES = ['meta', torch.device('meta'), 'cpu:1', 'cpu:3', 'cuda:99', '', True, 1.5, 'x' * 10**5, '\x1b[31m']


@pytest.mark.parametrize('device', NO_DEVICES, ids=lambda d: printable(d, 20))
def test_devices_that_are_refused(device):
    with pytest.raises(ValueError, match='not available here; this machine has: cpu') as e: pick_device(device)
    assert str(e.value).isprintable() and len(str(e.value)) < 300


def test_devices_that_are_accepted():
    assert {pick_device(d).type for d in ('cpu', 'cpu:0', torch.device('cpu'))} == {'cpu'}


@pytest.mark.parametrize('text, found', [
    ('a\x1b[2Jb', r'a\x1b[2Jb'), ('two\nlines\r\t', r'two\nlines\r\t'), ('\x00\x7f\x9b', r'\x00\x7f\x9b'),
    ('\u202egnp', r'\u202egnp'), (os.fsdecode(b'caf\xe9'), r'caf\udce9'), ('naïve 数 🦓', 'naïve 数 🦓'),
    (Path('a b'), 'a b'), (3, '3')], ids=ascii)
def test_printable(text, found): assert printable(text) == found and printable(found) == found


def test_printable_is_short():
    assert len(printable('\x1b' * 10**6, 50)) == 50 == len(printable('a' * 51, 50))
    assert printable('a' * 50, 50) == 'a' * 50


def test_no_memory_is_one_line():
    cuda = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 10 GiB\nand more lines')
    def raises(e): raise e
    cases = {'4000000000000000 bytes': lambda: torch.empty(10**15), '7.11 PiB': lambda: np.empty(10**15),
             '20.00 GiB': lambda: raises(cuda), 'not enough memory': lambda: raises(MemoryError()),
             'memory;': lambda: torch.empty(2**62, 2**62)}
    for word, greedy in cases.items():
        with pytest.raises(ValueError, match=word) as e, enough_memory('a smaller ipc'): greedy()
        assert str(e.value).endswith('try a smaller ipc') and '\n' not in str(e.value)


@pytest.mark.parametrize('error', [RuntimeError('shape'), KeyError('x'), KeyboardInterrupt(), OSError(28, 'full')])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as e, enough_memory('a smaller ipc'): raise error
    assert e.value is error


def test_versions():
    found = versions()
    assert found['threads'] == torch.get_num_threads() and found['omp_num_threads'] == os.environ['OMP_NUM_THREADS']
    assert len(found['processor'].split(', ')[0]) > 2 and json.loads(json.dumps(found)) == found


def test_cost_counts_on_the_cpu():
    with Cost() as cost: torch.ones(2**23)
    assert 0 < cost.seconds < 5 and cost.peak_mb < 200


# Files that are whole or absent

def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    "The file first, then its name, then the folder."
    done, sync, replace = [], os.fsync, os.replace
    def fsync(fd):
        done.append(Path(os.readlink(f'/proc/self/fd/{fd}')).name)
        sync(fd)
    monkeypatch.setattr(core.os, 'fsync', fsync)
    monkeypatch.setattr(core.os, 'replace', lambda a, b: (done.append('rename'), replace(a, b)))
    write_json(tmp_path/'a.json', {'x': 1})
    assert done == [f'.a.json.{os.getpid()}.tmp', 'rename', tmp_path.name]


def test_a_file_system_without_fsync_of_folders(tmp_path, monkeypatch):
    sync = os.fsync
    def fsync(fd):
        if os.path.isdir(f'/proc/self/fd/{fd}'): raise OSError(errno.EINVAL, 'Invalid argument')
        sync(fd)
    monkeypatch.setattr(core.os, 'fsync', fsync)
    assert read_json(write_json(tmp_path/'a.json', [1])) == [1]


def test_remains_of_killed_processes_go(tmp_path):
    "Only those of the same file, and of processes that no longer exist."
    dead = multiprocessing.get_context('fork').Process(target=int)
    dead.start(); dead.join()
    parent, target = os.getppid(), tmp_path/'a[1].json'
    names = [f'.a[1].json.{dead.pid}.tmp', f'.a[1].json.{parent}.tmp', f'.b.json.{dead.pid}.tmp', '.a[1].json.tmp',
             '.a[1].json.' + '9' * 30 + '.tmp', f'.a1.json.{dead.pid}.tmp']
    for name in names: (tmp_path/name).write_text('half')
    write_json(target, 1)
    assert {p.name for p in tmp_path.iterdir()} == {target.name, *names[1:]}


KILLED = '''
import os, signal, sys
from rdd_nb.core import atomic_write
def write(p): p.write_text('{"half'); os.kill(os.getpid(), signal.SIGKILL)
atomic_write(sys.argv[1], write)
'''


def test_a_killed_writer(tmp_path):
    write_json(tmp_path/'a.json', 'old')
    subprocess.run([sys.executable, '-c', KILLED, tmp_path/'a.json'])
    assert read_json(tmp_path/'a.json') == 'old' and len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path/'a.json', 'new')
    assert read_json(tmp_path/'a.json') == 'new' and len(list(tmp_path.iterdir())) == 1


def test_json_of_any_depth_is_read_or_refused(tmp_path):
    path = tmp_path/'a.json'
    for text in ('[' * 10**5, '{"a": ' * 10**5, '', '\ufeff{}', 'nul', b'\xff\xfe'):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(read_json, path, 'not a JSON file')
    with pytest.raises(FileNotFoundError, match=r'\\x1b'): read_json(tmp_path/'\x1b[31m.json')


# Files that notice damage

def flips(raw, n, seed):
    "Copies with one flipped bit: at `n` random places, and in the first and last 20 bytes."
    rng = random.Random(seed)
    for at in [*range(20), *range(len(raw) - 20, len(raw)), *(rng.randrange(len(raw)) for _ in range(n))]:
        yield raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]


def cuts(raw, n, seed):
    some = random.Random(seed).sample(range(len(raw)), n)
    return [raw[:k] for k in (0, 1, 7, 8, 63, 64, 65, len(raw) - 64, len(raw) - 1, *some)] + [raw + b'0']


def example_state():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    channels_last = torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last)
    return dict(step=3, config='ab' * 8, history=[.1, .2, float('inf')], shape=(2, 3), none=None,
                stored=[torch.randn(4, 3)], network=net.state_dict(), optimizer=optimizer.state_dict(),
                rng=torch.get_rng_state(), channels=channels_last)


def test_a_state_comes_back(tmp_path):
    state = example_state()
    back = read_state(write_state(tmp_path/'new'/'state.pt', state))
    assert back.keys() == state.keys() and back['history'] == state['history'] and back['shape'] == (2, 3)
    assert back['optimizer']['param_groups'] == state['optimizer']['param_groups']
    assert torch.equal(back['optimizer']['state'][0]['exp_avg'], state['optimizer']['state'][0]['exp_avg'])
    assert torch.equal(back['network']['1.running_var'], state['network']['1.running_var'])
    assert back['channels'].stride() == state['channels'].stride()
    assert torch.load(tmp_path/'new'/'state.pt', weights_only=True)['step'] == 3      # for others a file of PyTorch
    with zipfile.ZipFile(tmp_path/'new'/'state.pt') as z: assert z.testzip() is None and len(z.comment) == 64


def test_no_damage_to_a_state_goes_unnoticed(tmp_path):
    path = write_state(tmp_path/'state.pt', example_state())
    raw = path.read_bytes()
    for content in [*flips(raw, 220, 0), *cuts(raw, 40, 1)]:
        path.write_bytes(content)
        refused(read_state, path, 'damaged or cut short')
    path.write_bytes(raw)
    assert read_state(path)['step'] == 3


class Payload:
    "Code that runs when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.filterwarnings('ignore:Detected pickle')
def test_a_state_of_others(tmp_path):
    path = tmp_path/'state.pt'
    torch.save(example_state(), path)
    refused(read_state, path)
    write_state(path, dict(a=Payload(tmp_path/'pwned')))
    refused(read_state, path)
    path.write_bytes(os.urandom(5000))
    refused(read_state, path)
    assert not (tmp_path/'pwned').exists()
    for nothing in (tmp_path/'none', tmp_path):
        with pytest.raises(FileNotFoundError, match='no such file'): read_state(nothing)


ABOUT = dict(note='ünï "digest": "0", 数', other=dict(digest='ab' * 32))


def example_tensors(path):
    tensors = dict(x=torch.randn(3, 4).t(), y=torch.arange(5), half=torch.ones(2).half())
    return write_tensors(path, tensors | dict(same=tensors['x']), ABOUT)


def test_tensors_come_back(tmp_path):
    torch.manual_seed(0)
    path = example_tensors(tmp_path/'a.safetensors')
    tensors, about = read_tensors(path)
    torch.manual_seed(0)
    assert torch.equal(tensors['x'], torch.randn(3, 4).t()) and torch.equal(tensors['same'], tensors['x'])
    assert tensors['half'].dtype == torch.half and about.pop('digest') and about == ABOUT
    raw = path.read_bytes()
    torch.manual_seed(0)
    assert example_tensors(path).read_bytes() == raw                     # the same every time


def test_no_damage_to_tensors_goes_unnoticed(tmp_path):
    "It is refused, or the file no longer claims to be checked."
    path = example_tensors(tmp_path/'a.safetensors')
    raw, unsealed = path.read_bytes(), 0
    for content in flips(raw, 300, 0):
        path.write_bytes(content)
        try: about = read_tensors(path)[1]
        except ValueError as e: assert '\n' not in str(e) and str(path) in str(e)
        else:
            unsealed += 1
            assert 'digest' not in about
    assert unsealed < 30
    for content in cuts(raw, 30, 1):
        path.write_bytes(content)
        refused(read_tensors, path)


def test_tensors_of_others_are_read_without_a_digest(tmp_path):
    save_file(dict(x=torch.ones(2)), tmp_path/'a.safetensors', dict(format='pt'))
    tensors, about = read_tensors(tmp_path/'a.safetensors')
    assert torch.equal(tensors['x'], torch.ones(2)) and about == dict(format='pt')


def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    "A header that promises 10^15 bytes, and a file with a hole that is larger than the memory."
    path = tmp_path/'a.safetensors'
    for shape in ([10**15], [2**40, 2**40], [10**30], [-1], [1.5]):
        header = json.dumps(dict(x=dict(dtype='F32', shape=shape, data_offsets=[0, 4 * 10**15]))).encode()
        path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
        with Cost() as cost: refused(read_tensors, path)
        assert cost.peak_mb < 50
    size = 2 * os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    header = json.dumps(dict(x=dict(dtype='U8', shape=[size], data_offsets=[0, size]))).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header)
    os.truncate(path, len(header) + 8 + size)
    for read in (read_tensors, read_state):
        with Cost() as cost: refused(read, path, 'more than this machine has memory')
        assert cost.peak_mb < 50
