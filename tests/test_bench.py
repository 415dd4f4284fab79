"The harness of tools/bench.py on toy functions and a clock that they move; `make bench` runs the real rows."
import json, sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tools'))
import bench, bench_harness
from bench import main
from bench_harness import Absent, Clock, Contest, Row, chosen, judge, markdown, race

ROWS = {r.name: r for r in bench.ROWS}


class Toy:
    "A clock, and functions that let it go on"
    def __init__(self): self.now, self.cpu, self.order = 0., 0., []
    def clock(self): return Clock(wall=lambda: self.now, cpu=lambda: self.cpu)
    def side(self, name, *seconds, gives=1):
        left = list(seconds)
        def f():
            self.order.append(name); t = left.pop(0) if len(left) > 1 else left[0]
            self.now += t; self.cpu += 2*t if name == 'theirs' else t
            return gives
        return f
    def contest(self, ours, theirs, gives=(1, 1), **about):
        return Contest({'ours': self.side('ours', *ours, gives=gives[0]),
                        'theirs': self.side('theirs', *theirs, gives=gives[1])},
                       lambda found: (found['ours'] == found['theirs'],
                                      f"{found['ours']} and {found['theirs']}"), '3 toys', **about)

def make(row, contest, toy, **given):
    return judge(row, contest, *race(contest, clock=toy.clock(), **{'seconds': 0, 'rounds': 3, **given}))


def test_ratios_by_hand():
    toy = Toy(); contest = toy.contest([9., 2., 2., 2., 2.4, 2.5], [9., 5.]) # the first is the warm-up
    r = make(Row('toy', 'a toy', None, at_least=2.), contest, toy)
    assert toy.order == ['ours', 'theirs'] + ['ours', 'theirs', 'ours']*3, 'a warm-up, three rounds'
    by_hand = {'median': 5/2.2, 'min': 2., 'max': 2.5}
    assert r['ratios']['wall'] == pytest.approx(by_hand)
    assert r['ratios']['cpu'] == pytest.approx({k: 2*v for k,v in by_hand.items()})
    assert (r['ours'], r['theirs']) == pytest.approx((2.2, 5.))
    assert (r['rounds'], r['reached'], r['status']) == (3, True, 'measured')
    assert r['seconds']['theirs'][0] == pytest.approx([5., 10.]) and r['share'] == pytest.approx(36.7/21.7)

def test_a_row_in_doubt_is_not_measured():
    "A true ratio of 2 that was once measured as .34 under load"
    wavering = [1., *[1., 1., 2., 2., 2., 2.]*3]
    toy = Toy(); r = make(Row('toy', 'a toy', None, at_least=2.), toy.contest(wavering, [4.]), toy)
    assert r['status'] == 'not measured: ratios from 2.00 to 4.00' and r['reached'] is False
    assert bench_harness.line(r)['ratio, wall'] == r['status'] and bench_harness.line(r)['ours (s)'] == ''
    assert r['ratios']['wall']['median'] == 2., 'the JSON keeps what was seen'
    assert r['tries'] == 3 and toy.order.count('theirs') == 1 + 3*3, 'three rounds, three times'
    steady = make(Row('toy', '', None), Toy().contest([1., 1., 1.2], [2.]), Toy())
    assert steady['status'].startswith('not measured') # no time went by on this clock

def test_a_row_in_doubt_is_run_anew():
    toy = Toy(); r = make(Row('toy', 'a toy', None, at_least=2.), toy.contest([1., 1., 1., 2.], [4.]), toy)
    assert (r['status'], r['tries'], r['rounds']) == ('measured', 2, 3)
    assert r['ratios']['wall'] == {'median': 2., 'min': 2., 'max': 2.}

