"""Our AutoAttack against the authors' code, verdict by verdict.

Three nets: a plain one; a loud one, whose cross-entropy has no gradient, so that of the APGDs only the
targeted one breaks it; a rounded one without any gradient, which only Square breaks. Both sides see the same
random numbers, and must then agree on each image and each component. With draws of their own they may differ
at the border, as the authors' code differs from itself under another seed.
"""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import refine_nb.attacks.ensemble as module
from refine_nb.attacks import STANDARD, OtherRun, apgd, autoattack, boundary_start, fab_t, pgd
from refine_nb.attacks.protocol import _Protocol
from refine_nb.attacks.queue import _hash, _names

N, QUICK = 16, dict(steps=15, n_queries=150)      # images; the standard at a size that a test can afford


class Loud(nn.Module):
    "The same decisions, but cross-entropy rounds to zero"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return 3000*self.net(x)

class Rounded(Loud):
    "Five grey levels: no gradient anywhere"
    def forward(self, x): return self.net((x*5).round()/5)

@pytest.fixture(scope='module')
def digits():
    d = load_digits()
    return torch.tensor(d.images[:, None]/16, dtype=torch.float32), torch.tensor(d.target)

def trained(digits, eps):
    torch.manual_seed(0)
    (x, y), net = digits, nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                                        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for i in torch.randint(1200, (100, 64)):
        x_adv = pgd(net, x[i], y[i], eps=eps, step_size=.1, steps=3) if eps else x[i]; net.train()
        optimiser.zero_grad(); F.cross_entropy(net(x_adv), y[i]).backward(); optimiser.step()
    return net.eval()

@pytest.fixture(scope='module')
def nets(digits):
    net = trained(digits, .15)
    return {'plain': net, 'loud': Loud(net), 'rounded': Rounded(net)}

@pytest.fixture(scope='module')
def batch(digits): return digits[0][1200:1200+N], digits[1][1200:1200+N]

@pytest.fixture
def same_draws(monkeypatch, squares_as_theirs):
    """The authors' APGDs begin where ours do; our Square takes the numbers that theirs draws.
    How each goes on is its own"""
    def made(model, p, device, n_targets, make=module._authors_attack):
        a = make(model, p, device, n_targets)
        def run(x, y, x_init=None, *, run, name, attack):
            aim = attack.y_target if name == 'apgd-t' else None
            with torch.no_grad(): order = model(x).argsort(1)
            job = 0 if aim is None else order.shape[1]-2-(order == aim[:, None]).int().argmax(1)
            return run(x, y,
                       x_init=boundary_start(x, p.eps, _hash(_names(x), p.seed, STANDARD.index(name), job)))
        for name, attack in (('apgd-ce', a.apgd), ('apgd-t', a.apgd_targeted)):
            attack.attack_single_run = partial(run, run=attack.attack_single_run, name=name, attack=attack)
        return a
    def as_theirs(model, x, y, *, seed, square=module.square, **settings):
        with torch.random.fork_rng():
            torch.manual_seed(seed); return square(model, x, y, seed=seed, **settings)
    monkeypatch.setattr(module, '_authors_attack', made)
    squares_as_theirs(1); monkeypatch.setattr(module, 'square', as_theirs)


# ---- verdict by verdict ------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('eps', [.14, .22])
@pytest.mark.parametrize('name', ['plain', 'loud', 'rounded'])
def test_same_draws_same_breakers(name, eps, seed, nets, batch, same_draws):
    """Who is broken, and by which component, image by image, of all four.
    Ours runs on the folded model and in batches of another size"""
    given = dict(eps=eps, seed=seed, **QUICK)
    ours, theirs = (autoattack(nets[name], *batch, batch_size=50, **given),
                    autoattack(nets[name], *batch, reference=True, **given))
    differ = {i: (int(a), int(b)) for i, (a, b) in enumerate(zip(ours.breaker, theirs.breaker)) if a != b}
    assert not differ, f'image: (our breaker, theirs) is {differ}'
    assert ours.survivors == theirs.survivors
    broken = {c: ours.survivors[a]-ours.survivors[c] for a, c in zip(['clean', *STANDARD], STANDARD)}
    if name == 'plain': assert broken['apgd-ce'] > 0
    if name == 'loud': assert broken['apgd-ce'] == 0 < broken['apgd-t']
    # a random start may do it
    if name == 'rounded': assert broken['apgd-ce'] <= 1 and broken['apgd-t'] <= 1 and broken['fab-t'] == 0
    if name == 'rounded' and eps == .22: assert broken['square'] > 0

