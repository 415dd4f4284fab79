"Memory layouts by trial: verdicts of the fixed one, the choice in the record, nothing where nobody asked."
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.testing import assert_close

from refine_nb.attacks import autoattack, ensemble, pgd, salt_and_pepper
from refine_nb.base import Adversarials, Cell, Robustness, call, key
from refine_nb.refinement import Correction, OnSource, Quantised
from refine_nb.reporting import made_on
from refine_nb.runs import Setting, Store, attempt, provenance, values
from refine_nb.training import Engine, engine
from refine_nb.vision import classifier, fold, laid, layout_for
from toys import quiet, recipe

PLAIN, LAST = torch.contiguous_format, torch.channels_last
PGD = call(pgd, eps=.1, step_size=.04, steps=5)


@pytest.fixture
def plain_wins():
    "The trial, by a clock that goes on by one for each image in the plain layout, by two in the other"
    now = [0.]
    def tick(module, args):
        if hasattr(module, 'laid'): now[0] += len(args[0])*(1 if module.laid is PLAIN else 2)
    handle = register_module_forward_pre_hook(tick)
    trial = mock.Mock(side_effect=partial(layout_for, seconds=1e9, clock=lambda: now[0]))
    with mock.patch.object(values, 'layout_for', trial): yield trial
    handle.remove()

def tried(root): return Store(root, Engine(layout='tried'), quiet=True, every=0.)

def many():
    "A spec of each kind that asks a network, of one recipe; and a cell of its int8 network"
    base = recipe()
    fixed = Correction(base, call(salt_and_pepper, targeted=True, steps=20))
    return [Cell(base), Cell(base, PGD, n_eval=60), fixed, OnSource(base, fixed),
            Adversarials(base, PGD, n_eval=20), Robustness(base, eps=.1, n_eval=12, components=('apgd-ce',)),
            Cell(Quantised(base, n_calibrate=50), n_eval=60)]

def test_what_is_asked_in_another_layout_says_the_same(tmp_path, plain_wins):
    fixed, other, specs = quiet(tmp_path/'fixed'), tried(tmp_path/'tried'), many()
    fixed.run(specs); assert not plain_wins.called
    other.run(specs); assert plain_wins.call_count == 2        # a trial for a network, whoever asks it
    for s in specs:
        a, b = fixed.get(s), other.get(s)
        assert a.record['key'] == b.record['key'] == key(s)
        assert 'layout' not in a.made and b.made['layout'] == 'contiguous'
        assert {**a.made, 'seconds': 0} == {k: v for k,v in {**b.made, 'seconds': 0}.items() if k != 'layout'}
        for k,v in a.tensors().items(): # images and distances up to last digits
            assert_close(b.tensors()[k], v, **({'atol': 1e-5, 'rtol': 1e-5} if v.is_floating_point() else {}))
    for s in (recipe(), Quantised(recipe(), n_calibrate=50)): # made in the fixed layout: the same bits
        a, b = fixed.get(s), other.get(s); assert 'layout' not in b.made
        assert_close(b.tensors(), a.tensors(), atol=0, rtol=0)
    both = provenance([other.get(s) for s in (recipe(), *specs)])
    assert both['layouts'] == ['contiguous'] and 'layouts' not in provenance(map(fixed.get, specs))
    assert 'layout' in made_on(specs[:2], other) and 'layout' not in made_on(specs[:2], fixed)

def deep():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
                        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6*36, 5)).double()
    with torch.no_grad(): net.train()(torch.rand(64, 3, 8, 8).double())
    return net.eval()

