"""Adversarial training: against loops written out by hand, and what is counted and drawn.

A killed run ends with the bits of one that was left in peace.
"""
import signal
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refine_nb.base import call, canonical, key
from refine_nb.vision import classifier, load_data
from refine_nb.attacks import ce, kl_pgd, pgd
from refine_nb.training import (Diverged, Engine, adversarial, adversarial_training, cosine, halves,
                                piecewise, sgd, trades, train_epoch)
from refine_nb.runs import timeless
from toys import Worker, net, quiet, recipe, work

PGD, KL = call(pgd, eps=.1, step_size=.02, steps=3), call(kl_pgd, eps=.1, step_size=.02, steps=3)
RUN = recipe(method=call(adversarial_training, attack=KL, objective=call(trades, beta=2.)),
             schedule=call(cosine, warmup=.1), clip=2., robust=PGD, n_robust=40, select='last')


def drawn(seed=5): return torch.Generator().manual_seed(seed)

@pytest.fixture
def batch():
    "Sixteen images, their labels, and a network that is being trained, without dropout"
    model = net(num_classes=10).train(); model[3].p = 0.
    return torch.rand(16, 1, 8, 8), torch.randint(10, (16,)), model

def gradients(model, loss):
    return dict(zip((n for n,_ in model.named_parameters()),
                    torch.autograd.grad(loss, list(model.parameters()))))


# ---- the step, against loops written out -------------------------------------------------------------------

def test_trades_by_hand(batch):
    """Noise of .001, clean probabilities fixed, steps on their KL in evaluation mode.
    Then both forwards in training mode, clean first, nothing detached"""
    x, y, model = batch
    before = {k: v.clone() for k,v in model.state_dict().items()}
    got = adversarial(KL, call(trades, beta=6.))(model, (x, y, drawn()), 0.)[0]
    by_step, statistics = gradients(model, got), {k: v.clone() for k,v in model.named_buffers()}
    model.load_state_dict(before); model.eval()
    p, x_adv = model(x).softmax(1).detach(), x + .001*torch.randn(x.shape, generator=drawn())
    for _ in range(3):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(F.kl_div(model(x_adv).log_softmax(1), p, reduction='sum'), x_adv)
        x_adv = (x + (x_adv.detach()+.02*grad.sign()-x).clamp(-.1, .1)).clamp(0, 1)
    model.train(); z, z_adv = model(x), model(x_adv)
    loss = F.cross_entropy(z, y) + 6*F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction='batchmean')
    assert_close(got, loss); assert_close(by_step, gradients(model, loss))
    assert_close(statistics, dict(model.named_buffers()))

@pytest.mark.parametrize('mode', ['eval', 'train', 'train_untouched'])
def test_madry_by_hand(batch, mode):
    x, y, model = batch
    before = {k: v.clone() for k,v in model.state_dict().items()}
    got = adversarial(PGD, ce, mode=mode)(model, (x, y, drawn()), 0.)[0]
    by_step, statistics = gradients(model, got), {k: v.clone() for k,v in model.named_buffers()}
    model.load_state_dict(before); model.train(mode != 'eval')
    x_adv = (x + (torch.rand(x.shape, generator=drawn())*2-1)*.1).clamp(0, 1)
    for _ in range(3):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = (x + (x_adv.detach()+.02*grad.sign()-x).clamp(-.1, .1)).clamp(0, 1)
    if mode != 'train': model.load_state_dict(before)
    loss = F.cross_entropy(model.train()(x_adv), y)
    assert_close(got, loss); assert_close(by_step, gradients(model, loss))
    assert_close(statistics, dict(model.named_buffers()))

MODES = {'Madry': (PGD, ce, 'eval', 11, 1), 'Madry in train mode': (PGD, ce, 'train', 11, 11),
         'statistics put back': (PGD, ce, 'train_untouched', 11, 1), 'halves': (PGD, halves, 'eval', 12, 2),
         'TRADES': (KL, trades, 'eval', 13, 2), 'TRADES in train mode': (KL, trades, 'train', 13, 13)}

