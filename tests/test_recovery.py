"""A store's promises.

A run that is killed, damaged, refused or asked for twice ends with the bits of one that was left in peace.
"""
import json, os, shutil, signal, tempfile, threading, time, warnings
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from refine_nb.base import Cell, Worst, ancestors, call, key
from refine_nb.attacks import salt_and_pepper
from refine_nb.training import Diverged, Engine, Snapshots, fine_tune
from refine_nb.refinement import Correction, adapt
from refine_nb.runs import Store, here, provenance
from toys import Worker, growing_net, quiet, read, recipe, same, teach, tied_net, work

RUN, SP = recipe(), call(salt_and_pepper, targeted=True, steps=50)


def refined():
    "A correction by attack, and the adaptation from it"
    return replace(RUN, init=RUN, method=call(adapt, source=Correction(RUN, SP), coral_weight=.1),
                   epochs=2, batch_size=16)

def entries(root):
    return sorted(str(p.parent.relative_to(root)) for p in Path(root).glob('*/*/record.json')
                  if p.parts[-3] != 'damaged')
def epochs(log): return [int(line.split()[1]) for line in Path(log).read_text().splitlines()]
def makers(log): return list(dict.fromkeys(line.split()[0] for line in Path(log).read_text().splitlines()))

def until(true, seconds=60):
    "Wait for something that another process does"
    for _ in range(int(seconds/.01)):
        if true(): return
        time.sleep(.01)
    raise AssertionError(f'waited {seconds} s in vain')


@pytest.fixture(scope='module')
def peace(tmp_path_factory):
    "A store in which nothing ever happened: the runs, made without snapshots"
    root = tmp_path_factory.mktemp('peace')
    store = quiet(root, every=3600.)
    for s in (refined(), Cell(RUN)): store.get(s)
    return root

@pytest.fixture
def root(tmp_path): return tmp_path/'store'

@pytest.fixture
def kept(peace, root):
    "A copy of the peaceful store that may be damaged"
    shutil.copytree(peace, root)
    return root


# ---- kills -------------------------------------------------------------------------------------------------

def test_a_toy_run_learns_and_draws(peace, root):
    "What is compared below is not trivial: weights move; dropout, order and augmentation hang on the seed"
    done = quiet(peace).get(RUN, make=False)
    losses = [h['loss'] for h in done.result['history']]
    assert len(losses) == 3 and losses[-1] < .8*losses[0]
    fixed = quiet(peace).get(Correction(RUN, SP), make=False).result
    assert 0 < fixed['corrected'] < fixed['n']
    other = quiet(root).get(recipe(seed=2))
    assert not torch.equal(other.tensors()['5.weight'], done.tensors()['5.weight'])

def test_snapshots_change_nothing(peace, root):
    quiet(root, every=0.).get(refined())
    assert same(peace, root, RUN) and same(peace, root, refined()) and same(peace, root, Correction(RUN, SP))

def test_killed_in_the_middle_of_epochs(peace, root, tmp_path):
    """Three kills in one run: before any snapshot, at the start of the second epoch, at the last step of all.
    Each goes on from the last snapshot"""
    log = tmp_path/'log'
    for where in ('kill:0:2', 'kill:1:0', 'kill:2:3'):
        assert Worker(tmp_path/'said', work, root, RUN,
                      env={'TOY_DO': where, 'TOY_LOG': str(log)}).end() == -signal.SIGKILL
        assert entries(root) == []
    assert Worker(tmp_path/'said', work, root, RUN, env={'TOY_LOG': str(log)}).end() == 0
    assert epochs(log) == [0, 0,1, 1,2, 2] and len(makers(log)) == 4
    assert same(peace, root, RUN)

def test_killed_at_every_file_operation(peace, tmp_path):
    """The store's format and locks, each snapshot's writing, renaming and removal,
    the entry, and the clearing up after it"""
    for n in count(1):
        root, said = tmp_path/f'{n}', tmp_path/f'said{n}'
        code = Worker(said, work, root, RUN, kill=(n, root)).end()
        if code == 0: break
        assert code == -signal.SIGKILL, said.read_text()
        with warnings.catch_warnings():
            warnings.simplefilter('error')       # a kill is not damage
            quiet(root).get(RUN)
        assert same(peace, root, RUN) and entries(root) == [f'recipe/{key(RUN)}']
        shutil.rmtree(root)
    assert n > 30, f'only {n-1} operations were seen: the hook misses some'

