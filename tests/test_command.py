"`refine`, as a person types it: each command on tiny data, each thing that can be typed wrongly"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from refine_nb import runs
from refine_nb.base import Cell, Recipe, call, key
from refine_nb.vision import classifier, load_data, own_images
from refine_nb.training import fine_tune, sgd
from refine_nb.command.main import _refine
from refine_nb.command.own_networks import three_arms
from toys import heeds_ctrl_c

NETWORKS = '''import torch
from torch import nn
class Bright(nn.Module): # the brighter ones are cats
    def forward(self, x): m = 10*(x.flatten(1).mean(1, keepdim=True)-.39); return torch.cat([m, -m], 1)
def network(): return Bright()
def three(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def large(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
def nothing(): return 7
'''

def refine(*args): return CliRunner().invoke(_refine, [str(a) for a in args])

def error(*args, status=1): # what is said, in one line
    r = refine(*args)
    assert r.exit_code == status and not isinstance(r.exception, (AssertionError, AttributeError)), r.output
    return r.output.strip().splitlines()[-1]

def program(*args, **env):
    return subprocess.Popen([sys.executable, '-c', 'from refine_nb.command.main import main; main()', *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **env}, preexec_fn=heeds_ctrl_c)

@pytest.fixture
def pets(tmp_path, monkeypatch):
    "Thirty 8x8 images of two classes, and networks that look at them"
    for i in range(30):
        (of := tmp_path/'pets'/('cat' if i%2 else 'dog')).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(100*(i%2), 100*(i%2)+99, (8,8), dtype=np.uint8)
        Image.fromarray(pixels).save(of/f'{i}.png')
    (tmp_path/'my_nets.py').write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path)); monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('REFINE_DATA', str(tmp_path/'data'))
    sys.modules.pop('my_nets', None)
    return tmp_path/'pets'


# ---- what is typed wrongly ---------------------------------------------------------------------------

@pytest.mark.parametrize('args,says', [
    (['lst'], "unknown command 'lst': did you mean list"),
    (['show', 'tab1_adcord'], "unknown artefact 'tab1_adcord': did you mean tab1_adcorda"),
    (['list', 'adcorde'], "unknown paper 'adcorde': did you mean adcorda?"),
    (['plan', 'tab1_adcorda', '-p', 'modle', 'x'], "parameter of tab1_adcorda 'modle': did you mean model?"),
    (['run', 'tab1_adcorda', '--preset', 'big'], "'big' is not one of"),
    (['run', 'tab1_adcorda', '--budget', '0m'], 'wants a time such as'),
    (['run', 'tab1_adcorda', '--workers', '0'], '0 is not in the range'),
    (['evaluate', 'm:f', 'd', '--eps', '8'], 'wants a budget in (0,1], such as 8/255'),
    (['evaluate', 'm:f', 'd', '--attacks', 'pgdd'], 'did you mean pgd'),
    (['store', 'pruned'], 'did you mean prune'), (['run'], 'Missing argument')])
def test_what_is_not_understood_has_status_2(args, says): assert says in error(*args, status=2)

@pytest.mark.parametrize('network,says', [
    ('my_nets', 'MODULE:FACTORY'), ('no_such_nets:f', 'no_such_nets cannot be imported (ModuleNotFoundError'),
    ('my_nets:netwrk', 'my_nets has no function netwrk'),
    ('my_nets:nothing', 'returns no torch module, got int'),
    ('my_nets:large', 'cannot take images [1, 8, 8]'),
    ('my_nets:three', 'knows 3 classes, the data has 2 (cat, dog)')])
def test_a_network_that_does_not_fit(pets, network, says):
    for command in ('evaluate', 'audit'): assert says in error(command, network, pets)

def test_images_that_do_not_fit(pets):
    net = 'my_nets:network'
    assert 'there is no' in error('evaluate', net, './nowhere')
    assert "unknown data set 'nowhere'" in error('evaluate', net, 'nowhere')
    (pets/'cat'/'broken.png').write_bytes(b'nothing'); (pets/'dog'/'cut.jpg').write_bytes(b'\xff\xd8\xff')
    said = error('evaluate', net, pets)
    assert '2 images cannot be read' in said and 'broken.png' in said and 'cut.jpg' in said
    for p in (pets/'dog').iterdir(): p.unlink()
    assert 'holds no image' in error('adcorda', pets)
    (pets/'dog').rmdir(); assert 'found only one, cat' in error('adcorda', pets)

