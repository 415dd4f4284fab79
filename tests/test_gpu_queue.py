"`make gpu` on toy pages: the queue, the budget, archives, what goes out, and a Python without Jupyter"
import io, json, os, re, signal, subprocess, sys, tarfile, threading, time, zipfile
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import gpu
from refine_nb.command import pages
from refine_nb.runs import Store, import_results

TOY = ["preset = None\nseed = 0\ndataset = 'digits'\nmodel = 'resnet20'\nepochs = 1\ndevice = None",
"""from refine_nb.reporting import Sheet, one_whole, measured
sheet = Sheet('tab2_dra', globals(), seed=one_whole(), dataset=['digits', 'mnist'],
              model=['resnet20'], epochs=one_whole(1))""",
"""import pandas as pd
from refine_nb.base import Cell, Recipe, call
from refine_nb.vision import classifier, load_data
from refine_nb.training import fine_tune, sgd
def trained(dataset, seed, epochs, model): return Recipe(
    data=call(load_data, name=dataset, size=8, n_train=64), model=call(classifier, name=model, stem='cifar'),
    method=call(fine_tune), epochs=epochs, optimiser=call(sgd, lr=.05), batch_size=32, seed=seed)
def grid(dataset, seed, epochs, model): return {
    'vanilla': {'clean': Cell(trained(dataset, seed, 1, model))},
    'ours': {'clean': Cell(r:=trained(dataset, seed+1, epochs, model)), 'few': Cell(r, n_eval=20)}}
cells = sheet.ask(grid(**sheet.asked))
sheet.plan()""",
"sheet.make()",
"""ours = sheet.table(pd.DataFrame([{'row': row, 'column': c, **measured([cell], sheet.store)}
                                 for row,its in cells.items() for c,cell in its.items()]))
sheet.show(ours)""", "sheet.save()"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A checkout whose only page is a toy, entries of the queue run in this process; call it with a queue"
    (tmp_path/'nbs').mkdir()
    cells = [{'cell_type': 'code', 'source': s, 'outputs': [], 'execution_count': None, 'id': f'cell{i}',
              'metadata': {'tags': ['parameters']} if i == 0 else {}} for i,s in enumerate(TOY)]
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}
    page = tmp_path/'nbs'/'tab2_dra.ipynb'
    page.write_text(json.dumps({'cells': cells, 'metadata': kernel, 'nbformat': 4, 'nbformat_minor': 5}))
    monkeypatch.setattr(gpu, 'ROOT', tmp_path); monkeypatch.setattr(pages, '_page', lambda artefact: page)
    for name in ('REFINE_HOME', 'REFINE_REPORTS', 'REFINE_DATA', 'PYTHONPATH', 'MPLBACKEND'):
        monkeypatch.setenv(name, str(tmp_path/name.lower()))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    for s in (signal.SIGTERM, signal.SIGINT): monkeypatch.setitem(_BEFORE, s, signal.getsignal(s))
    def child(course, command, seconds):
        before = os.environ.copy()
        try: gpu.entry_run(json.loads(Path(command[-2]).read_text()), Path(command[-1])); return 0
        finally: os.environ.clear(); os.environ.update(before)
    monkeypatch.setattr(gpu.Course, 'child', child)
    def run(queue, *args, budget='2m'):
        (tmp_path/'queue.json').write_text(json.dumps(queue))
        return gpu.main(['--out', str(tmp_path/'out'), '--queue', str(tmp_path/'queue.json'),
                         '--budget', budget, '--skip', 'tests,bench', *args])
    yield run
    for s,f in _BEFORE.items(): signal.signal(s, f)

_BEFORE = {}
ENTRY = {'artefact': 'tab2_dra', 'datasets': ['digits'], 'presets': ['paper'], 'rows': ['vanilla']}

def said(tmp_path): return json.loads((tmp_path/'out'/'gpu.json').read_text())
def states(tmp_path): return [s['state'] for s in said(tmp_path)['ran']]


# ---- a queue -----------------------------------------------------------------------------------------------

