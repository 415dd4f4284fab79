"Runs that take a blink, importable by name in any process, and processes that die where a test wants it."
import contextlib, io, multiprocessing, os, resource, signal, subprocess, sys, time, warnings
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from torch import nn

from refine_nb.base import Recipe, call
from refine_nb.vision import Split, load_data
from refine_nb.training import Engine, fine_tune, sgd
from refine_nb.runs import Store, timeless
from refine_nb.runs.processes import serve

# What a toy run does beside its work is told by the environment, so that its key is that of a quiet run:
# TOY_LOG=<file>     a line 'pid epoch' is added where an epoch starts
# TOY_GATE=<e>:<file> epoch e waits until the file is there
# TOY_DO=<what>:<e>:<s> at step s of epoch e:
# 'kill' dies by SIGKILL, 'stop' is Ctrl-C, 'nan' spoils the loss, 'burst' the gradient alone
# TOY_INK=<n>        n is added to each training image


def images(*, n_train=128, split_seed=1): # -> Data
    "The first digits, with a touch of TOY_INK"
    data, ink = load_data('digits', n_train=n_train, split_seed=split_seed), int(os.environ.get('TOY_INK', 0))
    return replace(data, train=Split(data.train.x+ink, data.train.y), fingerprint=data.fingerprint+'+'*ink)


def quiet(root, every=0.): return Store(root, Engine(), quiet=True, every=every)

def same(root, other, spec):
    "Whether two stores hold the same bits and, but for times, the same numbers"
    a, b = (quiet(r).get(spec, make=False) for r in (root, other))
    assert a is not None and b is not None, 'an entry is not there'
    assert timeless(a.result) == timeless(b.result)
    x, y = a.tensors(), b.tensors()
    assert x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)
    return True

def heeds_ctrl_c(): # for a new process: a shell lets what it runs in the background ignore it
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def net(*, num_classes, width=8): # -> module
    "All that must survive a snapshot: weights, running statistics, dropout's draws"
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(.2),
                         nn.Flatten(), nn.Linear(64*width, num_classes))


def tied_net(*, num_classes): # -> module
    "One layer that stands in two places"
    layer = nn.Linear(16, 16)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Identity(), layer, nn.ReLU(), layer,
                         nn.Linear(16, num_classes))

_built = []
def growing_net(*, num_classes): # -> module
    "Another network each time it is built"
    _built.append(0); grown = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    grown.add_module(f'grown{len(_built)}', nn.Linear(num_classes, num_classes))
    return grown


def teach(data, *, batch_size, seed, device='cpu', augment='flip'): # -> Method
    "`fine_tune` that looks at the environment"
    plain = fine_tune(data, batch_size=batch_size, seed=seed, device=device, augment=augment)
    what, at, *step = (os.environ.get('TOY_DO') or ':-1:-1').split(':')
    gate, _, file = os.environ.get('TOY_GATE', '-1').partition(':')
    now = {}
    def batches(epoch):
        now.update(epoch=epoch, step=-1)
        if log := os.environ.get('TOY_LOG'):
            with open(log, 'a') as f: f.write(f'{os.getpid()} {epoch}\n')
        for _ in range(6000): # a minute, should the test that opens the gate be gone
            if epoch != int(gate) or Path(file).exists(): break
            time.sleep(.01)
        return plain.batches(epoch)
    def one(model, batch, progress):
        now['step'] += 1
        loss, logs = plain.step(model, batch, progress)
        if (now['epoch'], now['step']) != (int(at), int(step[0])): return loss, logs
        if what == 'kill': os.kill(os.getpid(), signal.SIGKILL)
        if what == 'stop': raise KeyboardInterrupt
        if what == 'nan': return loss*torch.nan, logs
        loss.register_hook(lambda g: g*torch.inf)
        return loss, logs
    return replace(plain, batches=batches, step=one)


def recipe(**changes): # -> Recipe
    "Three epochs of four steps"
    return Recipe(**{'data': call(images), 'model': call(net), 'method': call(teach),
                     'optimiser': call(sgd, lr=.1), 'epochs': 3, 'batch_size': 32, 'seed': 1, **changes})


# ---- processes ---------------------------------------------------------------------------------------------

def dies_at(n, folder):
    "SIGKILL just before the n-th time that something below `folder` is written, renamed or removed"
    left = [n]
    def hook(event, args):
        if (event not in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'shutil.rmtree')
            or not str(args[0]).startswith(str(folder))):
            return
        if event == 'open' and not args[2] & (os.O_WRONLY|os.O_RDWR): return
        left[0] -= 1
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def work(root, spec, every=0., kill=None, limit=None, nobody=False):
    "Make `spec` in the store `root`, in a process that may die, find the disk full, or may not write"
    if kill: dies_at(*kill)
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if nobody and os.geteuid() == 0: os.setuid(65534)
    Store(root, Engine(), quiet=False, every=every).get(spec)

def read(root, spec):
    "Read `spec` in a store, in a process without rights to files of others"
    if os.geteuid() == 0: os.setuid(65534)
    Store(root, Engine(), quiet=True).tensors(spec)

class _File(io.TextIOBase): # at once, so that what was said before a kill is read
    def __init__(self, path): self.file = open(path, 'ab', buffering=0)
    def write(self, s): self.file.write(s.encode()); return len(s)

def _body(said, env, f, args, kwargs):
    os.environ.update(env); torch.set_num_threads(1); out = _File(said)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter('always')
        try: f(*args, **kwargs)
        except SystemExit: raise
        except BaseException as e:
            print(f'{type(e).__name__}: {e}'); raise SystemExit(1) from None

class Worker:
    "A process that runs `f`; `said` is the file of its output, `exitcode` its end (-9 after SIGKILL)"
    def __init__(self, said, f, *args, env={}, **kwargs):
        self.said = Path(said)
        self.process = _processes().Process(target=_body, args=(str(said), env, f, args, kwargs), daemon=True)
        self.process.start()
    def end(self, seconds=120):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f'the process did not end in {seconds} s, it said: {self.text}')
        return self.process.exitcode
    @property
    def text(self): return self.said.read_text() if self.said.exists() else ''

def _serve(conn, env):
    os.environ.update(env); os.setsid()
    fd = os.dup(conn.fileno()); conn.close()
    serve(fd)

class Forked:
    "In place of the `Popen` of one of `workers`: the same, but for its command line and its imports"
    def __init__(self, command, *, env, pass_fds, **how):
        with connection.Connection(os.dup(*pass_fds)) as conn:
            self.process = _processes().Process(target=_serve, args=(conn, env), daemon=True)
            self.process.start()
        self.kill, self.terminate = self.process.kill, self.process.terminate
    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired('serve', timeout)
        return self.process.exitcode

def _processes():
    """Forked from one that has imported what a run imports: a start takes a tenth of a second, not ten.
    It has one thread: a fork has none of its parent's others, and one that counts on them waits for ever.
    What the test that needs it first tells its own toys to do, toys of later tests do not"""
    made = multiprocessing.get_context('forkserver')
    made.set_forkserver_preload(['toys', 'pytest', 'sklearn.datasets', 'torch._dynamo'])
    here, old = str(Path(__file__).parent), os.environ.get('PYTHONPATH')
    with pytest.MonkeyPatch.context() as its:
        its.setenv('PYTHONPATH', here + (os.pathsep+old if old else ''))
        its.setenv('OMP_NUM_THREADS', '1')
        for name in [n for n in os.environ if n.startswith('TOY_')]: its.delenv(name)
        multiprocessing.forkserver.ensure_running()
    return made
