"What people hand to AutoAttack and its components, each alone: 16 bits, features, few classes, odd settings."
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from refine_nb.attacks import apgd, apgd_best, autoattack, boundary_start, fab_t, pgd, square, zero
from refine_nb.attacks.queue import _names
from refine_nb.base import call, key

few = dict(steps=8)
def ensemble(model, x, y, **settings):
    return autoattack(model, x, y, **{'steps': 4, 'n_queries': 20, **settings}).x_adv

ATTACKS = {'apgd': partial(apgd, **few), 'apgd_dlr_t': partial(apgd, objective='dlr_t', **few),
           'apgd_start': partial(apgd, start=lambda x, *_: x+1, **few),
           'apgd_best': lambda *a, **k: apgd_best(*a, **few, **k)[0], 'fab_t': partial(fab_t, **few),
           'square': partial(square, n_queries=60), 'square_best': partial(square, n_queries=60, best=True),
           'autoattack': ensemble, 'autoattack_best': partial(ensemble, best=True)}
every = pytest.mark.parametrize('name', ATTACKS)


def small_net(K=10, C=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(C, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                         nn.Linear(8*16, K)).eval()

@pytest.fixture
def task():
    net, x = small_net(), torch.rand(24, 3, 8, 8)
    x[:6] = x[:6].round()                          # at the ends of the range
    return net, x, net(x).argmax(1)


# ---- 16 bits -----------------------------------------------------------------------------------------------

@every
@pytest.mark.parametrize('eps', [1/255, 8/255, .1])
@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_16_bits_stay_within_the_budget(name, kind, eps, task):
    "Measured in double precision, where a distance is not rounded"
    net, x, y = task
    net, x = net.to(kind), x.to(kind)
    y = net(x).argmax(1)
    x_adv = ATTACKS[name](net, x, y, eps=eps)
    assert x_adv.dtype == kind and x_adv.shape == x.shape
    assert (x_adv.double()-x.double()).abs().max() <= eps*(1+1e-6)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if eps == .1: assert (net(x_adv).argmax(1) != y).float().mean() > .3

def test_16_bits_find_what_32_find(task):
    "The same net and images, the precision of a pixel apart: verdicts differ on few images"
    net, x, y = task
    wide, narrow = net.bfloat16().float(), small_net().bfloat16()
    x = x.bfloat16()
    for name in ('apgd', 'fab_t', 'square'):
        held = [m(ATTACKS[name](m, t, y, eps=.03)).argmax(1) == y
                for m, t in ((wide, x.float()), (narrow, x))]
        assert 0 < held[0].sum() < len(x) and (held[0] != held[1]).sum() <= 4, name


# ---- what is attacked --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['apgd', 'apgd_dlr_t', 'apgd_start', 'apgd_best', 'fab_t'])
def test_features_are_attacked_as_images_are(name):
    "[B,d] is what [B,d,1,1] is"
    torch.manual_seed(0); x = torch.rand(32, 12)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)); y = net(x).argmax(1)
    flat, tall = (ATTACKS[name](net, t, y, eps=.1, **({} if name == 'fab_t' else dict(
        generator=torch.Generator().manual_seed(0)))) for t in (x, x[:, :, None, None]))
    torch.testing.assert_close(flat, tall.flatten(1), atol=1e-6, rtol=0)
    assert (net(flat).argmax(1) != y).any() and (flat-x).abs().max() <= .1+1e-6
    r = autoattack(net, x, y, eps=.1, steps=4, components=('apgd-ce', 'apgd-t', 'fab-t'))
    assert 0 < (r.breaker > 0).sum() and r.x_adv.shape == x.shape

@pytest.mark.parametrize('name', ['square', 'autoattack'])
def test_square_wants_images(name):
    net, x = nn.Linear(12, 5), torch.rand(8, 12)
    with pytest.raises(ValueError, match=r'images must be \[B,C,H,W\], got \[8, 12\]'):
        ATTACKS[name](net, x, net(x).argmax(1), eps=.1)

class Answer(nn.Module):
    def __init__(self, answer): super().__init__(); self.answer = answer
    def forward(self, x): return self.answer(x)

