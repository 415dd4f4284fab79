"Each broken net or attack raises exactly its findings; sound ones raise none."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refine_nb.base import call, seeded
from refine_nb.vision import load_data, to_input
from refine_nb.attacks import fgsm, mim, pgd, vbi
from refine_nb.evaluation import CHECKS, audit

EPS = .1
NAMES = {c.__name__ for c in CHECKS}
MASKED = {'random_noise', 'transferred', 'square_search'} # what sees through a hidden gradient


class Do(nn.Module):
    "A function as a layer"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def stairs(x):
    "Flat but for short ramps at the levels that clean digits have"
    d = x*16-(x*16).round()
    return ((x*16).round()+d.clamp(-.04, .04))/16

@pytest.fixture(scope='module')
def digits():
    d = load_data('digits')
    return to_input(d.train.x), d.train.y, to_input(d.test.x[:100]), d.test.y[:100]

@pytest.fixture(scope='module')
def nets(digits):
    "plain, another plain one, one trained on PGD, one with batch norm"
    X, Y, *_ = digits
    torch.manual_seed(0)
    def trained(attack=None, width=16, norm=False):
        net = nn.Sequential(nn.Conv2d(1, width, 3, padding=1),
                            nn.BatchNorm2d(width) if norm else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Flatten(), nn.Linear(16*width, 10))
        optimiser = torch.optim.Adam(net.parameters(), 5e-3)
        for i in torch.randint(len(Y), (200, 64)):
            images = attack(net, X[i], Y[i]) if attack else X[i]
            optimiser.zero_grad(); F.cross_entropy(net(images), Y[i]).backward(); optimiser.step()
        return net.eval()
    return {'plain': trained(), 'other': trained(width=12),
            'sturdy': trained(partial(pgd, eps=EPS, step_size=.04, steps=5)), 'norm': trained(norm=True)}

def run(net, digits, nets, *, eps=EPS, seed=0, **settings):
    return audit(net, *digits[2:], eps=eps, surrogate=nets['other'],
                 generator=torch.Generator().manual_seed(seed), **settings)

# ten steps are too few for the net with batch norm, and the audit says so
@pytest.mark.parametrize('name, steps', [('plain', 10), ('sturdy', 10), ('norm', 100)])
def test_a_sound_net_raises_nothing(name, steps, digits, nets):
    result = run(nets[name], digits, nets,
                 attack=call(pgd, eps=EPS, step_size=max(EPS/10, 2.5*EPS/steps), steps=steps))
    assert result.raised == () and {f.check for f in result.findings} == NAMES
    assert all(f.raised is False and f.meaning and f.numbers for f in result.findings)

BROKEN = { # name -> net of plain, budget, findings
    'rounded input':  (lambda net: nn.Sequential(Do(lambda x: (x*8).round()/8), net).eval(), .2,
                       MASKED | {'vanishing_gradient', 'unbounded'}),
    'large logits':   (lambda net: nn.Sequential(net, Do(lambda z: z*1000)).eval(), .2,
                       MASKED | {'saturated_logits', 'unbounded'}),
    'stairs':         (lambda net: nn.Sequential(Do(stairs), net).eval(), .2, MASKED | {'single_step'}),
    'random logits':  (lambda net: nn.Sequential(net, Do(lambda z: z+.01*torch.randn_like(z))).eval(), EPS,
                       {'stochastic_outputs'}),
    'dropping':       (lambda net: nn.Sequential(net, nn.Dropout(.3)).train(), EPS, {'training_mode'}),
    'probabilities':  (lambda net: nn.Sequential(net, nn.Softmax(1)).eval(), EPS, {'probability_outputs'}),
    'log-softmax, which is sound': (lambda net: nn.Sequential(net, nn.LogSoftmax(1)).eval(), EPS, set()),
    'a training flag that changes nothing': (lambda net: nn.Sequential(net, Do(lambda z: z)).train(), EPS,
                                             set()),
}

@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_net_raises_its_findings(name, digits, nets):
    make, eps, expected = BROKEN[name]
    assert set(run(make(nets['plain']), digits, nets, eps=eps).raised) == expected
    nets['plain'].eval()

ATTACKS = { # name -> attack on the sturdy net, findings
    'too few steps':    (call(pgd, eps=EPS, step_size=EPS/20, steps=2), {'stronger_attack'}),
    'nothing at all':   (lambda model, x, y: x, {'stronger_attack'}),
    'the wrong way':    (call(vbi, eps=EPS), {'stronger_attack'}),
    'a small budget':   (call(pgd, eps=EPS/4, step_size=EPS/16), {'budget_scale', 'stronger_attack'}),
    'divided by 255':   (call(pgd, eps=EPS/255, step_size=EPS/255/4), {'budget_scale', 'stronger_attack'}),
    'a double budget':  (call(pgd, eps=2*EPS, step_size=EPS/2), {'budget_scale'}),
    'below black':      (lambda model, x, y: x-EPS, {'budget_scale', 'stronger_attack'}),
    'MIM':              (call(mim, eps=EPS), set()),
    'a partial':        (partial(pgd, eps=EPS, step_size=EPS/4, steps=20), set()),
}