def test_killed_while_an_entry_is_written_leaves_nothing_behind(root, tmp_path):
    "A second run clears the half-written folder of a first that was killed"
    half = lambda: [p for p in root.glob('recipe/.*')]
    for n in count(20):
        assert Worker(tmp_path/'said', work, root, RUN, kill=(n, root)).end() == -signal.SIGKILL
        if half(): break
        shutil.rmtree(root)
    assert entries(root) == []
    quiet(root).get(RUN)
    assert not half() and entries(root) == [f'recipe/{key(RUN)}'] and not list((root/'running').iterdir())

@pytest.mark.parametrize('n', [4, 9])
def test_an_adaptation_is_killed(peace, kept, tmp_path, n):
    """Killed while its first and second snapshot is written.
    The parent and the corrected set stay, the rest is made to the same bits"""
    shutil.rmtree(quiet(kept).folder(refined()))
    code = Worker(tmp_path/'said', work, kept, refined(), kill=(n, kept/'running'/key(refined()))).end()
    assert code == -signal.SIGKILL, (tmp_path/'said').read_text()
    before = (kept/'recipe'/key(RUN)).stat().st_mtime_ns
    assert quiet(kept).plan([refined()]) == [refined()]
    quiet(kept).get(refined())
    assert same(peace, kept, refined()) and (kept/'recipe'/key(RUN)).stat().st_mtime_ns == before

def test_interrupted_by_hand(peace, root, tmp_path, monkeypatch):
    "Ctrl-C in a notebook: the lock is given back, and the same process goes on"
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    store = quiet(root)
    monkeypatch.setenv('TOY_DO', 'stop:1:2')
    with pytest.raises(KeyboardInterrupt): store.get(RUN)
    monkeypatch.delenv('TOY_DO')
    store.get(RUN)
    assert epochs(tmp_path/'log') == [0,1, 1,2] and same(peace, root, RUN)


# ---- damage ------------------------------------------------------------------------------------------------