def test_processor_time_counts_where_wall_time_is_taken_away():
    "The ratio in wall time spans 1 to 2, that of the work 2 to 2.2"
    toy = Toy(); contest = toy.contest([1.], [2.])
    times = {'ours': [(1., 1.), (2., 1.), (1., 1.)], 'theirs': [(2., 2.), (2., 2.2), (2., 2.)]}
    r = judge(Row('toy', '', None, at_least=2.), contest, True, '', times)
    assert (r['status'], r['by'], r['reached']) == ('measured', 'cpu', True)
    assert bench_harness.line(r)['counts'] == 'CPU'
    gpu = judge(Row('toy', '', None, at_least=2.), contest, True, '', times, clocks=('wall',))
    assert (gpu['by'], gpu['reached']) == (None, False) and gpu['status'].startswith('not measured')

def test_what_is_in_doubt_is_measured_again(tmp_path, monkeypatch):
    rows = [Row(n, n, lambda s: Toy().contest([1.], [2.])) for n in ('a', 'b', 'new')]
    steady, wavering = [[1., 1.]]*3, [[1., 1.], [2., 2.], [1., 1.]]
    times = lambda ours: {'ours': ours, 'theirs': [[3., 3.]]*3}
    like = {'alike': {'median': 9., 'min': 9., 'max': 9.}}
    line = lambda name, ours: {'name': name, 'says': name, 'target': '', 'agrees': True, 'size': '',
                               'agreement': '', 'seconds': times(ours), 'ratios': like}
    s = bench.Setting('cpu'); old = {'commit': 'old', 'dirty': False}
    stored = {**bench_harness.named(s), 'source': old, 'quick': False,
              'versions': bench_harness.versions(('torch',)),
              'rows': [line('a', steady), line('b', wavering)]}
    made = bench.once_more(stored, s, rows, seconds=0, rounds=3, say=lambda s: None)
    a, b, new = made['rows']
    assert (a['source'], a['by'], a['ratios']['wall']['median']) == (old, 'wall', 3.) and a['ratios']['alike']
    assert b['source'] == new['source'] == bench_harness.commit() and 'alike' not in b.get('ratios', {})
    with pytest.raises(ValueError, match='the report is of Abacus and 9 threads.*measure all rows'):
        bench.once_more({**stored, 'device': 'Abacus', 'threads': 9}, s, rows)
    for k,other in (('threads', 9), ('held_to', 'SSE41'), ('capability', 'SSE41')):
        with pytest.raises(ValueError, match=f'the report is of .*{other}.*measure all rows'):
            bench.once_more({**stored, k: other}, s, rows)
    for changes,says in ((dict(quick=True), 'a quick run, or'),
                         (dict(versions={'torch': '1.0'}), 'torch 1.0, here')):
        with pytest.raises(ValueError, match=f'the report is of {says}.*measure all rows'):
            bench.once_more({**stored, **changes}, s, rows)
    one = bench.once_more(stored, s, rows[2:], seconds=0, rounds=3, say=lambda s: None)
    assert [r['name'] for r in one['rows']] == ['a', 'b', 'new'], 'rows that were not asked for stay'
    assert stored['versions'].items() <= one['versions'].items() and 'adv_lib' not in stored['versions']

def test_a_limit_is_ours_over_theirs():
    for ours, reached in ((1.04, True), (1.06, False)):
        toy = Toy(); r = make(Row('toy', 'a toy', None, at_most=1.05), toy.contest([ours], [1.]), toy)
        assert r['ratios']['wall']['median'] == pytest.approx(ours) and r['reached'] is reached

def test_like_for_like_has_its_own_ratio():
    toy = Toy(); plain = toy.contest([1.], [6.])
    contest = Contest({**plain.sides, 'theirs on our net': toy.side('alike', 3.)}, plain.agree, '',
                      alike=('ours', 'theirs on our net'))
    r = make(Row('toy', '', None, at_least=2.), contest, toy)
    there = ['ours', 'theirs', 'alike']
    assert (toy.order == there + [*there, 'theirs', 'ours']*3 and r['ratios']['wall']['median'] == 6
            and r['ratios']['alike'] == {'median': 3., 'min': 3., 'max': 3.})
    assert bench_harness.line(r)['like for like'] == '3.00' and len(r['seconds']['theirs on our net']) == 3

