"""Speed side by side: our attacks and training steps against the codes that people use

Markdown and JSON go to reports/bench/<device kind>/. `make bench` measures every row in about half an hour,
`make bench ARGS=--quick` in about one minute. Ours and theirs do the same work from the same start; a row
first shows that they agree, then runs A, B, A at least three times, where A is the mean of both, so that a
machine that slows down or wakes up does so for both. It reports the median of the ratios with its range, in
wall and in processor time, beside the load and the processor time that it got. Where the ratios span a
factor of 1.3 or more in wall time, which others on the machine can take away, the processor time counts, and
is said to. Where that wavers as much the rounds are run anew; after three times the row is not measured, and
says so. `make bench ARGS=--again` runs such rows of the stored report again.
"""
import argparse, json, os, re, statistics, sys, time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import fisher_exact
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from refine_nb.base import Call, call, commit, device_name, versions, whole
from refine_nb.vision import classifier, cosine_head, fold
from refine_nb.attacks import attacking, ce, ddn, dra, gaussian, kl_pgd, pgd, square
from refine_nb.training import engine, trades
from refine_nb.reporting import show_table

REPORTS = Path(__file__).resolve().parents[1]/'reports'/'bench'
EPS, STEP, STEPS = 8/255, 2/255, 10


# ---- the harness -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Clock:
    "Two clocks in seconds, and what to wait for before reading them"
    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    sync: Callable[[], None] = lambda: None
    counts: tuple[str,...] = ('wall', 'cpu')  # the work of a GPU takes no processor time

    def time(self, f): # -> what f gives, (wall, cpu)
        self.sync(); start = self.wall(), self.cpu()
        found = f(); self.sync()
        return found, (self.wall()-start[0], self.cpu()-start[1])

@dataclass(frozen=True)
class Contest:
    "Functions that do the same work: 'ours', 'theirs', perhaps others, which are timed beside them"
    sides: dict[str, Callable[[], object]]
    # what each side gave -> whether they agree, and a line that says how well
    agree: Callable[[dict], tuple[bool, str]]
    size: str                                 # of the work, for the table
    # a side of ours and one of theirs that do it in the same way on the same net,
    # where 'ours' and 'theirs' do not
    alike: tuple[str,str]|None = None
    warm: bool = True                         # one round before the clock; a long contest may count its first
    about: dict = field(default_factory=dict) # what else the JSON should hold

@dataclass(frozen=True)
class Row:
    """A line of the table: `make(setting)` gives its `Contest`.
    The target is theirs/ours at least, or ours/theirs at most"""
    name: str
    says: str
    make: Callable
    at_least: float|None = None
    at_most: float|None = None

    def ratio(self, ours, theirs): return ours/theirs if self.at_most else theirs/ours
    def reached(self, ratio, agrees):
        return (None if not self.target
                else agrees and (ratio <= self.at_most if self.at_most else ratio >= self.at_least))
    @property
    def target(self):
        return (f'at most {self.at_most}' if self.at_most
                else f'at least {self.at_least}' if self.at_least else '')

class Absent(Exception): "What a row needs is not there; the message names it"

ROWS = []

def row(says, **target):
    "Register a function as a row of the table"
    def add(make):
        ROWS.append(Row(make.__name__, says, make, **target))
        return make
    return add

def needs(name):
    "The module, or `Absent`"
    try: return import_module(name)
    except ModuleNotFoundError as e:
        raise Absent(f'{name} is not installed' if e.name in name
                     else f'{name} needs {e.name}, which is not installed') from None

def race(contest, *, seconds, rounds, most=9, clock=Clock()):
    """Rounds until `seconds` are over, at least `rounds`; as many again where they leave a doubt, and again.
    Gives agreement, and the times of each side in the last of them, {side: [(wall, cpu)]}, and how many"""
    start = clock.wall()
    if contest.warm:
        agrees, line = contest.agree({k: f() for k,f in contest.sides.items()})
        if not agrees: return agrees, line, {k: [] for k in contest.sides}, 0
    times, first = timed(contest, start+seconds, rounds, most, clock); tries = 1
    while not counting(times, clock.counts) and tries < 3:
        times, tries = timed(contest, 0., rounds, most, clock)[0], tries+1
    if not contest.warm: agrees, line = contest.agree(first)
    return agrees, line, times, tries

