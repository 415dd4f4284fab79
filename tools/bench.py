"""Speed side by side: our attacks and training steps against widely used code

Markdown and JSON go to reports/bench/<device kind>/. `make bench` measures every row in about an hour,
`make bench ARGS=--quick` in a few minutes. Ours and theirs do the same work from the same start;
`bench_harness.py` says how they are timed. `bench_switches.py` adds a row for each switch that makes us fast,
with and without it. `make bench ARGS=--again` reruns the rows that the stored report could not
measure, and adds those that it lacks.
"""
import argparse, json, os, sys
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import fisher_exact
from torch.utils.flop_counter import FlopCounterMode

from refine_nb.base import Call, call
from refine_nb.vision import cosine_head, fold
from refine_nb.attacks import attacking, ce, ddn, dra, gaussian, kl_pgd, pgd, salt_and_pepper, square
from refine_nb.training import engine, trades
from bench_harness import (EPS, ROWS, STEP, STEPS, Contest, Setting, budget, chosen, digits, last, markdown,
                           near, needs, once_more, our_pgd, report, row, run, same_pixels, save, seeded)

REPORTS = Path(__file__).resolve().parents[1]/'reports'/'bench'


# ---- attacks -----------------------------------------------------------------------------------------------

def our_kl_pgd(net, x, y): return kl_pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS)

def passes(net, x, y):
    "The least that an attack of ten steps needs: ten forward passes and ten backward passes to the images"
    with attacking(net):
        for _ in range(STEPS):
            at = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(net(at), y, reduction='sum'), at)

def foolbox_pgd(net, x, y):
    foolbox = needs('foolbox')
    return foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS).run(
        foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device), x,
        foolbox.criteria.Misclassification(y), epsilon=EPS)

def torchattacks_pgd(net, x, y): return needs('torchattacks').PGD(net, eps=EPS, alpha=STEP, steps=STEPS)(x, y)

def recomputing_kl_pgd(net, x, y):
    "The inner attack as in TRADES' published code: the net sees the clean image again at every step"
    at = x+.001*torch.randn(x.shape, device=x.device, dtype=x.dtype)
    for _ in range(STEPS):
        at.requires_grad_()
        loss = F.kl_div(F.log_softmax(net(at), 1), F.softmax(net(x), 1), reduction='sum')
        at = at.detach()+STEP*torch.autograd.grad(loss, at)[0].sign()
        at = torch.min(torch.max(at, x-EPS), x+EPS).clamp(0, 1)
    return at

def attack_contest(s, ours, theirs):
    "Ours on a folded channels-last copy of the net, its making timed too; theirs on the net as it is"
    net, (x, y) = s.net(), s.images(s.batch)
    folded, x_last = fold(net), last(x)
    def on_a_copy(net, x, y): return ours(fold(net), last(x), y)
    sides = {'ours': lambda: seeded(on_a_copy, net, x_last, y), 'theirs': lambda: seeded(theirs, net, x, y),
             'theirs on our net': lambda: seeded(theirs, folded, x_last, y)}
    return Contest(sides, same_pixels(s, on_a_copy, theirs), f'{s.batch} images',
                   alike=('ours', 'theirs on our net'))

@row('PGD-10, against ten times forward and backward to the images', at_most=1.05)
def pgd_passes(s):
    net, (x, y) = fold(s.net()), s.images(s.batch)
    x = last(x)
    return Contest({'ours': lambda: seeded(our_pgd, net, x, y), 'theirs': lambda: passes(net, x, y)},
                   lambda found: (True, 'nothing to compare'), f'{s.batch} images')

@row('PGD-10, against foolbox', at_least=2.)
def pgd_foolbox(s): needs('foolbox'); return attack_contest(s, our_pgd, foolbox_pgd)

@row('PGD-10, against torchattacks', at_least=1.4)
def pgd_torchattacks(s): needs('torchattacks'); return attack_contest(s, our_pgd, torchattacks_pgd)

@row('PGD-10 on the KL divergence, against a loop that recomputes the clean logits', at_least=1.6)
def kl_pgd_recomputing(s): return attack_contest(s, our_kl_pgd, recomputing_kl_pgd)


