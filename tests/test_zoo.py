"""Networks as people write them, shown to every attack and to everything else that asks a network something.

A matrix, attack x network, holds the contract of attacks with a verdict for each cell: 'ok', or the sentence
with which the pair is refused. Two kinds of network are shown to more: one that flattens with `view` can't
take channels-last images, one that normalises in place changes what it is given. Both must answer as their
well-behaved twins do, and nothing they do may reach anybody.
"""
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from refine_nb.base import call
from refine_nb.vision import Data, Split, fold_if_same
from refine_nb.attacks import (apgd, autoattack, bih, bim, ce, cw_linf, ddn, fab_t, fgsm, kl_pgd, l2, linf,
                               ll, mim, pgd, salt_and_pepper, square, uniform, vbi)
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
    for a, b in zip(methods(engine.place(net)), methods(engine.place(twin))):
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


# ---- the matrix --------------------------------------------------------------------------------------------

def stack(*layers, C=3, H=8, W=8):
    "A convolution, what is to be tried, and the layers that make logits of it"
    return nn.Sequential(nn.Conv2d(C, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(4*H*W, K))

class Tied(nn.Module):
    "One convolution twice, and one weight under two names"
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, K)
        self.again = nn.Conv2d(4, 4, 3, padding=1); self.again.weight = self.conv.weight
    def forward(self, x):
        x = self.first(4*x-2)
        for f in (self.conv, self.again, self.conv): x = 3*f(x).tanh()
        return self.out(x.flatten(1))

class TinyViT(nn.Module):
    "Patches of 4 pixels, one block of attention"
    def __init__(self):
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 4, 8)*.1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=.1, batch_first=True)
        self.out = nn.Linear(8, K)
    def forward(self, x):
        return self.out(self.block(self.patch(x).flatten(2).transpose(1, 2)+self.place).mean(1))

class Answers(Small):
    "Logits as one thing among others, as segmentation and auxiliary heads give them"
    def __init__(self, wrap): super().__init__(); self.wrap = wrap
    def forward(self, x): return self.wrap([super().forward(x), x])

ZOO = { # name -> (network, shape of an image, kind of its numbers)
    'flattens by view': (Flattens, (3,8,8)), 'in place': (InPlace, (3,8,8)), 'both': (Both, (3,8,8)),
    'tied': (Tied, (3,8,8)), 'no batch norm': (lambda: stack(nn.ReLU()), (3,8,8)),
    'weight norm': (lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(),
                                          weight_norm(nn.Linear(144, K))), (3,8,8)),
    'PReLU': (lambda: stack(nn.BatchNorm2d(4), nn.PReLU(4)), (3,8,8)),
    'GroupNorm': (lambda: stack(nn.GroupNorm(2, 4), nn.ReLU()), (3,8,8)), 'ViT': (TinyViT, (3,8,8)),
    'one channel': (lambda: Small(1), (1,8,8)), 'one channel by view': (lambda: Flattens(1), (1,8,8)),
    'rectangular': (lambda: Small(3, 6, 10), (3,6,10)), 'float64': (Small, (3,8,8), torch.float64),
    'bfloat16': (Small, (3,8,8), torch.bfloat16), 'bfloat16 in place': (InPlace, (3,8,8), torch.bfloat16),
    'a tuple': (lambda: Answers(tuple), (3,8,8)),
    'a dict': (lambda: Answers(lambda zs: {'z': zs[0]}), (3,8,8)),
}

def whole(model, x, y, *, eps):
    return autoattack(model, x, y, eps=eps, steps=2, n_queries=5, n_targets=1).x_adv

few = dict(steps=3, step_size=.03)
ATTACKS = { # name -> (attack, budget or None); the rest is what it needs to be quick
    'fgsm': (fgsm, .1), 'bim': (partial(bim, **few), .1),
    'bim_uniform': (partial(bim, start=uniform, **few), .1),
    'pgd': (partial(pgd, **few), .1), 'pgd_restarts': (partial(pgd, restarts=2, early_stop=True, **few), .1),
    'pgd_l2': (partial(pgd, norm='l2', steps=3), .5), 'mim': (partial(mim, steps=3), .1),
    'kl_pgd': (partial(kl_pgd, **few), .1), 'cw_linf': (partial(cw_linf, **few), .1),
    'vbi': (partial(vbi, **few), .1), 'bih': (partial(bih, **few), .1), 'll': (partial(ll, **few), .1),
    'ddn': (partial(ddn, steps=5), None), 'salt_and_pepper': (partial(salt_and_pepper, steps=10), None),
    'apgd': (partial(apgd, steps=3), .1), 'apgd_dlr': (partial(apgd, steps=3, objective='dlr'), .1),
    'fab_t': (partial(fab_t, steps=3, n_targets=2), .1), 'square': (partial(square, n_queries=10), .1),
    'autoattack': (whole, .1),
}
THEIR_OWN = {'apgd', 'apgd_dlr', 'fab_t', 'square', 'autoattack'} # loops, starts and projections of their own