@pytest.mark.parametrize('name', ATTACKS)
def test_a_broken_attack_raises_its_findings(name, digits, nets):
    attack, expected = ATTACKS[name]
    assert set(run(nets['sturdy'], digits, nets, attack=attack).raised) == expected

def test_every_check_is_raised_somewhere():
    assert set().union(*(e for *_, e in BROKEN.values()), *(e for _, e in ATTACKS.values())) == NAMES

def test_an_eps_divided_twice(digits, nets):
    assert 'budget_scale' in run(nets['plain'], digits, nets, eps=8/255/255).raised

def test_without_a_surrogate_its_check_is_marked(digits, nets):
    result = audit(nets['plain'], *digits[2:], eps=EPS, n=20)
    assert result['transferred'].raised is None and result.n == 20
    table = result.table()
    assert len(table) == 12 and list(table.columns) == ['check', 'raised', 'numbers', 'meaning']
    assert table.set_index('check').raised['transferred'] == 'not run'

def test_effort_and_tolerance_count(digits, nets):
    seen = []
    hook = nets['plain'].register_forward_hook(lambda m, i, o: seen.append(len(o)))
    run(nets['plain'], digits, nets, n=10); small = sum(seen); seen.clear()
    run(nets['plain'], digits, nets, n=10, effort=2); large = sum(seen); hook.remove()
    assert 1.7*small < large
    noise = run(nets['sturdy'], digits, nets, attack=lambda model, x, y: x, tolerance=0.).raised
    assert ('random_noise' in noise
            and 'random_noise' not in run(nets['sturdy'], digits, nets, attack=lambda model, x, y: x).raised)

def test_the_model_comes_back_and_draws_are_given(digits, nets):
    net = nn.Sequential(nets['norm'], nn.Dropout(.3)).train()
    nets['norm'][1].eval(); net[0][0].weight.requires_grad_(False)
    modes, asks, state = ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
                          {k: v.clone() for k, v in net.state_dict().items()})
    x, before = digits[2], torch.get_rng_state()
    a, b = run(net, digits, nets, n=30), run(net, digits, nets, n=30)
    assert torch.equal(torch.get_rng_state(), before) and repr(a) == repr(b) and a.findings == b.findings
    assert ([m.training for m in net.modules()] == modes
            and [p.requires_grad for p in net.parameters()] == asks)
    for k, v in net.state_dict().items(): assert torch.equal(v, state[k]), k
    assert (all(p.grad is None or not p.grad.isnan().any() for p in net.parameters())
            and torch.equal(x, digits[2]))
    net[0][0].weight.requires_grad_(True); nets['norm'].eval()

def test_inside_inference_mode(digits, nets):
    with torch.inference_mode():
        result = audit(nets['plain'], digits[2][:20].clone(), digits[3][:20].clone(), eps=EPS)
    assert result.raised == ()

@pytest.mark.parametrize('settings, says', [
    (dict(n=0), 'n wants a whole number'), (dict(effort=.5), 'effort wants a whole number'),
    (dict(tolerance=5), 'tolerance wants a finite number'), (dict(eps=8), 'write 8/255, not 8'),
    (dict(eps=0.), 'no attack to audit'), (dict(attack=lambda model, x, y: x[:3]), 'must return images'),
    (dict(attack=lambda model, x, y: x*torch.nan), 'nan or inf')])
def test_bad_input_is_said(settings, says, digits, nets):
    with pytest.raises(ValueError, match=says): run(nets['plain'], digits, nets, **settings)

def test_bad_images_are_said(digits, nets):
    x, y = digits[2:]
    for a, b, says in ((x*255, y, 'lie in'), (x, y+10, 'below the 10 classes'), (x[:0], y[:0], 'no images'),
                       (x, y.float(), 'int64')):
        with pytest.raises(ValueError, match=says): audit(nets['plain'], a, b, eps=EPS)
    with pytest.raises(ValueError, match='none of the 100 images right'):
        audit(nets['plain'], x, (nets['plain'](x).argmax(1)+1)%10, eps=EPS)

def test_one_step_as_the_reported_attack(digits, nets):
    "FGSM is a weak attack, not a sign of masking"
    assert set(run(nets['sturdy'], digits, nets, attack=call(fgsm, eps=EPS)).raised) <= {'stronger_attack'}


def test_the_price_of_an_audit_is_of_the_passes_it_makes():
    "Each image that goes forward, and each whose gradient comes back, on a network that counts both"
    from refine_nb.runs.prices import _AUDITED
    seen = {'forward': 0, 'attack': 0}
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.view_as(x)
        @staticmethod
        def backward(ctx, g): seen['attack'] += len(g); return g
    class Net(nn.Sequential):
        def forward(self, x): seen['forward'] += len(x); return super().forward(Counted.apply(x))
    torch.manual_seed(0); net, other = (Net(nn.Flatten(), nn.Linear(64, 10)).eval() for _ in range(2))
    x = torch.rand(20, 1, 8, 8)
    audit(net, x, net(x).argmax(1), eps=.02, n=20, surrogate=other,
          attack=call(pgd, eps=.02, step_size=.005, steps=20), generator=seeded(0, 'price'))
    back = seen['attack']/20-20                             # without the reported attack's own
    assert abs(back/_AUDITED['attack']-1) < .1 and .5 < (seen['forward']/20-back-20)/_AUDITED['forward'] < 2