# ---- AutoAttack --------------------------------------------------------------------------------------------

def verdicts_compared(ours, theirs): # bool [seeds, images] each: who withstood
    """How many verdicts differ at the first seed; how many images are broken by every seed of one side and by
    none of the other; on how many a side's own seeds differ; each of these with (ours, theirs) by seed. Also
    the opposed images"""
    def unsure(v): return (v != v[0]).any(0)
    opposed = ((ours[0] != theirs[0]) & ~unsure(ours) & ~unsure(theirs)).nonzero()[:,0]
    return {'changed': (ours[0] != theirs[0]).sum().item(), 'ours_unsure': unsure(ours).sum().item(),
            'theirs_unsure': unsure(theirs).sum().item(), 'opposed': len(opposed),
            'withstood': {i: (ours[:, i].int().tolist(), theirs[:, i].int().tolist()) for i in (
                unsure(ours) | unsure(theirs) | (ours[0] != theirs[0])).nonzero()[:,0].tolist()}}, opposed

def set_apart(ours, theirs, images): # each: (seed, images) -> bool [images], who withstood
    """Images whose verdicts differ beyond chance, by Fisher's exact test at 2 %.
    Both sides run again, with eight seeds that played no part in choosing the images"""
    a, b = (torch.stack([f(seed, images) for seed in range(3, 11)]).sum(0).cpu() for f in (ours, theirs))
    return [i for i,m,n in zip(images.tolist(), a.tolist(), b.tolist())
            if fisher_exact([[m, 8-m], [n, 8-n]]).pvalue < .02]

def verdict_contest(s, *, taught_at, share, eps=None, **about):
    """Which images withstand AutoAttack's standard version, by our code and by the authors'.
    Timed at seed 0; agreement is checked at seeds 0, 1, 2 of both, and at more where the sides are opposed"""
    autoattack, theirs = needs('refine_nb.attacks').autoattack, needs('pyautoattack').AutoAttack
    net, x, y = digits(s, taught_at)
    eps = eps or budget(net, x, y, share)
    net, x, y = net.to(s.device), x.to(s.device), y.to(s.device)
    def mine(seed=0, at=slice(None)):
        return autoattack(net, x[at], y[at], eps=eps, seed=seed, batch_size=len(x)).breaker < 0
    def reference(seed=0, at=slice(None)):
        x_adv, _ = theirs(net, norm='Linf', eps=eps, seed=seed, version='standard',
                          device=s.device).run_standard_evaluation(x[at], y[at], batch_size=len(x))
        with torch.no_grad(): return net(x_adv).argmax(1) == y[at]
    def agree(found):
        a, b = (torch.stack([found[k], f(1), f(2)]).cpu() for k,f in (('ours', mine), ('theirs', reference)))
        alone = {'broken by ours alone': (b[0] & ~a[0]).sum().item(),
                 'broken by theirs alone': (a[0] & ~b[0]).sum().item()}
        said, opposed = verdicts_compared(a, b)
        apart = set_apart(mine, reference, opposed) if len(opposed) else []
        contest.about.update(**said, **alone, set_apart=apart, robust_accuracy=a[0].float().mean().item())
        return (not apart,
                (f"of {len(x)} verdicts {said['changed']} differ at seed 0, {said['opposed']} at three seeds "
                 f"of both, {len(apart)} beyond chance at eight more; verdicts that the "
                 f"authors' code changes between its own seeds: {said['theirs_unsure']}; "
                 f"robust accuracy {a[0].float().mean():.1%}"))
    contest = Contest({'ours': mine, 'theirs': reference}, agree, f'{len(x)} digits, eps {eps:.2f}',
                      about={'eps': eps}, **about)
    return contest

@row('AutoAttack, standard version, a net of about 50 % robust accuracy, against pyautoattack', at_least=3.)
def autoattack_half(s): return verdict_contest(s, taught_at=.15, share=.58, warm=False)

@row('AutoAttack, standard version, a net that withstands nothing, against pyautoattack', at_least=20.)
def autoattack_none(s): return verdict_contest(s, taught_at=0, share=0, eps=.3)

