"""The harness of `bench.py`: how two sides are timed and judged, what the report says, and what both work on

A row first shows that its sides agree, then runs A, B, A at least three times, where A is the mean of its two
runs, so that a machine that speeds up or slows down does so for both. It reports the median of the ratios and
their range, in wall and in processor time, beside the load and the processor time that it got. Wall time
depends on what else the machine is doing: where its ratios span a factor of 1.3 or more, processor time
counts instead, and the report says so. Where that varies as much, the rounds are repeated; after three tries
the row counts as not measured, and says so.
"""
import json, os, re, resource, statistics, sys, time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from refine_nb.base import commit, device_name, versions, whole
from refine_nb.vision import classifier
from refine_nb.attacks import pgd
from refine_nb.reporting import show_table

EPS, STEP, STEPS = 8/255, 2/255, 10 # of an attack, unless its row says otherwise


# ---- the harness -------------------------------------------------------------------------------------------

def processor_time():
    "Seconds of this process and of those that it started and that have ended"
    return time.process_time()+sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

@dataclass(frozen=True)
class Clock:
    "Two clocks, in seconds, and what to wait for before reading them"
    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = processor_time
    sync: Callable[[], None] = lambda: None
    counts: tuple[str,...] = ('wall', 'cpu')  # the work of a GPU takes no processor time

    def time(self, f): # -> what f gives, (wall, cpu)
        self.sync(); start = self.wall(), self.cpu()
        found = f(); self.sync()
        return found, (self.wall()-start[0], self.cpu()-start[1])

@dataclass(frozen=True)
class Contest:
    "Functions that do the same work: 'ours', 'theirs' and perhaps others, timed beside them"
    sides: dict[str, Callable[[], object]]
    # what each side returned -> whether they agree, and a line that says how well
    agree: Callable[[dict], tuple[bool, str]]
    size: str                                 # of the work, for the table
    # a side of ours and one of theirs that work in the same way on the same net,
    # if 'ours' and 'theirs' do not
    alike: tuple[str,str]|None = None
    warm: bool = True                         # one untimed round first; a long contest may time its first
    about: dict = field(default_factory=dict) # what else the JSON should hold

@dataclass(frozen=True)
class Row:
    """A line of a table: `make(setting)` gives its `Contest`.
    The target is theirs/ours at least, or ours/theirs at most"""
    name: str
    says: str
    make: Callable
    at_least: float|None = None
    at_most: float|None = None
    switch: bool = False                      # ours is with the switch, theirs without: in a table of its own
    counts: tuple[str,...] = ('wall', 'cpu')  # clocks that may count, if they count on the device, too

    def ratio(self, ours, theirs): return ours/theirs if self.at_most else theirs/ours
    def reached(self, ratio, agrees):
        return (None if not self.target
                else agrees and (ratio <= self.at_most if self.at_most else ratio >= self.at_least))
    @property
    def target(self):
        return (f'at most {self.at_most}' if self.at_most
                else f'at least {self.at_least}' if self.at_least else '')
    @property
    def about(self): # what its line in the report says, measured or not
        return {'name': self.name, 'says': self.says, 'target': self.target} | (
            {'switch': True} if self.switch else {})
    def clocks(self, there): return tuple(c for c in there if c in self.counts)

class Absent(Exception): "Something that a row needs is missing; the message names it"

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
    """Rounds until `seconds` are over, at least `rounds`; repeated up to twice if the ratios vary too much.
    Returns whether they agree, the line, the times of the last try, {side: [(wall, cpu)]}, and the tries"""
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
    "Rounds of A, B, A: each side's mean times in each round, and what each side returned first"
    times, longest, first = {k: [] for k in contest.sides}, 0., {}
    while (done := len(times['ours'])) < rounds or (done < most and clock.wall()+longest <= end):
        began, spent = clock.wall(), {k: [] for k in contest.sides}
        for k in (*contest.sides, *list(contest.sides)[-2::-1]):
            found, took = clock.time(contest.sides[k])
            spent[k].append(took); first.setdefault(k, found)
        for k,v in spent.items(): times[k].append(tuple(map(statistics.mean, zip(*v))))
        longest = max(longest, clock.wall()-began)
    return times, first

