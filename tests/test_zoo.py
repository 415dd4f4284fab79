"""Networks as people write them, shown to everything that asks a network something.

One that flattens with `view` can't take channels-last images, one that normalises in place changes what it
is given. Both must answer as their well-behaved twins do, and nothing they do may reach anybody.
"""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refine_nb.base import call
from refine_nb.vision import Data, Split, fold_if_same
from refine_nb.attacks import autoattack, ce, pgd, square, vbi
from refine_nb.evaluation import (adversarial_images, evidence, predict, single_step, stochastic_outputs,
                                  training_mode, vanishing_gradient, verdicts)
from refine_nb.training import Engine, adversarial_training, fine_tune, fit
from refine_nb.refinement import adapt, correct

K = 5


class Small(nn.Module):
    "A convolution, a batch norm and a layer: the twin of those below"
    def __init__(self, C=3, H=8, W=8):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), nn.Linear(4*(H-2)*(W-2), K)
    def forward(self, x): return self.out(self.norm(self.conv((x-.5)/.25)).relu().flatten(1))

class Flattens(Small):
    def forward(self, x): return self.out(self.norm(self.conv((x-.5)/.25)).relu().view(len(x), -1))

class InPlace(Small):
    def forward(self, x): return super().forward(x.sub_(.5).div_(.25).mul_(.25).add_(.5))

class InPlaceUnseen(Small):
    "Past the version counter, too"
    def forward(self, x): x.data.mul_(2).sub_(1); return super().forward(x*.5+.5)

class Both(Small):
    def forward(self, x): return Flattens.forward(self, x.sub_(.5).add_(.5))

DIFFICULT = {f.__name__: f for f in (Flattens, InPlace, InPlaceUnseen, Both)}
difficult = pytest.mark.parametrize('kind', DIFFICULT)

def twins(kind):
    torch.manual_seed(1)
    twin = Small(); net = DIFFICULT[kind](); net.load_state_dict(twin.state_dict())
    return net, twin

def images(n=60, C=3, H=8, W=8): # float images lie where a data set keeps them
    x = torch.rand(n, C, H, W, generator=torch.Generator().manual_seed(2))
    return x, torch.randint(K, (n,), generator=torch.Generator().manual_seed(3))

close = dict(atol=1e-5, rtol=1e-4)


# ---- what is asked of a network ----------------------------------------------------------------------------

@difficult
def test_evaluation(kind):
    (net, twin), (x, y) = twins(kind), images(); before, split = x.clone(), Split(x, y)
    for channels_last in (False, True):
        if channels_last: net, _ = (m.to(memory_format=torch.channels_last) for m in (net, twin))
        assert torch.equal(predict(net, x), predict(twin, x))
        attack = call(pgd, eps=.1, steps=3)
        assert torch.equal(verdicts(net, split, attack=attack), verdicts(twin, split, attack=attack))
        assert_close(adversarial_images(net, split, attack), adversarial_images(twin, split, attack), **close)
        assert torch.equal(x, before)

@difficult
def test_autoattack_and_its_folded_copy(kind):
    (net, twin), (x, y) = twins(kind), images(24); y = predict(twin, x)
    before = x.clone(); short = dict(eps=.03, steps=4, n_queries=40, n_targets=2)
    ours, theirs = (autoattack(m, x, y, **short) for m in (net, twin))
    assert torch.equal(ours.breaker, theirs.breaker) and (ours.breaker > 0).any()
    assert (ours.x_adv-x).abs().max() <= .03+1e-6 and torch.equal(x, before)
    assert_close(square(net, x, y, eps=.1, n_queries=40), square(twin, x, y, eps=.1, n_queries=40), **close)
    fold_if_same(net.eval(), x)
    assert torch.equal(x, before)

@difficult
@pytest.mark.parametrize('engine', [Engine(), Engine(precision='bfloat16')], ids=lambda e: e.precision)
def test_training_and_correction(kind, engine):
    (net, twin), (x, y) = twins(kind), images()
    before, part = x.clone(), Split(x, y)
    data = Data('own', tuple('abcde'), part, part, part, '0')
    def trained(m, method, epochs=2):
        return fit(m, method, torch.optim.SGD(m.parameters(), .1), epochs=epochs, seed=0, select='last',
                   validate=lambda m: verdicts(m, part).float().mean().item(), engine=engine, quiet=True)
    def methods(m):
        yield fine_tune(data, batch_size=20, seed=0)
        yield adversarial_training(data, batch_size=20, seed=0, attack=call(pgd, eps=.05, steps=2),
                                   objective=ce_adv)
        corrected = correct(m, data, call(vbi, eps=.2, step_size=.1), seed=0)
        if engine.precision == 'float32': yield adapt(data, source=corrected, batch_size=20, seed=0)
    tolerance = dict(atol=1e-4, rtol=1e-3) if engine.precision == 'float32' else dict(atol=.02, rtol=.02)
    for a, b in zip(methods(engine.place(net, training=True)), methods(engine.place(twin, training=True))):
        ours, theirs = trained(net, a), trained(twin, b)
        assert ours['history'][-1]['loss'] == pytest.approx(theirs['history'][-1]['loss'], rel=.02)
        for p, q in zip(net.parameters(), twin.parameters()): assert_close(p, q, **tolerance)
    assert torch.equal(x, before)

def ce_adv(z_adv, y): return ce(z_adv, y)

@difficult
def test_an_audit(kind):
    (net, twin), (x, y) = twins(kind), images(4); y = predict(twin, x); before = x.clone()
    checks = (stochastic_outputs, training_mode, single_step, vanishing_gradient)
    looked = [evidence(m, x, y, eps=.02, generator=torch.Generator().manual_seed(0)) for m in (net, twin)]
    for check in checks:
        ours, theirs = map(check, looked)
        assert ours.raised == theirs.raised, ours
    assert torch.equal(x, before)

@difficult
def test_placed_for_evaluation(kind):
    "The engine puts weights channels-last: that alone breaks a network that flattens with `view`"
    (net, twin), (x, y) = twins(kind), images(10)
    assert torch.equal(predict(Engine().place(net), x), predict(Engine().place(twin), x))

def test_a_well_behaved_network_is_given_no_copy():
    net, (x, y) = Small().to(memory_format=torch.channels_last), images(10)
    x, seen = x.to(memory_format=torch.channels_last), []
    net.forward = lambda x: (seen.append(x), type(net).forward(net, x))[1]
    predict(net, x)
    assert seen[-1] is not seen[0] and seen[-1].data_ptr() == x.data_ptr() and len(seen) == 2 # trial, answer
    predict(net, x); assert len(seen) == 3
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
