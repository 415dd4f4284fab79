"""The contract of every attack, and agreement with independent implementations.

One table of attacks drives one test body, on a small net trained on scikit-learn's digits. The reference
attacks (foolbox, torchattacks) run only here; those of torchattacks are skipped where it is not installed.
"""
import warnings
from functools import partial

import eagerpy
import foolbox
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

from refine_nb.base import call
from refine_nb.attacks import (NotFinite, apgd, attacking, autoattack, bi, bih, bim, cw_linf, ddn, dra, fab_t,
                               fgsm, gaussian, kl, kl_pgd, ll, margin, mim, pgd, salt_and_pepper,
                               square, vbi, zero)

EPS = .15
few = dict(step_size=.04, steps=5)

def short_autoattack(model, x, y, *, eps):
    "All four components, a few steps of each"
    # there it has nothing to say, and says so: see test_autoattack
    if eps == 0 or len(x) == 0: return x.clone()
    return autoattack(model, x, y, eps=eps, steps=4, n_queries=20, n_targets=2).x_adv

# name -> attack at its test settings, needing only (model, x, y) and perhaps eps and generator
BUDGET = {
    'fgsm': fgsm, 'bim': partial(bim, **few), 'mim': partial(mim, steps=5), 'kl_pgd': partial(kl_pgd, **few),
    'pgd': partial(pgd, **few), 'pgd_restarts': partial(pgd, restarts=2, **few),
    'pgd_early': partial(pgd, early_stop=True, **few),
    'pgd_gaussian': partial(pgd, start=gaussian, clamp_start=False, **few),
    'cw_linf': partial(cw_linf, **few), 'bi': partial(bi, **few), 'bih': partial(bih, **few),
    'vbi': partial(vbi, **few), 'll': partial(ll, **few), 'apgd': partial(apgd, steps=5),
    'apgd_dlr_t': partial(apgd, steps=5, objective='dlr_t'), 'fab_t': partial(fab_t, steps=10),
    'pgd_l2': partial(pgd, norm='l2', step_size=.3, steps=5), 'square': partial(square, n_queries=300),
    'autoattack': short_autoattack, 'dra': dra, 'dra_sum': partial(dra, norm='sum', p=1., ranked='fresh'),
}
SIZES = {'pgd_l2': 1., 'dra_sum': 8.}             # budgets in a norm that may exceed 1
FREE = {'ddn': partial(ddn, steps=20), 'salt_and_pepper': partial(salt_and_pepper, steps=60)}
ALL = {**{name: partial(a, eps=SIZES.get(name, EPS)) for name,a in BUDGET.items()}, **FREE}
RANDOM = {'kl_pgd', 'pgd', 'pgd_restarts', 'pgd_early', 'pgd_gaussian', 'pgd_l2', 'cw_linf', 'apgd',
          'apgd_dlr_t', 'salt_and_pepper'}
HARMLESS = {'vbi', 'll', 'bih'}                   # made to correct, not to break

every = pytest.mark.parametrize('name', ALL)
with_budget = pytest.mark.parametrize('name', BUDGET)


def small_net():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                         nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 10))

@pytest.fixture(scope='module')
def digits():
    d = load_digits()
    return torch.tensor(d.images[:, None]/16, dtype=torch.float32), torch.tensor(d.target)

@pytest.fixture(scope='module')
def trained(digits):
    torch.manual_seed(0)
    (x, y), model = digits, small_net()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for i in torch.randint(1200, (80, 64)):
        optimiser.zero_grad(); F.cross_entropy(model(x[i]), y[i]).backward(); optimiser.step()
    return model.eval()

@pytest.fixture
def model(trained):
    "A fresh copy in a difficult state: training but for one batch norm, one frozen weight, gradients stored"
    model = small_net(); model.load_state_dict(trained.state_dict())
    model.train(); model[4].eval(); model[0].weight.requires_grad_(False)
    for p in model.parameters(): p.grad = torch.full_like(p, 3.) if p.requires_grad else None
    return model