@every
def test_a_model_is_a_module_that_gives_logits(name, task):
    net, x, y = task
    for model, says in ((lambda x: net(x), 'must be an nn.Module, got function'), (net.forward, 'nn.Module'),
                        (Answer(lambda x: (net(x), 0)), 'got tuple'),
                        (Answer(lambda x: {'z': net(x)}), 'got dict')):
        with pytest.raises(ValueError, match=says): ATTACKS[name](model, x, y, eps=.1)

@pytest.mark.parametrize('name', ['apgd', 'apgd_best', 'fab_t', 'autoattack'])
def test_a_gradient_of_nan_is_no_verdict(name, task):
    "Logits are finite everywhere, the gradient is not: sqrt at zero"
    net, x, y = task
    model = Answer(lambda t: net(t)+(t.flatten(1)*0).pow(2).sum(1, keepdim=True).sqrt())
    with pytest.raises(ValueError, match='nan or inf'): ATTACKS[name](model, x, y, eps=.1)


# ---- few classes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('K', [4, 6, 9])
def test_fewer_than_ten_classes_have_fewer_targets(K, task):
    "The same rule alone and inside: all classes but the true one"
    net, x = small_net(K), task[1]; y = net(x).argmax(1)
    given = dict(eps=.03, **few)
    for attack in (partial(apgd, objective='dlr_t', start=zero, **given), partial(fab_t, **given)):
        assert torch.equal(attack(net, x, y), attack(net, x, y, n_targets=K-1))
        assert (attack(net, x, y) != x).any()
    r = autoattack(net, x, y, eps=.03, steps=4, n_queries=20)
    assert any(f'{K} classes leave {K-1} targets' in f for f in r.flags)

@pytest.mark.parametrize('K', [2, 3])
def test_two_and_three_classes(K, task):
    "Cross-entropy, FAB and Square do; the targeted DLR says what does"
    net, x = small_net(K), task[1]; y = net(x).argmax(1)
    for name in ('apgd', 'apgd_best', 'fab_t', 'square'):
        assert (net(ATTACKS[name](net, x, y, eps=.2)).argmax(1) != y).any()
    with pytest.raises(ValueError, match="needs at least 4 classes.*use objective='ce'"):
        apgd(net, x, y, objective='dlr_t')
    with pytest.raises(ValueError, match='apgd-t needs at least 4 classes.*leave it out'):
        ensemble(net, x, y, eps=.1)
    left = ('apgd-ce', 'fab-t', 'square')
    assert (ensemble(net, x, y, eps=.2, components=left) != x).any()


# ---- models that no copy can be made of --------------------------------------------------------------------

class Locked(nn.Module):
    def __init__(self, net): super().__init__(); self.net, self.lock = net, threading.Lock()
    def forward(self, x): return self.net(x)

def weight_normed(net):                            # its weight is a result, which nothing can be folded into
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); nn.utils.weight_norm(net[0])
    return net

@pytest.mark.parametrize('of', [Locked, weight_normed])
def test_a_model_without_copies_is_attacked_as_it_is(of, task):
    net, x, y = task
    net = nn.Sequential(net[0], nn.BatchNorm2d(8), *net[1:]).eval(); y = net(x).argmax(1)
    plain = autoattack(net, x, y, eps=.02, steps=4, n_queries=20)
    r = autoattack(of(net), x, y, eps=.02, steps=4, n_queries=20)
    assert torch.equal(r.breaker, plain.breaker) and 0 < r.robust < 1
    # where nothing could be folded, such as a weight-normed layer, nothing is said
    assert sum('takes longer' in f for f in r.flags) == (of is Locked), r.flags


# ---- settings ----------------------------------------------------------------------------------------------

