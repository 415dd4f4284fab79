"""What a user of Table 1's notebook can get wrong.

Each mistake stops it with a sentence that says what there is, and nothing is written.
"""
import os, re, warnings
from pathlib import Path

import nbformat, papermill, pytest, torch
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from refine_nb.runs import Store

NOTEBOOK = Path(__file__).resolve().parents[1]/'nbs'/'tab1_adcorda.ipynb'


class Here(Engine):
    "Runs a notebook's cells in this process: a kernel of its own would spend ten seconds on imports"
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **_):
        names = {'__name__': '__main__'}
        for i, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != 'code': continue
            cell.execution_count, cell.outputs = i+1, []
            try: exec(compile(cell.source, f'cell {i}', 'exec'), names)
            except Exception as e:
                cell.outputs = [nbformat.v4.new_output('error', ename=type(e).__name__,
                                                       evalue=str(e), traceback=[])]
                return nb_man.cell_exception(cell, i, exception=e)

papermill_engines.register('here', Here)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    "Reports, data and weights are looked for in empty folders; the notebook may say notes in its own way"
    for name in ('REFINE_REPORTS', 'REFINE_DATA', 'TORCH_HOME'):
        monkeypatch.setenv(name, str(tmp_path/name.lower()))
    monkeypatch.delenv('REFINE_DOWNLOAD', raising=False)
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
    return tmp_path

@pytest.fixture
def no_store(monkeypatch):
    "The mistake is to be found before a store is opened: one that slips through ends there, not after a demo"
    def opened(self, *args, **kwargs): raise AssertionError('a store was opened')
    monkeypatch.setattr(Store, '__init__', opened)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)

@pytest.fixture
def priced(monkeypatch):
    "The plan, which is told before the images are read, knows the network's speed: none is measured and kept"
    monkeypatch.setattr('refine_nb.runs.prices.speed',
                        lambda *args, **kwargs: {'forward': 1e-3, 'attack': 3e-3, 'train': 3e-3})

def written(tmp_path):
    "All files below the test's folder but the executed notebook, the sign of the store and its locks"
    return [str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*')
            if p.is_file() and p.name not in ('out.ipynb', 'store.json') and p.parent.name != 'locks']

def refused(tmp_path, engine='here', leaves=(), **given):
    "The error that stops the notebook with these parameters: its kind and its sentence"
    with pytest.raises(PapermillExecutionError) as told:
        papermill.execute_notebook(str(NOTEBOOK), str(tmp_path/'out.ipynb'), parameters=given,
                                   engine_name=engine if engine == 'here' else None, kernel_name='python3',
                                   progress_bar=False, log_output=False, cwd=str(tmp_path))
    assert written(tmp_path) == list(leaves)
    return f'{told.value.ename}: {told.value.evalue}'


MODELS, DATASETS = ("'resnet18', 'resnet34', 'resnet50', 'efficientnet_v2_m'",
                    "'cifar10', 'cifar10_resplit', 'cifar10_jpeg', 'cifar100'")
MISTAKES = [
    (dict(model='resnet19'), f"ValueError: unknown model 'resnet19': choose one of {MODELS}"),
    (dict(model=18), f"ValueError: unknown model 18: choose one of {MODELS}"),
    (dict(model=['resnet18', 'resnet34']),
     f"ValueError: unknown model ['resnet18', 'resnet34']: choose one of {MODELS}"),
    (dict(dataset='imagenet'), f"ValueError: unknown dataset 'imagenet': choose one of {DATASETS}"),
    (dict(dataset='CIFAR10'), f"ValueError: unknown dataset 'CIFAR10': choose one of {DATASETS}"),
    (dict(preset='tiny'),
     "ValueError: unknown preset 'tiny': choose one of None, 'demo', 'small', 'gpu', 'paper'"),
    (dict(preset=True),
     "ValueError: unknown preset True: choose one of None, 'demo', 'small', 'gpu', 'paper'"),
    (dict(epochs=5), "ValueError: unknown parameter 'epochs': choose one of 'preset', 'model', 'dataset', "
     "'seeds', 'augment', 'storage', 'pairing', 'device'"),
    (dict(models='resnet18', preset='demo'),
     "ValueError: unknown parameter 'models': choose one of 'preset', 'model'"),
    (dict(epochs=None), "ValueError: unknown parameter 'epochs': choose one of 'preset'"),
    (dict(seeds='one'),
     "ValueError: seeds wants whole numbers >= 0, each once, such as 1 or '1,2,5', got 'one'"),
    (dict(seeds=1.5), "ValueError: seeds wants whole numbers >= 0, each once, such as 1 or '1,2,5', got 1.5"),
    (dict(seeds='1,1'), "got '1,1'"), (dict(seeds='1,,2'), "got '1,,2'"), (dict(seeds=''), "got ''"),
    (dict(seeds=[-1]), "got [-1]"), (dict(seeds=None), "got None"), (dict(seeds=True), "got True"),
    (dict(augment='crop'), "ValueError: unknown augment 'crop': choose one of 'none', 'flip', 'crop_flip'"),
    (dict(augment=None), "ValueError: unknown augment None: choose one of 'none', 'flip', 'crop_flip'"),
    (dict(storage='float16'), "ValueError: unknown storage 'float16': choose one of 'float32', 'uint8'"),
    (dict(pairing=1), "ValueError: unknown pairing 1: choose one of 'independent', 'aligned'"),
]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('given,says', MISTAKES,
                         ids=[','.join(f'{k}={v}' for k,v in g.items()) for g,_ in MISTAKES])