@pytest.mark.parametrize('name, eps', [('plain', .14), ('loud', .14), ('rounded', .22)])
def test_own_draws_same_verdicts_but_at_the_border(name, eps, nets, batch):
    "No image on which our seeds agree, theirs agree, and we differ; the others are listed, and few"
    run = lambda **k: torch.stack([autoattack(nets[name], *batch, eps=eps, seed=s, steps=10, n_queries=500,
                                              **k).breaker < 0 for s in range(3)])
    ours, theirs = run(), run(reference=True)
    sure = (ours == ours[0]).all(0) & (theirs == theirs[0]).all(0)
    against = (sure & (ours[0] != theirs[0])).nonzero()[:, 0].tolist()
    border = {i: (ours[:, i].int().tolist(), theirs[:, i].int().tolist())
              for i in (~sure).nonzero()[:, 0].tolist()}
    print(f'{name}: survived under seeds 0, 1, 2, by image: (ours, theirs) is {border}')
    assert not against, (f'images {against}: every seed of ours says one thing, '
                         f'every seed of theirs the other; border: {border}')
    assert len(border) <= N//4, border

@pytest.mark.parametrize('component', ['apgd-t', 'fab-t'])
@pytest.mark.parametrize('name, eps', [('plain', .14), ('loud', .14), ('rounded', .22)])
def test_targets_side_by_side_are_one_after_the_other(component, name, eps, nets, batch):
    """Rows of several targets share a batch, and leave as soon as one of their image breaks it.
    The verdicts are those of a target after the other"""
    net, (x, y) = nets[name], batch; given = dict(eps=eps, components=(component,), folded=False, **QUICK)
    with torch.no_grad(): z = net(x)
    broken, p = z.argmax(1) != y, _Protocol(norm='linf', reference=False, seed=0, n_targets=9, **{
        k: v for k, v in given.items() if k != 'folded'})
    attack, rows = module._ours(p, component, net, net, z.argsort(1), _names(x)), []
    with module.attacking(net):
        for job in range(9):
            e = (~broken).nonzero()[:, 0]; rows.append(len(e))
            if len(e): broken[e[attack(x[e], y[e], e, torch.full_like(e, job))[1]]] = True
    for size in (7, 9*N):
        together = autoattack(net, x, y, batch_size=size, **given)
        assert torch.equal(together.breaker != -1, broken), f'batches of {size}'
    assert min(rows) > 0 and (name == 'rounded' or rows[0] > rows[-1])

def test_the_full_standard(nets, batch, same_draws):
    "Nothing made smaller: 100 steps, 9 targets, 5000 queries"
    x, y = (t[:4] for t in batch)
    ours, theirs = (autoattack(nets['plain'], x, y, eps=.18),
                    autoattack(nets['plain'], x, y, eps=.18, reference=True))
    assert (ours.label, theirs.label) == ('AutoAttack (standard)', "AutoAttack (authors' code)")
    assert torch.equal(ours.breaker, theirs.breaker) and {*ours.breaker.tolist()} >= {-1, 1}
    moved = (ours.x_adv-x).abs().amax((1, 2, 3))
    assert moved.max() <= .18+1e-6 and torch.equal(moved > 0, ours.breaker > 0)

def test_only_square_breaks_what_has_no_gradient(nets, batch):
    for reference in (False, True):
        r = autoattack(nets['rounded'], *batch, eps=.3, reference=reference, **QUICK)
        assert r.survivors['square'] < r.survivors['fab-t']
        assert any('may be masked' in f for f in r.flags) and any('have no gradient' in f for f in r.flags)


# ---- what it costs, and what it leaves ---------------------------------------------------------------------

def rows_seen(net, *args, **kwargs):
    "How many images the model looks at"
    seen = []
    handle = net[-1].register_forward_hook(lambda m, i, o: seen.append(len(o)))
    try: autoattack(net, *args, folded=False, **kwargs)
    finally: handle.remove()
    return sum(seen)