def flip(p): raw = bytearray(p.read_bytes()); raw[len(raw)*3//4] ^= 1; p.write_bytes(raw)
def cut(p): p.write_bytes(p.read_bytes()[:-7])
def empty(p): p.write_bytes(b'')
def edit(p): p.write_text(p.read_text().replace('"best_epoch": ', '"best_epoch": 1'))
def forget(p): said = json.loads(p.read_text()); said.pop('checksum'); p.write_text(json.dumps(said))
def as_list(p): p.write_text('[]')
def folder(p): p.unlink(); p.mkdir()

TENSORS, RECORD = 'tensors.safetensors', 'record.json'
DAMAGE = [(TENSORS, cut), (TENSORS, flip), (TENSORS, empty), (TENSORS, Path.unlink), (TENSORS, folder),
          (RECORD, cut), (RECORD, flip), (RECORD, empty), (RECORD, edit), (RECORD, forget), (RECORD, as_list),
          (RECORD, Path.unlink), (RECORD, folder)]

@pytest.mark.parametrize('file,harm', DAMAGE, ids=[f'{f.split(".")[0]}-{h.__name__}' for f,h in DAMAGE])
def test_a_damaged_entry(peace, kept, file, harm):
    "Named in a warning, set aside, and made again with the same bits"
    broken = kept/'recipe'/key(RUN)
    harm(broken/file)
    with pytest.warns(UserWarning, match=rf'recipe {key(RUN)} is damaged '
                      rf'\(.*{file.split(".")[0]}.*\).*damaged/.*made again') as heard:
        quiet(kept).tensors(RUN)
    assert len(heard) == 1 and same(peace, kept, RUN)
    aside, = (kept/'damaged').iterdir()
    assert aside.name.startswith(key(RUN)) and aside.is_dir()

def test_an_entry_under_a_wrong_name(peace, kept):
    wrong = kept/'recipe'/key(RUN)
    shutil.rmtree(wrong); shutil.copytree(kept/'recipe'/key(refined()), wrong)
    with pytest.warns(UserWarning, match=f'belongs to {key(refined())}'): quiet(kept).get(RUN)
    assert same(peace, kept, RUN)

def test_an_entry_that_is_a_file(peace, kept):
    wrong = kept/'recipe'/key(RUN)
    shutil.rmtree(wrong); wrong.write_text('?')
    with pytest.warns(UserWarning, match=f'{key(RUN)} is damaged'): quiet(kept).get(RUN)
    assert same(peace, kept, RUN)

@pytest.mark.parametrize('spec', [Correction(RUN, SP), Cell(RUN)], ids=['correction', 'cell'])
def test_damage_of_other_kinds(peace, kept, spec):
    flip(quiet(kept).folder(spec)/TENSORS)
    with pytest.warns(UserWarning, match=f'{key(spec)} is damaged'): quiet(kept).tensors(spec)
    assert same(peace, kept, spec)

def test_damage_twice(peace, kept):
    "What was set aside first is not overwritten by what is set aside next"
    for n in (1, 2):
        flip(kept/'recipe'/key(RUN)/TENSORS)
        with pytest.warns(UserWarning, match='is damaged'): quiet(kept).tensors(RUN)
        assert len(list((kept/'damaged').iterdir())) == n
    assert same(peace, kept, RUN)

def test_a_plan_sees_a_damaged_record(kept):
    "and a parent that only a child needs is not asked for"
    cut(kept/'recipe'/key(refined())/RECORD)
    with pytest.warns(UserWarning, match='is damaged'):
        assert quiet(kept).plan([refined(), Cell(RUN)]) == [refined()]

def started(root, monkeypatch):
    "A run that stopped in its last epoch: the path of its snapshot"
    monkeypatch.setenv('TOY_DO', 'stop:2:1')
    with pytest.raises(KeyboardInterrupt): quiet(root).get(RUN)
    monkeypatch.delenv('TOY_DO')
    snapshot, = (root/'running'/key(RUN)).glob('*.pt')
    return snapshot

def tree(monkeypatch, commit, dirty):
    monkeypatch.setattr('refine_nb.runs.store.loaded_commit', lambda: {'commit': commit*40, 'dirty': dirty})

def test_a_resumed_result_names_the_tree_that_began_it(peace, root, monkeypatch):
    tree(monkeypatch, 'a', True); started(root, monkeypatch)
    tree(monkeypatch, 'b', False); entry = quiet(root).get(RUN)
    assert (entry.made['commit'], entry.made['dirty']) == ('b'*40, False) and same(peace, root, RUN)
    assert [(h['commit'], h['dirty']) for h in entry.made['resumed_from']] == [('a'*40, True)]
    said = provenance([entry])
    assert said['dirty'] and said['commits'] == ['a'*40, 'b'*40] and said['n_no_commit'] == 0

def test_a_result_resumed_by_the_same_code_does_not(root, monkeypatch):
    tree(monkeypatch, 'a', False); started(root, monkeypatch)
    assert 'resumed_from' not in quiet(root).get(RUN).made

def test_a_snapshot_that_names_nobody_is_said_to(root, monkeypatch):
    "Of an older version"
    tree(monkeypatch, 'a', False); snapshot = started(root, monkeypatch)
    state = torch.load(snapshot, weights_only=True); state.pop('hands'); snapshot.unlink()
    assert Snapshots(snapshot.parent, every=0., owner=key(RUN)).save(state)
    entry = quiet(root).get(RUN)
    assert entry.made['resumed_from'] == [{}] and provenance([entry])['n_no_commit'] == 1

def test_a_result_begun_anew_does_not_name_a_lost_snapshot(root, monkeypatch):
    "in the same process"
    tree(monkeypatch, 'a', True); snapshot = started(root, monkeypatch); store = quiet(root)
    monkeypatch.setenv('TOY_DO', 'stop:2:1')
    with pytest.raises(KeyboardInterrupt): store.get(RUN)
    monkeypatch.delenv('TOY_DO'); tree(monkeypatch, 'b', False); shutil.rmtree(snapshot.parent)
    assert 'resumed_from' not in store.get(RUN).made

def test_a_result_on_the_way_of_a_resumed_one_names_the_tree_that_began_it(root, monkeypatch):
    "A training of three epochs, kept by one of four that another tree began"
    short, longer = (recipe(method=call(fine_tune), epochs=n) for n in (3, 4))
    def make(): return quiet(root).run([short, longer])
    def interrupted(self, state): saved(self, state); raise KeyboardInterrupt
    saved = Snapshots.save; tree(monkeypatch, 'a', True)
    with monkeypatch.context() as m:
        m.setattr(Snapshots, 'save', interrupted)
        with pytest.raises(KeyboardInterrupt): make()
    assert not entries(root) and [p.name for p in (root/'running').iterdir()] == [key(longer)]
    tree(monkeypatch, 'b', False); assert not make()
    made = {r: quiet(root).get(r, make=False).made for r in (short, longer)}
    assert made[short]['within'] == key(longer) and 'within' not in made[longer]
    assert all((m['commit'], [h['commit'] for h in m['resumed_from']]) == ('b'*40, ['a'*40])
               for m in made.values())

@pytest.mark.parametrize('harm', [flip, cut, empty])
def test_a_damaged_snapshot(peace, root, tmp_path, monkeypatch, harm):
    harm(started(root, monkeypatch))
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    with pytest.warns(UserWarning, match=r'snapshot 00002-\w+.pt is damaged: set aside'): quiet(root).get(RUN)
    assert epochs(tmp_path/'log') == [0, 1, 2] and same(peace, root, RUN)

def test_an_older_snapshot_stands_in(peace, root, tmp_path, monkeypatch):
    """A kill between writing a snapshot and removing the one before leaves two.
    Where the newer is damaged, the older is used"""
    newer = started(root, monkeypatch); raw = newer.read_bytes(); newer.unlink()
    monkeypatch.setenv('TOY_DO', 'stop:1:0'); shutil.rmtree(newer.parent)
    with pytest.raises(KeyboardInterrupt): quiet(root).get(RUN)
    monkeypatch.delenv('TOY_DO'); newer.write_bytes(raw[:-1])
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    with pytest.warns(UserWarning, match='snapshot 00002-.* is damaged'): quiet(root).get(RUN)
    assert epochs(tmp_path/'log') == [1, 2] and same(peace, root, RUN)

def test_a_stranger_among_snapshots(peace, root, monkeypatch):
    "A file that is no snapshot does not stop a run"
    snapshot = started(root, monkeypatch)
    (snapshot.parent/'zzz.pt').write_bytes(b'?')
    with warnings.catch_warnings(record=True): warnings.simplefilter('always'); quiet(root).get(RUN)
    assert same(peace, root, RUN)


# ---- no room, no right -------------------------------------------------------------------------------------

@pytest.mark.parametrize('limit,every', [(5, 3600.), (3000, 3600.), (3000, 0.)],
                         ids=['at the start', 'for the entry', 'for a snapshot'])
def test_the_disk_is_full(peace, root, tmp_path, limit, every):
    worker = Worker(tmp_path/'said', work, root, RUN, every=every, limit=limit)
    if limit < 1000: worker.said = Path(os.devnull)  # its output does not fit either
    assert worker.end() == 1
    if limit >= 1000:
        last = worker.text.strip().splitlines()[-1]
        assert (last.startswith('OSError') and f'cannot write to the store {root}' in last
                and 'no partial result was kept' in last and 'REFINE_HOME' in last)
    assert entries(root) == [] and not [p for p in root.rglob('*')
                                        if p.is_file() and p.suffix != '.lock' and p.name != 'store.json']
    quiet(root).get(RUN)
    assert same(peace, root, RUN)

def test_the_disk_fills_up_at_the_last_moment(peace, root, monkeypatch):
    "All is written but not yet on the disk"
    store, real = quiet(root), os.fsync
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match=r'cannot write to the store .* \(No space left on device\): '
                       r'no partial result was kept; make room'):
        store.get(RUN)
    assert entries(root) == [] and not list(root.glob('recipe/.*'))
    monkeypatch.setattr(os, 'fsync', real)
    assert quiet(root).get(RUN) and same(peace, root, RUN)