def test_a_wrong_parameter(tmp_path, no_store, given, says):
    assert says in refused(tmp_path, **given)
    assert not (tmp_path/'refine_home').exists()  # not even a store was opened

@pytest.mark.parametrize('given', ['cuda', 'cuda:1'])
def test_a_gpu_that_is_not_there(tmp_path, no_store, given):
    assert (f"ValueError: device '{given}' was asked for, but torch {torch.__version__} finds no GPU: "
            "use device='cpu'" in refused(tmp_path, device=given))

@pytest.mark.parametrize('given', ['gpu', 'mps', 0, ['cpu']])
def test_a_device_that_nobody_has(tmp_path, no_store, given):
    said = refused(tmp_path, device=given)
    assert (said.startswith('ValueError') and 'device' in said and repr(given) in said
            and "'cpu'" in said), said

def test_a_wrong_preset_in_the_environment(tmp_path, no_store, monkeypatch):
    monkeypatch.setenv('REFINE_PRESET', 'wrong')
    assert ("ValueError: unknown preset 'wrong': choose one of 'demo', 'small', 'gpu', 'paper'"
            in refused(tmp_path))
    assert not (tmp_path/'refine_home').exists()

def test_the_parameter_outdoes_the_environment(tmp_path, no_store, monkeypatch):
    """A wrong name in the environment is of no account where the parameter is given.
    The next mistake is then met"""
    monkeypatch.setenv('REFINE_PRESET', 'wrong')
    assert 'finds no GPU' in refused(tmp_path, preset='small', device='cuda')

@pytest.mark.parametrize('dataset,folder,hint',
                         [('cifar10', 'cifar-10-batches-py', "call load_data('cifar10', download=True)"),
                          ('cifar100', 'cifar-100-python', "call load_data('cifar100', download=True)"),
                          ('cifar10_jpeg', 'cifar-10-images', 'unpack its archive there')])
def test_images_that_are_not_there(priced, tmp_path, dataset, folder, hint):
    "The sentence names the set, where it was looked for, how to get it, and how to say where it is"
    said = refused(tmp_path, preset='small', dataset=dataset, model='resnet18', device='cpu')
    assert (said.startswith(f"FileNotFoundError: {dataset} is not there")
            and str(tmp_path/'refine_data'/folder) in said and hint in said and 'REFINE_DATA' in said), said

def test_the_jpeg_edition_is_not_cifar10(priced, tmp_path):
    for part in ('train', 'test'): (tmp_path/'refine_data'/'cifar-10-images'/part/'cat').mkdir(parents=True)
    said = refused(tmp_path, preset='small', dataset='cifar10', model='resnet18', device='cpu')
    assert (said.startswith('FileNotFoundError: cifar10 is not there')
            and "another data set: ask for it as 'cifar10_jpeg'" in said), said

def test_a_jpeg_tree_with_missing_classes(priced, tmp_path):
    for part in ('train', 'test'): (tmp_path/'refine_data'/'cifar-10-images'/part/'cat').mkdir(parents=True)
    said = refused(tmp_path, preset='small', dataset='cifar10_jpeg', model='resnet18', device='cpu')
    assert re.search(r'ValueError: .*cifar-10-images/train must hold 10 class folders \(airplane, .*\), '
                     r'found 1: cat', said), said

def test_a_store_that_cannot_be(tmp_path, monkeypatch):
    "Found before anything is computed"
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('REFINE_HOME', str(tmp_path/'file'/'home'))
    assert 'cannot write to the store' in refused(tmp_path, leaves=['file'])

@pytest.mark.filterwarnings('ignore')
def test_in_a_kernel_of_its_own(tmp_path):
    """papermill only warns of a name that the notebook does not have.
    The notebook stops, and the output shows why"""
    assert "unknown parameter 'epochs'" in refused(tmp_path, engine='kernel', epochs=5, model='resnet18')
    errors = [o for c in nbformat.read(tmp_path/'out.ipynb', 4).cells
              for o in c.get('outputs', []) if o.output_type == 'error']
    assert any("unknown parameter 'epochs': choose one of 'preset', 'model', 'dataset'" in o.evalue
               for o in errors)
    assert os.listdir(tmp_path) == ['out.ipynb']