@pytest.fixture
def batch(digits): return digits[0][1200:1248], digits[1][1200:1248]

def correct(model, x, y): return (model(x).argmax(1)==y).float().mean().item()

def run(name, model, x, y, seed=0, **settings):
    if name in RANDOM or name in FREE: settings['generator'] = torch.Generator().manual_seed(seed)
    return ALL[name](model, x, y, **settings)


# ---- the contract ------------------------------------------------------------------------------------------

@every
def test_range_budget_and_kind(name, model, batch):
    x, y = batch
    before = x.clone()
    x_adv = run(name, model, x, y)
    assert torch.equal(x, before), 'the images given must not change'
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and x_adv.device == x.device
    assert not x_adv.requires_grad and not x_adv.is_inference() and x_adv.data_ptr() != x.data_ptr()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    change = (x_adv-x).flatten(1)
    if name == 'pgd_l2': assert change.norm(dim=1).max() <= 1+1e-6
    elif name == 'dra': assert change.abs().mean(1).max() <= EPS+1e-6  # a mean over the values of an image
    elif name == 'dra_sum': assert change.abs().sum(1).max() <= 8+1e-5 # their sum
    elif name in BUDGET: assert change.abs().max() <= EPS+1e-6

@every
def test_beats_the_identity(name, trained, batch):
    x, y = batch
    x_adv = run(name, trained, x, y)
    if name in HARMLESS: assert (x_adv-x).abs().max() > .01
    else: assert correct(trained, x_adv, y) < correct(trained, x, y)-.25

@every
def test_model_comes_back(name, model, batch):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, asks = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    run(name, model, *batch)
    assert [m.training for m in model.modules()] == modes and not model[4].training
    assert [p.requires_grad for p in model.parameters()] == asks
    for k, v in model.state_dict().items(): assert torch.equal(v, state[k]), k
    for p in model.parameters():
        assert p.grad is None or torch.equal(p.grad, torch.full_like(p, 3.)), (
            'no weight gradient may be added')

@every
def test_model_comes_back_after_an_error(name, model, batch):
    def fail(module, given, out): raise RuntimeError('half way')
    handle, modes = model[6].register_forward_hook(fail), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match='half way'): run(name, model, *batch)
    handle.remove()
    assert [m.training for m in model.modules()] == modes
    assert ([p.requires_grad for p in model.parameters()]
            == [p is not model[0].weight for p in model.parameters()])

@every
def test_evaluation_mode_is_what_is_attacked(name, model, trained, batch):
    assert_close(run(name, model, *batch), run(name, trained, *batch), atol=0, rtol=0)

@every
def test_repeatable(name, trained, batch):
    state = torch.get_rng_state()
    a, b = run(name, trained, *batch), run(name, trained, *batch)
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state), 'a generator was given, so the global one must not move'
    if name in RANDOM: assert not torch.equal(a, run(name, trained, *batch, seed=1))

@every
def test_without_generator_follows_the_global_seed(name, trained, batch):
    torch.manual_seed(5); a = ALL[name](trained, *batch)
    torch.manual_seed(5); b = ALL[name](trained, *batch)
    assert torch.equal(a, b)

@every
def test_one_image_and_none(name, trained, batch):
    x, y = batch
    assert run(name, trained, x[:1], y[:1]).shape == x[:1].shape
    assert run(name, trained, x[:0], y[:0]).shape == x[:0].shape

@every
def test_double_precision(name, trained, batch):
    model = small_net().double(); model.load_state_dict(trained.state_dict()); model.eval()
    x_adv = run(name, model, batch[0].double(), batch[1])
    assert x_adv.dtype == torch.float64 and x_adv.min() >= 0 and x_adv.max() <= 1

@every
def test_memory_layout_does_not_matter(name, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 10)).double().eval()
    x = torch.rand(16, 3, 8, 8, dtype=torch.float64); y = model(x).argmax(1)
    expected = run(name, model, x, y)
    strided = torch.rand(16, 3, 8, 16, dtype=torch.float64)[..., ::2].copy_(x)
    last = x.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert_close(run(name, model, strided, y), expected)
    got = run(name, model, last, y)
    assert_close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)

