"What `refine` refuses before it costs anything, and what it keeps"
import json, os
from pathlib import Path

import pytest
import torch

from refine_nb.base import key
from refine_nb.runs import home_folder
from refine_nb.command import own_networks, pages
from refine_nb.command.own_networks import _verdict, three_arms
from test_command import error, pets, refine  # noqa: F401


# ---- pages -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('args,says', [
    (['--budget', '90'], 'wants a time such as 90s, 25m or 2h'),
    (['-p', 'preset', 'tiny'], "unknown preset 'tiny': there are demo, small, gpu, paper"),
    (['-p', 'preset', 'small', '--preset', 'paper'], 'preset is given 2 times'),
    (['-p', 'model', 'resnet18', '-p', 'model', 'resnet34'], 'model is given 2 times'),
    (['-p', 'workers', '2'], 'say refine run --workers 2'), (['-p', 'budget', '5m'], 'run --budget 5m')])
def test_a_page_is_not_started_for_what_it_cannot_be_asked(monkeypatch, args, says):
    monkeypatch.setattr(pages, 'executed', None)
    assert says in error('run', 'tab1_adcorda', *args, status=2)

@pytest.fixture
def papermill(monkeypatch):
    "Pages that say what they are asked for, and stop where that is the model 'bad'"
    import papermill
    def execute(page, out, parameters, stdout_file, **_):
        Path(out).write_text(str(parameters)); stdout_file.write(str(parameters))
        if parameters.get('model') == 'bad':
            raise papermill.PapermillExecutionError(1, 1, '', 'ValueError', 'no such model', [])
    monkeypatch.setattr(papermill, 'execute_notebook', execute)

def test_each_choice_of_parameters_has_its_own_copy(papermill):
    asked = [{'preset': 'small'}, {'preset': 'small', 'model': 'a'}, {'preset': 'small', 'model': 'b'}]
    out = [pages.executed('tab1_adcorda', v) for v in asked]
    assert out[0].name == 'tab1_adcorda-small.ipynb' and len(set(out)) == 3
    assert [p.read_text() for p in out] == [p.with_suffix('.log').read_text() for p in out] == [
        str(v) for v in asked]
    assert pages.executed('tab1_adcorda', dict(reversed(asked[1].items()))) == out[1]

def test_the_same_page_may_run_twice_at_a_time(monkeypatch):
    import papermill
    runs = []
    def execute(page, out, parameters, stdout_file, **_): # another process begins later, and ends before
        runs.append(n := len(runs)); Path(out).write_text(f'page {n}'); stdout_file.write(f'log {n}')
        if n == 0: assert pages.executed('tab1_adcorda', {'model': 'a'}).read_text() == 'page 1'
    monkeypatch.setattr(papermill, 'execute_notebook', execute)
    out = pages.executed('tab1_adcorda', {'model': 'a'})
    assert out.read_text() == 'page 0' and out.with_suffix('.log').read_text() == 'log 0'
    assert len(runs) == 2 and sorted(out.parent.iterdir()) == [out, out.with_suffix('.log')]

def test_a_page_that_fails_leaves_the_good_copy(papermill, monkeypatch):
    monkeypatch.setattr(pages, '_out', lambda a, v: home_folder()/'executed'/f'{a}.ipynb')
    good = pages.executed('tab1_adcorda', {'model': 'a'}); was = good.read_text()
    with pytest.raises(RuntimeError, match=r'no such model \(its log is .*tab1_adcorda-failed.log\)'):
        pages.executed('tab1_adcorda', {'model': 'bad'})
    assert good.read_text() == good.with_suffix('.log').read_text() == was
    assert 'bad' in (good.parent/'tab1_adcorda-failed.ipynb').read_text()
    assert sorted(p.name for p in good.parent.iterdir()) == [
        f'tab1_adcorda{end}' for end in ('-failed.ipynb', '-failed.log', '.ipynb', '.log')]


# ---- one's own ---------------------------------------------------------------------------------------

def test_no_attack_at_all_is_refused():
    assert 'wants one or more of fgsm' in error('evaluate', 'm:f', 'd', '--attacks', ',', status=2)

def test_digits_by_their_name():
    cells = three_arms('digits', size=8, epochs=1, further=1)
    tuned = cells['AdCorDA'].recipe
    for r in (tuned, tuned.init, tuned.method['source'].recipe): assert r.data['name'] == 'digits'
    assert tuned.method['coral_weight'] == 1/750 and cells['control'].recipe.init == cells['baseline'].recipe
    assert own_networks._weighed(tuned)[0].startswith('The CORAL weight is 0.00133, as on CIFAR-10: the')
    assert own_networks._weighed(three_arms('cifar10')['AdCorDA'].recipe) == ()

def test_the_keys_of_published_sets_stay():
    assert [key(c) for c in three_arms('cifar10_resplit').values()] == [
        '326060910826cd517640', 'e8a052446a7d98f3af02', '014dede46542953f1b6f']

def test_better_is_said_where_interval_and_test_say_so():
    of = dict(difference=.1, low=.01, high=.15, n=9)
    assert 'is better than x' in _verdict({**of, 'p': .04}, 'x')
    assert 'is not significantly different from x' in _verdict({**of, 'p': .0625}, 'x')
    assert 'is worse than x' in _verdict({**of, 'low': -.2, 'high': -.1, 'p': .01}, 'x')
    assert 'is not significantly different from x' in _verdict({**of, 'low': -.2, 'p': .01}, 'x')

def test_where_the_weights_go_is_tried_first(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert own_networks._free(None, None, '~/r.safetensors') == str(tmp_path/'r.safetensors')
    def denied(dir): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('tempfile.TemporaryFile', denied)
    said = error('adcorda', 'digits', '--out', tmp_path/'r.safetensors', status=2)
    assert f'cannot write to {tmp_path} (Permission denied): name another folder' in said

def test_the_answer_is_there_where_the_weights_cannot_be_written(pets, tmp_path, monkeypatch): # noqa: F811
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    r = refine('adcorda', pets, '--size', 8, '--epochs', 1, '--further', 1, '--device', 'cpu',
               '--out', tmp_path/'r.safetensors')
    assert r.exit_code == 1 and 'further training: ' in r.output and 'could not be written' in r.output

def test_weights_that_adcorda_wrote_are_no_start(tmp_path):
    file = tmp_path/'r.safetensors'
    own_networks._kept({'net.fc.weight': torch.ones(2)}, file, network="classifier('resnet18', stem='cifar')")
    said = error('adcorda', 'digits', '--weights', file, status=2)
    assert "was written by refine adcorda, with weights of classifier('resnet18'" in said
    for raw in (b'', b'cut', b'\xff'*20):
        file.write_bytes(raw); assert own_networks._plain_weights(None, None, str(file)) == str(file)


# ---- a disk that says no -----------------------------------------------------------------------------

def test_a_home_that_is_a_file_is_said_plainly(tmp_path, monkeypatch):
    (tmp_path/'file').write_text(''); monkeypatch.setenv('REFINE_HOME', str(tmp_path/'file'))
    said = error('store', 'size')
    assert said.startswith('Error: cannot write to the store') and 'room' not in said and 'Errno' not in said