DOUBT = 1.3 # ratios that span this factor reflect the machine, not the code

def counting(times, clocks=('wall', 'cpu')):
    "The first clock by which the ratios span less than the factor, or None"
    for name in clocks:
        i = ('wall', 'cpu').index(name)
        ratios = [b[i]/a[i] for a,b in zip(times['ours'], times['theirs']) if a[i] > 0]
        if ratios and 0 < max(ratios) < DOUBT*min(ratios): return name

def spread(values): # median, smallest, largest
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}

def judge(row, contest, agrees, line, times, tries=1, clocks=('wall', 'cpu')):
    "A line of the report"
    made = {**row.about, 'size': contest.size, 'agrees': agrees, 'agreement': line,
            'reached': False if row.target else None, **contest.about}
    if not times['ours']: return {**made, 'status': 'they do not agree: not timed'}
    return {**made, **timings(row, agrees, times, clocks, contest.alike), 'tries': tries}

def timings(row, agrees, times, clocks, alike=None):
    "What a row's times show, and by which clock"
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
            'ratios': found,
            'reached': row.reached(found[by]['median'], agrees) if by else False if row.target else None}

def chosen(names, rows):
    "The rows with these names, or a `ValueError` that lists the unknown ones"
    there = {r.name: r for r in rows}
    if unknown := [n for n in names if n not in there]:
        raise ValueError(f"there is no row {', '.join(unknown)}: choose from {', '.join(there)}")
    return [there[n] for n in names] if names else list(rows)

def run(rows, setting, *, seconds, rounds, clock=Clock(), load=lambda: os.getloadavg()[0],
        say=lambda s: print(s, file=sys.stderr, flush=True), so_far=lambda made: None):
    "Run every row in turn, each with its share of the seconds left; `so_far` is called after each"
    start, made = clock.wall(), []
    for i,r in enumerate(rows):
        began, own = clock.wall(), replace(clock, counts=r.clocks(clock.counts))
        try:
            contest = r.make(setting)
            left = seconds-(began-start)
            made.append(judge(r, contest, *race(contest, seconds=left/(len(rows)-i)-(clock.wall()-began),
                                                rounds=rounds, clock=own), clocks=own.counts))
        except Absent as e: made.append({**r.about, 'status': str(e)})
        made[-1] |= {'load': load(), 'source': commit()} # load of the last minute
        say(f"{r.name}: {made[-1]['status']}, {clock.wall()-began:.0f} s"); so_far(made)
    return made


def reread(stored, rows, clocks):
    "The lines of a stored report by name, judged again from their times"
    there, lines = {r.name: r for r in rows}, {}
    for line in stored['rows']:
        line = {'source': stored['source'], **line}
        if line.get('seconds') and line['name'] in there:
            r = there[line['name']]
            new = timings(r, line['agrees'], line['seconds'], r.clocks(clocks))
            line = {**line, **new, 'ratios': line['ratios'] | new['ratios'], 'says': r.says}
        lines[line['name']] = line
    return lines

VERSIONS = ('torch', 'torchvision', 'foolbox', 'torchattacks', 'pyautoattack', 'adv_lib', 'mair', 'refine_nb')

def named(setting):
    "What the machine is, as a report says it"
    return {'device': device_name(setting.device), 'kind': setting.kind, 'threads': torch.get_num_threads(),
            'cores': os.cpu_count(), 'capability': torch.backends.cpu.get_cpu_capability(),
            'held_to': os.environ.get('ONEDNN_MAX_CPU_ISA')}

def machine(report):
    "In words; on a CPU with the instruction set"
    isa = f"held to {report['held_to']}" if report.get('held_to') else report.get('capability')
    return ', '.join([report['device'], *[isa]*bool(report['kind'] == 'cpu' and isa)])