def test_attacks_find_the_same_images():
    "In double precision, through the folded copy, which lies as its network does"
    net, x = deep().to(memory_format=LAST), torch.rand(16, 3, 8, 8).double()
    other, y, how = laid(deep(), PLAIN), net(x).argmax(1), dict(eps=.02, step_size=.005, steps=10)
    a, b = (pgd(m, x.to(memory_format=LAST), y, generator=torch.Generator().manual_seed(1), **how)
            for m in (net,other))
    assert (a-x).abs().max() > .01; assert_close(b, a, atol=1e-9, rtol=0)
    copies = []
    def spied(*args): copies.append(fold(args[0])); return copies[-1],None
    with mock.patch.object(ensemble, 'fold_if_same', spied):
        a, b = (autoattack(m, x, y, eps=.008, steps=10, n_queries=100) for m in (net,other))
    assert 0 < a.survivors['apgd-ce'] and a.survivors['square'] < 16
    assert torch.equal(a.breaker, b.breaker); assert_close(b.x_adv, a.x_adv, atol=1e-9, rtol=0)
    assert [c[3].weight.is_contiguous() for c in copies] == [False,True]

class Viewing(nn.Module):
    "Takes its channels last only where somebody copies for it"
    def __init__(self, K): super().__init__(); self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8*36, K)
    def forward(self, x): return self.fc(self.conv(x).relu().view(len(x), -1))

def viewing(*, num_classes): return Viewing(num_classes)

def test_a_network_is_used_in_the_layout_that_it_takes(tmp_path):
    "Whatever the clock says: the other fails"
    cell = Cell(recipe(model=call(viewing)), PGD, n_eval=40)
    with pytest.raises(RuntimeError, match='view'): Viewing(10).to(memory_format=LAST)(torch.rand(2, 1, 8, 8))
    stores = quiet(tmp_path/'fixed'), tried(tmp_path/'tried')
    a, b = (s.value(cell) for s in stores)
    assert stores[1].get(cell).made['layout'] == 'contiguous' and torch.equal(a.predicted, b.predicted)

def test_whoever_makes_it_follows_the_engine(tmp_path, monkeypatch):
    "As another process would, that was told otherwise by its environment"
    monkeypatch.setenv('REFINE_LAYOUT', 'channels_last')
    store, cell = tried(tmp_path), Cell(recipe(model=call(viewing)), n_eval=40)
    far = pickle.loads(pickle.dumps(Setting.of(store))).open()
    for s in store.plan([cell]): assert attempt(far, (s,))
    assert store.get(cell, make=False).made['layout'] == 'contiguous'

def test_a_layout_is_chosen_by_name(monkeypatch):
    monkeypatch.setenv('REFINE_LAYOUT', 'tried'); assert engine('cpu').layout == 'tried'
    assert Store(engine=engine('cpu')).engine.layout == 'tried'
    monkeypatch.setenv('REFINE_LAYOUT', 'nhwc')
    with pytest.raises(ValueError, match="^unknown layout in the environment's REFINE_LAYOUT 'nhwc': choose"):
        Store()
    with pytest.raises(ValueError, match="^unknown layout 'nhwc': choose one of 'channels_last', 'tried'$"):
        Engine(layout='nhwc')

def test_a_stage_in_a_layout_of_its_own(tmp_path, monkeypatch):
    "It says the same, through the folded copy too, and the record names the stage"
    spec = recipe(model=call(classifier, name='resnet20', stem='cifar', mean=[0.]*3, std=[1.]*3), epochs=1)
    cells = Cell(spec, PGD, n_eval=12), Robustness(spec, eps=.0005, n_eval=30, components=('apgd-t',))
    stores = quiet(tmp_path/'fixed'), tried(tmp_path/'tried')
    monkeypatch.setattr(values, 'layout_for', lambda net, x: {'': LAST, 'net.layer3': PLAIN})
    copies, seen = [], ensemble.fold_if_same
    def spied(*args): copies.append(seen(*args)[0]); return copies[-1],None
    monkeypatch.setattr(ensemble, 'fold_if_same', spied)
    for cell in cells:
        a, b = (s.get(cell) for s in stores)
        assert b.made['layout'] == 'channels_last, net.layer3 contiguous' and 'layout' not in a.made
        assert a.result.keys() == b.result.keys() and a.tensors().keys() == b.tensors().keys()
        for k,v in a.tensors().items():
            if not v.is_floating_point(): assert torch.equal(b.tensors()[k], v)
    lie = [[m.conv1.weight.is_contiguous() for m in (c.net.layer2[0],c.net.layer3[0])] for c in copies]
    assert lie == [[False,False],[False,True]]
