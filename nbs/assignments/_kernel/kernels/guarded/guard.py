"""A Python kernel that can write only to its working folder, where it also keeps its temporary files.

Linux enforces it (Landlock, Linux 5.13 or newer), for compiled code, threads and child processes too. Without root it
cannot be undone. Also limited: processor time, memory and the size of a file. From Linux 6.7 on it opens no TCP
connection, from 6.12 on it signals no other process. Not limited: what it reads, UDP, the number of processes.
"""
import atexit, ctypes, os, resource, shutil, sys, tempfile

CPU = int(os.environ.get('RDD_NB_KERNEL_CPU_SECONDS', 300))
MEMORY, FILE = 6 << 30, 100 << 20               # bytes of private data, bytes of one file
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, TRUNCATE, REFER = 1 << 1, 1 << 14, 1 << 13
CHANGE = WRITE_FILE | sum(1 << bit for bit in range(4, 13))   # remove and make files, folders, links, sockets, devices


class Ruleset(ctypes.Structure):
    _fields_ = [('files', ctypes.c_uint64), ('network', ctypes.c_uint64), ('scope', ctypes.c_uint64)]


class Below(ctypes.Structure):
    _pack_ = 1
    _fields_ = [('allowed', ctypes.c_uint64), ('folder', ctypes.c_int32)]


def call(number, *args):
    "A system call of Linux; raises `OSError` where it fails."
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *args)
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def contain(folders):
    "Let this process, and all it starts, write below `folders` only."
    version = call(CREATE_RULESET, None, 0, 1)
    writes = CHANGE | (REFER if version > 1 else 0) | (TRUNCATE if version > 2 else 0)
    rules = Ruleset(writes, 2 if version > 3 else 0, 2 if version > 5 else 0)   # 2: TCP connections; signals
    ruleset = call(CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t((8, 16, 24)[(version > 3) + (version > 5)]), 0)
    for path in folders:
        allowed = writes if os.path.isdir(path) else writes & (WRITE_FILE | TRUNCATE)
        below = Below(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
        call(ADD_RULE, ruleset, 1, ctypes.byref(below), 0)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)      # no new privileges, which Landlock demands
    call(RESTRICT_SELF, ruleset, 0)


def limit():
    "Upper limits, which an ordinary user cannot raise again."
    for what, most in (resource.RLIMIT_CPU, CPU), (resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, FILE):
        resource.setrlimit(what, (most, most))


def main():
    own = tempfile.mkdtemp(prefix='.grading-', dir=os.getcwd())
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ.update(TMPDIR=own, IPYTHONDIR=own, JUPYTER_RUNTIME_DIR=own, PYTHONDONTWRITEBYTECODE='1')
    tempfile.tempdir, sys.dont_write_bytecode = own, True
    try: contain([os.getcwd(), os.devnull])
    except OSError as e:
        sys.exit(f'guard.py: this Linux cannot contain a process ({e}); grade in a container and set GUARDED = False')
    limit()
    sys.argv[0] = 'ipykernel'
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance()


if __name__ == '__main__': main()
