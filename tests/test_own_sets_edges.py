"One's own images: their parts are all read, and the first of a part are of all classes"
import numpy as np, pytest, torch
from PIL import Image
from refine_nb.evaluation.gathering import Evidence
from refine_nb.vision import data_of, load_data, own_images

@pytest.fixture
def arrays(tmp_path):
    draw = np.random.default_rng(0)
    def made(**parts):
        kept = {}
        for p,n in parts.items():
            kept |= {p: draw.integers(0, 256, (n, 8, 8), dtype=np.uint8),
                     p.replace('x', 'y', 1): np.sort(np.arange(n) % 2)}
        np.savez(tmp_path/'mine.npz', **kept); return tmp_path/'mine.npz'
    return made

def test_the_first_images_to_test_on_are_of_all_classes(arrays, tmp_path):
    d = load_data(own_images(arrays(x_train=40, x_test=40)))
    assert d.test.y[:20].unique().tolist() == [0, 1] and d.test.y.sum() == 20
    again = load_data(own_images(tmp_path/'mine.npz')); assert torch.equal(d.test.x, again.test.x)
    for part in ('train', 'test'):
        for k in 'ab':
            (tmp_path/'f'/part/k).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(np.full((8, 8), 9*i+len(part), np.uint8)).save(tmp_path/'f'/part/k/f'{i}.png')
    assert load_data(own_images(tmp_path/'f')).test.y[:8].unique().tolist() == [0, 1]

def test_images_to_test_on_are_taken_beside_x_and_y(arrays):
    name = own_images(arrays(x=20, x_test=6)); d = load_data(name)
    assert len(d.test) == 6 == name.sizes[1] and len(d.train)+len(d.valid) == 20 == name.sizes[0]
    with pytest.raises(ValueError, match='has both x and x_train: leave one out'):
        own_images(arrays(x=20, x_train=20, x_test=6))

@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_more_than_eight_bits_are_not_cut(mode):
    kind = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]
    image = Image.fromarray(np.full((8, 8), 300).astype(kind)); assert image.mode == mode
    with pytest.raises(ValueError, match='more than 8 bits a pixel'): data_of([(image, 0), (image, 1)]*9)

def test_a_tolerance_is_not_exceeded_by_being_reached():
    held = torch.ones(100, dtype=torch.bool); other = held.clone(); other[:5] = False
    assert Evidence.more(None, other, than=held) == .05