@every
def test_networks_see_channels_last(name):
    "Whatever layout the caller's images are in: convolutions are faster so"
    torch.manual_seed(0); seen = []
    class Spy(nn.Flatten):
        def forward(self, x):
            if len(x) > 1: seen.append(x.stride())
            return super().forward(x)
    model = nn.Sequential(Spy(), nn.Linear(192, 10)).eval()
    x = torch.rand(16, 3, 8, 8); run(name, model, x, model(x).argmax(1))
    assert len(seen) > 1 and {*seen[1:]} == {(192, 1, 24, 3)}

@every
def test_callers_gradient_mode_does_not_matter(name, trained, batch):
    expected = run(name, trained, *batch)
    with torch.no_grad(): assert torch.equal(run(name, trained, *batch), expected)
    with torch.inference_mode():
        inside = run(name, trained, batch[0].clone(), batch[1].clone())
    assert torch.equal(inside, expected) and not inside.is_inference(), 'images to train on'

@every
def test_no_graph_is_left(name, trained, batch):
    x = batch[0].clone().requires_grad_()
    assert not run(name, trained, x, batch[1]).requires_grad and x.grad is None

@with_budget
def test_no_budget_no_change(name, trained, batch):
    generator = dict(generator=torch.Generator().manual_seed(0)) if name in RANDOM else {}
    assert torch.equal(BUDGET[name](trained, *batch, eps=0, **generator), batch[0])

@pytest.mark.parametrize('name', ['fgsm', 'bim', 'mim', 'pgd', 'pgd_restarts', 'pgd_early',
                                  'pgd_l2', 'cw_linf', 'ddn'])
def test_targeted_goes_to_the_target(name, trained, batch):
    x, y = batch
    runner_up = trained(x).topk(2).indices[:, 1]
    assert correct(trained, run(name, trained, x, runner_up, targeted=True), runner_up) > .3

@pytest.mark.parametrize('kappa', [0., 1., 50.])
@pytest.mark.parametrize('scale', [1, 100])
def test_targeted_cw_needs_no_confidence(kappa, scale, trained, batch):
    """The target is far behind at first, by more than any kappa where logits are large.
    There the hinge must be steep"""
    x, target = batch[0], trained(batch[0]).topk(2).indices[:, 1]
    loud = Answer(lambda x: scale*trained(x))
    x_adv = cw_linf(loud, x, target, eps=EPS, step_size=.02, kappa=kappa, targeted=True,
                    generator=torch.Generator().manual_seed(0))
    assert correct(trained, x_adv, target) > .6

def test_restarts_leave_what_is_broken(trained, batch):
    "With early_stop a later start is for the images that still stand; without, for all"
    x, y = batch
    starts = []
    def start(x, *_): starts.append(len(x)); return x+(torch.rand_like(x)*2-1)*.1
    standing = lambda x_adv: (trained(x_adv).argmax(1)==y)
    torch.manual_seed(0)
    x_adv = pgd(trained, x, y, eps=.1, step_size=.03, steps=4, start=start, restarts=4, early_stop=True)
    assert (starts[0] == len(x) > starts[1] >= starts[2] >= starts[3] >= standing(x_adv).sum()
            and (x_adv-x).abs().max() <= .1+1e-6)
    starts.clear(); pgd(trained, x, y, eps=.1, step_size=.03, steps=4, start=start, restarts=2)
    assert starts == [len(x)]*2


# ---- errors at the border ----------------------------------------------------------------------------------

class Answer(nn.Module):
    "A model that answers whatever it is told"
    def __init__(self, answer): super().__init__(); self.answer = answer
    def forward(self, x): return self.answer(x)

