"Our Square attack against the authors' code, and what ours promises beyond it."
import warnings

import pytest
import torch
from pyautoattack.square import SquareAttack
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

import refine_nb.attacks.random_search as module
import refine_nb.attacks.squares as draws
from refine_nb.base import call
from refine_nb.attacks import ce, pgd, square, square_side


def small_net(C=3, K=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(C, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                         nn.Linear(8*25, K)).eval()

@pytest.fixture
def task():
    "A net that is right on four of five of 40 random images, some of them by a hair"
    net, x = small_net(), torch.rand(40, 3, 10, 10)
    x[:10] = x[:10].round()                      # at the ends of the range, where clipping counts
    y = net(x).argmax(1); y[::5] = (y[::5]+1)%6
    return net, x, y

def reference(net, x, y, eps, n_queries, seed=0, **settings):
    return SquareAttack(net, norm='Linf', eps=eps, n_queries=n_queries, seed=seed, n_restarts=1,
                        resc_schedule=False, device='cpu', **settings).perturb(x, y)

def right(net, x, y): return net(x).argmax(1)==y

@pytest.mark.parametrize('eps, n_queries', [(.01, 300), (.03, 700), (.3, 30), (.03, 1)])
def test_same_draws_give_the_images_of_the_reference(squares_as_theirs, task, eps, n_queries):
    net, x, y = task
    theirs = reference(net, x, y, eps, n_queries)
    squares_as_theirs(3); torch.manual_seed(0)
    ours = square(net, x, y, eps=eps, n_queries=n_queries)
    assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal(right(net, ours, y), right(net, theirs, y))
    assert (ours-x).abs().max() > eps/2, 'nothing was broken: the comparison proves nothing'

def test_the_budgets_compared_leave_some_and_break_some(task):
    net, x, y = task
    held = right(net, reference(net, x, y, .01, 300), y).sum()
    assert 0 < held < right(net, x, y).sum()

@pytest.mark.parametrize('shape', [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224), (2, 20, 45)])
@pytest.mark.parametrize('p_init', [.8, .3, .05])
def test_sides_are_the_reference_s(shape, p_init):
    C, H, W = shape
    schedule = SquareAttack(None, p_init=p_init, n_queries=5000, resc_schedule=False).p_selection
    for q in range(5000):
        assert square_side(q, H, W, p_init) == min(max(int(round((schedule(q)*C*H*W/C)**.5)), 1), H, W)

def test_own_draws_break_as_much(task):
    """Another sample of the same attack.
    Over 60 seeds each mean was 28.5 and 28.8 images that hold (standard error .1)"""
    net, x, y = task
    mean = lambda f: sum(right(net, f(seed), y).sum().item() for seed in range(10))/10
    ours, theirs = (mean(lambda s: square(net, x, y, eps=.01, n_queries=100, seed=s)),
                    mean(lambda s: reference(net, x, y, .01, 100, s)))
    assert abs(ours-theirs) < 1.2 and ours < right(net, x, y).sum()-2

def test_more_queries_never_break_less_and_a_longer_run_begins_as_a_shorter_one(task):
    net, x, y = task
    found = [right(net, square(net, x, y, eps=.01, n_queries=n), y) for n in (1, 49, 50, 51, 200)]
    assert all((later <= earlier).all() for earlier, later in zip(found, found[1:]))
    assert found[-1].sum() < found[0].sum()

def test_the_window_does_not_matter(monkeypatch, task):
    net, x, y = task
    expected = square(net, x, y, eps=.02, n_queries=100)
    for window in (1, 7, 200):
        for m in (module, draws): monkeypatch.setattr(m, '_WINDOW', window)
        assert_close(square(net, x, y, eps=.02, n_queries=100), expected, atol=1e-6, rtol=0)

def test_late_leaving_as_on_a_gpu_gives_the_same(monkeypatch, task):
    "Examples that are broken but still in the batch do not change any more"
    net, x, y = task
    expected = square(net, x, y, eps=.02, n_queries=120)
    monkeypatch.setattr(module, '_retire', lambda s, out, share=0.: False)
    assert_close(square(net, x, y, eps=.02, n_queries=120), expected, atol=1e-6, rtol=0)

def test_company_and_order_do_not_matter(task):
    net, x, y = task
    order = torch.randperm(40)
    whole = square(net, x, y, eps=.02, n_queries=80)
    parts = torch.cat([square(net, a, b, eps=.02, n_queries=80)
                       for a, b in zip(x[order].split(7), y[order].split(7))])
    assert_close(parts, whole[order], atol=1e-6, rtol=0)