def timed(contest, end, rounds, most, clock):
    "Rounds there and back (A, B, A): the mean times of each side in each, and what each side gave first"
    times, longest, first = {k: [] for k in contest.sides}, 0., {}
    while (done := len(times['ours'])) < rounds or (done < most and clock.wall()+longest <= end):
        began, spent = clock.wall(), {k: [] for k in contest.sides}
        for k in (*contest.sides, *list(contest.sides)[-2::-1]):
            found, took = clock.time(contest.sides[k])
            spent[k].append(took); first.setdefault(k, found)
        for k,v in spent.items(): times[k].append(tuple(map(statistics.mean, zip(*v))))
        longest = max(longest, clock.wall()-began)
    return times, first

DOUBT = 1.3 # ratios that span this factor are of the machine, not of the codes

def counting(times, clocks=('wall', 'cpu')):
    "The first of the clocks by which the ratios don't span the factor, or None"
    for name in clocks:
        i = ('wall', 'cpu').index(name)
        ratios = [b[i]/a[i] for a,b in zip(times['ours'], times['theirs']) if a[i] > 0]
        if ratios and 0 < max(ratios) < DOUBT*min(ratios): return name

def spread(values): # median, smallest, largest
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}

def judge(row, contest, agrees, line, times, tries=1, clocks=('wall', 'cpu')):
    "A line of the report"
    made = {'name': row.name, 'says': row.says, 'target': row.target, 'size': contest.size, 'agrees': agrees,
            'agreement': line, 'reached': False, **contest.about}
    if not times['ours']: return {**made, 'status': 'they do not agree: not timed'}
    return {**made, **timings(row, agrees, times, clocks, contest.alike), 'tries': tries}

def timings(row, agrees, times, clocks, alike=None):
    "What the times of a row say, and by which clock"
    def ratios(i, ours='ours', theirs='theirs'):
        return spread(
            [row.ratio(a[i], b[i]) for a,b in zip(times[ours], times[theirs]) if min(a[i], b[i]) > 0] or [0.])
    found = {'wall': ratios(0), 'cpu': ratios(1)} | ({'alike': ratios(0, *alike)} if alike else {})
    spent, by = [sum(t[i] for side in times.values() for t in side) for i in (0, 1)], counting(times, clocks)
    seen = f"ratios from {found['wall']['min']:.2f} to {found['wall']['max']:.2f}"
    return {'rounds': len(times['ours']), 'status': 'measured' if by else f'not measured: {seen}', 'by': by,
            'share': spent[1]/spent[0] if spent[0] else 0., # processor seconds a second
            'seconds': {k: [list(t) for t in v] for k,v in times.items()},
            'ours': statistics.median(t[0] for t in times['ours']),
            'theirs': statistics.median(t[0] for t in times['theirs']),
            'ratios': found, 'reached': by is not None and row.reached(found[by]['median'], agrees)}

def chosen(names, rows):
    "The rows of these names, or `ValueError` that names the unknown ones"
    there = {r.name: r for r in rows}
    if unknown := [n for n in names if n not in there]:
        raise ValueError(f"there is no row {', '.join(unknown)}: choose from {', '.join(there)}")
    return [there[n] for n in names] if names else list(rows)

def run(rows, setting, *, seconds, rounds, clock=Clock(), load=lambda: os.getloadavg()[0],
        say=lambda s: print(s, file=sys.stderr, flush=True)):
    "Every row in turn, each with its share of the seconds that are left"
    start, made = clock.wall(), []
    for i,r in enumerate(rows):
        began = clock.wall()
        try:
            contest = r.make(setting)
            left = seconds-(began-start)
            made.append(judge(r, contest, *race(contest, seconds=left/(len(rows)-i)-(clock.wall()-began),
                                                rounds=rounds, clock=clock), clocks=clock.counts))
        except Absent as e:
            made.append({'name': r.name, 'says': r.says, 'target': r.target, 'status': str(e)})
        made[-1] |= {'load': load(), 'source': commit()} # load of the last minute
        say(f"{r.name}: {made[-1]['status']}, {clock.wall()-began:.0f} s")
    return made


