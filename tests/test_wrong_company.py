"""Networks, optimisers, attacks and files that do not go together: each is told, or right"""
from dataclasses import replace

import click
import pytest
import torch
from torch import nn

from refine_nb.attacks import dra, pgd, unit_l2
from refine_nb.base import Cell, Recipe, call
from refine_nb.command.own_networks import _free
from refine_nb.command.pages import _demo_notes
from refine_nb.training import (adversarial_training, coral, fading, fine_tune, fit, halves,
                                regulated_training, sgd)
from refine_nb.refinement import through_int8
from refine_nb.vision import load_data

DIGITS = load_data('digits', n_train=64)

def digit_net(): # [B,1,8,8] -> [B,10]
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
def net(K=10): return nn.Sequential(nn.Flatten(), nn.Linear(64, K))

def trained(model, optimiser=None, method=None):
    method = method or fine_tune(DIGITS, batch_size=16, seed=1)
    optimiser = optimiser or sgd(model.parameters())
    return fit(model, method, optimiser, epochs=1, seed=1, validate=lambda m: 0., quiet=True)

def test_an_optimiser_of_another_network_is_told():
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        trained(net(), sgd(net().parameters()))
    with pytest.raises(ValueError, match='no parameter of the model requires a gradient'):
        trained(frozen := net().requires_grad_(False), sgd(frozen.parameters()))
    trained(net())

class Two(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(x), x

@pytest.mark.parametrize('model,says', [(Two(), 'must return logits'), (net(3), 'below the 3 classes'),
    (nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), 'does not take images')])
def test_a_wrong_network_is_told_by_the_first_step(model, says):
    with pytest.raises(ValueError, match=says): trained(model)

def test_training_takes_no_attack_that_helps():
    make = lambda attack: adversarial_training(DIGITS, batch_size=16, seed=1, attack=attack, objective=halves)
    with pytest.raises(ValueError, match='targeted=True moves images towards the labels'):
        make(call(pgd, targeted=True))
    with pytest.raises(ValueError, match='attack wants'): make('pgd')

def test_a_number_is_asked_of_no_attack_that_helps():
    base = Recipe(data=call(load_data, name='digits'), model=call(nn.Flatten), method=call(fine_tune),
                  optimiser=call(sgd), epochs=1, batch_size=16)
    for spec in (lambda a: Cell(base, a), lambda a: replace(base, robust=a)): # before anything is trained
        assert spec(call(pgd))
        with pytest.raises(ValueError, match='targeted=True moves images towards the labels'):
            spec(call(pgd, targeted=True))

def test_int8_calibrates_alike_in_a_step_and_between_epochs():
    model = digit_net().train()
    method = through_int8(DIGITS, method=call(fine_tune), batch_size=16, seed=1, n_calibrate=50)
    batch = next(method.batches(0))
    def loss():
        with torch.autocast('cpu', torch.bfloat16): return method.step(model, batch, 0.)[0]
    within = loss(); method.deploy(model) # calibrates again, as validation does
    assert torch.equal(within, loss())

@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_dra_keeps_sixteen_bits(kind):
    x, y = DIGITS.test.x[:6].to(kind)/255, DIGITS.test.y[:6]
    x_adv = dra(net().to(kind), x, y)
    assert x_adv.dtype == kind and (x_adv != x).any() and 0 <= x_adv.min() <= x_adv.max() <= 1

def test_a_snapshot_knows_how_dra_fades():
    def about(**how):
        m = regulated_training(DIGITS, batch_size=16, seed=1, attack=call(dra), **how)
        return str(m.about)
    assert len({about(), about(total='sum'), about(fade=call(fading, to=1., until=1.))}) == 3

def test_covariances_are_of_full_precision_in_bf16_training():
    a = torch.randn(32, 10, generator=torch.Generator().manual_seed(0)); b = a+1e-3*a.flip(0)
    with torch.autocast('cpu', torch.bfloat16): inside = coral(a, b)
    torch.testing.assert_close(inside, coral(a, b))

def test_steps_of_tiny_and_huge_gradients_have_length_one():
    g = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in (1e-30, 1., 1e30): assert unit_l2(k*g)[0].flatten(1).norm(dim=1).allclose(torch.ones(2))

def test_the_file_to_write_is_looked_at_first(tmp_path):
    assert _free(None, None, str(tmp_path/'new.safetensors'))
    with pytest.raises(click.BadParameter, match='there is no folder'):
        _free(None, None, str(tmp_path/'no'/'x'))
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(click.BadParameter, match='is there already'):
        _free(None, None, str(tmp_path/'mine.txt'))

def test_a_demo_says_that_it_has_its_own_network(monkeypatch, tmp_path):
    monkeypatch.delenv('REFINE_PRESET', raising=False)
    note, = _demo_notes({'tab1_adcorda': {'model': 'resnet34'}})
    assert 'model resnet34 is for --preset small' in note
    assert _demo_notes({'tab1_adcorda': {'model': 'resnet34', 'preset': 'small'}}) == []
    assert _demo_notes({'tab1_adcorda': {'dataset': str(tmp_path)}}) == [] # a folder of one's own is honoured