def test_broken_examples_are_queried_no_more(monkeypatch, task):
    net, x, y = task
    seen, alive = [], []
    def counted(model, s, k, one=module._pass):
        alive.append(len(s['y'])); seen.clear(); one(model, s, k)
        assert k == 1 and sum(seen) <= alive[-1]     # fewer where the square is there, or was rejected
    monkeypatch.setattr(module, '_pass', counted)
    hook = net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    square(net, x, y, eps=.02, n_queries=200, ahead=1); hook.remove()
    assert alive == sorted(alive, reverse=True) and alive[0] > alive[-1]


# ---- several queries at once -------------------------------------------------------------------------------

def residual(K=10):
    "A thin residual net"
    class Block(nn.Module):
        def __init__(self):
            super().__init__(); self.c, self.n = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        def forward(self, x): return (x+self.n(self.c(x))).relu()
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block(),
                         nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, K))

@pytest.fixture(scope='module')
def taught():
    """Three nets on digits, taught for a moment, and 48 images, in float64.
    In float32 a convolution may round otherwise in a batch of another size, and a tie fall the other way"""
    d = load_digits(); X, Y = torch.tensor(d.images[:, None]/16), torch.tensor(d.target); torch.manual_seed(0)
    nets = {'convolution': nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                                         nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
            'linear': nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 'residual': residual()}
    for net in nets.values():
        net.double(); optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for i in torch.randint(1200, (60, 64)):
            x_adv = pgd(net, X[i], Y[i], eps=.1, step_size=.05, steps=2); net.train()
            optimiser.zero_grad(); ce(net(x_adv), Y[i]).mean().backward(); optimiser.step()
        net.eval()
    return nets, X[1200:1248], Y[1200:1248]

def counting(net, f):
    "What `f` gives, and the sizes of the batches that the net saw"
    seen = []; hook = net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    try: return f(), seen
    finally: hook.remove()

@torch.no_grad()
def one_after_the_other(net, x, y, eps, n_queries):
    "Square as it is written: a query for all images, then the next. Images, and how many queries each took"
    s = module._begin(net, x, y, torch.arange(len(x)), eps, 0); took = torch.where(s['lead'] > 0, -1, 0)
    for first, end in draws._windows(n_queries):
        drawn = draws._squares(s['name'], first, end, *x.shape[1:], .8)
        for t, (rows, cols, up) in enumerate(zip(*(d.unbind(1) for d in drawn[:3]))):
            colour = torch.where(up[..., None, None], s['high'], s['low'])
            new = torch.where(rows[:, None, :, None] & cols[:, None, None, :], colour, s['best'])
            lead = module._lead(net(new), y); better = (lead < s['lead']) & (s['lead'] > 0)
            s['lead'] = torch.where(better, lead, s['lead'])
            s['best'] = torch.where(better[:, None, None, None], new, s['best'])
            took[better & (lead <= 0)] = first+t+1
    return s['best'], took

@pytest.mark.parametrize('ahead', [1, 2, 8, None])
@pytest.mark.parametrize('kind', ['convolution', 'linear', 'residual'])
def test_ahead_is_one_after_the_other(kind, ahead, taught, monkeypatch):
    "Bit by bit the images, and how many queries each took to break"
    nets, x, y = taught; net = nets[kind]; i = right(net, x, y); x, y = x[i], y[i]
    expected, took = one_after_the_other(net, x, y, .12, 700)
    found, ends = torch.full_like(took, -1), []
    def window(s, first, end, *rest, make=module._window): ends.append(end); make(s, first, end, *rest)
    def retire(s, out, share=0., leave=module._retire):
        broken = s['lead'] <= 0; gone = s['at'][broken]
        found[gone] = torch.where(s['taken'][broken] > 0, ends[-1]-s['open'][broken].sum(1), 0)
        return leave(s, out, share)
    monkeypatch.setattr(module, '_window', window); monkeypatch.setattr(module, '_retire', retire)
    x_adv = square(net, x, y, eps=.12, n_queries=700, best=True, ahead=ahead)
    assert torch.equal(x_adv, expected) and torch.equal(found, took)
    assert (took > 50).any() and (took == -1).any()

def test_no_square_is_asked_about_twice(taught):
    "Of one image from its present best, nor one that changes nothing; without notes, only the latter"
    nets, x, y = taught; net, seen = nets['linear'], []
    hook = net.register_forward_hook(lambda m, i, o: seen.extend(i[0].clone()))
    x_adv = square(net, x[:1], y[:1], eps=.05, n_queries=3000, ahead=1); hook.remove()
    assert torch.equal(x_adv, x[:1])                          # it holds: all queries were made
    runs = torch.stack(seen[3:]).flatten(1); assert len(runs) < 600  # of 3000
    whole = torch.unique(runs, dim=0); assert len(whole) > .85*len(runs)