def reread(stored, rows, clocks):
    "The lines of a stored report by name, judged anew by their times"
    there, lines = {r.name: r for r in rows}, {}
    for line in stored['rows']:
        line = {'source': stored['source'], **line}
        if line.get('seconds') and line['name'] in there:
            new = timings(there[line['name']], line['agrees'], line['seconds'], clocks)
            line = {**line, **new, 'ratios': line['ratios'] | new['ratios']}
        lines[line['name']] = line
    return lines

def once_more(stored, setting, rows, **how):
    "A stored report with those of its rows measured again that are in doubt, or were not there"
    here = device_name(setting.device), torch.get_num_threads()
    if here != (stored['device'], stored['threads']):
        raise ValueError(f"the report is of {stored['device']} and {stored['threads']} threads, this is "
                         f"{here[0]} and {here[1]}: measure all rows")
    kept = reread(stored, rows, setting.clock().counts)
    new = run([r for r in rows if not kept.get(r.name, {}).get('by')], setting, **how)
    found = kept | {line['name']: line for line in new}
    return {**stored, 'rows': [found[r.name] for r in rows], 'source': commit()}


# ---- the report --------------------------------------------------------------------------------------------

def shown(s): return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"

def line(r):
    "A row as the table shows it"
    made = {'what': r['says'], 'size': r.get('size', ''), 'ours (s)': '', 'theirs (s)': '',
            'ratio, wall': r['status'], 'ratio, CPU': '', 'counts': '', 'like for like': '',
            'load': f"{r['load']:.1f}" if 'load' in r else '',
            'processors got': f"{r['share']:.2f}" if 'share' in r else '', 'target': r['target'],
            'reached': {None: '', True: 'yes', False: 'no'}[r.get('reached')],
            'agreement': ('' if r.get('agrees', True) else 'NO: ')+r.get('agreement', '')}
    if r['status'] != 'measured': return made
    return {**made, 'ours (s)': f"{r['ours']:.3g}", 'theirs (s)': f"{r['theirs']:.3g}",
            'ratio, wall': shown(r['ratios']['wall']), 'ratio, CPU': shown(r['ratios']['cpu']),
            'counts': {'wall': 'wall', 'cpu': 'CPU'}[r['by']],
            'like for like': f"{r['ratios']['alike']['median']:.2f}" if 'alike' in r['ratios'] else ''}

def markdown(report):
    "The tables of a report, with the machine named"
    limits = report['limits']
    notes = ['Ratios are theirs over ours, except where the target says "at most"; '
             'the median over rounds of A, B, A, and the range. '
             '"Like for like" is the ratio where both do exactly the same: theirs attacks our folded, '
             'channels-last copy of the net, or ours attacks in training mode as theirs does.',
             'The load is what the machine was asked for in the last minute of a row, "processors got" the '
             'processor seconds that both sides had in a second. Ratios that span a factor of '
             f'{DOUBT} or more are of the machine: where those in wall time do, those in CPU time count; '
             'where both do, the rounds are run anew, and after three times the row is not measured.',
             'PGD rows: ours is what a user gets who attacks `fold(model)`; training rows: what a training '
             'run does, which brings a folded copy up to date at every step. Folding is inside the clock.']
    if report['kind'] == 'cpu':
        notes.append('Targets were set for two AVX2 cores, before anything was measured. '
                     'Where our loop takes no longer than its passes (first row), '
                     'a ratio can only come from what a pass costs: weight gradients, batch norms, layout.')
    if report['quick']:
        notes.insert(0, 'A quick run: small batches and few rounds, to see that everything works. '
                     'Its ratios are not to be quoted.')
    if report.get('held_to'):
        notes.append(f"The processor can do more: oneDNN was held to {report['held_to']}, "
                     f"PyTorch's own kernels to {report['capability']}, as on an older machine.")
    if report['load'] > .5*report['cores']:
        notes.append(f"The machine was busy: {report['load']:.1f} processes wanted its {report['cores']} "
                     "cores when the run began.")
    made_at = {(r['source']['commit'][:8] + ' (changed)'*r['source']['dirty']): 0 for r in report['rows']
               if r.get('source', {}).get('commit')}
    if len(made_at) > 1: notes.append(f"Rows were measured at the commits {', '.join(made_at)}.")
    held = f", held to {report['held_to']}" if report.get('held_to') else ''
    title = f"Speed on {report['device']}{held}{', a quick run' if report['quick'] else ''}"
    table = show_table(pd.DataFrame([line(r) for r in report['rows']]), title, notes).data
    rates = pd.DataFrame([{'what': k, 'rate': f'{v:,.0f} {unit}'} for k,(v,unit) in limits.items()])
    return table + ('\n' + show_table(rates, 'What this device can do').data if limits else '')

