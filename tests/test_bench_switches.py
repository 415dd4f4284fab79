"The rows of tools/bench_switches.py at toy size: sides agree, one that differs is refused; their table."
import json, subprocess, sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tools'))
import bench, bench_harness as harness, bench_switches as switches
from bench_harness import Absent, Contest, Row
from test_bench import Toy

ROWS = {r.name: r for r in bench.ROWS if r.switch}

@dataclass(frozen=True)
class Small(harness.Setting):
    "Images of 8x8 pixels, and a net that takes milliseconds"
    def net(self, dtype=torch.float32):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
        net[1].running_mean.normal_(0, .1); net[1].running_var.uniform_(.8, 1.2)
        return net.eval().to(self.device, dtype)
    def images(self, n, size=8, dtype=torch.float32, channels=3):
        return super().images(n, 8 if channels == 3 else size, dtype, channels)

@pytest.fixture
def small(monkeypatch):
    "The setting; the digits are noise of one channel, and their net has learnt nothing"
    def digits(s, taught_at):
        g = torch.Generator().manual_seed(0); torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                            nn.Linear(144, 10))
        x = torch.rand(12, 1, 8, 8, generator=g)
        return net.eval(), x, net(x).argmax(1)
    monkeypatch.setattr(switches, 'digits', digits)
    return Small('cpu', quick=True)

def sides(contest): return {k: f() for k,f in contest.sides.items()}

def spoil(name, found): # what the side without would give, were it wrong by little
    if name == 'switch_bfloat16': return found[0]*1.05, found[1]
    if name in ('switch_pooled', 'switch_targets'): # a single verdict
        return torch.cat([found[:1] ^ 1, found[1:]])
    if name == 'switch_batches': return found+1
    if name == 'switch_trained': return found*1.01
    return found

AT_ONCE = ('switch_fold', 'switch_grey', 'switch_layout', 'switch_trial', 'switch_lending',
           'switch_bfloat16', 'switch_pooled', 'switch_targets', 'switch_batches', 'switch_trained')

@pytest.mark.parametrize('name', AT_ONCE)
def test_sides_agree(name, small):
    contest = ROWS[name].make(small)
    found = sides(contest)
    agrees, line = contest.agree(found)
    assert agrees, line
    if (wrong := spoil(name, found['theirs'])) is not found['theirs']:
        agrees, line = contest.agree({**found, 'theirs': wrong})
        assert not agrees, line

@pytest.mark.parametrize('row, made', [('switch_fold', 'on_itself'), ('switch_lending', 'backward_pgd')])
def test_other_pixels_are_refused(row, made, small, monkeypatch):
    "A side that stops a step early"
    real = getattr(switches, made)
    if made == 'on_itself':
        monkeypatch.setattr(switches, made, lambda net, x, y: lambda: harness.pgd(
            net, x, y, eps=harness.EPS, step_size=harness.STEP, steps=9))
    else:
        monkeypatch.setattr(switches, 'STEPS', 9); assert real is switches.backward_pgd
    contest = ROWS[row].make(small)
    agrees, line = contest.agree(sides(contest))
    assert not agrees and 'differ by up to' in line, line

def test_an_attack_that_bfloat16_changed_is_refused(small):
    "The pixels say so, however near the losses are"
    contest = ROWS['switch_bfloat16'].make(small)
    found = sides(contest); loss, x_adv = found['ours']
    turned = x_adv.clone(); turned[0, 0, 0, 0] += .01
    agrees, line = contest.agree({**found, 'ours': (loss, turned)})
    assert not agrees and '100% must be' in line

def test_batches_from_the_host_are_the_same(small, monkeypatch):
    contest = switches.epoch_contest(small)
    agrees, line = contest.agree(sides(contest))
    assert agrees and line.startswith('2 batches: pixels differ by up to 0e+00'), line
    real, starts = switches.fine_tune, iter((0, 1, 1, 1))
    monkeypatch.setattr(switches, 'fine_tune', lambda *a, seed, **kw: real(*a, seed=next(starts), **kw))
    contest = switches.epoch_contest(small) # the second side draws another order
    assert not contest.agree(sides(contest))[0]

def test_a_compiled_step_is_compared_where_a_compiler_is(small, monkeypatch):
    "Compilation, which takes a minute, is left out: the net is its own runner"
    monkeypatch.setattr(torch, 'compile', lambda f, **how: f)
    contest = ROWS['switch_compiled'].make(small)
    assert contest.agree(found := sides(contest))[0]
    loss, x_adv = found['theirs']
    assert not contest.agree({**found, 'theirs': (loss*1.01, x_adv)})[0]
    def broken(f, **how): raise RuntimeError('no working C++ compiler\nwas found')
    monkeypatch.setattr(torch, 'compile', broken)
    with pytest.raises(Absent, match=r'^torch.compile fails here: no working C\+\+ compiler$'):
        ROWS['switch_compiled'].make(small)