@pytest.mark.parametrize('name', MODES)
def test_forwards_and_statistics(name):
    "of one update with ten steps, on a ResNet: every batch norm counts alike, and a frozen one stays frozen"
    attack, objective, mode, forwards, updates = MODES[name]
    model, seen = classifier('resnet18', num_classes=10).train(), Counter()
    model.net.layer1[0].bn1.eval(); model.register_forward_hook(lambda *_: seen.update(n=1))
    loss, _ = adversarial(attack.but(steps=10), objective,
                          mode=mode)(model, (torch.rand(2,1,8,8), torch.tensor([0,1]), drawn()), 0.)
    assert seen['n'] == forwards and not model.net.layer1[0].bn1.training and model.training
    assert (Counter(m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
            == {updates: 19, 0: 1})
    loss.backward(); assert all(p.grad is not None for p in model.parameters())

def test_an_attack_makes_no_weight_gradients(batch):
    "not even for a moment: nothing that it differentiates needs them"
    x, y, model = batch; asked = []
    model.register_forward_hook(lambda m, *_: asked.append(any(p.requires_grad for p in m.parameters())))
    for mode in ('eval', 'train', 'train_untouched'):
        adversarial(PGD, ce, mode=mode)(model, (x, y, drawn()), 0.)
    assert asked == [*[False]*3, True]*3

def test_a_compiled_model(batch, monkeypatch):
    """Attack and update through `torch.compile` (its tracing, not its code generation).
    The same numbers as without, from no more than a few graphs"""
    (x, y, model), made = batch, []; torch._dynamo.reset()
    x, model = x.double(), deepcopy(model).double() # where rounding turns no sign of a gradient
    def backend(graph, inputs): made.append(1); return graph.forward
    runner = torch.compile(model, backend=backend)
    step = adversarial(KL, trades)
    for seed in range(3):
        state = {k: v.clone() for k,v in model.state_dict().items()}
        plain = gradients(model, step(model, (x, y, drawn(seed)), 0.)[0]); model.load_state_dict(state)
        assert_close(gradients(model, step(runner, (x, y, drawn(seed)), 0.)[0]), plain)
    assert len(made) <= 4
    model.load_state_dict(state) # what is folded is the network inside
    assert_close(gradients(model,
                           adversarial(KL, trades, folded=True)(runner, (x, y, drawn(seed)), 0.)[0]), plain)
    torch._dynamo.reset()


# ---- recipes -----------------------------------------------------------------------------------------------

def test_new_fields_do_not_rename_old_runs():
    assert set(canonical(recipe())) == {'spec', 'data', 'model', 'method', 'optimiser',
                                        'epochs', 'batch_size', 'seed'}
    changed = [recipe(schedule=call(cosine)), recipe(clip=1), recipe(robust=PGD),
               recipe(robust=PGD, n_robust=9), recipe(select='last'), recipe(robust=PGD, select='robust')]
    assert (len({key(r) for r in [recipe(), *changed]}) == 7 and key(recipe(clip=1)) == key(recipe(clip=1.))
            and key(recipe(select='valid')) == key(recipe()))

@pytest.fixture(scope='module')
def peace(tmp_path_factory):
    "A store in which nothing ever happened"
    root = tmp_path_factory.mktemp('peace')
    quiet(root, every=3600.).get(RUN)
    return root

def test_the_history(peace):
    done = quiet(peace).get(RUN)
    rows = done.result['history']
    assert [set(h) for h in rows] == [{'epoch', 'loss', 'lr', 'train_accuracy', 'robust_train_accuracy',
                                       'valid_accuracy', 'robust_valid_accuracy', 'images_per_second'}]*3
    assert_close([h['lr'] for h in rows], [.1*cosine((e+7/8)/3, warmup=.1) for e in range(3)])
    assert (done.result['best_accuracy'] == max(h['robust_valid_accuracy'] for h in rows)
            and 'other' not in done.result)

def test_what_does_not_touch_the_training(peace, tmp_path):
    """Looking at robustness, and which epoch is kept, change no weight of the last epoch.
    Seed, draws, schedule and clipping do"""
    last = quiet(peace).tensors(RUN)['5.weight']
    blind = quiet(tmp_path/'a').tensors(replace(RUN, robust=None, n_robust=None))['5.weight']
    assert torch.equal(last, blind)
    for i,other in enumerate((replace(RUN, seed=2), replace(RUN, schedule=None), replace(RUN, clip=.1),
                              replace(RUN, method=RUN.method.but(attack=KL.but(steps=1))))):
        assert not torch.equal(last, quiet(tmp_path/f'{i}').tensors(other)['5.weight'])

@pytest.mark.parametrize('n', [2, 6, 9])
def test_killed(peace, tmp_path, n):
    """At the first, between two, and at the last snapshot.
    Schedule, dropout, augmentation and random starts go on as if nothing had been"""
    root, said = tmp_path/'store', tmp_path/'said'
    assert (Worker(said, work, root, RUN, kill=(n, root/'running'/key(RUN))).end()
            == -signal.SIGKILL), said.read_text()
    a, b = quiet(root).get(RUN), quiet(peace).get(RUN)
    assert timeless(a.result) == timeless(b.result)
    x, y = a.tensors(), b.tensors()
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)

