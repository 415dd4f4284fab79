"""What each switch that makes us fast gains on the device at hand: rows of `bench.py`, with it and without it

Both sides are ours and differ only in the switch; the one without it is called theirs, as in the other rows.
Their results are compared as closely as the switch allows: bit by bit, pixel by pixel in float64, or within
a tolerance that the row states.
"""
from collections import deque
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

from refine_nb.base import Recipe, call
from refine_nb.vision import (Data, GreyConv2d, Split, classifier, fold, laid, layout_for, load_data,
                              small_network)
from refine_nb.attacks import autoattack, ce, fixed_sizes, pgd
from refine_nb.evaluation import EVAL_BATCH, predict
from refine_nb.training import Engine, Method, adversarial, fine_tune, sgd, train_epoch
from refine_nb.runs import Store, here, timeless, workers
from bench_harness import (EPS, STEP, STEPS, Absent, Contest, budget, digits, last, near, our_pgd, row,
                           same_pixels, seeded)

switch = partial(row, switch=True)

def needs_gpu(s, why):
    if not s.cuda: raise Absent(f'needs a GPU: {why}')


# ---- attacks -----------------------------------------------------------------------------------------------

def attack_contest(s, ours, theirs, made=None): # each: (net, x, y) -> () -> x_adv, the attack prepared
    "Two ways to attack a net in channels-last that must give the same pixels; `made`: net, x, y"
    net, x, y = made or (s.net(), *s.images(s.batch))
    net, x = net.to(memory_format=torch.channels_last), last(x)
    def at_once(side): return lambda net, x, y: side(net, x, y)()
    return Contest({'ours': partial(seeded, ours(net, x, y)), 'theirs': partial(seeded, theirs(net, x, y))},
                   same_pixels(s, at_once(ours), at_once(theirs), made and doubled(*made)),
                   f'{len(x)} images')

def doubled(net, x, y): return deepcopy(net).double(), x[:4].double(), y[:4]

def on_itself(net, x, y): return lambda: our_pgd(net, x, y)

@switch('PGD-10 on a folded copy, made inside the clock; without: on the net itself')
def switch_fold(s):
    def on_a_copy(net, x, y): return lambda: our_pgd(fold(net), x, y)
    return attack_contest(s, on_a_copy, on_itself)

@switch('PGD-10 on a folded copy laid in channels-last; without: laid in the plain layout')
def switch_layout(s):
    def lying(layout):
        def ready(net, x, y):
            net = laid(fold(net), layout) # whatever the attack gives it
            return lambda: our_pgd(net, x, y)
        return ready
    return attack_contest(s, lying(torch.channels_last), lying(torch.contiguous_format))

@switch('PGD-10 on a folded network for digits, with our backward pass for its first convolution; '
        "without: with torch's")
def switch_grey(s):
    def back(kind): # both in channels-last
        def ready(net, x, y):
            net = fold(net)
            for m in net.modules():
                if isinstance(m, GreyConv2d): m.__class__ = kind
            return lambda: our_pgd(net, x, y)
        return ready
    net = small_network('two_convs', num_classes=10).eval().to(s.device)
    return attack_contest(s, back(GreyConv2d), back(nn.Conv2d), (net, *s.images(s.digits, 28, channels=1)))

@switch('PGD-10 on a folded copy in the layout that a trial chose before; without: in channels-last')
def switch_trial(s):
    def laid_as(choose):
        def ready(net, x, y):
            net = fold(net); laid(net, choose(net, x))
            return lambda: our_pgd(net, x, y)
        return ready
    return attack_contest(s, laid_as(layout_for), laid_as(lambda net, x: torch.channels_last))

@switch('PGD-10 on a folded copy in ten batches that shrink as images fall, padded to powers of two and '
        'replayed from CUDA graphs; without: launched kernel by kernel')
def switch_sizes(s):
    needs_gpu(s, 'CUDA graphs are recorded there')
    return sizes_contest(s)