def test_padded_batches_get_the_same_pixels(small, monkeypatch):
    "And a padded net that answers otherwise is refused"
    contest = switches.sizes_contest(small)
    agrees, line = contest.agree(sides(contest))
    assert agrees and 'all pixels' in line, line
    monkeypatch.setattr(switches, 'fixed_sizes', lambda net: nn.Sequential(nn.Hardtanh(-1., .5), net))
    contest = switches.sizes_contest(small)
    assert not contest.agree(sides(contest))[0]

@pytest.mark.parametrize('name, why', [('switch_graphs', 'CUDA graphs are recorded there'),
                                       ('switch_sizes', 'CUDA graphs are recorded there'),
                                       ('switch_tf32', 'TF32'), ('switch_data', 'on a CPU the images lie')])
def test_a_cpu_says_what_needs_a_gpu(name, why, small):
    with pytest.raises(Absent, match=f'^needs a GPU: {why}'): ROWS[name].make(small)

def test_two_processes_make_the_same_numbers(small, monkeypatch):
    "Here both sides are made in this process: tests/test_executors.py has the processes"
    monkeypatch.setattr(switches, 'workers', lambda n: switches.here())
    contest = ROWS['switch_processes'].make(small); before = torch.get_num_threads()
    found = sides(contest)
    assert contest.agree(found)[0] and torch.get_num_threads() == before
    (result, tensors), second = found['ours']
    key = next(iter(tensors)); other = {**tensors, key: tensors[key]+1}
    agrees, line = contest.agree({**found, 'ours': [(result, other), second]})
    assert not agrees and 'NOT equal' in line


# ---- the report --------------------------------------------------------------------------------------------

def toy_rows():
    return [Row('code', 'ours against theirs', lambda s: Toy().contest([1.], [2.]), at_least=2.),
            Row('on', 'a switch', lambda s: Toy().contest([1.], [2.]), switch=True)]

def measured(rows, times):
    contest = Contest({}, None, '3 toys')
    return [harness.judge(r, contest, True, 'equal', times, clocks=r.clocks(('wall', 'cpu'))) for r in rows]

def test_switches_have_a_table_of_their_own():
    rows, s = toy_rows(), harness.Setting('cpu')
    made = measured(rows, {'ours': [(1., 1.)], 'theirs': [(3., 3.)]})
    assert 'switch' not in made[0] and made[1]['switch'] and made[1]['reached'] is None
    said = harness.markdown(harness.report(made, s, limits={}, load=0., quick=False))
    first, second = said.split('**What each switch is worth here**')
    assert '|ours against theirs|' in first and 'a switch' not in first and '|ours (s)|' in first
    assert '|a switch|3 toys|1|3|3.00' in second and '|with (s)|without (s)|' in second
    assert 'target' not in second.split('\n\n')[1], 'a switch has none'
    alone = harness.markdown(harness.report(made[:1], s, limits={}, load=0., quick=False))
    assert 'switch' not in alone

def test_processes_are_judged_by_the_wall():
    "As many processor seconds in half the time: what others take away is not made up for by that clock"
    row = replace(ROWS['switch_processes'], make=None)
    times = {'ours': [(1., 2.)]*3, 'theirs': [(2., 2.), (4., 2.), (2., 2.)]}
    r, = measured([row], times)
    assert r['by'] is None and r['status'].startswith('not measured') and r['reached'] is None
    assert measured([Row('toy', '', None)], times)[0]['by'] == 'cpu'

def test_time_of_children_is_counted():
    before = harness.processor_time()
    subprocess.run([sys.executable, '-c', 'x = sum(range(3_000_000))'], check=True)
    assert harness.processor_time()-before > .02

def test_a_stored_report_gets_only_the_new_rows():
    rows, s = toy_rows(), harness.Setting('cpu')
    stored = harness.report(measured(rows[:1], {'ours': [[1., 1.]], 'theirs': [[3., 3.]]}), s, limits={},
                            load=0., quick=False)
    stored['rows'][0]['source'] = {'commit': 'old', 'dirty': False}
    def never(s): raise AssertionError('it was measured before')
    made = harness.once_more(json.loads(json.dumps(stored)), s, [replace(rows[0], make=never), rows[1]],
                             seconds=0, rounds=1, say=lambda s: None)
    old, new = made['rows']
    assert old['source']['commit'] == 'old' and new['switch'] and new['agrees']
    assert 'What each switch is worth here' in harness.markdown(made)

def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'device_limits', lambda s: {})
    def stopped(s): raise KeyboardInterrupt
    rows = [toy_rows()[0], Row('late', 'late', stopped)]
    with pytest.raises(KeyboardInterrupt): bench.main(['--device', 'cpu', '--out', str(tmp_path)], rows)
    assert [r['name'] for r in json.loads((tmp_path/'bench.json').read_text())['rows']] == ['code']

def test_switches_come_last_and_can_be_asked_for():
    kinds = [r.switch for r in bench.ROWS]
    assert len(ROWS) > 8 and kinds == sorted(kinds) and not any(r.target for r in ROWS.values())
    assert [r.name for r in harness.chosen(['switch_fold'], bench.ROWS)] == ['switch_fold']
