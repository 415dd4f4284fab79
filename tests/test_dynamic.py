"DRA against Algorithm 1 written out as plain loops, image by image, and what training and papers make of it."
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from refine_nb.base import call
from refine_nb.attacks import dra, significant
from refine_nb.training import Engine, Snapshots, fine_tune, fit, regulated_training, sgd
from refine_nb.runs import Store, passed


@pytest.fixture(scope='module')
def model():
    "Bent enough that the gradient after the last step ranks otherwise than the one before"
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(),
                        nn.Linear(6*25, 4)).double().eval()
    net[0].weight.data *= 6
    return net

@pytest.fixture
def batch():
    x = torch.rand(6, 3, 5, 5, dtype=torch.float64)
    x[:, :, 0], x[:, :, 1] = 0, 1               # black and white rows: clipping has something to do
    return x, torch.tensor([0, 1, 2, 3, 0, 1])

def gradient(model, x, y): # of one image, by `backward`
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x[None]), y[None]).backward()
    return x.grad.clone()

def algorithm_1(model, x, y, eps, p, T, norm, rank, ranked, per, clip):
    "One image [C,H,W], in the lines of the document"
    alpha, x_t, t = eps/T, x.clone(), 0                                       # lines 1 and 2
    while t < T:                                                              # line 3, printed "if"
        g = gradient(model, x_t, y)
        total = sum(abs(v) for v in g.flatten().tolist())
        x_t = x_t + alpha*g/(total if norm=='sum' else total/g.numel())
        if clip: x_t = x_t.clamp(0, 1)
        t += 1
    if ranked == 'fresh': g = gradient(model, x_t, y)
    C, H, W = x.shape
    def size(v): return abs(v) if rank=='magnitude' else v
    places = [(c, i, j) for c,i,j in product(range(C), range(H), range(W))]
    def weight(c, i, j):                                                      # line 4
        return sum(size(g[k, i, j].item()) for k in (range(C) if per=='pixel' else (c,)))
    found = sorted({weight(*at) for at in places}, reverse=True)
    k = round(p*(H*W if per=='pixel' else C*H*W))
    threshold = found[k-1] if k else float('inf')
    for at in places:                                                         # line 5, gradient for pixel
        if weight(*at) < threshold: x_t[at] = x[at]
    return x_t

CHOICES = list(product(('mean', 'sum'), ('magnitude', 'signed'), ('last', 'fresh'), ('value', 'pixel'),
                       (True, False)))

@pytest.mark.parametrize('norm, rank, ranked, per, clip', CHOICES)
def test_dra_is_algorithm_1(norm, rank, ranked, per, clip, model, batch):
    eps, how = .2*(75 if norm=='sum' else 1), dict(norm=norm, rank=rank, ranked=ranked, per=per, clip=clip)
    for p, T in ((1/3, 4), (.12, 1), (1., 3)):
        ours = dra(model, *batch, eps=eps, p=p, steps=T, **how)
        theirs = torch.stack([algorithm_1(model, a, b, eps, p, T, **how) for a,b in zip(*batch)])
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        assert (ours-batch[0]).abs().max() > .02

def test_each_choice_gives_other_images(model, batch):
    "No setting of `dra` is without effect"
    first = dict(norm='mean', rank='magnitude', ranked='last', per='value', clip=True)
    made = dra(model, *batch, eps=.1, p=1/3, steps=3, **first)
    for change in (dict(norm='sum'), dict(rank='signed'), dict(ranked='fresh'), dict(per='pixel'),
                   dict(clip=False)):
        assert (dra(model, *batch, eps=.1, p=1/3, steps=3, **first|change)-made).abs().max() > 1e-4, change