def test_best_and_last(tmp_path):
    "A rate that explodes late: robust accuracy is best early; both weights are there, whatever is the result"
    spoilt = replace(RUN, schedule=call(piecewise, at=(.6,), factor=30.), epochs=3)
    for select, other in (('last', 'best'), ('robust', 'last')):
        store, r = quiet(tmp_path/select), replace(spoilt, select=select)
        done = store.get(r).result
        assert done['best_epoch'] < 3 and any(k.startswith(f'{other}/') for k in store.tensors(r))
        best, last = (store.model(r, which)[5].weight for which in ('best', 'last'))
        assert (not torch.equal(best, last)
                and torch.equal(store.model(r)[5].weight, last if select=='last' else best))

def test_a_network_that_breaks_down(tmp_path):
    "The attack of the next step is the first to meet nan; the sentence names the step, and what is kept"
    r = replace(RUN, schedule=call(piecewise, at=(.5,), factor=1e38), clip=None)
    with pytest.raises(Diverged, match=r'at epoch 2, step [34] of 4; the snapshot of epoch 1 is kept'):
        quiet(tmp_path).get(r)

def test_a_budget_without_a_step(tmp_path):
    with pytest.raises(ValueError, match='step_size wants a finite number > 0, got 0'):
        quiet(tmp_path).get(replace(RUN, method=RUN.method.but(attack=call(pgd, eps=.1, step_size=0.))))


# ---- a GPU -------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('made', [dict(), dict(precision='bfloat16', compiled=True),
                                  dict(precision='bfloat16', compiled=True, graphs=True)],
                         ids=['plain', 'compiled', 'graphs'])
def test_on_a_gpu(made):
    "Each engine trains: the loss falls, and the attack stays within its budget"
    engine, data = Engine('cuda', **made), load_data('digits', n_train=256)
    model = engine.place(classifier('resnet18', num_classes=10, stem='cifar'))
    runner, m = engine.runner(model), adversarial_training(data, batch_size=64, seed=1,
                                                           attack=KL, objective=partial(trades, beta=1.),
                                                           augment='none', device='cuda')
    optimiser = sgd(model.parameters(), lr=.02)
    losses = [train_epoch(runner, m, optimiser, epoch=e, epochs=6, seed=1, engine=engine, quiet=True)['loss']
              for e in range(6)]
    assert losses[-1] < .8*losses[0]
    x, y, generator = next(m.batches(0))
    assert (x.is_contiguous(memory_format=torch.channels_last)
            and (KL(runner, x, y, generator=generator)-x).abs().max() < .1001)