def lived_in(build, dtype):
    "Statistics that have seen something; one module frozen, one weight without gradient"
    torch.manual_seed(4); net = build()
    with torch.no_grad():
        for b in net.buffers():
            if b.is_floating_point(): b.add_(.1*torch.rand_like(b))
    net = net.to(dtype).train(); list(net.modules())[1].eval(); next(net.parameters()).requires_grad_(False)
    return net

def broken_promises(net, attack, eps, x, y):
    "What of the contract does not hold, one after the other"
    before, state = x.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    modes, asks = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    x_adv = attack(net, x, y, **({} if eps is None else {'eps': eps}))
    if not torch.equal(x, before): yield 'the images given have changed'
    if (x_adv.shape, x_adv.dtype) != (x.shape, x.dtype): yield 'another shape or kind'
    if x_adv.requires_grad or x_adv.is_inference() or x_adv.data_ptr() == x.data_ptr(): yield 'not its own'
    if not (x_adv >= 0).all() or not (x_adv <= 1).all(): yield 'outside [0,1]'
    change = (x_adv.double()-x.double()).flatten(1)
    if eps and change.norm(dim=1, p=2 if eps == .5 else torch.inf).max() > eps+1e-6: yield 'beyond the budget'
    if not change.any(): yield 'nothing has changed'
    if modes != [m.training for m in net.modules()]: yield 'modes have changed'
    if asks != [p.requires_grad for p in net.parameters()]: yield 'gradient flags have changed'
    if hooks != [len(m._forward_pre_hooks) for m in net.modules()]: yield 'hooks stay'
    if any(p.grad is not None for p in net.parameters()): yield 'gradients stay'
    if any(not torch.equal(v, state[k]) for k, v in net.state_dict().items()): yield 'weights have changed'

def verdict(attack, network):
    build, shape, *kind = ZOO[network]; dtype = kind[0] if kind else torch.float32
    net = lived_in(build, dtype); x = images(8, *shape)[0].to(dtype)
    z = net.eval()(x.clone()); y = z.argmax(1) if isinstance(z, torch.Tensor) else torch.zeros(8).long()
    (f, eps), lived = ATTACKS[attack], lived_in(build, dtype)
    if attack == 'vbi': y = (y+1)%K # what it goes towards
    torch.manual_seed(0)
    try: return '; '.join(broken_promises(lived, f, eps, x, y)) or 'ok'
    except ValueError as e: return f'refused: {e}'

REFUSED = {'a tuple': 'refused: the model must return logits [8,K], got tuple',
           'a dict': 'refused: the model must return logits [8,K], got dict'}

@pytest.mark.parametrize('network', ZOO)
@pytest.mark.parametrize('attack', ATTACKS)
def test_matrix(attack, network):
    found, expected = verdict(attack, network), REFUSED.get(network, 'ok')
    if attack in THEIR_OWN and network.startswith('bfloat16') and found == 'beyond the budget':
        pytest.xfail('rounds outward: it has a projection of its own')
    assert found == expected


# ---- 16 bits -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_projection_never_leaves_budget_or_range(norm, kind):
    "Looked at in float64; what is allowed beyond the budget is the rounding of float32 itself"
    draw = torch.Generator().manual_seed(5)
    for eps in (0., 1e-4, 1/255, .03, 8/255, .1, .5, 1.):
        x = torch.rand(64, 50, generator=draw).mul(1.2).sub(.1).clamp(0, 1).to(kind) # some at 0 and 1
        x_adv = (x.double()+torch.randn(64, 50, generator=draw).double()*eps).to(kind)
        out = (linf if norm == 'linf' else l2)(x_adv, x, eps)
        far = (out.double()-x.double()).norm(dim=1, p=torch.inf if norm == 'linf' else 2)
        assert out.dtype == kind and (out >= 0).all() and (out <= 1).all()
        assert far.max() <= eps+1e-6, (eps, far.max())
        if eps >= .03: assert far.max() > .8*eps # and it uses what it has