def test_a_store_that_may_only_be_read(peace, tmp_path):
    "What is there is given; what is not there cannot be made, and a sentence says so"
    shared = Path(tempfile.mkdtemp())        # pytest's own folders may not be entered by others
    try:
        shutil.copytree(peace, shared/'store')
        for p in [shared, *shared.rglob('*')]: p.chmod(0o555 if p.is_dir() else 0o444)
        assert (Worker(tmp_path/'a', work, shared/'store', RUN, nobody=True).end()
                == 0), (tmp_path/'a').read_text()
        for file, place, spec in (('b', shared/'store', recipe(seed=9)), ('c', shared/'new', RUN)):
            worker = Worker(tmp_path/file, work, place, spec, nobody=True)
            assert (worker.end() == 1
                    and f'cannot write to the store {place} (Permission denied)' in worker.text), worker.text
    finally:
        for p in [shared, *shared.rglob('*')]: p.chmod(0o755)
        shutil.rmtree(shared)

@pytest.mark.parametrize('below', ['', 'deep/er'])
def test_a_store_that_is_a_file(tmp_path, below):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot write to the store .*file.*set REFINE_HOME to another folder'):
        quiet(tmp_path/'file'/below)
    assert (tmp_path/'file').read_text() == ''

def test_a_store_where_no_folder_can_be():
    with pytest.raises(OSError, match='cannot write to the store /proc/nowhere'): quiet('/proc/nowhere')