def test_broken_images_leave_at_once(nets, batch):
    "Where everything breaks, our cost is a small part of theirs: they run each component to its end"
    given = dict(eps=.6, components=('apgd-ce',))
    assert autoattack(nets['plain'], *batch, **given).robust == 0
    assert (rows_seen(nets['plain'], *batch, **given)
            < .2*rows_seen(nets['plain'], *batch, reference=True, **given))

@pytest.mark.parametrize('reference', [False, True])
def test_the_model_and_the_draws_of_others_are_as_before(reference, nets, batch):
    net = nets['plain']; net.zero_grad(); net.train(); net[1].eval(); net[0].weight.requires_grad_(False)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    try:
        r = autoattack(net, *batch, eps=.1, reference=reference, steps=2, n_queries=3)
        assert (net.training and not net[1].training and not net[0].weight.requires_grad
                and all(p.requires_grad for p in net[5].parameters()))
        assert (all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
                and all(p.grad is None for p in net.parameters()))
        assert torch.equal(torch.get_rng_state(), state) and any('training mode' in f for f in r.flags)
    finally: net.eval().requires_grad_(True)

def test_a_cut_run_of_the_authors_code_goes_on(nets, batch):
    given, kept = dict(eps=.18, reference=True, batch_size=10, steps=5, n_queries=20), []
    whole = autoattack(nets['plain'], *batch, save=kept.append, **given)
    for state in kept[1::3]:
        rest = autoattack(nets['plain'], *batch, state=state, **given)
        assert (torch.equal(rest.breaker, whole.breaker) and torch.equal(rest.x_adv, whole.x_adv)
                and rest.survivors == whole.survivors)
    with pytest.raises(ValueError, match='of another run'):
        autoattack(nets['plain'], *batch, state=kept[0], **{**given, 'batch_size': 9})

def test_a_state_of_other_weights_is_refused(nets, batch, digits):
    """The other net gives the same answers on the clean images, but was not trained to withstand attacks.
    From this net's state it would inherit verdicts that are not its own"""
    net, weak, kept, given = nets['plain'], trained(digits, 0), [], dict(eps=.14, **QUICK)
    same = weak(batch[0]).argmax(1) == net(batch[0]).argmax(1)
    batch = tuple(t[same] for t in batch); assert len(batch[1]) >= .75*N
    whole = autoattack(net, *batch, save=kept.append, **given)
    assert autoattack(weak, *batch, **given).robust <= whole.robust/2
    for state in (kept[0], kept[-1]):
        with pytest.raises(OtherRun, match='not of the model given'):
            autoattack(weak, *batch, state=state, **given)
        with pytest.raises(OtherRun, match='not of the labels given'):
            autoattack(net, batch[0], (batch[1]+1)%10, state=state, **given)
    assert torch.equal(autoattack(net, *batch, state=kept[0], **given).breaker, whole.breaker)

def test_a_state_of_another_function_is_refused(nets, batch):
    "The same weights under a function that no fingerprint of weights sees"
    class Kept(nn.Module):
        def __init__(self, f): super().__init__(); self.f = f
        def forward(self, x): return self.f(x)
    net, kept, given = nets['plain'], [], dict(eps=.1, components=('apgd-ce',), steps=2)
    autoattack(Kept(lambda x: net(x)), *batch, save=kept.append, **given)
    with pytest.raises(OtherRun, match='other logits'):
        autoattack(Kept(lambda x: net(x)*1.1), *batch, state=kept[0], **given)

def test_alone_each_attack_says_what_it_says_inside(nets, batch):
    x, y = batch
    inside = autoattack(nets['plain'], x, y, eps=.18, components=('fab-t',), folded=False, **QUICK)
    changed = lambda x_adv: (x_adv != x).flatten(1).any(1)
    assert torch.equal(changed(fab_t(nets['plain'], x, y, eps=.18, steps=QUICK['steps'])),
                       changed(inside.x_adv)) and changed(inside.x_adv).any()
    both = [changed(apgd(nets['plain'], x, y, eps=.18, steps=QUICK['steps'], objective=o,
                         generator=torch.Generator().manual_seed(0))) for o in ('ce', 'dlr_t')]
    inside = autoattack(nets['plain'], x, y, eps=.18, components=('apgd-ce', 'apgd-t'), folded=False, **QUICK)
    assert (changed(inside.x_adv) != (both[0]|both[1])).sum() <= 2   # other draws
