"Real MNIST and two editions of CIFAR-10, where the environment's REFINE_DATA has them; skipped elsewhere."
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from refine_nb.vision import batches, load_data


def needs(folder):
    "The data root; skips the test, saying why, if `folder` is not in it"
    root = os.environ.get('REFINE_DATA')
    if not root: pytest.skip("REFINE_DATA is not set: no real data to test on")
    if not (Path(root)/folder).is_dir(): pytest.skip(f"REFINE_DATA={root} has no {folder}")
    return Path(root)


@pytest.fixture(scope='module')
def mnist():
    root = needs('MNIST/raw')
    return root, load_data('mnist', root=root)


@pytest.fixture(scope='module')
def jpeg():
    root = needs('cifar-10-images')
    return root, load_data('cifar10_jpeg', root=root)


@pytest.fixture(scope='module')
def resplit():
    root = needs('cifar10-resplit')
    return root, load_data('cifar10_resplit', root=root)


def idx(file, header): return np.frombuffer(file.read_bytes(), np.uint8)[header:]


def test_mnist_counts(mnist):
    _, d = mnist
    assert [len(s) for s in (d.train, d.valid, d.test)] == [54_000, 6_000, 10_000]
    assert d.shape == (1, 28, 28) and d.num_classes == 10
    pool = torch.cat([d.train.y, d.valid.y]).bincount()
    assert pool.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949] # the published set's
    assert d.test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_mnist_pixels_are_the_file_s(mnist):
    root, d = mnist
    raw = root/'MNIST'/'raw'
    pixels = idx(raw/'t10k-images-idx3-ubyte', 16).reshape(-1, 28, 28)
    labels = idx(raw/'t10k-labels-idx1-ubyte', 8)
    assert_close(d.test.x[:, 0], torch.from_numpy(pixels.copy()))
    assert_close(d.test.y, torch.from_numpy(labels.astype(np.int64)))


def test_jpeg_counts_and_balance(jpeg):
    _, d = jpeg
    assert [len(s) for s in (d.train, d.valid, d.test)] == [45_000, 5_000, 10_000]
    assert d.shape == (3, 32, 32) and d.name == 'cifar10_jpeg'
    assert (d.train.y.bincount() + d.valid.y.bincount()).tolist() == [5_000]*10
    assert d.test.y.bincount().tolist() == [1_000]*10
    first = d.test.y[:1000].bincount()
    assert first.min() > 60 and first.max() < 140  # any first n is a fair sample


@pytest.mark.parametrize('part,label,number', [('test', 'cat', 17), ('test', 'truck', 999),
                                               ('train', 'airplane', 1), ('train', 'ship', 2500)])
def test_jpeg_pixels_by_pil(jpeg, part, label, number):
    root, d = jpeg
    files = sorted((root/'cifar-10-images'/part/label).iterdir())
    wanted = torch.from_numpy(np.array(Image.open(files[number]))).permute(2, 0, 1)
    splits = [d.test] if part == 'test' else [d.train, d.valid]
    same = [s.y[(s.x == wanted).flatten(1).all(1)] for s in splits]
    assert d.classes.index(label) in torch.cat(same).tolist()


def test_jpeg_all_images_are_there(jpeg):
    "The mean of the training pool, added up file by file for one class"
    root, d = jpeg
    k = d.classes.index('frog')
    ours = sum(s.x[s.y == k].sum(dtype=torch.int64).item() for s in (d.train, d.valid))
    assert ours == sum(int(np.array(Image.open(f)).sum(dtype=np.int64))
                       for f in (root/'cifar-10-images'/'train'/'frog').iterdir())


def test_jpeg_cache_gives_the_same(jpeg):
    root, d = jpeg
    again = load_data('cifar10_jpeg', root=root)
    assert again.fingerprint == d.fingerprint
    assert load_data('cifar10_jpeg', root=root, split_seed=2).fingerprint != d.fingerprint
    x, y, i = next(batches(again.train, 8, augment='crop_flip', size=64))
    assert x.shape == (8, 3, 64, 64) and 0 <= x.min() and x.max() <= 1 and x.std() > .1
    assert_close(y, d.train.y[i])


def test_jpeg_is_not_given_for_cifar10(jpeg):
    root, _ = jpeg
    if (root/'cifar-10-batches-py').is_dir(): pytest.skip("the published CIFAR-10 is there too")
    with pytest.raises(FileNotFoundError, match="ask for it as 'cifar10_jpeg'"):
        load_data('cifar10', root=root)


def test_resplit_counts_and_fingerprint(resplit):
    "51,000 images in a split of its own; the first 1,000 test images are those of the published test set"
    _, d = resplit
    assert [len(s) for s in (d.train, d.valid, d.test)] == [36_900, 4_100, 10_000]
    assert d.shape == (3, 32, 32) and d.num_classes == 10 and d.name == 'cifar10_resplit'
    assert d.test.y[:1000].bincount().tolist() == [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]
    assert d.fingerprint.startswith('4d3c7b0dcfb0')


def test_resplit_pixels_by_pil(resplit):
    "The first and last image of a class, whose label is its folder"
    root, d = resplit
    files = sorted((root/'cifar10-resplit'/'test'/'horse').iterdir())
    of = d.test.x[d.test.y == d.classes.index('horse')]
    assert len(of) == len(files)
    for file in (files[0], files[-1]):
        wanted = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert (of == wanted).flatten(1).all(1).sum() == 1