def sizes_contest(s):
    "On a CPU the same code without graphs"
    def shrinking(net, x, y):
        left = [n for k in (37, 33, 24, 19, 13, 11, 7, 4, 2, 1) if (n := len(x)*k//40)]
        return lambda: torch.cat([our_pgd(net, x[:n], y[:n]) for n in left])
    def padded(net, x, y): return shrinking(fixed_sizes(fold(net)), x, y)
    return attack_contest(s, padded, lambda net, x, y: shrinking(fold(net), x, y))

def backward_pgd(net, x, y):
    "PGD that calls `backward`, and so computes weight gradients that are never used"
    at = near(x+torch.empty_like(x).uniform_(-EPS, EPS), x)
    for _ in range(STEPS):
        at = at.detach().requires_grad_()
        F.cross_entropy(net(at), y).backward()
        at = near(at.detach()+STEP*at.grad.sign(), x)
    return at

@switch('PGD-10 on a net whose weights ask for no gradients meanwhile; without: `backward` to weights, too')
def switch_lending(s):
    def backwards(net, x, y): return lambda: backward_pgd(net, x, y)
    return attack_contest(s, on_itself, backwards)


# ---- a training step ---------------------------------------------------------------------------------------

def step_contest(s, ours, theirs, *, loss, pixels=None): # engines, and what may differ
    """A step of adversarial training under two engines, each from the same net, images and draws.
    Losses may differ by less than the share `loss`; at least the share `pixels` must be equal, if given"""
    net, x, y = digits(s, 0) if s.quick else (s.net(), *s.images(s.batch))
    def side(on):
        own, seen, images = on.place(deepcopy(net)), deque(maxlen=1), x.to(s.device)
        step = adversarial(call(pgd, eps=EPS, step_size=STEP, steps=STEPS), ce, folded=True, see=seen.append)
        def batches(epoch):
            draws = torch.Generator(s.device).manual_seed(2)
            yield last(images), y.to(s.device), draws
        about = dict(epoch=0, epochs=1, seed=0, engine=on, quiet=True)
        runner, optimiser = on.runner(own), sgd(own.parameters(), lr=.01)
        def once():
            made = train_epoch(runner, Method(batches, step, 1, len(x)), optimiser, **about)
            return made['loss'], seen[-1]
        return once
    def agree(found):
        (a, at), (b, other) = found['ours'], found['theirs']
        alike = ((at-other).abs() < 1e-6).float().mean().item()
        said = f', at least {pixels:.0%} must be' if pixels is not None else ''
        return (abs(a-b) < loss*abs(b) and (pixels is None or alike >= pixels),
                f'losses {a:.5g} and {b:.5g}, which may differ by {loss:.2%}; '
                f'{alike:.1%} of the attacked pixels are equal{said}')
    return Contest({'ours': side(ours), 'theirs': side(theirs)}, agree, f'{len(x)} images')

@switch('a training step with PGD-10 in bfloat16, its attack in full precision; without: all in float32')
def switch_bfloat16(s):
    # the attack is the same, except for GPU kernels that add in any order
    return step_contest(s, Engine(s.device, 'bfloat16'), Engine(s.device), loss=.03,
                        pixels=.99 if s.cuda else 1.)

@contextmanager
def tf32(allowed):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    were = [b.allow_tf32 for b in backends]
    for b in backends: b.allow_tf32 = allowed
    try: yield
    finally:
        for b,was in zip(backends, were): b.allow_tf32 = was

@switch('a training step with PGD-10 where TF32 is allowed; without: all in float32')
def switch_tf32(s):
    needs_gpu(s, 'TF32 is arithmetic of its own')
    plain = step_contest(s, Engine(s.device), Engine(s.device), loss=.02)
    def under(allowed, side):
        def once():
            with tf32(allowed): return side()
        return once
    return replace(plain, sides={k: under(k=='ours', side) for k,side in plain.sides.items()})

@switch('three training steps on clean images, a ResNet-20 in channels-last; without: in the plain layout')
def switch_trained(s):
    n, steps = 8 if s.quick else 128, 3
    torch.manual_seed(0); net = classifier('resnet20', num_classes=10, stem='cifar').to(s.device)
    x, y = s.images(n)
    def side(layout):
        def once():
            own = deepcopy(net).train().to(memory_format=layout); optimiser = sgd(own.parameters(), lr=.01)
            for _ in range(steps):
                loss = ce(own(x), y).mean()
                optimiser.zero_grad(); loss.backward(); optimiser.step()
            return loss.detach()
        return once
    def agree(found):
        a, b = (v.item() for v in found.values())
        return abs(a-b) < 1e-3*abs(b), f'losses {a:.6g} and {b:.6g}, which may differ by 0.1%'
    return Contest({'ours': side(torch.channels_last), 'theirs': side(torch.contiguous_format)}, agree,
                   f'{n} images')

def compiles(s):
    "`torch.compile` works here, or `Absent` says why not"
    try: torch.compile(lambda x: x.sin()+1)(torch.ones(4, device=s.device))
    except Exception as e: raise Absent(f'torch.compile fails here: {str(e).strip().splitlines()[0]}') from e

@switch('a training step with PGD-10, the net of the step compiled; without: not compiled')
def switch_compiled(s):
    compiles(s)
    return step_contest(s, Engine(s.device, compiled=True), Engine(s.device), loss=.001)

@switch('a compiled training step with PGD-10, replayed from CUDA graphs; without: kernel by kernel')
def switch_graphs(s):
    needs_gpu(s, 'CUDA graphs are recorded there'); compiles(s)
    return step_contest(s, Engine(s.device, compiled=True, graphs=True), Engine(s.device, compiled=True),
                        loss=.001)


# ---- data --------------------------------------------------------------------------------------------------

def epoch_contest(s):
    "Ordinary training from images that are on the device, and from batches that are moved one by one"
    n, on, g = s.batch*(2 if s.quick else 16), Engine(s.device), torch.Generator().manual_seed(1)
    there = Split(torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8),
                  torch.randint(10, (n,), generator=g))
    data = Data('noise', tuple('0123456789'), there, there, there, fingerprint='noise')
    def method(device): return fine_tune(data, batch_size=s.batch, seed=0, device=device, augment='crop_flip')
    def moved(epoch):
        for batch in method('cpu').batches(epoch): yield [t.to(s.device) for t in batch]
    ways = {'ours': method(s.device), 'theirs': replace(method('cpu'), batches=moved)}
    def side(way):
        net = on.place(s.net()); optimiser = sgd(net.parameters(), lr=.01)
        return lambda: train_epoch(net, way, optimiser, epoch=0, epochs=1, seed=0, engine=on, quiet=True)
    def agree(found):
        pairs = list(zip(*(way.batches(0) for way in ways.values())))
        worst = max((a-b).abs().max().item() for (a,*_),(b,*_) in pairs)
        same = all(torch.equal(c, d) for (_,*a),(_,*b) in pairs for c,d in zip(a, b))
        return (same and worst < 1e-6,
                f"{len(pairs)} batches: pixels differ by up to {worst:.0e}, less than 1e-06 may be; "
                f"labels and places are {'equal' if same else 'NOT equal'}")
    return Contest({k: side(way) for k,way in ways.items()}, agree, f'{n} images, batches of {s.batch}')

@switch('an epoch of training on images that lie on the device; without: each batch moved from the host')
def switch_data(s):
    needs_gpu(s, 'on a CPU the images lie where they are used either way')
    return epoch_contest(s)


# ---- evaluation --------------------------------------------------------------------------------------------

@switch('AutoAttack, what survives pooled across batches; without: one batch after the other')
def switch_pooled(s):
    net, x, y = digits(s, .15)
    net, x, y = net.to(s.device), x.to(s.device), y.to(s.device)
    n, how = len(x)//4, dict(steps=10, n_queries=100) if s.quick else {}
    def attacked(x, y): return autoattack(net, x, y, eps=.15, batch_size=n, **how).breaker
    def batch_by_batch(): return torch.cat([attacked(a, b) for a,b in zip(x.split(n), y.split(n))])
    def agree(found):
        differ = (found['ours'] != found['theirs']).sum().item()
        held = (found['ours'] < 0).sum().item()
        return differ == 0, f'of {len(x)} verdicts {differ} differ, none may; {held} images withstand'
    return Contest({'ours': lambda: attacked(x, y), 'theirs': batch_by_batch}, agree,
                   f'{len(x)} digits, batches of {n}', warm=False)

@switch('APGD-T and FAB-T on a few images, several targets of each in one pass; without: a target a pass')
def switch_targets(s):
    net, x, y = digits(s, .15); few = 4 if s.quick else 24
    eps = budget(net, x, y, .12)
    hard = dict(eps=eps, components=('apgd-ce',)) | (dict(steps=5) if s.quick else {})
    at = (autoattack(net, x, y, **hard).breaker < 0).nonzero()[:few, 0] # what reaches them: survivors
    net, x, y = net.to(s.device), x[at].to(s.device), y[at].to(s.device)
    how = hard | dict(components=('apgd-t', 'fab-t'))
    def attacked(rows): return lambda: autoattack(net, x, y, batch_size=rows, **how).breaker
    def agree(found):
        differ = (found['ours'] != found['theirs']).sum().item()
        return differ == 0, f'of {len(x)} verdicts {differ} differ, none may'
    return Contest({'ours': attacked(s.digits), 'theirs': attacked(len(x))}, agree,
                   f'{len(x)} digits, eps {eps:.2f}')

@switch(f'clean accuracy in batches of {EVAL_BATCH}; without: in batches of 50')
def switch_batches(s):
    n = (10 if s.cuda and not s.quick else 1)*EVAL_BATCH
    net, (x, _) = Engine(s.device).place(s.net()), s.images(n, 8 if s.quick else 32)
    def asked(x): return predict(net, x, device=s.device)
    def agree(found):
        share = (found['ours'] == found['theirs']).float().mean().item()
        return share > .99, f'{share:.1%} of the classes are equal, more than 99% must be'
    return Contest({'ours': lambda: asked(x), 'theirs': lambda: torch.cat([asked(b) for b in x.split(50)])},
                   agree, f'{n} images')


# ---- several runs ------------------------------------------------------------------------------------------

@contextmanager
def threads(n):
    were = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(were)

def run_contest(s):
    "Two trainings at once and in turn, each time in a new store, with one thread each"
    epochs = 1 if s.quick else 60 if s.cuda else 8
    base = Recipe(data=call(load_data, name='digits', n_train=64 if s.quick else None),
                  model=call(classifier, name='resnet20', stem='cifar'), method=call(fine_tune),
                  optimiser=call(sgd, lr=.05), epochs=epochs, batch_size=32)
    recipes = [replace(base, seed=seed) for seed in (0, 1)]
    def made(executor):
        with threads(1), TemporaryDirectory() as root:
            store = Store(root, Engine(s.device), quiet=True)
            store.run(recipes, executor=executor)
            return [(timeless(e.result), e.tensors()) for e in (store.get(r, make=False) for r in recipes)]
    def agree(found):
        pairs = list(zip(found['ours'], found['theirs']))
        first = [[r['history'][0]['loss'] for r,_ in side] for side in found.values()]
        same = all(r == q and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
                   for (r,a),(q,b) in pairs)
        near = all(abs(a-b) < .01*abs(b) for a,b in zip(*first))
        how = 'equal' if same else 'NOT equal'
        return (same or s.cuda and near, f'weights and numbers are {how} bit for bit'
                + ', losses of the first epoch within 1%, which a GPU may do'*(s.cuda and near))
    return Contest({'ours': lambda: made(workers(2)), 'theirs': lambda: made(here())}, agree,
                   f'{epochs} epochs each', warm=False)

@switch('two small trainings in two single-threaded processes, start-up included; '
        'without: one after the other', counts=('wall',))
def switch_processes(s): return run_contest(s)
