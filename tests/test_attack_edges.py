"Where logits tie, gradients are infinite, or a seldom used setting meets another: nothing is lost in silence"
import weakref

import pytest, torch
from torch import nn, tensor
from refine_nb.attacks import (StepsToFlip, apgd, apgd_rows, attacking, autoattack, bim, ddn, dlr, dlr_t, dra,
                               fgsm, gaussian, iterate, mim, momentum, pgd, random_signs, salt_and_pepper,
                               square, uniform, unit_l1, worst, zero)
from refine_nb.attacks.lending import NotFinite
from refine_nb.attacks.queue import _order

EPS = .1

class Root(nn.Module):
    "The square root has an infinite gradient where a pixel is black"
    def __init__(self):
        super().__init__(); torch.manual_seed(0); self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    def forward(self, x): return self.net(x.sqrt())

class Gap(nn.Module):
    "No finite answer where an image comes near the boundary"
    def __init__(self): super().__init__(); self.net = Root().net
    def forward(self, x):
        z = self.net(x); top = z.topk(2).values
        return torch.where((top[:,:1]-top[:,1:]) < .02, torch.nan, z)

@pytest.fixture
def images():
    x = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(1)).clamp(.05, .95)
    black = x.clone(); black[:, :, 0, 0] = 0
    net = Root(); return net, x, black, net(black).argmax(1)

@pytest.mark.parametrize('attack', [mim, ddn, lambda *a, **k: pgd(*a, norm='l2', start=zero, **k),
                                    lambda *a, **k: dra(*a, steps=1, **k)], ids=['mim','ddn','l2','dra'])
def test_an_infinite_gradient_is_said_where_a_step_needs_its_length(attack, images):
    net, _, black, y = images
    with pytest.raises(NotFinite): attack(net, black, y, **({} if attack is ddn else {'eps': EPS}))

@pytest.mark.parametrize('attack', [fgsm, bim, pgd])
def test_its_sign_is_enough_for_the_others(attack, images):
    net, _, black, y = images
    assert (net(attack(net, black, y, eps=EPS)).argmax(1) != y).any()

@pytest.mark.parametrize('attack', [ddn, salt_and_pepper])
def test_an_answer_that_is_not_finite_on_the_way_is_said(attack, images):
    _, x, _, _ = images; net = Gap(); clean = net(x); x = x[clean.isfinite().all(1)]
    with pytest.raises(NotFinite): attack(net, x, net(x).argmax(1), steps=100)

def test_worst_and_later_starts_take_no_answer_that_is_not_finite():
    class Cliff(nn.Module):
        def forward(self, x): return torch.where(x.amax((1, 2, 3))[:, None] > .9, torch.nan, x.flatten(1))
    x = tensor([[.1, .5]]).view(1, 1, 1, 2); bad = tensor([[.95, .2]]).view(1, 1, 1, 2); y = tensor([1])
    for a,b in ((x, bad), (bad, x)):
        with pytest.raises(NotFinite): worst(Cliff(), x, y, a, b)
    with pytest.raises(ValueError, match=r'must return images \[1, 1, 1, 2\], got \[2, 1, 1, 2\]'):
        worst(Cliff(), x, y, x, torch.cat([x, x]))

def test_a_tie_hides_no_target():
    class First(nn.Module):
        def forward(self, x): return x.flatten(1)
    x, y = tensor([[.5, .5, .3, .2]]).view(1, 1, 1, 4), tensor([0]) # of two equal logits the first answers
    found = apgd(First(), x, y, eps=.05, objective='dlr_t', n_targets=1, start=zero)
    assert First()(found).argmax(1) == 1
    assert autoattack(First(), x, y, eps=.05, components=('apgd-t',), n_targets=1).robust == 0
    assert _order(First()(x), y)[0].tolist() == [3, 2, 1, 0] # of a label that loses a tie, too
    assert _order(First()(x), tensor([1]))[0].tolist() == [3, 2, 0, 1]

def test_square_says_where_it_stops_at_a_tie():
    class Coarse(nn.Module):
        def forward(self, x): z = (50*x.mean((1, 2, 3))).round(); return torch.stack([z, 0*z+30], 1)
    x = torch.full((1, 1, 4, 4), .8)     # from 40 against 30 to 30 at least
    with pytest.warns(UserWarning, match='1 of 1 images end in an exact tie of logits'):
        assert torch.equal(square(Coarse(), x, tensor([0]), eps=.2, n_queries=500), x)