BAD = dict(eps=['8/255', True, [8/255], None, float('nan'), 8, -.1], steps=['9', True, 2.5, None, 0],
           n_targets=[0, 2.5, True, '9'], restarts=[0, True, 1.5], rho=[float('nan'), -1, 2, '1', True],
           objective=['hinge', None, 3], generator=[3, 'x'], start=['zero', 0], best=['yes', 2],
           early_stop=['no', None], alpha_max=[float('nan'), 2], eta=[0, float('inf')], beta=[-1, True],
           n_queries=[0, 2.5, True, '9'], p_init=[0, 2, float('nan'), True], seed=[-1, .5, True, None],
           components=[(), ('pgd',), None, 3, ('square', 'square')], norm=['l3', None, 2],
           reference=['no', 2], batch_size=[0, 2.5, True], folded=['no', 3], save=['x', 3], quiet=['no'],
           state=['x', {}], ahead=[0, 2.5, True, '9'])
APGD = {'eps', 'steps', 'objective', 'n_targets', 'restarts', 'rho', 'generator', 'start'}
HAS = {apgd: APGD | {'early_stop', 'best'}, apgd_best: APGD,
       fab_t: {'eps', 'steps', 'n_targets', 'alpha_max', 'eta', 'beta', 'early_stop', 'best'},
       square: {'eps', 'n_queries', 'p_init', 'seed', 'best', 'ahead'},
       autoattack: {'eps', 'norm', 'components', 'reference', 'seed', 'steps', 'n_queries', 'n_targets',
                    'batch_size', 'folded', 'state', 'save', 'quiet', 'best'}}

@pytest.mark.parametrize('attack, name', [(a, n) for a, names in HAS.items() for n in sorted(names)],
                         ids=lambda v: getattr(v, '__name__', v))
def test_a_bad_setting_is_a_sentence(attack, name, task):
    net, x, y = task
    for bad in BAD[name]:
        given = {'eps': .1, **({} if attack is square else {'steps': 2}), name: bad}
        with pytest.raises(ValueError, match=name.removesuffix('s')): attack(net, x[:4], y[:4], **given)

def test_numbers_of_numpy_are_numbers(task):
    net, x, y = task
    a, b = (autoattack(net, x, y, eps=t(.125), seed=i(3), steps=i(4), n_queries=i(20), n_targets=i(2),
                       batch_size=i(7)) for t, i in ((float, int), (np.float32, np.int64)))
    assert torch.equal(a.x_adv, b.x_adv) and a.label == b.label
    for attack, counts in ((apgd, ('steps', 'restarts', 'n_targets')), (fab_t, ('steps', 'n_targets')),
                           (square, ('n_queries', 'seed'))):
        given = {k: np.int64(3) for k in counts}; torch.manual_seed(0)
        found = attack(net, x, y, eps=np.float32(.125), **given); torch.manual_seed(0)
        assert torch.equal(found, attack(net, x, y, eps=.125, **{k: 3 for k in counts}))

def test_results_keep_their_keys():
    "What was added is in no key until it is asked for"
    assert [key(c) for c in (call(apgd, eps=8/255), call(apgd, objective='dlr_t'), call(fab_t),
                             call(square, n_queries=3))] == [
        '9232385ef68bdbaee94f', '0da6f258ac4f92f655b9', '430b94760f62a0c54847', '4daeec1486be43d2bac2']
    assert key(call(apgd, best=True)) != key(call(apgd))


# ---- starts ------------------------------------------------------------------------------------------------

def test_a_start_that_draws_by_name_is_the_usual_one(task):
    "The seed is drawn from the generator first, and the job's number goes into the name"
    from refine_nb.attacks.queue import _hash, _seed_of
    net, x, y = task
    g = lambda: torch.Generator().manual_seed(5)
    named = lambda x, eps, norm, generator: boundary_start(x, eps, _hash(_names(x), _seed_of(g()), 0))
    given = dict(eps=.03, steps=8)
    assert torch.equal(apgd(net, x, y, generator=g(), **given), apgd(net, x, y, start=named, **given))

def test_from_pgd_apgd_breaks_no_less(task):
    net, x, y = task
    first = pgd(net, x, y, eps=.03, steps=5, start=zero)
    broken = net(first).argmax(1) != y
    on = apgd(net, x, y, eps=.03, steps=8, start=lambda x, *_: first)
    assert 0 < broken.sum() < len(x) and torch.equal(on[broken], first[broken])
    assert (net(on).argmax(1) != y).sum() >= broken.sum()