@pytest.mark.parametrize('sign,says',
                         [('{"format": 99}', 'has format 99, this version of refine_nb reads format 2'),
                          ('{}', 'is empty or damaged'), ('', 'is empty or damaged'),
                          ('{"for', 'results in the store are unchanged'),
                          ('[1]', 'write {"format": 2} into it')])
def test_a_store_of_another_format(kept, sign, says):
    "refused before anything in it is touched"
    (kept/'store.json').write_text(sign); before = sorted(kept.rglob('*'))
    with pytest.raises(ValueError, match=says) as told: quiet(kept)
    assert ('REFINE_HOME' in str(told.value) and str(kept) in str(told.value)
            and sorted(kept.rglob('*')) == before)


# ---- two at once -------------------------------------------------------------------------------------------

def two(root, tmp_path, spec=RUN):
    """A process that holds a run, stopped in its second epoch, and one that waits for the same run.
    Besides: the log and the gate's file"""
    log, go = tmp_path/'log', tmp_path/'go'
    one = Worker(tmp_path/'one', work, root, spec, env={'TOY_LOG': str(log), 'TOY_GATE': f'1:{go}'})
    until(lambda: log.exists() and 1 in epochs(log))
    other = Worker(tmp_path/'other', work, root, spec, env={'TOY_LOG': str(log)})
    until(lambda: 'another process is making this recipe' in other.text)
    assert key(RUN) in other.text
    return one, other, log, go

def test_two_want_the_same_run(peace, root, tmp_path):
    one, other, log, go = two(root, tmp_path)
    go.touch()
    assert one.end() == other.end() == 0
    assert epochs(log) == [0, 1, 2] and len(makers(log)) == 1
    assert entries(root) == [f'recipe/{key(RUN)}'] and same(peace, root, RUN)

def test_two_want_the_same_parent(peace, root, tmp_path):
    "One wants the parent, one the child"
    one, other, log, go = two(root, tmp_path, refined())
    go.touch()
    assert one.end() == other.end() == 0 and len(makers(log)) == 1
    assert len(entries(root)) == 3 and same(peace, root, refined())

def test_two_share_the_work(tmp_path):
    "What another process is at is left to it, with all that needs it; the rest is made meanwhile"
    first, second = replace(RUN, seed=1), replace(RUN, seed=2)
    store, helper = quiet(tmp_path), threading.Thread(
        target=lambda: quiet(tmp_path).run([Cell(first), Cell(second)]), daemon=True)
    with store.claimed(first):
        helper.start(); until(lambda: store.find(Cell(second)))
        assert store.find(first) is None
    helper.join(60)
    assert store.find(Cell(first)) and store.plan([Cell(first), Cell(second)]) == []

