"One's own images: their parts are all read, and the first of a part are of all classes"
import numpy as np, pytest, torch
from PIL import Image
from refine_nb.evaluation.gathering import Evidence
from refine_nb.vision import FROST, corrupt, data_of, frost_photographs, load_data, own_images

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

@pytest.fixture
def folder(tmp_path):
    def paint(path, value=9, mode='L', **how):
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new('RGBA', (8, 8), (value,)*3+(how.get('alpha', 255),)) if mode=='RGBA' else Image.new(
            mode, (8, 8), value)
        image.save(tmp_path/path); return tmp_path
    return paint

@pytest.mark.parametrize('ending', ['bmp', 'webp', 'tif', 'PNG', 'jpeg', 'pgm'])
def test_images_of_every_common_kind_are_read(folder, ending):
    for k in 'ab':
        for i in range(6): at = folder(f'mine/{k}/{i}.{ending if i % 2 else "png"}', 30*i)
    name = own_images(at/'mine')
    assert sum(name.sizes[:2]) == 12 and len(load_data(name).test) == name.sizes[1]

def test_an_image_that_is_not_read_is_named(folder):
    for k in 'ab': at = folder(f'mine/{k}/0.png')
    folder('mine/b/moving.gif')
    with pytest.raises(ValueError, match='moving.gif has a format that is not read: save it as PNG'):
        own_images(at/'mine')

def test_parts_are_found_in_capitals_and_not_twice(folder):
    for part in ('Train', 'TEST'):
        for k in 'ab':
            for i in range(5): at = folder(f'mine/{part}/{k}/{i}.png', 9*i+len(part))
    name = own_images(at/'mine'); assert name.sizes[:2] == (10, 10) and name.classes == ('a', 'b')
    for part in ('valid', 'val'): folder(f'mine/{part}/a/0.png'); folder(f'mine/{part}/b/0.png')
    with pytest.raises(ValueError, match=r'a part twice \(TEST, Train, val, valid\): leave one of them out'):
        own_images(at/'mine')

@pytest.mark.parametrize('ending', ['tif', 'webp', 'png'])
def test_a_file_of_several_images_is_refused(folder, ending):
    for k in 'ab': at = folder(f'mine/{k}/0.png')
    two = [Image.new('RGB', (8, 8), (v, 9, 200)) for v in (0, 255)]
    two[0].save(at/'mine'/'a'/f'1.{ending}', save_all=True, append_images=two[1:])
    with pytest.raises(ValueError, match=f'1.{ending} .2 images in one file: save each by itself'):
        own_images(at/'mine')

def test_transparent_pixels_are_no_colour(folder):
    for k in 'ab':
        for i in range(6): at = folder(f'mine/{k}/{i}.png', 30*i, 'RGBA')
    assert len(load_data(own_images(at/'mine')).train) # opaque
    folder('mine/a/0.png', 5, 'RGBA', alpha=100)
    with pytest.raises(ValueError, match='0.png .has transparent pixels: flatten it onto a background'):
        load_data(own_images(at/'mine'))

def test_arrays_of_several_shapes_are_refused(tmp_path):
    y = np.arange(20) % 2
    for other in ((20, 9, 9), (20, 8, 8, 3)):
        np.savez(tmp_path/'mine.npz', x_train=np.zeros((20, 8, 8), np.uint8), y_train=y,
                 x_test=np.zeros(other, np.uint8), y_test=y)
        with pytest.raises(ValueError, match='wants images .C,H,W. of one shape in all parts, got '):
            own_images(tmp_path/'mine.npz')

def test_frost_says_what_its_photographs_lack(tmp_path):
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match='cannot be read .FileNotFoundError.: frost needs all five of'):
        corrupt(x, 'frost', frost=tmp_path)
    for name in FROST: Image.new('RGB', (200, 162)).save(tmp_path/name)
    with pytest.raises(ValueError, match='too small for images of 32 pixels: '
                                         'it needs more than 162 per side'):
        corrupt(x, 'frost', frost=tmp_path)
    for name in FROST: Image.new('RGB', (163, 163)).save(tmp_path/name)
    assert corrupt(x, 'frost', frost=tmp_path).shape == x.shape
    with pytest.raises(ValueError, match='seed wants a whole number >= 0, got -1'): corrupt(x, 'fog', seed=-1)

def test_frost_adds_a_crop_of_one_of_five_photographs():
    folder = frost_photographs(needed=False)
    if folder is None:
        pytest.skip('imagecorruptions is optional: pip install --no-deps imagecorruptions==1.1.2')
    found = set()
    for a, b, severity, value in ((1, .2, 1, 0), (.75, .45, 5, 60)):
        parts = []
        for name in FROST:
            photo = np.asarray(Image.open(folder/name).convert('RGB'))[2::5, 2::5]
            made = np.floor(np.clip(a*value + b*photo.astype(float), 0, 255)).astype(np.uint8)
            parts.append(np.lib.stride_tricks.sliding_window_view(made, (32, 32), axis=(0, 1)))
        x = torch.full((6, 3, 32, 32), value, dtype=torch.uint8)
        for image in corrupt(x, 'frost', severity).numpy():
            hits = [i for i, p in enumerate(parts) if (p==image).all((2, 3, 4)).any()]
            assert hits in ([0], [1, 2], [3], [4]) # the second and the third show the same
            found |= set(hits)
    assert len(found) > 3 # of five, in twelve draws