def report(rows, setting, *, limits, load, quick):
    "All that a run found and what made it"
    return {'device': device_name(setting.device), 'kind': setting.kind, 'threads': torch.get_num_threads(),
            'cores': os.cpu_count(), 'load': load, 'quick': quick,
            'capability': torch.backends.cpu.get_cpu_capability(),
            'held_to': os.environ.get('ONEDNN_MAX_CPU_ISA'),
            'tf32': setting.cuda and torch.backends.cuda.matmul.allow_tf32, 'source': commit(), 'versions':
            versions(('torch', 'torchvision', 'foolbox', 'torchattacks', 'pyautoattack', 'adv_lib',
                      'refine_nb')),
            'limits': limits, 'rows': rows}

def save(made, folder):
    "bench.md and bench.json, each whole or not at all"
    texts = {'bench.md': markdown(made), 'bench.json': json.dumps(made, indent=1, ensure_ascii=False)+'\n'}
    for name,text in texts.items():
        with whole(Path(folder)/name) as new: new.write_text(text, encoding='utf-8')


# ---- what is measured on -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    "The device, and how large the work is"
    device: str
    quick: bool = False

    @property
    def cuda(self): return self.device.startswith('cuda')
    @property
    def kind(self):
        return re.sub(r'[^a-z0-9]+', '-', device_name(self.device).lower()).strip('-') if self.cuda else 'cpu'
    @property
    def batch(self): return (128 if self.quick else 512) if self.cuda else (4 if self.quick else 32)
    @property
    def digits(self): return 32 if self.quick else 256
    def clock(self): return Clock(sync=torch.cuda.synchronize, counts=('wall',)) if self.cuda else Clock()

    def net(self, dtype=torch.float32):
        "A ResNet-18 for CIFAR with the statistics of some noise, in evaluation mode, as its user holds it"
        torch.manual_seed(0)
        net = classifier('resnet18', num_classes=10, stem='cifar')
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.8, 1.2)
        return net.eval().to(self.device, dtype)

    def images(self, n, size=32, dtype=torch.float32): # -> x, y
        g = torch.Generator().manual_seed(1)
        return (torch.rand(n, 3, size, size, generator=g).to(self.device, dtype),
                torch.randint(10, (n,), generator=g).to(self.device))

def last(x): return x.contiguous(memory_format=torch.channels_last)


# ---- attacks -----------------------------------------------------------------------------------------------

def our_pgd(net, x, y): return pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS)
def our_kl_pgd(net, x, y): return kl_pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS)

def passes(net, x, y):
    "What no attack of ten steps can do without: ten times forward, and backward to the images"
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
    "The inner attack as in TRADES' published code: the clean image goes through the net again at every step"
    at = x+.001*torch.randn(x.shape, device=x.device, dtype=x.dtype)
    for _ in range(STEPS):
        at.requires_grad_()
        loss = F.kl_div(F.log_softmax(net(at), 1), F.softmax(net(x), 1), reduction='sum')
        at = at.detach()+STEP*torch.autograd.grad(loss, at)[0].sign()
        at = torch.min(torch.max(at, x-EPS), x+EPS).clamp(0, 1)
    return at

def seeded(f, *args):
    "From the same start every time"
    torch.manual_seed(2)
    return f(*args)

def same_pixels(s, ours, theirs):
    "Every pixel of an attack in float64, where rounding can turn no sign; in float32 the share that is equal"
    def agree(found):
        net, (x, y) = s.net(torch.float64), s.images(4, 16, torch.float64)
        worst = (seeded(ours, fold(net), last(x), y)-seeded(theirs, net, x, y)).abs().max().item()
        share = ((found['ours']-found['theirs']).abs() < 1e-5).float().mean().item()
        said = f'differ by up to {worst:.0e}' if worst else 'are equal'
        return worst < 1e-6, f'float64: all pixels {said}; float32: {share:.1%} of them equal'
    return agree