@pytest.mark.parametrize('norm', ['mean', 'sum'])
@pytest.mark.parametrize('p', [0., 1/3, 1.])
def test_dra_keeps_its_budget_and_its_share(norm, p, model, batch):
    "The budget is an L1 one, clipped or not; where nothing is clipped the plain ascent uses it up"
    for clip in (True, False):
        x_adv = dra(model, *batch, eps=.15, p=p, steps=4, norm=norm, clip=clip)
        change = (x_adv-batch[0]).flatten(1).abs()
        size = getattr(change, norm)(1)
        assert size.max() <= .15+1e-12 and (change > 0).sum(1).max() <= round(p*75)
        if clip: assert x_adv.min() >= 0 and x_adv.max() <= 1
        if p == 0: assert torch.equal(x_adv, batch[0])
    one = dra(model, *batch, eps=.15, p=1., steps=1, norm=norm, clip=False)
    torch.testing.assert_close(getattr((one-batch[0]).flatten(1).abs(), norm)(1),
                               torch.full((6,), .15, dtype=torch.float64))

def test_a_zero_gradient_leaves_the_image_and_no_other(batch):
    class Step(nn.Module):                     # the second image's logits ignore it
        def forward(self, x):
            s = (x*torch.tensor([1., 0.]).view(2, 1, 1, 1)).flatten(1).sum(1)
            return torch.stack([s, -s], 1)
    x = torch.full((2, 1, 2, 2), .5)
    for ranked in ('last', 'fresh'):
        x_adv = dra(Step(), x, torch.zeros(2, dtype=torch.int64), eps=.1, p=.5, ranked=ranked)
        assert torch.equal(x_adv[1], x[1]) and (x_adv[0]-x[0]).abs().max() > .05

def test_the_last_ranking_costs_nothing(model, batch):
    looked = []
    hook = model.register_forward_hook(lambda m, i, o: looked.append(len(o)))
    dra(model, *batch, steps=4); last = len(looked)
    dra(model, *batch, steps=4, ranked='fresh'); hook.remove()
    assert (last, len(looked)-last) == (4, 5)

def test_ties_keep_no_more_than_the_share():
    assert significant(torch.zeros(2, 3, 4, 4), 1/3).sum((1, 2, 3)).tolist() == [16, 16]


# ---- fine-tuning -------------------------------------------------------------------------------------------

def test_a_recipe_tunes_from_its_vanilla_network(tmp_path):
    "Without a budget the stored weights are those of further clean epochs; with one they are not"
    vanilla = toys.recipe()
    def tuned(method): return replace(vanilla, method=method, init=vanilla, optimiser=call(sgd, lr=.05))
    def ours(eps): return tuned(call(regulated_training, attack=call(dra, eps=eps), augment='none'))
    specs = [tuned(call(fine_tune, augment='none')), ours(0.), ours(.1)]
    store = Store(tmp_path, Engine(), quiet=True); store.run(specs)
    control, none, some = (store.get(s).tensors() for s in specs)
    for k in control: assert torch.equal(control[k], none[k]), k
    assert set(control) == set(none) and any(not torch.equal(control[k], some[k]) for k in control)
    assert not passed([specs[2], replace(specs[2], epochs=1)])   # its budget asks how long the run will be

@pytest.mark.parametrize('total', ['mean', 'alternating'])
def test_a_run_in_two_parts_ends_with_the_same_bits(total, tmp_path):
    "Which batch is attacked, and how hard, hangs on its number alone"
    data = toys.images()
    method = regulated_training(data, batch_size=32, seed=1, attack=call(dra, eps=.1), total=total)
    def run(folder, fails=()):
        torch.manual_seed(0); net = toys.net(num_classes=10)
        def validate(m):
            if (found := Snapshots(folder, every=0).load()) and found['epoch'] in fails:
                raise KeyError('power')
            return 0.
        fit(net, method, sgd(net.parameters(), lr=.05), epochs=4, seed=1, validate=validate, quiet=True,
            select='last', snapshots=Snapshots(folder, every=0))
        return net.state_dict()
    with pytest.raises(KeyError): run(tmp_path/'a', fails=(2,))
    torch.testing.assert_close(run(tmp_path/'a'), run(tmp_path/'b'), rtol=0, atol=0)