@every
@pytest.mark.parametrize('change, says', [
    (dict(x=lambda x: x-.5), r'in \[0,1\], got -0.5'), (dict(x=lambda x: x*255), r'in \[0,1\], got 0..255'),
    (dict(x=lambda x: (x*255).byte()), 'float'), (dict(x=lambda x: x/0), 'nan|finite'),
    (dict(y=lambda y: y+3), 'got (.*)12'), (dict(y=lambda y: y-3), 'got -3'),
    (dict(y=lambda y: y.float()), 'int64'), (dict(y=lambda y: y[:-1]), r'\[B\]|int64 \[48\]'),
    (dict(model=lambda m: nn.Flatten(2)), r'logits \[48,K\], got \[48, 1, 64\]'),
    (dict(model=lambda m: Answer(lambda x: (m(x), 0))), 'got tuple'),
    (dict(model=lambda m: Answer(lambda x: m(x)*torch.nan)), 'nan or inf'),
], ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_errors_are_sentences(name, change, says, trained, batch):
    given = dict(model=trained, x=batch[0], y=batch[1])
    given.update({k: f(given[k]) for k, f in change.items()})
    with pytest.raises(ValueError, match=says): run(name, **given)

# FGSM looks at the images given, no further
@pytest.mark.parametrize('name', sorted(set(BUDGET)-HARMLESS-{'fgsm'}))
def test_nan_half_way_does_not_count_as_broken(name, trained, batch):
    "Finite on the images given, nan wherever a pixel has left them"
    x, y = batch
    seen = x.flatten(1)
    def fragile(v):
        known = (torch.cdist(v.detach().flatten(1), seen) < 1e-3).any(1)
        return trained(v)*torch.where(known, 1., torch.nan)[:, None]
    with pytest.raises(NotFinite, match='nan or inf'): run(name, Answer(fragile), x[y != 0], y[y != 0])

@with_budget
@pytest.mark.parametrize('eps', [-.1, 8, float('nan'), float('inf'), '8/255', [.1], True])
def test_bad_budgets(name, eps, trained, batch):
    if name in SIZES and eps == 8: return          # an L2 budget or a sum may exceed 1
    with pytest.raises(ValueError, match='write 8/255, not 8'): BUDGET[name](trained, *batch, eps=eps)

@pytest.mark.parametrize('attack', [bim, pgd, mim, kl_pgd, cw_linf, apgd, fab_t, bi, bih, vbi, ll,
                                    ddn, salt_and_pepper, dra])
def test_bad_steps(attack, trained, batch):
    with pytest.raises(ValueError, match='steps wants a whole number >= 1, got 0'):
        attack(trained, *batch, steps=0)

@pytest.mark.parametrize('attack', [bim, pgd, mim, kl_pgd, cw_linf, bi, bih, vbi, ll])
def test_bad_step_size(attack, trained, batch):
    for bad in (0, -1/255, float('nan'), float('inf'), '1/255', True):
        with pytest.raises(ValueError, match='step_size wants a finite number > 0'):
            attack(trained, *batch, step_size=bad)

@pytest.mark.parametrize('name', sorted(set(ALL)-{'salt_and_pepper', 'square'}))
def test_a_model_without_gradient_is_named(name, trained, batch):
    model = Answer(lambda x: trained(x).detach())
    with pytest.raises(ValueError, match='do not depend on the images'): run(name, model, *batch)


# ---- agreement ---------------------------------------------------------------------------------------------

def lend(model): return foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')

def test_fgsm_is_foolbox(trained, batch):
    x, y = batch
    theirs = foolbox.attacks.LinfFastGradientAttack().run(lend(trained), x,
                                                          foolbox.criteria.Misclassification(y), epsilon=.1)
    assert_close(fgsm(trained, x, y, eps=.1), theirs, atol=1e-6, rtol=0)

def test_pgd_is_foolbox_from_the_same_start(trained, batch):
    x, y = batch
    noise = (torch.rand_like(x)*2-1)*.1
    attack = foolbox.attacks.LinfPGD(abs_stepsize=.02, steps=10)
    attack.get_random_start = lambda x0, epsilon: x0+eagerpy.astensor(noise)
    theirs = attack.run(lend(trained), x, foolbox.criteria.Misclassification(y), epsilon=.1)
    ours = pgd(trained, x, y, eps=.1, step_size=.02, steps=10, start=lambda x, *_: x+noise)
    assert_close(ours, theirs, atol=1e-6, rtol=0)

@pytest.mark.parametrize('attack', [vbi, partial(bim, targeted=True)])
def test_targeted_bim_is_foolbox(attack, trained, batch):
    x, y = batch
    target = (y+1)%10
    theirs = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=1/255, steps=10).run(
        lend(trained), x, foolbox.criteria.TargetedMisclassification(target), epsilon=8/255)
    assert_close(attack(trained, x, target, eps=8/255), theirs, atol=1e-6, rtol=0)