def test_a_queue_gives_reports_results_and_numbers(toy, tmp_path):
    assert toy([ENTRY, ENTRY | {'parameters': {'seed': 5}}]) == 0
    found, out = said(tmp_path), tmp_path/'out'
    assert states(tmp_path) == ['report', 'report'] and len(found['numbers']) == 6
    assert [n['cell'] for n in found['numbers'][:3]] == ['vanilla / clean', 'ours / clean', 'ours / few']
    assert all(0 <= n['low'] <= n['accuracy'] <= n['high'] <= 1 for n in found['numbers'])
    assert sorted(p.name for p in out.iterdir()) == ['gpu.json', 'log.txt', 'reports.tar.gz', 'results.tar',
                                                     'weights.tar']
    assert all(gpu._sha(out/n) == f['sha256'] for n,f in found['files'].items())
    with tarfile.open(out/'reports.tar.gz') as t: assert any(n.endswith('/tidy.csv') for n in t.getnames())
    other = Store(tmp_path/'other', quiet=True)
    taken = import_results(other, out/'results.tar')['new']
    assert {n['key'] for n in found['numbers']} <= {e.partition('/')[2] for e in taken}
    assert 'the end: 1. tab2_dra paper report; 2. tab2_dra paper report' in (out/'log.txt').read_text()

def test_a_budget_that_ends_in_the_middle_keeps_what_was_made(toy, tmp_path, monkeypatch):
    assert toy([ENTRY | {'parameters': {'seed': 9}}]) == 0 # warm
    monkeypatch.setattr(gpu.Page, 'price', lambda *a: 0.) # it seems to fit
    monkeypatch.setattr(gpu, 'LEAST', 1.)
    long = {'parameters': {'epochs': 100_000}, 'rows': ['vanilla', 'ours']}
    start = time.monotonic()
    assert toy([ENTRY | long, ENTRY], budget='5s') == 0
    assert states(tmp_path) == ['unfinished', 'not begun'] and time.monotonic()-start < 40
    found = said(tmp_path)
    assert [n['cell'] for n in found['numbers']] == ['vanilla / clean']
    assert 'the time was up' in found['entries'][0]['says'] and 'results.tar' in found['files']

def test_the_largest_preset_that_fits_is_taken(toy, tmp_path, monkeypatch):
    costs = {'paper': 1e6, 'gpu': 20., 'small': 1.}
    monkeypatch.setattr(gpu.Page, 'price', lambda page, specs: costs[page.sheet.p.preset.name])
    assert toy([ENTRY | {'presets': list(costs)}, ENTRY | {'presets': ['paper']}]) == 0
    found = said(tmp_path)
    assert found['entries'][0]['preset'] == 'gpu' and states(tmp_path) == ['report', 'skipped']
    assert 'no preset fits' in found['entries'][1]['says'] and 'paper about' in found['entries'][1]['says']

def test_rows_are_made_first_and_the_page_where_it_fits(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Page, 'price', lambda page, specs: 1e6 if len(specs) > 1 else 1.)
    assert toy([ENTRY]) == 0 and states(tmp_path) == ['rows']
    assert [n['cell'] for n in said(tmp_path)['numbers']] == ['vanilla / clean']

def test_data_that_is_not_there_is_named_and_the_queue_goes_on(toy, tmp_path):
    (tmp_path/'empty').mkdir()
    assert toy([ENTRY | {'datasets': ['mnist']}, ENTRY], '--data', str(tmp_path/'empty')) == 0
    assert states(tmp_path) == ['skipped', 'report']
    assert 'none of mnist is in' in (says := said(tmp_path)['ran'][0]['says']) and 'MNIST' in says

def test_an_entry_that_fails_says_so_and_the_queue_goes_on(toy, tmp_path):
    assert toy([ENTRY | {'rows': ['theirs']}, ENTRY]) == 1
    assert states(tmp_path) == ['failed', 'report']
    assert "unknown row of tab2_dra 'theirs'" in said(tmp_path)['ran'][0]['says']

@pytest.mark.parametrize('entry,says', [
    ({'artefact': 'tab9_none', 'presets': ['demo']}, "artefact of .*'tab9_none'"),
    ({'presets': ['demo']}, 'artefact of'),
    ({'artefact': 'tab2_dra'}, 'has no presets'), (ENTRY | {'presets': ['huge']}, "preset of .*'huge'"),
    (ENTRY | {'row': []}, "key of .*'row'"), (ENTRY | {'rows': 'ours'}, 'rows must be list'),
    (7, 'must be an object'), (ENTRY | {'parameters': {'sed': 1}}, "parameter of tab2_dra 'sed'"),
    (ENTRY | {'share': 0}, 'share of')])
def test_a_wrong_queue_is_refused_before_anything_starts(toy, tmp_path, capsys, entry, says):
    assert toy([ENTRY, entry]) == 2 and re.search(says, capsys.readouterr().err)
    assert not (tmp_path/'out').exists()

