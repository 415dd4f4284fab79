"""Whoever makes a run, its bits are the same: this process, workers of which one is killed, a Ray cluster.

And whatever stops them, what was made is there: a budget, SIGTERM, Ctrl-C.
"""
import importlib.util, os, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refine_nb.base import Cell, Recipe, ancestors, call, key
from refine_nb.attacks import pgd, salt_and_pepper
from refine_nb.training import Engine
from refine_nb.refinement import Correction, Quantised, adapt
from refine_nb.runs import Store, Unmade, here, ray, workers
from test_recovery import epochs, makers, until
from toys import Forked, Worker, net, quiet, recipe, same

HERE = Path(__file__).parent
SP = call(salt_and_pepper, targeted=True, steps=50)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    "The toys, in processes that others begin"
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(HERE), *filter(None, sys.path)]))

@pytest.fixture
def forked(monkeypatch):
    "Workers need not import all anew, which takes ten seconds each; those of the other tests do"
    of_workers = SimpleNamespace(**{**vars(subprocess), 'Popen': Forked}) # elsewhere `git` is still called
    monkeypatch.setattr('refine_nb.runs.processes.subprocess', of_workers)

def table():
    "Two rows of one baseline, one by a correction; an int8 network; a longer training; a cell under attack"
    base = recipe()
    adapted = call(adapt, source=Correction(base, SP), coral_weight=.1)
    tuned = replace(base, init=base, method=adapted, epochs=2, batch_size=16)
    other = recipe(seed=2)
    return [Cell(tuned), Cell(base, call(pgd, steps=2), n_eval=50), Cell(Quantised(other, n_calibrate=50)),
            Cell(replace(base, epochs=5, seed=3)), Cell(recipe(seed=4))]

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The table as one process makes it"
    root = tmp_path_factory.mktemp('alone')
    quiet(root).run(table(), executor=here())
    return root

def same_table(alone, root):
    assert quiet(alone).plan(table()) == quiet(root).plan(table()) == []
    return all(same(alone, root, s) for s in ancestors(*table()))


# ---- the same bits -----------------------------------------------------------------------------------------

def test_one_and_two_threads_differ(forked, tmp_path):
    "So the number of threads is a part of what every executor is told"
    wide = recipe(model=call(net, width=64), batch_size=128, epochs=1)
    for n in (1, 2): quiet(tmp_path/f'{n}').run([wide], executor=workers(1, threads=n))
    one, two = (quiet(tmp_path/f'{n}').get(wide, make=False) for n in (1, 2))
    assert two.made['device'].endswith('2 threads') and one.made['device'].endswith('1 thread')
    assert any(not torch.equal(one.tensors()[k], v) for k,v in two.tensors().items())