def test_l2_pgd_is_foolbox(trained, batch):
    x, y = batch
    theirs = foolbox.attacks.L2PGD(abs_stepsize=.2, steps=10, random_start=False).run(
        lend(trained), x, foolbox.criteria.Misclassification(y), epsilon=1.)
    assert_close(pgd(trained, x, y, norm='l2', eps=1., step_size=.2, steps=10, start=zero),
                 theirs, atol=1e-5, rtol=0)

def test_pgd_by_hand_in_double_precision():
    """An affine model with two classes, without autograd:
    the gradient of its cross-entropy is (1-p_y)(w_other-w_y)"""
    torch.manual_seed(0)
    w, b = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    x, y = torch.rand(20, 1, 3, 4, dtype=torch.float64), torch.randint(2, (20,))
    affine = nn.Linear(12, 2).double(); affine.weight.data, affine.bias.data = w, b
    model = nn.Sequential(nn.Flatten(), affine)
    flat, low, high = x.flatten(1), (x.flatten(1)-.1).clamp_min(0), (x.flatten(1)+.1).clamp_max(1)
    at = by_l2 = flat
    for _ in range(7):
        slope = w[1-y]-w[y]
        at = (at+.03*slope.sign()).clamp(low, high)
        step = by_l2+.2*slope/slope.pow(2).sum(1, keepdim=True).sqrt()
        change = step-flat; length = change.pow(2).sum(1, keepdim=True).sqrt()
        by_l2 = (flat+change*(.5/length).clamp(max=1)).clamp(0, 1)
    assert_close(bim(model, x, y, eps=.1, step_size=.03, steps=7), at.view_as(x), atol=1e-12, rtol=0)
    assert_close(pgd(model, x, y, norm='l2', eps=.5, step_size=.2, steps=7, start=zero),
                 by_l2.view_as(x), atol=1e-12, rtol=0)

def test_momentum_by_hand_in_double_precision(trained, batch):
    "MIM written out again with `backward`, example by example"
    model = small_net().double(); model.load_state_dict(trained.state_dict()); model.eval()
    x, y = batch[0].double(), batch[1]
    at, g = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        at = at.detach().requires_grad_(); F.cross_entropy(model(at), y, reduction='sum').backward()
        norms = torch.stack([v.abs().sum() for v in at.grad])
        g = .9*g + torch.stack([v/n if n>0 else v for v, n in zip(at.grad, norms)])
        at = torch.max(torch.min(at.detach()+.1/6*g.sign(), x+.1), x-.1).clamp(0, 1)
    assert_close(mim(model, x, y, eps=.1, steps=6, decay=.9), at, atol=1e-12, rtol=0)

def reference(name):
    ta = pytest.importorskip('torchattacks',
                             reason='torchattacks is optional: pip install --no-deps torchattacks')
    return getattr(ta, name)

def test_bim_is_torchattacks(trained, batch):
    ours = bim(trained, *batch, eps=.1, step_size=.02, steps=8)
    assert_close(ours, reference('PGD')(trained, eps=.1, alpha=.02, steps=8, random_start=False)(*batch),
                 atol=1e-6, rtol=0)

def test_fgsm_is_torchattacks(trained, batch):
    assert_close(fgsm(trained, *batch, eps=.1), reference('FGSM')(trained, eps=.1)(*batch), atol=1e-6, rtol=0)