def test_dlr_of_equal_logits_in_16_bits():
    for kind in (torch.float16, torch.bfloat16):
        z = tensor([[1., 1, 1, 1, 0]], dtype=kind).requires_grad_()
        for loss in (dlr(z, tensor([0])), dlr_t(z, tensor([0]), tensor([1]))):
            assert loss.item() == 0 and torch.autograd.grad(loss.sum(), z)[0].isfinite().all()

def test_steps_of_small_gradients_are_whole_in_16_bits():
    g = torch.full((1, 48), 3e-6, dtype=torch.float16)
    for norm,size in (('mean', 1.), ('sum', 1/48)):
        assert torch.allclose(unit_l1(norm)(g)[0].double(), torch.full((1, 48), size).double())

def test_a_count_of_steps_is_of_the_whole_batch(images):
    net, x, _, _ = images; y = net(x).argmax(1)
    with pytest.raises(ValueError, match='leave out observe, early_stop or restarts'):
        pgd(net, x, y, observe=StepsToFlip(), restarts=2, early_stop=True)
    count = StepsToFlip(); pgd(net, x, y, eps=.01, observe=count, restarts=2)
    assert count.kappa.shape == y.shape

def test_a_buffer_that_is_put_anew_comes_back():
    class Running(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('mean', torch.zeros(1))
        def forward(self, x): self.mean = .9*self.mean+.1*x.mean(); return x
    model = Running().train(); own = model.mean
    with attacking(model, 'train_untouched'): model(torch.ones(2))
    assert model.mean is own and own.item() == 0

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_square_keeps_the_layout(layout, images):
    net, x, _, _ = images; x = x.to(memory_format=layout)
    assert square(net, x, net(x).argmax(1), eps=.02, n_queries=9).is_contiguous(memory_format=layout)

def test_authors_code_wants_float32(images):
    pytest.importorskip('pyautoattack')
    net, x, _, _ = images; y = net(x).argmax(1); net.double()
    with pytest.raises(ValueError, match='the network is torch.float64: give model.float'):
        autoattack(net, x.double(), y, eps=EPS, reference=True, components=('square',))

def test_a_generator_is_one(images):
    net, x, _, _ = images; y = net(x).argmax(1)
    for run in (uniform, gaussian, lambda x, **k: random_signs(None, x, None, **k),
                lambda x, **k: pgd(net, x, y, **k), lambda x, **k: apgd(net, x, y, **k)):
        with pytest.raises(ValueError, match=r'generator must be a torch.Generator or None, got 3: write'):
            run(x, eps=EPS, generator=3)
    for attack in (ddn, salt_and_pepper):
        with pytest.raises(ValueError, match='generator must be a torch.Generator'):
            attack(net, x, y, generator=3)

def test_sentences(images):
    net, x, _, _ = images; y = net(x).argmax(1)
    with pytest.raises(ValueError, match='observe wants a function, got 3'): pgd(net, x, y, observe=3)
    with pytest.raises(ValueError, match='direction wants a function, got None'):
        iterate(net, x, y, eps=EPS, step_size=EPS, steps=1, direction=None)
    with pytest.raises(ValueError, match='got nan: look at where they come from'):
        pgd(net, x*torch.nan, y)

def test_momentum_of_huge_gradients_moves():
    assert (momentum()(torch.full((1, 3072), 2e35))[0] == 1).all()


def test_apgd_holds_one_pass_at_a_time():
    "Where most images fall at once, the pass of the few is made after that of all has been freed"
    made = []
    class Watch(nn.Flatten):
        def forward(self, x):
            if x.requires_grad:
                assert not any(seen() is not None for seen,_ in made), 'an earlier pass is still held'
                made.append((weakref.ref(x), len(x)))
            return super().forward(x)
    torch.manual_seed(0); model = nn.Sequential(Watch(), nn.Linear(64, 10)).eval()
    x = torch.rand(40, 1, 8, 8); y = model(x).argmax(1); y[4:] = (y[4:]+1)%10 # 36 are wrong from the start
    apgd_rows(model, x, y, y, torch.arange(40), x.clone(), eps=1e-6, steps=3)
    assert [n for _,n in made][:2] == [40, 4]