def test_the_second_takes_over(peace, root, tmp_path):
    "The first is killed while the second waits: it goes on from the first one's snapshot"
    one, other, log, _ = two(root, tmp_path)
    os.kill(one.process.pid, signal.SIGKILL)
    assert one.end() == -signal.SIGKILL and other.end() == 0
    assert epochs(log) == [0, 1, 1, 2] and len(makers(log)) == 2 and same(peace, root, RUN)

@pytest.mark.parametrize('meanwhile', ['tensors', 'find'], ids=['made again', 'cleared'])
def test_two_find_the_same_damage(peace, kept, meanwhile):
    "The second to see it finds the entry already made again, or the place already cleared"
    cut(kept/'recipe'/key(RUN)/RECORD) if meanwhile == 'find' else flip(kept/'recipe'/key(RUN)/TENSORS)
    slow, fast = quiet(kept), quiet(kept)
    aside = Store.set_aside
    def late(self, spec, why):
        if self is slow: getattr(fast, meanwhile)(spec) # all that happens between seeing and clearing
        return aside(self, spec, why)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True):
        warnings.simplefilter('always'); patch.setattr(Store, 'set_aside', late)
        slow.tensors(RUN)
    assert same(peace, kept, RUN) and len(entries(kept)) == 4


# ---- other data, other losses ------------------------------------------------------------------------------

@pytest.mark.parametrize('child', [refined(), Correction(RUN, None), Cell(RUN, split='valid')],
                         ids=['recipe', 'correction', 'cell'])
def test_the_images_changed_under_a_parent(peace, root, monkeypatch, child):
    quiet(root).get(RUN)
    monkeypatch.setenv('TOY_INK', '1')
    with pytest.raises(ValueError,
                       match=rf'stored weights {key(RUN)} were made from other images \(fingerprint \w+\) '
                       r'than digits has now .*restore the data, or use another REFINE_HOME'):
        quiet(root).get(child)
    assert entries(root) == [f'recipe/{key(RUN)}']
    monkeypatch.delenv('TOY_INK')
    assert quiet(root).get(child)

@pytest.mark.parametrize('every,kept',
                         [(0., 'the snapshot of epoch 2 is kept'), (3600., 'no snapshot was written before')])
def test_the_loss_is_nan(peace, root, tmp_path, monkeypatch, every, kept):
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    monkeypatch.setenv('TOY_DO', 'nan:2:1')
    with pytest.raises(Diverged,
                       match=f'the loss is nan at epoch 3, step 2 of 4; {kept}. A smaller learning rate'):
        quiet(root, every=every).get(RUN)
    assert entries(root) == []
    monkeypatch.delenv('TOY_DO')
    quiet(root).get(RUN)
    assert epochs(tmp_path/'log') == ([0,1,2, 2] if every == 0 else [0,1,2, 0,1,2]) and same(peace, root, RUN)

def test_a_rerun_that_diverges_still_names_the_snapshot(root, monkeypatch):
    "A new process does not know what an old one wrote but by looking"
    monkeypatch.setenv('TOY_DO', 'nan:2:0')
    for _ in range(2):
        with pytest.raises(Diverged, match='epoch 3, step 1 of 4; the snapshot of epoch 2 is kept'):
            quiet(root).get(RUN)
    assert [p.name[:5] for p in (root/'running'/key(RUN)).glob('*.pt')] == ['00002']