def once_more(stored, setting, rows, **how):
    "A stored report, with the rows that it could not measure or lacks measured now"
    here, with_ = named(setting), versions(VERSIONS)
    if any(stored.get(k) != here[k] for k in ('device', 'threads', 'capability', 'held_to')):
        was, now = (f"{m['device']} and {m['threads']} threads ({machine(m)})" for m in (stored, here))
        raise ValueError(f"the report is of {was}, but this machine is {now}: measure all rows")
    other = [k for k,v in stored['versions'].items() if v and with_.get(k) and v != with_[k]]
    if other or stored['quick'] != setting.quick:
        raise ValueError('the report is of ' + (f"{other[0]} {stored['versions'][other[0]]}, here is "
                         f"{with_[other[0]]}" if other else 'a quick run, or this one is')
                         + ': measure all rows')
    kept = reread(stored, rows, setting.clock().counts)
    new = run([r for r in rows if not kept.get(r.name, {}).get('by')], setting, **how)
    found, place = kept | {line['name']: line for line in new}, {r.name: i for i,r in enumerate(ROWS)}
    return {**stored, 'rows': sorted(found.values(), key=lambda line: place.get(line['name'], len(place))),
            'source': commit(),
            'versions': stored['versions'] | {k: v for k,v in with_.items() if v}}


# ---- the report --------------------------------------------------------------------------------------------

def shown(s): return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"

def line(r):
    "A row, as the table shows it"
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

def switches(rows):
    "The table of switches, each with and without; empty where there are no such rows"
    if not rows: return ''
    table = pd.DataFrame([line(r) for r in rows]).rename(
        columns={'ours (s)': 'with (s)', 'theirs (s)': 'without (s)'})
    table = table.drop(columns=[c for c in ('like for like', 'target', 'reached') if not table[c].any()])
    notes = ['Each row does the same work with one of our switches and without it, all else equal. '
             'Ratios are the time without over the time with it: below 1, the switch costs time on this '
             'device. The agreement says how far it changes the results.']
    return '\n' + show_table(table, 'What each switch is worth here', notes).data

def markdown(report):
    "The tables of a report, with the machine named"
    limits, rows = report['limits'], [r for r in report['rows'] if not r.get('switch')]
    notes = ['Ratios are their time over ours, except where the target says "at most": '
             'the median over rounds of A, B, A, and the range. '
             '"Like for like" is the ratio when both do exactly the same: theirs attacks our folded, '
             'channels-last copy of the net, or ours attacks in training mode as theirs does.',
             'The load is the average of the machine over the last minute of a row; "processors got" is the '
             'processor time that both sides got in each second. Ratios that span a factor of '
             f'{DOUBT} or more reflect the machine: if those in wall time do, those in CPU time count; '
             'if both do, the rounds are repeated, and after three tries the row counts as not measured.',
             'In PGD rows, ours is what a user gets by attacking `fold(model)`; in training rows, it is what '
             'a training run does, which updates a folded copy at every step. Folding is timed, too.']
    if report['kind'] == 'cpu':
        notes.append('Targets were set for two AVX2 cores, before anything was measured. '
                     'Where our loop takes no longer than its passes alone (first row), '
                     'a ratio can only come from what a pass costs: weight gradients, batch norms, layout.')
    if report['quick']:
        notes.insert(0, 'A quick run: small batches and few rounds, to check that everything works. '
                     'Do not quote its ratios.')
    if report.get('held_to'):
        notes.append(f"The processor can do more: oneDNN was held to {report['held_to']}, "
                     f"PyTorch's own kernels to {report['capability']}, as on an older machine.")
    if report['load'] > .5*report['cores']:
        notes.append(f"The machine was busy: its load was {report['load']:.1f} on {report['cores']} "
                     "cores when the run began.")
    made_at = {(r['source']['commit'][:8] + ' (changed)'*r['source']['dirty']): 0 for r in report['rows']
               if r.get('source', {}).get('commit')}
    if len(made_at) > 1: notes.append(f"Rows were measured at the commits {', '.join(made_at)}.")
    title = f"Speed on {machine(report)}{', a quick run' if report['quick'] else ''}"
    lines = [line(r) for r in rows] or [{'what': 'no row of this table was run'}]
    table = show_table(pd.DataFrame(lines), title, notes).data
    table += switches([r for r in report['rows'] if r.get('switch')])
    rates = pd.DataFrame([{'what': k, 'rate': f'{v:,.0f} {unit}'} for k,(v,unit) in limits.items()])
    return table + ('\n' + show_table(rates, 'What this device can do').data if limits else '')