def test_a_store_of_another_version(refine_home):
    refine_home.mkdir(); (refine_home/'store.json').write_text('{"format": 1}')
    assert 'has format 1, this version of refine_nb reads format 2' in error('store', 'size')

def test_no_space(monkeypatch):
    def full(*_): raise OSError(28, 'cannot write to the store: no space left on device')
    monkeypatch.setattr(runs, 'home_folder', full)
    assert 'no space left' in error('store', 'size')


# ---- pages -------------------------------------------------------------------------------------------

def test_list():
    assert json.loads(refine('list', 'spat', '--json').output)['rows'][0]['artefact'] == 'fig2_1_spat'

def test_the_list_imports_no_torch():
    code = "import sys; sys.argv=['refine','list']\nfrom refine_nb.command.main import main\n" \
           "try: main()\nfinally: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert 'tab1_adcorda' in out and out.splitlines()[-1] == 'False'

def test_run_hands_on_how(monkeypatch):
    asked = {}
    for k in ('BUDGET', 'WORKERS', 'ON'): monkeypatch.setenv(f'REFINE_{k}', '')
    def page(artefact, values):
        asked.update(values, **{k: v for k,v in os.environ.items() if 'REFINE' in k})
        return Path('x.ipynb')
    monkeypatch.setattr('refine_nb.command.pages.executed', page)
    r = refine('run', 'tab1_adcorda', '--preset', 'small', '-p', 'seeds', '1,2', '--budget', '25m',
               '--workers', 2, '--on', 'local')
    assert r.exit_code == 0, r.output
    assert {k: asked[k] for k in ('preset', 'seeds', 'REFINE_BUDGET', 'REFINE_WORKERS', 'REFINE_ON')} == {
        'preset': 'small', 'seeds': '1,2', 'REFINE_BUDGET': '25m',
        'REFINE_WORKERS': '2', 'REFINE_ON': 'local'}

def test_run_and_a_page_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path/'reports'))
    r = refine('run', 'fig3_mixture', '--preset', 'demo')
    assert r.exit_code == 0 and (tmp_path/'reports'/'fig3_mixture'/'demo').exists(), r.output
    said = error('run', 'tab2_adcorda', '-p', 'model', 'resnet9')
    assert "tab2_adcorda stopped: unknown model 'resnet9'" in said and '.log' in said

def test_show_says_which_runs_are_in_no_store(monkeypatch, tmp_path):
    out = refine('show', 'tab1_adcorda').output
    assert 'baseline' in out and '8 of the 8 runs behind it are in no store here' in out
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path))
    assert 'no report of tab3_9_spat' in error('show', 'tab3_9_spat')


# ---- the store ---------------------------------------------------------------------------------------

@pytest.fixture
def kept(refine_home):
    base = Recipe(data=call(load_data, name='digits'), model=call(classifier, name='resnet18'),
                  method=call(fine_tune), optimiser=call(sgd), epochs=1, batch_size=16)
    store = runs.Store(quiet=True)
    store.keep(base, {'best_accuracy': .5}, {'w': torch.ones(3)}, 1.)
    store.keep(Cell(base), {'accuracy': .25}, {}, 1.)
    return base

def test_explain(kept):
    out = refine('explain', key(kept)[:7]).output
    for part in ('fine_tune', 'best_accuracy', f'Cell {key(Cell(kept))}', 'made: seconds'): assert part in out
    rows = json.loads(refine('explain', key(Cell(kept)), '--json').output)['rows']
    assert {'what': 'made from', 'value': f'Recipe {key(kept)}'} in rows
    assert 'no result in this store' in error('explain', 'zz')

def test_store(kept, refine_home, monkeypatch, tmp_path):
    assert 'recipe' in refine('store', 'size').output and '2 of 2' in refine('store', 'verify').output
    report = tmp_path/'reports'/'tab1_adcorda'/'small'/'x'; report.mkdir(parents=True)
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path/'reports'))
    (report/'run.json').write_text(json.dumps({'made': [{'key': key(kept)}]}))
    assert '1 of 2 results' in refine('store', 'prune').output
    assert (refine_home/'cell'/key(Cell(kept))).exists()              # it was only counted
    assert 'removed' in refine('store', 'prune', '--yes').output
    assert not (refine_home/'cell'/key(Cell(kept))).exists() and (refine_home/'recipe'/key(kept)).exists()
    (refine_home/'recipe'/key(kept)/'tensors.safetensors').write_bytes(b'cut')
    r = refine('store', 'verify'); assert r.exit_code == 1 and key(kept) in r.output