@row('DDN, 100 steps, against adv_lib', at_least=1.)
def ddn_adv_lib(s):
    theirs, (net, x, y) = needs('adv_lib.attacks').ddn, digits(s, .15)
    net, x, y = net.to(s.device), x.to(s.device), y.to(s.device)
    def agree(found):
        fell, far = {}, {}
        for k,x_adv in found.items():
            with torch.no_grad(): fell[k] = net(x_adv).argmax(1) != y
            far[k] = (x_adv-x).flatten(1).norm(dim=1)[fell[k]].median().item()
        same = torch.equal(fell['ours'], fell['theirs']) and abs(far['ours']/far['theirs']-1) < .02
        return same, (f"{fell['ours'].float().mean():.1%} and {fell['theirs'].float().mean():.1%} fall, at a "
                      f"median L2 of {far['ours']:.4f} and {far['theirs']:.4f}")
    return Contest({'ours': lambda: ddn(net, x, y), 'theirs': lambda: theirs(net, x, y, levels=None)}, agree,
                   f'{s.digits} digits')

@row('salt-and-pepper noise, 1,000 draws an image, against foolbox', at_least=1.5)
def salt_foolbox(s):
    foolbox, (net, x, y) = needs('foolbox'), on_digits(s)
    def theirs():
        lent = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
        goal = foolbox.criteria.Misclassification(y)
        found = foolbox.attacks.SaltAndPepperNoiseAttack(steps=1000).run(lent, x, goal)
        with torch.no_grad(): return torch.where((net(found).argmax(1) != y)[:, None, None, None], found, x)
    def agree(made):
        share = (made['ours'] == made['theirs']).flatten(1).all(1).float().mean().item()
        return share > .99, f'{share:.1%} of the images are equal'
    return Contest({'ours': lambda: seeded(salt_and_pepper, net, x, y), 'theirs': lambda: seeded(theirs)},
                   agree, f'{s.digits} digits', warm=False)

@row('Square, several queries in one pass, against a query a pass', at_least=1.5)
def square_ahead(s):
    net, x, y = digits(s, .15); eps = budget(net, x, y, .58)
    net, x, y = net.to(s.device), x.to(s.device), y.to(s.device)
    def found(ahead): return lambda: square(net, x, y, eps=eps, ahead=ahead)
    def agree(made):
        share = (made['ours'] == made['theirs']).flatten(1).all(1).float().mean().item()
        return share > .99, f'{share:.1%} of the images are equal'
    return Contest({'ours': found(None), 'theirs': found(1)}, agree, f'{len(x)} digits, eps {eps:.2f}',
                   warm=False)


# ---- training ----------------------------------------------------------------------------------------------

def our_step(attack, objective, **mode): # -> (net, x, y, optimiser) -> loss, as all steps below
    "Our step of adversarial training, as `adversarial_training` makes it"
    if not isinstance(attack, Call): attack = call(attack, eps=EPS, step_size=STEP, steps=STEPS)
    return stepping(needs('refine_nb.training').adversarial(attack, objective, folded=not mode, **mode))

def stepping(step):
    "A step of ours on a batch, including the optimiser's step"
    def make(net, x, y, optimiser):
        loss, _ = step(net.train(), (x, y, torch.Generator(x.device).manual_seed(2)), 0.)
        optimiser.zero_grad(set_to_none=True); loss.backward(); optimiser.step()
        return loss.detach()
    return make

def train_mode_step(net, x, y, optimiser):
    """The net attacked in training mode with `backward`,
    which also accumulates weight gradients that are never used"""
    net.train(); at = near(x+torch.empty_like(x).uniform_(-EPS, EPS), x)
    for _ in range(STEPS):
        at = at.detach().requires_grad_()
        F.cross_entropy(net(at), y).backward()
        at = near(at.detach()+STEP*at.grad.sign(), x)
    optimiser.zero_grad(); loss = F.cross_entropy(net(at), y)
    loss.backward(); optimiser.step()
    return loss.detach()

