"What training, its steps and its networks do at their edges: each is told in a sentence, or right"
from functools import partial

import pytest
import torch
from torch import nn

from refine_nb.base import call, untargeted
from refine_nb.attacks import dra, pgd
from refine_nb.evaluation import verdicts
from refine_nb.refinement import straight_through, through_int8
from refine_nb.training import (Method, Snapshots, adversarial_training, advprop_step, attacker, boosted_ce,
                                cloned, coral, cosine, counting, covariance, fine_tune, fit, gairat, halves,
                                mail, regulated, sgd, train_epoch)
from refine_nb.vision import (CosineHead, SmoothReLU, Split, clipped, cosine_head, data_of, divided,
                              embeddings, fold, load_data, logits_and_cosines, refold, scaled_attack,
                              smooth_attack)

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
    lambda a: adversarial_training(DIGITS, batch_size=16, seed=1, attack=a, objective=halves)],
    ids=['attacker', 'advprop_step', 'counting', 'untargeted', 'adversarial_training'])
def test_no_step_takes_an_attack_that_helps(attack, made):
    with pytest.raises(ValueError, match='pgd with targeted=True moves images towards the labels'):
        made(attack)

def test_a_budget_that_fades_is_of_an_attack_that_harms():
    with pytest.raises(ValueError, match='moves images towards the labels'):
        regulated(call(pgd, targeted=True))

def test_an_attacker_wants_an_attack():
    for made in (attacker, advprop_step):
        with pytest.raises(ValueError, match='attack wants a function or a call'): made(None)

@pytest.mark.parametrize('attack', [call(pgd, restarts=2), call(pgd, early_stop=True),
                                    partial(pgd, restarts=3),
                                    call(smooth_attack, attack=call(pgd, restarts=2))],
                         ids=['restarts', 'early', 'partial', 'inside'])
def test_steps_to_flip_are_of_one_run(attack):
    with pytest.raises(ValueError, match='no early_stop, and restarts=1'): counting(attack)

def test_steps_to_flip_are_no_more_than_the_steps():
    assert counting(call(dra, steps=3))(net().eval(), X, Y)[1].max() <= 3
    with pytest.raises(ValueError, match='one gradient a step, such as .*, got 4 in 3 steps'):
        counting(call(dra, steps=3, ranked='fresh'))(net().eval(), X, Y)

# ---- losses and weights ------------------------------------------------------------------------------------

def test_a_certain_mistake_among_two_has_a_finite_boosted_loss():
    z = torch.tensor([[-30., 0.], [0., 0.], [100., 0.]], requires_grad=True)
    y = torch.zeros(3, dtype=torch.long)
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

# ---- the border of `fit` -----------------------------------------------------------------------------------

@pytest.mark.parametrize('how,says', [({'snapshots': 'there'}, 'snapshots wants a Snapshots'),
    ({'engine': 'cpu'}, "engine wants an Engine, such as engine"),
    ({'schedule': .1}, 'schedule wants a function'), ({'robust': .1}, 'robust wants a function'),
    ({'validate': lambda m: None}, 'valid_accuracy wants .*got None'),
    ({'method': Method(lambda e: [], len, 0, 0)}, 'n_steps of the method wants a whole number >= 1'),
    ({'method': Method(lambda e: [], len, 4, 4)}, 'the method gave no batch in epoch 1')])
def test_what_fit_is_given_is_looked_at(how, says):
    with pytest.raises(ValueError, match=says): trained(net(), **how)

def test_lbfgs_and_an_epoch_beyond_the_last_are_refused():
    model = net()
    with pytest.raises(ValueError, match='LBFGS recomputes the loss within a step'):
        trained(model, optimiser=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r'epoch wants a whole number in \[0, 1\], got 2'):
        train_epoch(model, plain(), sgd(model.parameters()), epoch=2, epochs=2, seed=1, quiet=True)

@pytest.mark.parametrize('every', [None, '0', -1])
def test_snapshots_are_so_many_seconds_apart(every):
    with pytest.raises(ValueError, match='every wants a finite number >= 0'): Snapshots('there', every=every)

def test_a_batch_of_one_is_told_by_its_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    with pytest.raises(ValueError, match='a batch norm needs two values per channel, got one: '
                                         'use batch_size >= 2'):
        trained(model, plain(1))

def test_an_accuracy_and_a_rate_may_be_tensors(tmp_path):
    def run(s, lr): # twice: the second goes on from the first
        model = net(); opt = torch.optim.Adam(model.parameters(), lr=lr)
        return trained(model, optimiser=opt, schedule=cosine, snapshots=s,
                       validate=lambda m: torch.tensor(.5))
    for _ in range(2):
        row, = run(Snapshots(tmp_path, every=0), torch.tensor(.01))['history']
        assert row['valid_accuracy'] == .5 and type(row['valid_accuracy']) is type(row['lr']) is float

class Besides(nn.Module): # keeps what is no tensor
    def __init__(self): super().__init__(); self.net, self.kept = net(), {'a': [1]}
    def forward(self, x): return self.net(x)
    def get_extra_state(self): return self.kept
    def set_extra_state(self, kept): self.kept = kept

def test_a_network_with_a_state_of_its_own_goes_on(tmp_path):
    model = Besides(); kept = cloned(model.state_dict()); model.kept['a'].append(2)
    assert kept['_extra_state'] == {'a': [1]}
    for epochs in (2, 2): log = trained(Besides(), epochs=epochs, snapshots=Snapshots(tmp_path, every=0))
    assert len(log['history']) == 2