def test_a_plan_keeps_that_a_training_diverged(peace, root, tmp_path, monkeypatch):
    """A plan goes on; the network has no numbers, nor has what hangs on it; nobody trains it again.
    Its folder away, it is tried again"""
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    monkeypatch.setenv('TOY_DO', 'nan:2:1')
    child, other = refined(), replace(RUN, seed=5, epochs=1)
    away = SP.but(targeted=False)
    specs = [Cell(child, split='valid', n_eval=7), Worst((Cell(RUN), Cell(RUN, away))), Cell(other)]
    with pytest.warns(UserWarning, match='diverged .the loss is nan at epoch 3, step 2 of 4.') as said:
        assert quiet(root).run(specs, executor=here()) == []
    assert len(said) == 1 and epochs(tmp_path/'log') == [0, 1, 2, 0]
    for _ in range(2): assert quiet(root).run(specs, executor=here()) == []
    assert len(epochs(tmp_path/'log')) == 4
    store = quiet(root)
    assert ([bool(store.diverged(s)) for s in (RUN, Correction(RUN, SP), child, *specs)]
            == [True, True, True, True, True, False])
    assert [store.find(s).result['accuracy'] for s in specs[:2]] == [None, None]
    assert ([store.find(s).result['n'] for s in specs[:2]] == [7, len(store.data(RUN.data).test)]
            and [h['epoch'] for h in store.find(RUN).result['history']] == [1, 2])
    for ask in (store.get, store.value): # of one that is there and of one that is not
        for s in (specs[0], Cell(child, n_eval=5)):
            with pytest.raises(Diverged, match='the loss is nan at epoch 3, step 2 of 4. This was found on'):
                ask(s)
    monkeypatch.delenv('TOY_DO'); monkeypatch.delenv('TOY_LOG')
    for s in ancestors(*specs):
        if store.diverged(s): shutil.rmtree(store.folder(s))
    quiet(root).run(specs, executor=here())
    assert same(peace, root, RUN) and same(peace, root, child) and not quiet(root).diverged(*specs)

def test_the_last_step_spoils_the_weights(root, monkeypatch):
    "Every loss is finite and the weights are not: that is found before they are kept"
    monkeypatch.setenv('TOY_DO', 'burst:1:3')
    with pytest.raises(Diverged, match='weights.*epoch 2|epoch 2.*weights'): quiet(root).get(RUN)
    assert entries(root) == [] and [p.name[:5] for p in root.glob('running/*/*.pt')] == ['00001']


# ---- what is left behind, what lies in the way -------------------------------------------------------------

def test_damage_twice_after_a_tidy_up(peace, kept):
    "The folder damaged/ may be emptied in part: what is set aside next still finds a free name"
    for n in range(3):
        flip(kept/'recipe'/key(RUN)/TENSORS)
        with pytest.warns(UserWarning, match='is damaged'): quiet(kept).tensors(RUN)
        if n == 0: shutil.copytree(kept/'damaged'/f'{key(RUN)}-0', kept/'damaged'/f'{key(RUN)}-1')
        if n == 1: shutil.rmtree(kept/'damaged'/f'{key(RUN)}-0')
    assert same(peace, kept, RUN) and len(list((kept/'damaged').iterdir())) == 3

@pytest.mark.parametrize('file,harm', [(TENSORS, flip), (RECORD, cut)])
def test_what_another_made_again_stays(peace, kept, file, harm):
    "Between seeing damage and setting it aside another process makes the entry again: it is used, not moved"
    good = kept/'recipe'/key(RUN)
    shutil.copytree(good, kept/'spare'); harm(good/file)
    aside = Store.set_aside
    def late(self, spec, why):
        shutil.rmtree(good); shutil.copytree(kept/'spare', good)
        return aside(self, spec, why)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('error'); patch.setattr(Store, 'set_aside', late)
        store = quiet(kept)
        found = store.get(RUN, make=False) if harm is cut else store.tensors(RUN)
    assert found is not None and not (kept/'damaged').exists() and same(peace, kept, RUN)

def test_leftovers_of_the_killed_are_cleared(peace, kept):
    "Who opens a store next removes what a kill left beside finished results, and nothing else"
    unfinished = kept/'running'/key(replace(RUN, seed=9))
    for p in (kept/'running'/key(RUN), unfinished, kept/'recipe'/f'.{key(RUN)}.refine-abcdefgh',
              kept/'.store.json.refine-abcdefgh', kept/'.hidden'):
        p.mkdir(parents=True); (p/'lock').write_text('')
    quiet(kept)
    assert [p.name for p in (kept/'running').iterdir()] == [unfinished.name]
    assert {p.name for p in kept.glob('.*')} == {'.hidden'} and not list(kept.glob('recipe/.*'))
    assert same(peace, kept, RUN)