def test_targeted_bim_is_torchattacks(trained, batch):
    x, y = batch
    theirs = reference('PGD')(trained, eps=.1, alpha=.02, steps=8, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    target = (y+1)%10
    assert_close(bim(trained, x, target, eps=.1, step_size=.02, steps=8, targeted=True),
                 theirs(x, target), atol=1e-6, rtol=0)

def test_pgd_is_torchattacks_from_the_same_start(trained, batch):
    torch.manual_seed(3); theirs = reference('PGD')(trained, eps=.1, alpha=.02, steps=8)(*batch)
    torch.manual_seed(3); ours = pgd(trained, *batch, eps=.1, step_size=.02, steps=8)
    assert_close(ours, theirs, atol=1e-6, rtol=0)

def test_mim_is_torchattacks(trained, batch):
    assert_close(mim(trained, *batch, eps=.1, step_size=.02, steps=8),
                 reference('MIFGSM')(trained, eps=.1, alpha=.02, steps=8)(*batch), atol=1e-6, rtol=0)

def test_kl_pgd_is_torchattacks_but_for_the_clamped_start(trained, batch):
    x, y = batch
    torch.manual_seed(3); theirs = reference('TPGD')(trained, eps=.1, alpha=.02, steps=8)(x, y)
    torch.manual_seed(3)
    settings = dict(eps=.1, step_size=.02, steps=8, objective=kl, start=gaussian)
    clamped = pgd(trained, x, y, **settings)
    assert_close(clamped, theirs, atol=1e-6, rtol=0)
    torch.manual_seed(3); free = pgd(trained, x, y, clamp_start=False, **settings)
    assert (free-clamped).abs().max() > .01, 'digits are full of zeros: the two families differ'

@pytest.mark.parametrize('targeted', [True, False])
@pytest.mark.parametrize('across_channels', [True, False])
def test_salt_and_pepper_is_foolbox(targeted, across_channels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 4)).eval()
    x = torch.rand(40, 3, 8, 8); y = torch.randint(4, (40,))
    goal = (foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification)(y)
    torch.manual_seed(7)
    theirs, _, won = foolbox.attacks.SaltAndPepperNoiseAttack(steps=150, across_channels=across_channels)(
        lend(model), x, goal, epsilons=None)
    ours = salt_and_pepper(model, x, y, steps=150, across_channels=across_channels, targeted=targeted,
                           generator=torch.Generator().manual_seed(7))
    assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal((model(ours).argmax(1)==y)==targeted, won) and won.any()
    torch.manual_seed(7)
    assert torch.equal(salt_and_pepper(model, x, y, steps=150, across_channels=across_channels,
                                       targeted=targeted), ours)

@pytest.mark.parametrize('targeted', [True, False])
def test_ddn_is_foolbox(targeted, trained, digits):
    x, y = digits[0][1200:], digits[1][1200:]
    x, y = x[::5], y[::5]
    if targeted: y = trained(x).topk(2).indices[:, 1]
    goal = (foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification)(y)
    theirs, _, won = foolbox.attacks.DDNAttack(steps=60)(lend(trained), x, goal, epsilons=None)
    ours = ddn(trained, x, y, steps=60, targeted=targeted)
    assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal((trained(ours).argmax(1)==y)==targeted, won) and won.float().mean() > .9


# ---- what each attack is for -------------------------------------------------------------------------------

def test_untargeted_leaves_a_misclassified_image(trained, digits):
    wrong = trained(digits[0]).argmax(1) != digits[1]
    x, y = digits[0][wrong], digits[1][wrong]
    assert len(x) > 20
    for attack in (ddn, partial(salt_and_pepper, steps=20)):
        assert torch.equal(attack(trained, x, y), x)
    assert correct(trained, ddn(trained, x, y, targeted=True), y) == 1
    assert (correct(trained, vbi(trained, x, y, eps=16/255), y)
            > correct(trained, bih(trained, x, y, eps=16/255), y) > 0)
    assert correct(trained, bi(trained, x, y, eps=16/255), y) == 0