def test_a_target_that_is_missed_is_said():
    toy = Toy(); r = make(Row('toy', 'a toy', None, at_least=2.), toy.contest([1.], [1.9]), toy)
    assert (r['reached'] is False and bench_harness.line(r)['reached'] == 'no'
            and bench_harness.line(r)['ratio, wall'] == '1.90 (1.90 to 1.90)')

def test_rounds_fill_the_time_and_never_fall_short():
    # a round takes three seconds, the warm-up two
    for seconds, rounds in ((0, 3), (13.9, 3), (14, 4), (17, 5), (1000, 9)):
        toy = Toy()
        assert make(Row('toy', '', None), toy.contest([1.], [1.]), toy, seconds=seconds)['rounds'] == rounds

def test_a_long_contest_counts_its_first_round():
    toy = Toy(); r = make(Row('toy', '', None), toy.contest([1.], [2.], warm=False), toy)
    assert toy.order == ['ours', 'theirs', 'ours']*3 and r['rounds'] == 3 and r['agreement'] == '1 and 1'

def test_gpu_work_is_waited_for():
    waits = []
    Clock(wall=lambda: 0., cpu=lambda: 0.,
          sync=lambda: waits.append(len(waits))).time(lambda: waits.append('work'))
    assert waits == [0, 'work', 2]

def test_disagreement_is_not_timed():
    toy = Toy(); r = make(Row('toy', 'a toy', None, at_least=2.), toy.contest([1.], [5.], gives=(1, 2)), toy)
    assert (toy.order == ['ours', 'theirs'] and r['status'] == 'they do not agree: not timed'
            and r['reached'] is False)
    assert bench_harness.line(r)['agreement'] == 'NO: 1 and 2' and bench_harness.line(r)['reached'] == 'no'
    late = make(Row('toy', 'a toy', None, at_least=2.),
                Toy().contest([1.], [5.], gives=(1, 2), warm=False), toy)
    assert late['ratios'] and late['reached'] is False, 'a ratio without agreement reaches nothing'

def test_unknown_rows_are_named():
    with pytest.raises(ValueError, match='there is no row pgd_folbox: choose from .*pgd_foolbox'):
        chosen(['pgd_folbox', 'pgd_foolbox'], bench.ROWS)
    assert ([r.name for r in chosen(['pgd_foolbox'], bench.ROWS)] == ['pgd_foolbox']
            and chosen([], bench.ROWS) == bench.ROWS)


# ---- the command -------------------------------------------------------------------------------------------

@pytest.fixture
def command(tmp_path, monkeypatch):
    "bench.py with toy rows; gives the exit code and the JSON"
    monkeypatch.setattr(bench, 'device_limits', lambda s: {'matrix product': (123.4, 'GFLOP/s')})
    monkeypatch.setattr(bench, 'REPORTS', tmp_path/'reports')
    def absent(s): raise Absent('torchattacks is not installed')
    toys = {'fine': lambda s: Toy().contest([1.], [1.]),
            'wrong': lambda s: Toy().contest([1.], [1.], gives=(1, 2)), 'absent': absent}
    def start(*names, args=()):
        code = main(['--device', 'cpu', '--quick', '--out', str(tmp_path/'out'), *args],
                    [Row(n, f'the {n} row', toys[n], at_least=2.) for n in names])
        file = tmp_path/'out'/'bench.json'
        return code, json.loads(file.read_text()) if file.exists() else None
    return start

def test_the_json_is_complete(command):
    code, made = command('fine', 'absent')
    assert code == 0
    assert {'device', 'kind', 'threads', 'cores', 'load', 'quick', 'capability', 'held_to', 'tf32', 'source',
            'versions', 'limits', 'rows'} == set(made)
    assert (made['kind'] == 'cpu' and made['threads'] == torch.get_num_threads() and made['versions']['torch']
            == torch.__version__.split('+')[0] and 'torchattacks' in made['versions'])
    fine, absent = made['rows']
    assert {'name', 'says', 'target', 'size', 'agrees', 'agreement', 'status', 'rounds', 'seconds', 'ours',
            'theirs', 'ratios', 'reached', 'share', 'load', 'by', 'tries', 'source'} == set(fine)
    assert absent == {'name': 'absent', 'says': 'the absent row', 'target': 'at least 2.0',
                      'status': 'torchattacks is not installed', 'load': absent['load'],
                      'source': made['source']}