def deep(p): p.write_text('['*100_000)

@pytest.mark.parametrize('file,harm', [(RECORD, deep)])
def test_other_damage(peace, kept, file, harm):
    harm(kept/'recipe'/key(RUN)/file)
    with pytest.warns(UserWarning, match=f'{key(RUN)} is damaged'): quiet(kept).tensors(RUN)
    assert same(peace, kept, RUN)

@pytest.mark.parametrize('file', [RECORD, TENSORS, 'store.json', ''])
def test_what_may_not_be_read_is_not_damage(peace, tmp_path, file):
    "Another user's result is not moved away: a sentence says what cannot be read, not that there is no room"
    shared = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(peace, shared/'store')
        for p in [shared, *shared.rglob('*')]: p.chmod(0o777)
        locked = shared/'store'/file if file == 'store.json' else shared/'store'/'recipe'/key(RUN)/file
        locked.chmod(0)
        worker = Worker(tmp_path/'a', read, shared/'store', RUN)
        assert worker.end() == 1 and 'PermissionError: [Errno 13] cannot read' in worker.text, worker.text
        assert 'room' not in worker.text and not (shared/'store'/'damaged').exists()
    finally: shutil.rmtree(shared)

@pytest.mark.parametrize('where', ['toys.fine_tune', 'refine_nb.runs.makers.fit'])
def test_what_is_missing_is_no_full_disk(root, monkeypatch, where):
    "An error of the disk that has nothing to do with writing is told as it is"
    def gone(*args, **kwargs): raise FileNotFoundError(2, 'the images are gone')
    monkeypatch.setattr(where, gone)
    with pytest.raises(FileNotFoundError, match='the images are gone'): quiet(root).get(RUN)

def test_a_store_stays_where_it_was(peace, tmp_path, monkeypatch):
    shutil.copytree(peace, tmp_path/'here'/'near'); (tmp_path/'there').mkdir()
    monkeypatch.chdir(tmp_path/'here'); monkeypatch.setenv('REFINE_HOME', 'near')
    store = Store(engine=Engine(), quiet=True)
    monkeypatch.chdir(tmp_path/'there')
    assert store.get(RUN, make=False) is not None and not list((tmp_path/'there').iterdir())

@pytest.mark.parametrize('under', ['recipe', 'changed'])
def test_a_snapshot_of_another_run_is_refused(root, monkeypatch, under):
    "A snapshot that was moved under another recipe does not become its weights"
    snapshot = started(root, monkeypatch)
    other = recipe(seed=2) if under == 'recipe' else recipe(method=call(teach, augment='none'))
    shutil.move(snapshot.parent, root/'running'/key(other))
    with pytest.raises(ValueError, match=f'is of another run, {key(RUN)}: move it to where it belongs'):
        quiet(root).get(other)
    assert entries(root) == []

def test_a_network_with_tied_layers(root, monkeypatch):
    "It is stored once, found again with its tie, and a rerun trains nothing"
    store, tied = quiet(root), recipe(model=call(tied_net))
    made = store.get(tied); model = store.model(tied)
    assert made.record['tied'] == {'6.weight': '4.weight', '6.bias': '4.bias'}
    assert model[4].weight is model[6].weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('refine_nb.runs.makers.fit', None)
        assert torch.equal(quiet(root).model(tied)[6].weight, model[4].weight)
    assert store.get(Cell(tied, n_eval=20)).result['n'] == 20

def test_what_cannot_be_stored_is_refused_before_training(root, tmp_path, monkeypatch):
    monkeypatch.setenv('TOY_LOG', str(tmp_path/'log'))
    with pytest.raises(ValueError, match='nothing was trained: this network could not be stored and found '
                       r'again afterwards \(RuntimeError: .*grown'):
        quiet(root).get(recipe(model=call(growing_net)))
    assert not (tmp_path/'log').exists() and entries(root) == []