def attack_contest(s, ours, theirs):
    "Ours on a folded channels-last copy of the net, made inside the clock; theirs on the net as it is"
    net, (x, y) = s.net(), s.images(s.batch)
    folded, x_last = fold(net), last(x)
    sides = {'ours': lambda: seeded(ours, fold(net), x_last, y), 'theirs': lambda: seeded(theirs, net, x, y),
             'theirs on our net': lambda: seeded(theirs, folded, x_last, y)}
    return Contest(sides, same_pixels(s, ours, theirs), f'{s.batch} images',
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

def digits_net(x, y, *, eps, steps=150):
    "A small net on digits: taught with PGD at `eps`, or plainly at 0"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Flatten(), nn.Linear(256, 10))
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for i in torch.randint(len(x), (steps, 64)):
        x_adv = pgd(net, x[i], y[i], eps=eps, step_size=max(eps/3, 1e-3), steps=5)
        optimiser.zero_grad(); F.cross_entropy(net.train()(x_adv), y[i]).backward(); optimiser.step()
    return net.eval()

def digits(s, taught_at): # -> net, x, y, on the CPU
    "The small net, and digits that it was not taught on"
    data = load_digits()
    x, y = torch.tensor(data.images[:, None]/16, dtype=torch.float32), torch.tensor(data.target)
    return digits_net(x[:1200], y[:1200], eps=taught_at), x[1200:1200+s.digits], y[1200:1200+s.digits]

def budget(net, x, y, share):
    "The largest eps, in hundredths, at which PGD leaves at least this share of the images"
    def left(eps):
        return (net(pgd(net, x, y, eps=eps, step_size=eps/8, steps=20)).argmax(1) == y).float().mean().item()
    return max((n/100 for n in range(1, 41) if left(n/100) >= share), default=.01)

def verdicts_compared(ours, theirs): # bool [seeds, images] each: who withstood
    """How many images: judged otherwise at the first seed; broken by every seed of one side and none of the
    other; on which a side's own seeds differ; each of these with (ours, theirs) by seed. And which are
    opposed"""
    def unsure(v): return (v != v[0]).any(0)
    opposed = ((ours[0] != theirs[0]) & ~unsure(ours) & ~unsure(theirs)).nonzero()[:,0]
    return {'changed': (ours[0] != theirs[0]).sum().item(), 'ours_unsure': unsure(ours).sum().item(),
            'theirs_unsure': unsure(theirs).sum().item(), 'opposed': len(opposed),
            'withstood': {i: (ours[:, i].int().tolist(), theirs[:, i].int().tolist()) for i in (
                unsure(ours) | unsure(theirs) | (ours[0] != theirs[0])).nonzero()[:,0].tolist()}}, opposed

def set_apart(ours, theirs, images): # each: (seed, images) -> bool [images], who withstood
    """Images that chance does not explain, by Fisher's exact test at 2 %.
    Both sides are asked again, with eight seeds that had no part in their choice"""
    a, b = (torch.stack([f(seed, images) for seed in range(3, 11)]).sum(0).cpu() for f in (ours, theirs))
    return [i for i,m,n in zip(images.tolist(), a.tolist(), b.tolist())
            if fisher_exact([[m, 8-m], [n, 8-n]]).pvalue < .02]

def verdict_contest(s, *, taught_at, share, eps=None, **about):
    """Which images withstand AutoAttack's standard version, by our code and by the authors'.
    Timed at seed 0; agreement asks for seeds 0, 1, 2 of both, and again where they oppose each other"""
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
    "A step of ours on a batch, with the optimiser's"
    def make(net, x, y, optimiser):
        loss, _ = step(net.train(), (x, y, torch.Generator(x.device).manual_seed(2)), 0.)
        optimiser.zero_grad(set_to_none=True); loss.backward(); optimiser.step()
        return loss.detach()
    return make

def near(at, x): return torch.min(torch.max(at, x-EPS), x+EPS).clamp(0, 1)

def train_mode_step(net, x, y, optimiser):
    """The net attacked in training mode with `backward`,
    which also adds up gradients of the weights that nobody uses"""
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
    "TRADES with the clean logits computed anew at every inner step, and a third forward of the loss"
    net.eval(); at = recomputing_kl_pgd(net, x, y)
    net.train(); optimiser.zero_grad()
    robust = F.kl_div(F.log_softmax(net(at), 1), F.softmax(net(x), 1), reduction='batchmean')
    loss = F.cross_entropy(net(x), y)+beta*robust
    loss.backward(); optimiser.step()
    return loss.detach()