def test_four_workers_one_is_killed(forked, alone, tmp_path, monkeypatch):
    "It dies in the middle of a training, is begun again, goes on from its snapshot; nothing is made twice"
    log, root = tmp_path/'log', tmp_path/'store'
    monkeypatch.setenv('TOY_LOG', str(log)); monkeypatch.setenv('TOY_GATE', f'2:{tmp_path}/go')
    lines = lambda: [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    killed = []
    def kill():
        until(lambda: any(e == '2' for _,e in lines()), 200)
        killed.append(next(pid for pid,e in lines() if e == '2'))
        os.kill(int(killed[0]), signal.SIGKILL); (tmp_path/'go').touch()
    helper = threading.Thread(target=kill, daemon=True); helper.start()
    assert quiet(root).run(table(), executor=workers(4)) == []
    helper.join(1)
    assert killed[0] in makers(log) and str(os.getpid()) not in makers(log) and same_table(alone, root)
    trained = [r for r in ancestors(*table()) if isinstance(r, Recipe) and r.method.name == 'teach']
    # four trainings, one of them with an epoch that is begun twice
    assert len(epochs(log)) == sum(r.epochs for r in trained) + 1 and epochs(log).count(2) == 5

def test_workers_keep_that_a_training_diverged(forked, tmp_path, monkeypatch, capfd):
    "As this process does; the rest of the plan is made, and what happened is said"
    monkeypatch.setenv('TOY_DO', 'nan:2:0')
    bad, store = recipe(), Store(tmp_path/'store', Engine(), quiet=False, every=0.)
    cells = [Cell(bad), Cell(replace(recipe(seed=2), epochs=2))]
    with pytest.warns(UserWarning, match=rf'{key(bad)} diverged \(the loss is nan at epoch 3, step 1'):
        assert store.run(cells, executor=workers(2)) == []
    assert store.diverged(cells[0]) and not store.diverged(cells[1]) and store.plan(cells) == []
    assert store.get(cells[1], make=False).result['accuracy'] > 0

def test_a_run_that_always_dies_is_named(forked, tmp_path, monkeypatch, capfd):
    "It is tried four times; everything that does not need it is made"
    monkeypatch.setenv('TOY_DO', 'kill:4:0'); monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    bad, store = replace(recipe(), epochs=5), Store(tmp_path/'store', Engine(), quiet=False, every=0.)
    with pytest.raises(Unmade, match=rf'1 run could not be made: recipe {key(bad)} \(teach\): '
                       r'it died 4 times; last time: it was killed \(signal 9\).* '
                       r'1 more waits for that. All else is stored'):
        store.run([Cell(bad), Cell(recipe(seed=2))], executor=workers(2))
    assert store.find(Cell(recipe(seed=2))) and store.plan([Cell(bad)]) == [bad, Cell(bad)]
    assert epochs(tmp_path/'log').count(4) == 4 and epochs(tmp_path/'log').count(3) == 1   # from its snapshot
    said = capfd.readouterr().out
    assert said.count(f'recipe {key(bad)} (teach): died after') == 3 and 'failed after' in said

def test_an_error_is_said_and_the_rest_is_made(forked, tmp_path):
    wrong = Cell(recipe(seed=2), n_eval=5000)
    with pytest.raises(Unmade, match=f'cell {key(wrong)}: ValueError: n_eval 5000 is more than'):
        quiet(tmp_path).run([wrong, Cell(recipe())], executor=workers(2))
    assert quiet(tmp_path).plan([Cell(recipe())]) == []

def test_a_real_ray(alone, tmp_path, monkeypatch):
    "Two tasks at once, on a cluster that is begun here"
    if not importlib.util.find_spec('ray'): pytest.skip("wants Ray: pip install 'refine_nb[cluster]'")
    try: left = quiet(tmp_path/'store').run(table(), executor=ray(at_most=2))
    except Exception as e:
        if 'timed out during startup' not in str(e): raise
        pytest.skip('Ray did not start in the 30 seconds that it gives itself: this machine is too busy')
    assert left == [] and same_table(alone, tmp_path/'store')


# ---- stopping ----------------------------------------------------------------------------------------------

def test_a_budget_runs_out_in_the_middle(alone, tmp_path, monkeypatch):
    "A training is stopped at a snapshot; the next run goes on from it"
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log')); monkeypatch.setenv('TOY_GATE', f'0:{tmp_path}/go')
    opener = threading.Timer(1.5, (tmp_path/'go').touch); opener.start()    # the first epoch takes all of it
    store = quiet(tmp_path/'store')
    left = store.run(table(), executor=here(), budget=1.)
    assert left == store.plan(table()) and left[0] == recipe()
    assert [p.name[:5] for p in (store.root/'running'/key(recipe())).glob('*.pt')] == ['00001']
    assert store.run(table(), budget='1h') == [] and same_table(alone, store.root)
    assert epochs(tmp_path/'log')[:3] == [0, 1, 2]

def work_all(root, executor):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Store(root, Engine(), every=0.).run(table(), executor=executor)

def begun(tmp_path, executor, gate):
    "A process of its own that runs the table, and has begun"
    env = {**os.environ, 'TOY_LOG': str(tmp_path/'log'), 'TOY_GATE': f'1:{gate}', 'OMP_NUM_THREADS': '1'}
    p = Worker(tmp_path/'said', work_all, tmp_path/'store', executor, env=env)
    until(lambda: (tmp_path/'log').exists() and 1 in epochs(tmp_path/'log'), 200)
    return p

def told(p, what):
    "It hands the signal on to its workers, who else might be through before they hear of it"
    os.kill(p.process.pid, what); time.sleep(2)

@pytest.mark.parametrize('executor', [here(), workers(2)], ids=['here', 'workers'])
def test_sigterm(alone, tmp_path, executor):
    "A snapshot, no lock, exit status 143"
    p = begun(tmp_path, executor, tmp_path/'go')
    told(p, signal.SIGTERM); (tmp_path/'go').touch()
    assert p.end(200) == 143, p.text
    store = quiet(tmp_path/'store')
    assert list((store.root/'running').glob('*/0000[123]-*.pt'))
    assert not any(store.taken(s) for s in store.plan(table()))
    store.run(table(), executor=here()); assert same_table(alone, store.root)

def test_ctrl_c_stops_the_workers(alone, tmp_path):
    p = begun(tmp_path, workers(2), tmp_path/'go')
    told(p, signal.SIGINT); (tmp_path/'go').touch()
    assert p.end(200) and 'KeyboardInterrupt' in p.text
    store = quiet(tmp_path/'store')
    assert list((store.root/'running').glob('*/0000[123]-*.pt')) and not any(
        store.taken(s) for s in store.plan(table()))
    store.run(table(), executor=here()); assert same_table(alone, store.root)


# ---- among others ------------------------------------------------------------------------------------------

def test_waits_for_any_not_for_the_first(tmp_path):
    "Others are at all that is ready: whichever they leave first is taken"
    first, second = recipe(seed=1), recipe(seed=2)
    others, mine = quiet(tmp_path), quiet(tmp_path)
    with others.claimed(first):
        claim = others.claimed(second); claim.__enter__()
        helper = threading.Thread(target=lambda: mine.run([Cell(first), Cell(second)]), daemon=True)
        helper.start(); helper.join(1); assert helper.is_alive() and not mine.find(second)
        claim.__exit__(None, None, None)
        until(lambda: mine.find(Cell(second))); assert not mine.find(first)
    helper.join(60)
    assert mine.plan([Cell(first), Cell(second)]) == []

def test_an_empty_folder_of_a_killed_run_goes(tmp_path):
    "Left between the mkdir and the first snapshot, or between the last one's removal and its own"
    store = quiet(tmp_path)
    for name in ('a'*32, key(recipe())): (tmp_path/'running'/name).mkdir(parents=True)
    with store.claimed(recipe()):
        helper = threading.Thread(target=lambda: quiet(tmp_path)); helper.start(); helper.join()
    assert [p.name for p in (tmp_path/'running').iterdir()] == [key(recipe())]      # its maker is alive
    quiet(tmp_path); assert not list((tmp_path/'running').iterdir())

def test_who_waited_clears_up_behind_who_was_killed(alone, tmp_path):
    "Killed after the result was there: who takes over finds it, and clears what was left"
    store = quiet(tmp_path); store.get(recipe())
    left = tmp_path/'running'/key(recipe()); left.mkdir()
    with store.claimed(recipe()): pass
    store.run([Cell(recipe())]); quiet(tmp_path); assert not left.exists()
