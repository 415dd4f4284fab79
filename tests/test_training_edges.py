"What training, its steps and its networks do at their edges: each is told in a sentence, or right"
import pytest
import torch
from torch import nn

from refine_nb.base import call
from refine_nb.refinement import straight_through, through_int8
from refine_nb.training import Snapshots, fine_tune, fit, sgd
from refine_nb.evaluation import verdicts
from refine_nb.vision import load_data

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