def eval_mode_step(net, x, y, optimiser):
    "The net attacked in evaluation mode with `autograd.grad`"
    net.eval(); at = near(x+torch.empty_like(x).uniform_(-EPS, EPS), x)
    for _ in range(STEPS):
        at.requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(net(at), y), [at])
        at = near(at.detach()+STEP*grad.sign(), x)
    net.train(); optimiser.zero_grad(); loss = F.cross_entropy(net(at), y)
    loss.backward(); optimiser.step()
    return loss.detach()

def trades_step(net, x, y, optimiser, beta=6.):
    "TRADES with the clean logits recomputed at every inner step, and a third forward pass for the loss"
    net.eval(); at = recomputing_kl_pgd(net, x, y)
    net.train(); optimiser.zero_grad()
    robust = F.kl_div(F.log_softmax(net(at), 1), F.softmax(net(x), 1), reduction='batchmean')
    loss = F.cross_entropy(net(x), y)+beta*robust
    loss.backward(); optimiser.step()
    return loss.detach()

def on_colours(s, dtype=None):
    "A ResNet-18 and colour images; a few small ones where a dtype is named, for a comparison in it"
    if dtype is None: return s.net(), *s.images(s.batch)
    return s.net(dtype), *s.images(4, 16, dtype)

def on_digits(s, dtype=torch.float32):
    "The small net of about half robust accuracy, and digits"
    net, x, y = digits(s, .15)
    return net.to(s.device, dtype), x.to(s.device, dtype), y.to(s.device)

def training_contest(s, ours, theirs, same=None, head=lambda net: net, on=on_colours):
    """A step of SGD on equal nets, with another head where `head` gives one.
    `same`: a step of ours that does exactly what theirs does, timed as well, if `ours` does not.
    `on`: (setting, dtype, by default float32 at full size) -> net, images, labels"""
    def side(step, place, *dtype):
        net, x, y = on(s, *dtype); net = place(head(net))
        if place is ours_place: x = last(x)
        optimiser = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9, weight_decay=5e-4)
        return lambda: seeded(step, net, x, y, optimiser)
    def ours_place(net): return engine(s.device).place(net)
    def theirs_place(net): return net
    sides = {'ours': side(ours, ours_place), 'theirs': side(theirs, theirs_place)} | (
        {'ours as theirs': side(same, ours_place)} if same else {})
    def agree(found):
        a, b = (side(step, place, torch.float64)().item()
                for step,place in ((same or ours, ours_place), (theirs, theirs_place)))
        return (abs(a-b) < 1e-9*abs(b), f"float64: losses {a:.10g} and {b:.10g}; float32: "
                f"{found['ours as theirs' if same else 'ours'].item():.5g} and {found['theirs'].item():.5g}")
    size = f'{s.digits} digits' if on is on_digits else f'{s.batch} images'
    return Contest(sides, agree, size, alike=('ours as theirs', 'theirs') if same else None)

@row('a training step with PGD-10, against a loop that attacks in training mode with backward()', at_least=2.)
def at_train_mode(s):
    return training_contest(s, our_step(pgd, ce), train_mode_step, same=our_step(pgd, ce, mode='train'))

@row('a training step with PGD-10, against a loop that attacks in evaluation mode with autograd.grad',
     at_least=1.2)
def at_eval_mode(s): return training_contest(s, our_step(pgd, ce), eval_mode_step)

@row("a training step with PGD-10, against MAIR's", at_least=1.)
def at_mair(s):
    needs('mair')
    return training_contest(s, our_step(pgd, ce), needs('bench_loops').mair_step)

@row('a TRADES step, against a loop that recomputes the clean logits at every inner step', at_least=1.6)
def trades_recomputing(s): return training_contest(s, our_step(kl_pgd, trades), trades_step)

def spat_contest(s, on):
    ours, published = needs('refine_nb.training'), needs('bench_loops')
    return training_contest(s, our_step(ours.spat_pgd, call(ours.spat)), published.spat_step,
                            head=cosine_head, on=on)

@row('a SPAT step, against the released loop', at_least=1.8)
def spat_released(s): return spat_contest(s, on_colours)

@row('a SPAT step on the net of about 50 % robust accuracy, against the released loop', at_least=1.8)
def spat_digits(s): return spat_contest(s, on_digits)