def test_notes_are_left_out_where_they_would_be_large(taught, monkeypatch):
    nets, x, y = taught; net = nets['convolution']
    few, asked = counting(net, lambda: square(net, x, y, eps=.05, n_queries=700, best=True))
    monkeypatch.setattr(module, '_RECALLED', 127)             # of 8x8 pixels in one colour there are 128
    same, more = counting(net, lambda: square(net, x, y, eps=.05, n_queries=700, best=True))
    assert torch.equal(few, same) and sum(asked) < .7*sum(more)

@pytest.mark.parametrize('kind', ['draws', 'looks around'])
def test_a_net_that_minds_company_is_asked_one_by_one(kind, taught):
    nets, x, y = taught
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net = nets['linear']
        def forward(self, x): return self.net(x+torch.randn_like(x)/9 if kind == 'draws' else x-x.mean(0)/2)
    model = Odd()
    with pytest.warns(UserWarning, match='one query at a time'):
        _, seen = counting(model, lambda: square(model, x, y, eps=.01, n_queries=100))
    assert max(seen) <= len(x) and len(seen) > 100

def test_no_gradient_and_channels_last(task):
    net, x, y = task
    seen = []
    def look(m, i, o):
        seen.append((i[0].is_contiguous(memory_format=torch.channels_last), o.requires_grad,
                     torch.is_grad_enabled()))
    hook = net.register_forward_hook(look); square(net, x, y, eps=.02, n_queries=60); hook.remove()
    assert set(seen) == {(True, False, False)}

def test_a_tie_is_left_where_the_reference_leaves_it(monkeypatch):
    "Two equal logits: the search ends, and argmax decides; class 0 holds, class 1 does not"
    class Tie(nn.Module):
        def forward(self, x): s = x.flatten(1).sum(1); return torch.stack([s, s], 1)
    x, y = torch.full((2, 1, 4, 4), .5), torch.tensor([0, 1])
    assert torch.equal(square(Tie(), x, y, eps=.1, n_queries=5), reference(Tie(), x, y, .1, 5))

def test_contract(task):
    net, x, y = task
    net.train(); net[0].weight.requires_grad_(False); before, state = x.clone(), torch.get_rng_state()
    with torch.inference_mode(): kept = x.clone()
    for given in (x, kept, x.double()):
        model = net.double() if given.dtype == torch.float64 else net
        x_adv = square(model, given, y, eps=.05, n_queries=20)
        assert (x_adv.dtype == given.dtype and not x_adv.requires_grad and not x_adv.is_inference()
                and x_adv.data_ptr() != given.data_ptr())
        assert (x_adv-given).abs().max() <= .05+1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (torch.equal(x, before) and net.training and not net[0].weight.requires_grad
            and net[0].bias.requires_grad)
    assert torch.equal(torch.get_rng_state(), state), 'no global draw'
    net.float()
    assert square(net, x[:0], y[:0]).shape == x[:0].shape
    held = call(square, eps=.05, n_queries=20)
    assert_close(held(net, x, y), square(net, x, y, eps=.05, n_queries=20), atol=0, rtol=0)

def test_nan_during_the_search_is_said(task):
    "Finite on the clean images, not on attacked ones"
    net, x, y = task
    class Fragile(nn.Module):
        def __init__(self): super().__init__(); self.seen = 0
        def forward(self, x): self.seen += 1; z = net(x); return z if self.seen < 5 else z*torch.nan
    with pytest.raises(ValueError, match='nan or inf on'): square(Fragile(), x, y, eps=.001, n_queries=20)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

@needs_gpu
def test_gpu_agrees(task):
    net, x, y = (t.double() if isinstance(t, nn.Module) or t.is_floating_point() else t for t in task)
    expected = square(net, x, y, eps=.02, n_queries=300)
    with warnings.catch_warnings():
        warnings.simplefilter('error')           # no fallback
        got = square(net.cuda(), x.cuda(), y.cuda(), eps=.02, n_queries=300)
    assert_close(got.cpu(), expected, atol=1e-6, rtol=0)

@needs_gpu
def test_gpu_without_graph_says_so(task):
    net, x, y = task
    class Waits(nn.Module):
        def forward(self, x): z = net(x); z.sum().item(); return z
    expected = square(net.cuda(), x.cuda(), y.cuda(), eps=.02, n_queries=120)
    with pytest.warns(UserWarning, match='cannot run as a CUDA graph'):
        got = square(Waits(), x.cuda(), y.cuda(), eps=.02, n_queries=120)
    assert_close(got, expected, atol=1e-6, rtol=0)