def report(rows, setting, *, limits, load, quick):
    "All results of a run, and what made them"
    return {**named(setting), 'load': load, 'quick': quick,
            'tf32': setting.cuda and torch.backends.cuda.matmul.allow_tf32, 'source': commit(),
            'versions': versions(VERSIONS),
            'limits': limits, 'rows': rows}

def save(made, folder):
    "bench.md and bench.json, each whole or not at all"
    texts = {'bench.md': markdown(made), 'bench.json': json.dumps(made, indent=1, ensure_ascii=False)+'\n'}
    for name,text in texts.items():
        with whole(Path(folder)/name) as new: new.write_text(text, encoding='utf-8')


# ---- what both sides work on -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    "The device and the size of the work"
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
        "A ResNet-18 for CIFAR with random batch-norm statistics, in evaluation mode, not folded"
        torch.manual_seed(0)
        net = classifier('resnet18', num_classes=10, stem='cifar')
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.8, 1.2)
        return net.eval().to(self.device, dtype)

    def images(self, n, size=32, dtype=torch.float32, channels=3): # -> x, y
        g = torch.Generator().manual_seed(1)
        return (torch.rand(n, channels, size, size, generator=g).to(self.device, dtype),
                torch.randint(10, (n,), generator=g).to(self.device))

def last(x): return x.contiguous(memory_format=torch.channels_last)

def near(at, x): return torch.min(torch.max(at, x-EPS), x+EPS).clamp(0, 1)

def our_pgd(net, x, y): return pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS)

def seeded(f, *args):
    "From the same start every time"
    torch.manual_seed(2)
    return f(*args)

def same_pixels(s, ours, theirs, made=None): # each: (net, x, y) -> x_adv, from the net as it is, not folded
    "Compares all pixels in float64, where rounding flips no sign; in float32, gives the share that is equal"
    def agree(found):
        net, x, y = made or (s.net(torch.float64), *s.images(4, 16, torch.float64))
        worst = (seeded(ours, net, x, y)-seeded(theirs, net, x, y)).abs().max().item()
        share = ((found['ours']-found['theirs']).abs() < 1e-5).float().mean().item()
        said = f'differ by up to {worst:.0e}' if worst else 'are equal'
        return worst < 1e-6, f'float64: all pixels {said}; float32: {share:.1%} of them equal'
    return agree

def digits_net(x, y, *, eps, steps=150):
    "A small net on digits, trained with PGD at `eps`; 0 is plain training"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Flatten(), nn.Linear(256, 10))
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for i in torch.randint(len(x), (steps, 64)):
        x_adv = pgd(net, x[i], y[i], eps=eps, step_size=max(eps/3, 1e-3), steps=5)
        optimiser.zero_grad(); F.cross_entropy(net.train()(x_adv), y[i]).backward(); optimiser.step()
    return net.eval()

def digits(s, taught_at): # -> net, x, y, on the CPU
    "The small net, and digits that it was not trained on"
    data = load_digits()
    x, y = torch.tensor(data.images[:, None]/16, dtype=torch.float32), torch.tensor(data.target)
    return digits_net(x[:1200], y[:1200], eps=taught_at), x[1200:1200+s.digits], y[1200:1200+s.digits]

def budget(net, x, y, share):
    "The largest eps, in hundredths, at which PGD leaves at least this share of the images"
    def left(eps):
        return (net(pgd(net, x, y, eps=eps, step_size=eps/8, steps=20)).argmax(1) == y).float().mean().item()
    return max((n/100 for n in range(1, 41) if left(n/100) >= share), default=.01)