def test_the_queue_of_the_project_names_what_there_is():
    "Each entry's page has its rows at a preset of its own"
    queue = gpu.queue_of(ROOT/'tools'/'gpu_queue.json')
    assert [e['artefact'] for e in queue] == ['tab3_4_spat', 'tab1_adcorda', 'tab1_mixture', 'tab3_dra']
    assert all('demo' not in e['presets'] and e['why'] for e in queue)
    for e in queue:
        values = {'preset': 'gpu', 'dataset': e['datasets'][0]}
        page = gpu.Page(e['artefact'], e.get('parameters', {}) | values)
        assert 0 < len(page.of(e.get('rows'))) <= len(page.sheet.cells)


# ---- its end -----------------------------------------------------------------------------------------------

def test_sigterm_ends_a_child_and_keeps_what_is_there(tmp_path):
    course = gpu.Course(tmp_path/'out', tmp_path/'work', 60.)
    threading.Timer(.3, course.ask, [signal.SIGTERM]).start(); start = time.monotonic()
    assert course.child([sys.executable, '-c', 'import time; time.sleep(60)'], 60.) is None
    assert time.monotonic()-start < 10 and course.left == 0
    (course.work/'reports'/'bench'/'gpu').mkdir(parents=True)
    (course.work/'reports'/'bench'/'gpu'/'bench.json').write_text('{}')
    gpu.kept(course, [], 3)
    assert {'bench.json', 'gpu.json', 'log.txt', 'reports.tar.gz'} == {p.name for p in course.out.iterdir()}

def test_a_child_that_does_not_end_is_killed_in_time(tmp_path):
    course = gpu.Course(tmp_path/'out', tmp_path/'work', 10.); start = time.monotonic()
    deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'
    assert course.child([sys.executable, '-c', deaf], .5) is None and time.monotonic()-start < 8

def test_told_to_stop_it_ends_with_143(toy, tmp_path, monkeypatch):
    inside = gpu.Course.child
    def child(course, *args): inside(course, *args); course.ask(signal.SIGTERM)
    monkeypatch.setattr(gpu.Course, 'child', child)
    assert toy([ENTRY, ENTRY]) == 143 and states(tmp_path) == ['report', 'not begun']

def test_weights_go_out_in_few_pieces_or_not_at_all(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'LIMIT', 50_000)
    assert toy([ENTRY], '--pieces', '200') == 0
    out, found = tmp_path/'out', said(tmp_path)
    parts = sorted(out.glob('weights.tar.*'))
    assert len(parts) > 1 and all(p.stat().st_size <= 50_000 for p in out.iterdir() if p.suffix != '.txt')
    (tmp_path/'weights.tar').write_bytes(b''.join(p.read_bytes() for p in parts)) # as cat does
    assert import_results(Store(tmp_path/'other', quiet=True), tmp_path/'weights.tar')['new']
    assert toy([ENTRY], '--pieces', '1') == 0 and not list(out.glob('weights.tar*'))
    assert 'left out' in said(tmp_path)['weights'] and found['weights'] == ''
    assert list(out.glob('results.tar*'))


# ---- archives ----------------------------------------------------------------------------------------------

def packed(path, **files):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z:
            for name,text in files.items(): z.writestr(name, text)
    else:
        with tarfile.open(path, 'w:gz' if path.suffix == '.gz' else 'w') as t:
            for name,text in files.items():
                info = tarfile.TarInfo(name); info.size = len(text)
                t.addfile(info, io.BytesIO(text.encode()))
    return path

@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz'])
def test_an_archive_of_data_is_unpacked_once(tmp_path, name):
    path = packed(tmp_path/name, **{'data/MNIST/raw/x': 'a', 'data/note': 'b'})
    folder = gpu.data_folder(str(path), tmp_path/'work')
    assert (folder/'MNIST'/'raw'/'x').read_text() == 'a' and folder.name == 'data'
    (folder/'more').touch()
    assert (gpu.data_folder(str(path), tmp_path/'work')/'more').exists()

@pytest.mark.parametrize('name', ['a.zip', 'a.tar'])
@pytest.mark.parametrize('inside', ['../out', '/out', 'a/../../out'])
def test_an_archive_writes_nothing_outside(tmp_path, name, inside):
    path = packed(tmp_path/name, **{'fine': 'a', inside: 'b'})
    with pytest.raises(ValueError, match='nothing was unpacked'): gpu.data_folder(str(path), tmp_path/'work')
    assert not list((tmp_path/'work').rglob('*fine*')) and not (tmp_path/'out').exists()

