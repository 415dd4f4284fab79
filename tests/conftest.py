"Every test runs in a fresh cache folder, without a network, from one seed."
import socket

import pytest
import torch


@pytest.fixture(autouse=True)
def refine_home(tmp_path, monkeypatch):
    """REFINE_HOME is an empty folder: no test sees the user's checkpoints, none leaves one behind.
    Reports are those of the checkout: a test that writes some names a folder of its own"""
    home = tmp_path/'refine_home'
    monkeypatch.setenv('REFINE_HOME', str(home))
    for name in ('REFINE_PRESET', 'REFINE_PRECISION', 'REFINE_LAYOUT', 'REFINE_REPORTS', 'REFINE_WORKERS',
                 'REFINE_ON', 'REFINE_BUDGET', 'SLURM_JOB_END_TIME'):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Connections beyond this machine fail at once, and say so (house rule 8)"
    def guard(real):
        def connect(self, address):
            far = (self.family in (socket.AF_INET, socket.AF_INET6)
                   and address[0] not in ('127.0.0.1', '::1', 'localhost'))
            if far:
                raise AssertionError(f'a default test must not use the network, '
                                     f'but connects to {address[0]}: embed the data or mark the test slow')
            return real(self, address)
        return connect
    for name in ('connect', 'connect_ex'):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """Sums are added in the same order in this process and those it starts, on every machine.
    Besides, nets this small only lose by sharing their work"""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    "Draws that a test does not seed itself are the same in every run"
    torch.manual_seed(0)

@pytest.fixture
def squares_as_theirs(monkeypatch):
    """Call it with C: our Square draws from torch's global generator what the authors' code draws.
    In its order, too: stripes of each image, then a square for all"""
    def use(C):
        def uniform(names, queries, lanes):
            if torch.equal(queries, torch.zeros(1, dtype=torch.int64)):
                return torch.rand(len(names), C, 1, lanes//C).reshape(-1, 1, lanes)
            u = torch.stack([torch.cat([torch.rand(1), torch.rand(1), torch.rand(C, 1, 1).flatten()])
                             for _ in queries])
            return u.expand(len(names), *u.shape)
        monkeypatch.setattr('refine_nb.attacks.squares._uniform', uniform)
    return use
