"What training, its steps and its networks do at their edges: each is told in a sentence, or right"
from functools import partial

import pytest
import torch
from torch import nn

from refine_nb.base import call, untargeted
from refine_nb.attacks import dra, pgd
from refine_nb.evaluation import verdicts
from refine_nb.refinement import straight_through, through_int8
from refine_nb.training import (Snapshots, adversarial_training, advprop_step, attacker, boosted_ce, coral, counting,
                                covariance, fine_tune, fit, gairat, halves, mail, regulated, sgd)
from refine_nb.vision import load_data, scaled_attack, smooth_attack

DIGITS = load_data('digits', n_train=64)

def net(): # [B,1,8,8] -> [B,10]
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

def plain(batch_size=16): return fine_tune(DIGITS, batch_size=batch_size, seed=1)

def trained(model, method=None, optimiser=None, **how):
    return fit(model, method or plain(), optimiser or sgd(model.parameters(), lr=.05),
               **{'epochs': 1, 'seed': 1, 'validate': lambda m: 0., 'quiet': True, **how})

# ---- training through int8 ---------------------------------------------------------------------------------

def int8_run(epochs=3, deployed=False, **how): # -> its method, weights and losses
    model, method = net(), through_int8(DIGITS, method=call(fine_tune), batch_size=16, seed=1, n_calibrate=50)
    judged = method.deploy if deployed else lambda m: m
    validate = lambda m: verdicts(judged(m), DIGITS.valid).float().mean().item()
    log = trained(model, method, epochs=epochs, validate=validate, select='last', **how)
    return model.state_dict(), [row['loss'] for row in log['history']]

class Ends(Exception): pass
class Ending(Snapshots): # killed after an epoch
    def save(self, state):
        super().save(state)
        raise Ends

def test_a_run_through_int8_goes_on_to_the_same_bits_whoever_validates(tmp_path):
    for deployed in (False, True):
        folder = tmp_path/str(deployed); whole, losses = int8_run(deployed=deployed)
        with pytest.raises(Ends): int8_run(deployed=deployed, snapshots=Ending(folder, every=0))
        again, found = int8_run(deployed=deployed, snapshots=Snapshots(folder, every=0))
        assert found == losses and all(torch.equal(whole[k], again[k]) for k in whole)

def test_ranges_are_of_the_weights_that_an_epoch_starts_from_and_are_made_once(monkeypatch):
    made, real = [], straight_through.calibrate
    monkeypatch.setattr(straight_through, 'calibrate', lambda *a: made.append(0) or real(*a))
    int8_run(3); assert len(made) == 3
    int8_run(3, deployed=True); assert len(made) == 3+1+3 # the first step, and each validation

# ---- steps on attacked images ------------------------------------------------------------------------------

X, Y = DIGITS.train.x[:8].float()/255, DIGITS.train.y[:8]

TOWARDS = {'call': call(pgd, targeted=True), 'partial': partial(pgd, targeted=True),
           'inside': call(smooth_attack, attack=call(pgd, targeted=True)),
           'scaled': call(scaled_attack, scale=1., attack=call(pgd, targeted=True)),
           'partial of a call': partial(call(pgd), targeted=True)}
@pytest.mark.parametrize('attack', TOWARDS.values(), ids=TOWARDS)
@pytest.mark.parametrize('made', [attacker, advprop_step, counting, untargeted,
    lambda a: adversarial_training(DIGITS, batch_size=16, seed=1, attack=a, objective=halves)])
def test_no_step_takes_an_attack_that_helps(attack, made):
    with pytest.raises(ValueError, match='pgd with targeted=True goes towards the labels'): made(attack)

def test_a_budget_that_fades_is_of_an_attack_that_harms():
    with pytest.raises(ValueError, match='goes towards the labels'): regulated(call(pgd, targeted=True))

def test_an_attacker_wants_an_attack():
    for made in (attacker, advprop_step):
        with pytest.raises(ValueError, match='attack wants a function or a call'): made(None)

@pytest.mark.parametrize('attack', [call(pgd, restarts=2), call(pgd, early_stop=True), partial(pgd, restarts=3),
                                    call(smooth_attack, attack=call(pgd, restarts=2))], ids=str)
def test_steps_to_flip_are_of_one_run(attack):
    with pytest.raises(ValueError, match='no early_stop, and restarts=1'): counting(attack)

def test_steps_to_flip_are_no_more_than_the_steps():
    assert counting(call(dra, steps=3))(net().eval(), X, Y)[1].max() <= 3
    with pytest.raises(ValueError, match='one gradient a step, such as .*, got 4 in 3 steps'):
        counting(call(dra, steps=3, ranked='fresh'))(net().eval(), X, Y)

# ---- losses and weights ------------------------------------------------------------------------------------

def test_a_certain_mistake_among_two_has_a_finite_boosted_loss():
    z = torch.tensor([[-30., 0.], [0., 0.], [100., 0.]], requires_grad=True); y = torch.zeros(3, dtype=torch.long)
    loss = boosted_ce(z, y, floor=0.)
    assert loss.isfinite().all() and (loss > -1e-12).all()
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()

def test_weights_of_no_images_are_none():
    no, labels = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert gairat(no, .9).shape == mail(torch.zeros(0, 3), labels, .9, form='paper').shape == (0,)

@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_covariances_of_sixteen_bits_are_of_full_precision(kind):
    f = (100*torch.randn(512, 4, generator=torch.Generator().manual_seed(0))+300).to(kind)
    assert torch.equal(covariance(f), covariance(f.float())) and covariance(f.double()).dtype == torch.float64
    assert coral(f, 2*f).dtype == torch.float32 and coral(f, 2*f).isfinite()

@pytest.mark.parametrize('params,says', [(net(), 'got Sequential: write model.parameters'), ([], 'got none'),
                                         (None, 'got NoneType'), (torch.ones(2), 'got Tensor')])
def test_an_optimiser_wants_parameters(params, says):
    with pytest.raises(ValueError, match=says): sgd(params)