def test_links_and_broken_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path/'link.tar', 'w') as t:
        info = tarfile.TarInfo('link'); info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
        t.addfile(info)
    whole = packed(tmp_path/'whole.tar.gz', a='x'*100_000).read_bytes()
    (tmp_path/'cut.tar.gz').write_bytes(whole[:len(whole)//2]); (tmp_path/'text.zip').write_text('no archive')
    for name,says in (('link.tar', 'a link or device'), ('cut.tar.gz', 'no whole'), ('text.zip', 'no whole'),
                      ('absent.tar', 'there is no data at')):
        with pytest.raises(ValueError, match=says): gpu.data_folder(str(tmp_path/name), tmp_path/'work')
        assert not [p for p in (tmp_path/'work').rglob('*') if p.is_file()]

def test_a_bad_archive_is_said_before_anything_starts(toy, tmp_path, capsys):
    (tmp_path/'bad.tar').write_text('no archive')
    assert toy([ENTRY], '--data', str(tmp_path/'bad.tar')) == 2
    assert 'bad.tar is no whole' in capsys.readouterr().err and not (tmp_path/'out').exists()


# ---- a Python without Jupyter ------------------------------------------------------------------------------

REFUSED = '''import sys
from importlib.machinery import PathFinder
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in %r: return None
        spec = PathFinder.find_spec(name, path)
        if spec and 'site-packages' not in str(spec.origin): return spec
        raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
'''
JUPYTER = ('papermill', 'nbdev', 'foolbox', 'ipykernel', 'IPython', 'nbformat', 'nbclient',
           'jupytext', 'execnb')

def bare(tmp_path, lacks, *command):
    "A Python in which some packages cannot be imported"
    (folder := tmp_path/'bare').mkdir()
    (folder/'sitecustomize.py').write_text(REFUSED % (lacks,))
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'PYTHONPATH': f'{folder}:{ROOT}:{ROOT}/tools'})

def test_a_page_needs_no_jupyter(tmp_path):
    code = (f"import gpu; print(gpu.equipped({str(tmp_path/'site')!r})); "
            "p = gpu.Page('tab3_4_spat', {'preset': 'small'}); print(len(p.sheet.cells))")
    made = bare(tmp_path, JUPYTER, '-c', code)
    assert made.stdout.startswith("['foolbox']\n70"), made.stderr[-2000:]

def test_what_is_missing_is_named_with_the_way_to_bring_it(tmp_path):
    lacks = 'fastcore', 'platformdirs'
    made = bare(tmp_path, lacks, str(ROOT/'tools'/'gpu.py'), '--out', str(tmp_path/'out'))
    assert made.returncode == 2 and not (tmp_path/'out').exists()
    assert 'lacks platformdirs, fastcore' in made.stderr and 'pip download -d wheels' in made.stderr

def test_wheels_are_brought_without_a_network(tmp_path):
    about = {'toy_wheel.py': 'n = 7', 'toy_wheel-1.dist-info/RECORD': '', 'toy_wheel-1.dist-info/METADATA':
             'Metadata-Version: 2.1\nName: toy_wheel\nVersion: 1\n',
             'toy_wheel-1.dist-info/WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    (tmp_path/'wheels').mkdir(); wheel = packed(tmp_path/'wheels'/'a.zip', **about)
    wheel.rename(tmp_path/'wheels'/'toy_wheel-1-py3-none-any.whl')
    gpu.carried(tmp_path/'wheels', tmp_path/'site')
    assert (tmp_path/'site'/'toy_wheel.py').read_text() == 'n = 7'
    with pytest.raises(ValueError, match='has no .whl file'): gpu.carried(tmp_path/'site', tmp_path/'site')
    (tmp_path/'wheels'/'x-1-py3-none-any.whl').write_text('no wheel')
    with pytest.raises(ValueError, match='pip could not install'):
        gpu.carried(tmp_path/'wheels', tmp_path/'site')

def test_the_report_is_that_of_papermill(toy, tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1') # the report says how many
    assert toy([ENTRY]) == 0
    ours = tmp_path/'out_work'/'reports'/'tab2_dra'/'paper'
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path/'theirs'))
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}/tests:{ROOT}')
    papermill.execute_notebook(str(tmp_path/'nbs'/'tab2_dra.ipynb'), str(tmp_path/'out.ipynb'),
                               parameters={'preset': 'paper', 'dataset': 'digits'}, kernel_name='python3',
                               progress_bar=False)
    theirs = tmp_path/'theirs'/'tab2_dra'/'paper'
    def files(top): return sorted(str(p.relative_to(top)) for p in top.rglob('*') if p.is_file())
    assert len(names := files(ours)) >= 4 and names == files(theirs)
    for n in names: assert (ours/n).read_bytes() == (theirs/n).read_bytes(), n