def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path/'half_there.py').write_text('import lacking_part'); monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match='^nobodys_attacks is not installed$'): bench.needs('nobodys_attacks')
    with pytest.raises(Absent, match='^half_there needs lacking_part, which is not installed$'):
        bench.needs('half_there')
    assert bench.needs('json') is json

def test_the_table_names_the_machine(command, tmp_path):
    _, made = command('fine', 'absent')
    said = (tmp_path/'out'/'bench.md').read_text()
    assert (said == markdown(made) and made['device'] in said and 'A quick run' in said
            and '123 GFLOP/s' in said)
    assert 'the absent row' in said and 'torchattacks is not installed' in said

def test_disagreement_fails_the_run(command):
    code, made = command('fine', 'wrong')
    assert code == 1 and [r['agrees'] for r in made['rows']] == [True, False]

def test_an_unknown_row_fails_the_run(command, capsys):
    code, made = command('fine', args=('--rows', 'fien'))
    assert code == 2 and made is None and 'there is no row fien: choose from fine' in capsys.readouterr().err

def test_only_whole_full_runs_are_kept(tmp_path, monkeypatch, command):
    main(['--device', 'cpu', '--quick'], []); assert not (tmp_path/'reports').exists()
    main(['--device', 'cpu'], [])
    assert json.loads((tmp_path/'reports'/'cpu'/'bench.json').read_text())['rows'] == []


# ---- the contestants, as far as a small net shows them -----------------------------------------------------

@pytest.mark.parametrize('ours, theirs', [('our_pgd', 'foolbox_pgd'), ('our_pgd', 'torchattacks_pgd'),
                                          ('our_kl_pgd', 'recomputing_kl_pgd')])
def test_contestants_give_the_same_pixels(ours, theirs):
    if theirs == 'torchattacks_pgd':
        pytest.importorskip('torchattacks',
                            reason='torchattacks is optional: pip install --no-deps torchattacks')
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                              torch.nn.Flatten(), torch.nn.Linear(8*36, 10)).double().eval()
    x, y = torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
    a, b = (bench.seeded(getattr(bench, f), net, x, y) for f in (ours, theirs))
    assert (a-b).abs().max() < 1e-9 and (a-x).abs().max() > .03

def test_only_verdicts_opposed_under_every_seed_disagree():
    """Four images: alike; theirs wavers; ours wavers and differs at seed 0;
    every seed of ours against every seed of theirs"""
    ours, theirs = (torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1]]).bool(),
                    torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool())
    said, opposed = bench.verdicts_compared(ours, theirs)
    assert said.pop('withstood') == {1: ([1, 1, 1], [1, 0, 1]), 2: ([0, 1, 0], [1, 1, 1]),
                                     3: ([1, 1, 1], [0, 0, 0])}
    assert (said == {'changed': 2, 'ours_unsure': 1, 'theirs_unsure': 1, 'opposed': 1}
            and opposed.tolist() == (ours != theirs).all(0).nonzero()[:,0].tolist())
    assert bench.verdicts_compared(theirs[:, :3], ours[:, :3])[0]['opposed'] == 0

def test_chance_is_told_from_a_fault():
    images = torch.tensor([4, 9, 11])
    # of eight seeds, 3 to 10
    def side(*often): return lambda seed, at: torch.tensor([seed-3 < n for n in often])
    # 8 of 8 against 0 of 8; 5 against 3 is chance
    assert bench.set_apart(side(8, 5, 0), side(0, 3, 0), images) == [4]
    # Fisher, two sides: 2/12870, 130/12870, and .13
    assert bench.set_apart(side(0, 7, 6), side(8, 1, 2), images) == [4, 9]

def test_every_row_has_a_target_and_a_name():
    assert (len(ROWS) == len(bench.ROWS)
            and all(r.says and (r.switch or bool(r.at_least) != bool(r.at_most)) for r in bench.ROWS))