def test_doctor():
    rows = {r['what']: r['value'] for r in json.loads(refine('doctor', '--json').output)['rows']}
    assert rows['locks'] == 'keep others out' and rows['data: digits'] == 'there'
    assert rows['results'] == 'none yet'


# ---- one's own ---------------------------------------------------------------------------------------

def test_evaluate(pets):
    net = ['evaluate', 'my_nets:network', pets, '--device', 'cpu']
    r = json.loads(refine(*net, '--eps', '.3', '--every', '--json').output)
    under = {row['under']: row for row in r['rows']}
    assert under['nothing (clean)']['accuracy'] == 100 and under['nothing (clean)']['n'] == 30
    assert under['the worst of them, image by image']['accuracy'] == 0 and 0 < under['pgd']['high'] < 20
    some = refine(*net, '--eps', '.3', '--attacks', 'pgd', '--autoattack')
    assert some.exit_code == 0 and 'apgd-ce' in some.output.lower(), some.output # of two classes

def test_audit(pets):
    out = refine('audit', 'my_nets:network', pets, '--eps', '.1', '--device', 'cpu').output
    assert 'of 12 checks raised on 6 images' in out and 'square search' in out

def test_adcorda(pets, tmp_path):
    few = ['--size', 8, '--epochs', 1, '--further', 1, '--device', 'cpu', '--json',
           '--out', tmp_path/'refined.safetensors']
    r = refine('adcorda', pets, *few); assert r.exit_code == 0, (r.output, r.exception)
    said = json.loads(r.output)
    assert [row['network'] for row in said['rows']] == ['baseline', 'control', 'AdCorDA']
    assert set(said['tests']) == {'baseline', 'control'} and said['tests']['control']['n'] == 6
    from safetensors.torch import load_file
    assert 'net.conv1.weight' in load_file(tmp_path/'refined.safetensors')
    again = json.loads(refine('adcorda', pets, *few).output)
    assert again['rows'] == said['rows']                 # from the store: the same images, the same keys
    Image.new('L', (8,8), 5).save(pets/'dog'/'0.png')    # other images at the same place
    others = three_arms(str(pets), size=8, epochs=1, further=1).values()
    assert not {key(c) for c in others} & {row['key'] for row in said['rows']}

def test_adcorda_from_weights(pets, tmp_path):
    net = classifier('resnet18', num_classes=5)
    torch.save(net.net.state_dict(), tmp_path/'w.pth')
    r = refine('adcorda', pets, '--size', 8, '--epochs', 1, '--further', 1, '--device', 'cpu',
               '--weights', tmp_path/'w.pth', '--out', tmp_path/'r.safetensors')
    assert r.exit_code == 0 and 'further training' in r.output, (r.output, r.exception)

def test_keys_say_what_images_hold_and_not_where_they_lie(pets, tmp_path):
    def named(): return key(call(load_data, name=own_images(pets), size=8))
    first = named(); moved = tmp_path/'other'; moved.mkdir(); pets.rename(moved/'pets')
    assert key(call(load_data, name=own_images(moved/'pets'), size=8)) == first
    (moved/'pets').rename(pets); assert named() == first
    (pets/'cat'/'1.png').unlink(); assert named() != first


# ---- the program -------------------------------------------------------------------------------------

def test_status_of_the_program(pets):
    p = program('explain', 'zz'); out, err = p.communicate(timeout=120)
    assert p.returncode == 1 and out == '' and err.startswith('Error: no result') and err.count('\n') == 1
    p = program('shwo'); _, err = p.communicate(timeout=60)
    assert p.returncode == 2 and 'did you mean show' in err

@pytest.mark.parametrize('told,status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_is_told_to_stop(pets, told, status):
    (pets.parent/'slow_nets.py').write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    where = f"{pets.parent}:{os.environ.get('PYTHONPATH', '')}"
    p = program('evaluate', 'slow_nets:f', str(pets), PYTHONPATH=where)
    assert p.stdout.readline() == 'here\n'
    time.sleep(.2); p.send_signal(told); _, err = p.communicate(timeout=60)
    assert p.returncode == status and 'Traceback' not in err