@row('a MART step, against the released loop', at_least=1.)
def mart_released(s):
    ours, near_x = needs('refine_nb.training'), dict(start=gaussian, clamp_start=False)
    attack = call(pgd, eps=EPS, step_size=STEP, steps=STEPS, **near_x)
    return training_contest(s, our_step(attack, call(ours.mart)), needs('bench_loops').mart_step)

@row('a DRA step, against Algorithm 1 line by line', at_least=1.)
def dra_by_the_line(s):
    step = needs('refine_nb.training').regulated(call(dra, eps=2/255), folded=True)
    return training_contest(s, stepping(step), needs('bench_loops').dra_step)


import_module('bench_switches') # adds its rows after these


# ---- the rates of the device -------------------------------------------------------------------------------

def rate(f, amount, clock, seconds=.5):
    "`amount` per second, in units of 1e9: the best of the runs that fit in `seconds`"
    f(); best, start = float('inf'), clock.wall()
    while clock.wall()-start < seconds: best = min(best, clock.time(f)[1][0])
    return amount/best/1e9

def device_limits(s):
    "Matrix products, copies, and the rates that the net reaches: name -> (rate, unit)"
    clock, n = s.clock(), 8192 if s.cuda else 1536
    a, b, c = (torch.rand(n, n, device=s.device) for _ in range(3))
    source = torch.rand(2**28 if s.cuda else 2**25, device=s.device)
    target = torch.empty_like(source)
    net, (x, _) = fold(s.net()), s.images(s.batch)
    x = last(x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter: net(x)
    work = counter.get_total_flops()
    def forward():
        with torch.no_grad(): net(x)
    def both():
        at = x.detach().requires_grad_()
        torch.autograd.grad(net(at).sum(), at)
    kind = 'TF32' if s.cuda else 'float32'
    return {
        f'matrix product {n}x{n}, {kind}': (rate(lambda: torch.mm(a, b, out=c), 2*n**3, clock), 'GFLOP/s'),
        'copy in memory, read and written': (rate(lambda: target.copy_(source), 8*source.numel(), clock),
                                             'GB/s'),
        f'ResNet-18 forward, {s.batch} images, {kind}': (rate(forward, work, clock), 'GFLOP/s'),
        f'the same, forward and backward to the images, {kind}': (rate(both, 2*work, clock), 'GFLOP/s')}


# ---- the command -------------------------------------------------------------------------------------------

def arguments(argv):
    p = argparse.ArgumentParser(prog='bench.py', description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true',
                   help='small batches, a few minutes: checks that everything works')
    p.add_argument('--again', action='store_true',
                   help='only rows that the stored report could not measure or lacks')
    p.add_argument('--rows', help='names separated by commas, out of: '+', '.join(r.name for r in ROWS))
    p.add_argument('--out', type=Path, help='folder for bench.md and bench.json; by default only '
                   'full runs are kept, in reports/bench/<device kind>/')
    p.add_argument('--device', help="'cpu', 'cuda' or 'cuda:1'; the first GPU where there is one")
    return p.parse_args(argv)

def main(argv=None, rows=None):
    args = arguments(argv)
    try: rows = chosen([n for n in (args.rows or '').split(',') if n], ROWS if rows is None else rows)
    except ValueError as e: print(e, file=sys.stderr); return 2
    s, load = Setting(engine(args.device).device, args.quick), os.getloadavg()[0]
    how = dict(seconds=45 if args.quick else 480, rounds=1 if args.quick else 3, clock=s.clock())
    if args.again:
        try: made = once_more(json.loads((REPORTS/s.kind/'bench.json').read_text()), s, rows, **how)
        except (OSError, ValueError) as e: print(e, file=sys.stderr); return 2
    else:
        of = partial(report, setting=s, limits=device_limits(s), load=load, quick=args.quick)
        def so_far(lines): # whoever stops the run finds the rows so far, if a folder was named
            if args.out: save(of(lines), args.out)
        made = of(run(rows, s, so_far=so_far, **how))
    folder = args.out or (None if args.quick or args.rows else REPORTS/s.kind)
    if folder: save(made, folder)
    print(markdown(made))
    return int(any(r.get('agrees') is False for r in made['rows']))


if __name__ == '__main__': sys.exit(main())