def test_early_stop_runs_fewer_examples_and_never_breaks_fewer(trained, batch):
    looked = []
    hook = trained.register_forward_hook(lambda m, i, o: looked.append(len(o)))
    settings = dict(eps=.2, step_size=.02, steps=20, start=zero)
    stopped = pgd(trained, *batch, early_stop=True, **settings); seen = sum(looked); looked.clear()
    full = pgd(trained, *batch, **settings); hook.remove()
    assert seen < .8*sum(looked)
    assert correct(trained, stopped, batch[1]) <= correct(trained, full, batch[1])

def test_kl_computes_the_clean_logits_once(trained, batch):
    looked = []
    hook = trained.register_forward_hook(lambda m, i, o: looked.append(len(o)))
    kl_pgd(trained, *batch, steps=10); hook.remove()
    assert len(looked) == 11

def test_zero_gradient_stands_still_without_nan():
    class Step(nn.Module):                        # the second example's logits ignore it
        def forward(self, x):
            s = (x*torch.tensor([1., 0.]).view(2, 1, 1, 1)).flatten(1).sum(1)
            return torch.stack([s, -s], 1)
    x, y = torch.full((2, 1, 2, 2), .5), torch.zeros(2, dtype=torch.int64)
    for attack in (mim, partial(pgd, norm='l2', start=zero)):
        x_adv = attack(Step(), x, y, eps=.1)
        assert torch.equal(x_adv[1], x[1]) and (x_adv[0]-x[0]).abs().max() > .01

def test_batch_does_not_matter(trained, batch):
    x, y = batch
    for attack in (mim, partial(pgd, norm='l2', eps=1., start=zero), bih, partial(ddn, steps=20)):
        alone = torch.cat([attack(trained, x[i:i+1], y[i:i+1]) for i in range(8)])
        assert_close(alone, attack(trained, x[:8], y[:8]), atol=1e-5, rtol=0)

def test_a_recipe_can_hold_an_attack(trained, batch):
    seeded = lambda: torch.Generator().manual_seed(2)
    held = call(pgd, objective=call(margin, kappa=5.), start=gaussian, steps=3)
    expected = pgd(trained, *batch, objective=lambda z_adv, y: margin(z_adv, y, 5.), start=gaussian,
                   steps=3, generator=seeded())
    assert_close(held(trained, *batch, generator=seeded()), expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match='use start=gaussian'):
        call(pgd, objective=kl, start=zero)(trained, *batch)
    with pytest.raises(ValueError, match='epsilon'): call(pgd, epsilon=.1)

def test_attacking_nests(model):
    modes = [m.training for m in model.modules()]
    with attacking(model):
        with attacking(model): pass
        assert (not any(m.training for m in model.modules())
                and not any(p.requires_grad for p in model.parameters()))
    assert [m.training for m in model.modules()] == modes

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', sorted(ALL))
def test_gpu_agrees(name, trained, batch):
    model = small_net().double(); model.load_state_dict(trained.state_dict()); model.eval()
    x, y = batch[0].double(), batch[1]
    expected = run(name, model, x, y)
    model.cuda()
    got = run(name, model, x.cuda(), y.cuda())
    assert got.is_cuda and next(model.parameters()).is_cuda
    assert_close(got.cpu(), expected, atol=1e-6, rtol=0)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_loop_waits_a_fixed_number_of_times(trained, batch):
    model = small_net(); model.load_state_dict(trained.state_dict()); model.cuda().eval()
    x, y = batch[0].cuda(), batch[1].cuda()
    def waits(steps):
        torch.cuda.set_sync_debug_mode('warn')
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always'); pgd(model, x, y, steps=steps, start=zero)
        finally: torch.cuda.set_sync_debug_mode('default')
        return len([w for w in caught if 'synchroniz' in str(w.message)])
    assert waits(3) == waits(12) <= 3