def training_contest(s, ours, theirs, same=None, head=lambda net: net):
    """A step of SGD on equal nets, with another head where `head` gives one.
    `same`: our step that does exactly what theirs does, timed as well, where it is not `ours`"""
    def side(step, place, n=s.batch, size=32, dtype=torch.float32):
        net, (x, y) = place(head(s.net(dtype))), s.images(n, size, dtype)
        if s.cuda and place is ours_place: x = last(x)
        optimiser = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9, weight_decay=5e-4)
        return lambda: seeded(step, net, x, y, optimiser)
    def ours_place(net): return engine(s.device).place(net, training=True)
    def theirs_place(net): return net
    sides = {'ours': side(ours, ours_place), 'theirs': side(theirs, theirs_place)} | (
        {'ours as theirs': side(same, ours_place)} if same else {})
    def agree(found):
        a, b = (side(step, place, 4, 16, torch.float64)().item()
                for step,place in ((same or ours, ours_place), (theirs, theirs_place)))
        return (abs(a-b) < 1e-9*abs(b), f"float64: losses {a:.10g} and {b:.10g}; float32: "
                f"{found['ours as theirs' if same else 'ours'].item():.5g} and {found['theirs'].item():.5g}")
    return Contest(sides, agree, f'{s.batch} images', alike=('ours as theirs', 'theirs') if same else None)

@row('a training step with PGD-10, against a loop that attacks in training mode with backward()', at_least=2.)
def at_train_mode(s):
    return training_contest(s, our_step(pgd, ce), train_mode_step, same=our_step(pgd, ce, mode='train'))

@row('a training step with PGD-10, against a loop that attacks in evaluation mode with autograd.grad',
     at_least=1.2)
def at_eval_mode(s): return training_contest(s, our_step(pgd, ce), eval_mode_step)

@row('a TRADES step, against a loop that recomputes the clean logits at every inner step', at_least=1.6)
def trades_recomputing(s): return training_contest(s, our_step(kl_pgd, trades), trades_step)

@row('a SPAT step, against the released loop', at_least=1.8)
def spat_released(s):
    ours, published = needs('refine_nb.training'), needs('bench_loops')
    return training_contest(s, our_step(ours.spat_pgd, call(ours.spat)), published.spat_step,
                            head=cosine_head)

@row('a MART step, against the released loop', at_least=1.)
def mart_released(s):
    ours, near_x = needs('refine_nb.training'), dict(start=gaussian, clamp_start=False)
    attack = call(pgd, eps=EPS, step_size=STEP, steps=STEPS, **near_x)
    return training_contest(s, our_step(attack, call(ours.mart)), needs('bench_loops').mart_step)

@row('a DRA step, against Algorithm 1 line by line', at_least=1.)
def dra_by_the_line(s):
    step = needs('refine_nb.training').regulated(call(dra, eps=2/255), folded=True)
    return training_contest(s, stepping(step), needs('bench_loops').dra_step)


# ---- the device's own rates --------------------------------------------------------------------------------

def rate(f, amount, clock, seconds=.5):
    "`amount` per second, in units of 1e9: the best of the runs that fit in `seconds`"
    f(); best, start = float('inf'), clock.wall()
    while clock.wall()-start < seconds: best = min(best, clock.time(f)[1][0])
    return amount/best/1e9

def device_limits(s):
    "Matrix products, copies, and what the net reaches of them: name -> (rate, unit)"
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
                   help='small batches, about a minute: does everything work?')
    p.add_argument('--again', action='store_true', help='only what is in doubt in the stored report, or new')
    p.add_argument('--rows', help='names with commas; all are: '+', '.join(r.name for r in ROWS))
    p.add_argument('--out', type=Path, help='folder of bench.md and bench.json; whole, '
                   'full runs go to reports/bench/<device kind>/')
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
        limits = device_limits(s)
        made = report(run(rows, s, **how), s, limits=limits, load=load, quick=args.quick)
    folder = args.out or (None if args.quick or args.rows else REPORTS/s.kind)
    if folder: save(made, folder)
    print(markdown(made))
    return int(any(r.get('agrees') is False for r in made['rows']))


if __name__ == '__main__': sys.exit(main())
