"The published loops of tools/bench_loops.py do what our training steps do, and what they waste is there."
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refine_nb.base import call
from refine_nb.vision import cosine_head
from refine_nb.attacks import ce, dra, gaussian, pgd
from refine_nb.training import adversarial, mart, regulated, spat, spat_pgd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tools'))
from bench_loops import EPS, STEP, STEPS, dra_step, mair_step, mart_step, spat_step

BUDGET = dict(eps=EPS, step_size=STEP, steps=STEPS)
NEAR = dict(start=gaussian, clamp_start=False)
LOOPS = { # the loop, our step, forwards of the loop and of ours once its copy is made
    'spat': (spat_step, adversarial(call(spat_pgd, **BUDGET), call(spat), folded=True), 22, 13),
    'mart': (mart_step, adversarial(call(pgd, **NEAR, **BUDGET), call(mart), folded=True), 12, 12),
    'dra': (dra_step, regulated(call(dra, eps=2/255), folded=True), 7, 7),
    'mair': (mair_step, adversarial(call(pgd, **BUDGET), ce, folded=True), 11, 11)}
absent = pytest.mark.skipif(find_spec('mair') is None, reason='MAIR is optional: no package index has it')
each = pytest.mark.parametrize('name', [pytest.param(n, marks=[absent]*(n == 'mair')) for n in LOOPS])

@pytest.fixture
def task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2),
                        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.8, 1.2)
    return net, torch.rand(8, 3, 8, 8, dtype=torch.double), torch.randint(5, (8,))

def teaching(step, net, times=2):
    "Losses and the network after steps of SGD, each from the same draws"
    net = deepcopy(net); optimiser = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    def once(x, y):
        torch.manual_seed(2)
        return step(net, x, y, optimiser)
    return net, lambda x, y: [once(x, y) for _ in range(times)]

def as_loop(step):
    def made(net, x, y, optimiser):
        loss,_ = step(net.train(), (x, y, torch.Generator().manual_seed(2)), 0.)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        return loss.detach()
    return made

@each
def test_a_loop_is_our_step(name, task):
    net, x, y = task
    if name=='spat': net = cosine_head(net)
    loop, ours, *_ = LOOPS[name]
    (a, teach_a), (b, teach_b) = teaching(loop, net), teaching(as_loop(ours), net)
    theirs, mine = teach_a(x, y), teach_b(x, y)
    assert_close(torch.stack(mine), torch.stack(theirs), atol=0, rtol=1e-9)
    assert theirs[0] != theirs[1], 'the second step is from another network'
    for k,t in b.state_dict().items(): assert_close(t, a.state_dict()[k], atol=1e-8, rtol=0, msg=k)

@each
def test_what_a_loop_computes(name, task):
    net, x, y = task
    if name=='spat': net = cosine_head(net)
    loop, ours, theirs_many, ours_many = LOOPS[name]
    def forwards(step, times):
        seen, (_, teach) = [], teaching(step, net, times)
        def look(m, given): # the first convolution, in the network and in a folded copy of it
            if isinstance(m, nn.Conv2d) and m.in_channels == 3: seen.append(m)
        hook = nn.modules.module.register_module_forward_pre_hook(look)
        try: teach(x, y)
        finally: hook.remove()
        return len(seen)
    assert forwards(loop, 2)-forwards(loop, 1) == theirs_many
    assert forwards(as_loop(ours), 2)-forwards(as_loop(ours), 1) == ours_many