def test_a_group_of_parameters_may_have_keys_of_its_own(tmp_path):
    def run(name):
        model = net()
        opt = torch.optim.SGD([{'params': model[0].parameters()},
                               {'params': model[4].parameters(), 'name': name}], lr=.01)
        return trained(model, optimiser=opt, snapshots=Snapshots(tmp_path, every=0))
    run('head'); run('head')
    with pytest.raises(ValueError, match=r"made with name \[None, 'head'\], now \[None, 'foot'\]"):
        run('foot')

def test_other_frozen_weights_are_another_run_where_a_snapshot_says_so(tmp_path):
    def run():
        model = net(); model[0].requires_grad_(False)
        return trained(model, snapshots=Snapshots(tmp_path, every=0))
    trained(net(), snapshots=Snapshots(tmp_path, every=0))
    with pytest.raises(ValueError, match=r"made with frozen \[\], now \['0.weight', '0.bias'\]"): run()
    s = Snapshots(tmp_path, every=0); old = s.load()
    del old['run']['frozen']; s.save(old) # of an older version
    assert run()

# ---- networks ----------------------------------------------------------------------------------------------

class Odd(nn.Module): # the layer registered last is a hidden one
    def __init__(self): super().__init__(); self.last, self.hidden = nn.Linear(32, 10), nn.Linear(64, 32)
    def forward(self, x): return self.last(self.hidden(x.flatten(1)).relu())

class Behind(nn.Module): # something follows the layer registered last
    def __init__(self): super().__init__(); self.last = nn.Linear(64, 10)
    def forward(self, x): return self.last(x.flatten(1)).log_softmax(1)

@pytest.mark.parametrize('made', [Odd, Behind])
def test_a_last_layer_is_what_the_network_returns(made):
    for ask in (lambda: embeddings(made(), X), lambda: logits_and_cosines(cosine_head(made()), X)):
        with pytest.raises(ValueError, match=f'{made.__name__} does not return what its last linear'): ask()

def test_images_of_another_size_are_not_taken_for_a_wrong_end():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        logits_and_cosines(cosine_head(net()), X[:, :, :7])

def test_cosines_are_those_of_a_network_that_is_right_and_nothing_is_left_behind():
    model = cosine_head(net(), scale=5.).eval(); z, cos = logits_and_cosines(model, X)
    assert torch.equal(z, model(X)) and torch.allclose(z, 5*cos) and not model[4]._forward_hooks
    assert torch.equal(embeddings(net().eval(), X), net().eval()[:4](X))
    with pytest.raises(ValueError, match='scale wants a finite number > 0'): CosineHead(net()[4], scale=0.)

class Cooled(nn.Module): # by a buffer that no state dict has
    def __init__(self):
        super().__init__(); self.net = net(); self.register_buffer('t', torch.ones(1), persistent=False)
    def forward(self, x): return self.net(x)*self.t

def test_a_folded_copy_follows_buffers_that_no_state_dict_has():
    model = Cooled().eval(); fast = fold(model); model.t = model.t*2
    assert not torch.allclose(fast(X), model(X))
    assert torch.allclose(refold(fast, model)(X), model(X), atol=1e-5)

def test_a_slope_is_no_text():
    with pytest.raises(ValueError, match="alpha must be a finite number > 0, got '10'"): SmoothReLU('10')

# ---- images ------------------------------------------------------------------------------------------------

PIXELS, LABELS = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40)%4

def test_a_pair_may_be_a_list():
    assert data_of([PIXELS, LABELS]).fingerprint == data_of((PIXELS, LABELS)).fingerprint

@pytest.mark.parametrize('kind', [torch.float32, torch.int64])
def test_images_up_to_255_are_told_how_to_be_given(kind):
    with pytest.raises(ValueError, match=f'{kind}.: give them as uint8, or divide them by 255'):
        data_of((PIXELS.to(kind), LABELS))

@pytest.mark.parametrize('shape,says', [((5, 3, 8, 8), 'make them alike$'), ((5, 1, 9, 9), 'or give a size')])
def test_images_to_test_on_are_like_the_others(shape, says):
    test = torch.zeros(shape, dtype=torch.uint8), LABELS[:5]
    with pytest.raises(ValueError, match=says): data_of((PIXELS, LABELS), test)
    if shape[1] == 1: assert data_of((PIXELS, LABELS), test, size=8).shape == (1, 8, 8)

def test_data_has_settings_of_its_own():
    with pytest.raises(ValueError, match="unknown setting of data_of 'root'"):
        data_of((PIXELS, LABELS), root='x')

def test_few_images_beside_a_validation_part_of_their_own_are_not_split():
    parts = {'train': Split(PIXELS[:4], LABELS[:4]), 'valid': Split(PIXELS[4:20], LABELS[4:20]),
             'test': Split(PIXELS[20:], LABELS[20:])}
    d = divided('own', parts, tuple('abcd'))
    assert sorted(d.train.y.tolist()) == [0, 1, 2, 3] and torch.equal(d.valid.x, parts['valid'].x)

def test_pixels_that_are_no_numbers_are_told_as_such():
    with pytest.raises(ValueError, match=r'must lie in \[0,1\], got nan: look at where they come from'):
        clipped(torch.tensor([[.5, torch.nan]]))
