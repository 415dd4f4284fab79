"Files and folders that are written by several processes at once, and by some that are killed"
import ctypes, os, signal
from itertools import count

import pytest

from refine_nb.base import clear, whole
from toys import Worker, dies_at

FILES = ('a', 'b', 'c')


def write(path, text):
    "A folder of files that all say the same"
    with whole(path) as new:
        new.mkdir()
        for name in FILES: (new/name).write_text(text)

def said(path):
    "What the folder says; fails where it is not there, not complete, or mixed"
    fd = os.open(path, os.O_RDONLY)              # one folder, whatever takes its place meanwhile
    try:
        texts = set()
        for name in FILES:
            f = os.open(name, os.O_RDONLY, dir_fd=fd); texts.add(os.read(f, 99).decode()); os.close(f)
    finally: os.close(fd)
    text, = texts
    return text

def writes(path, text, n, swap=True, kill=None):
    "Writes a folder n times, in a process"
    if not swap: ctypes.CDLL = None              # as on a system without it
    if kill: dies_at(*kill)
    for i in range(n): write(path, f'{text}{i}')


@pytest.mark.parametrize('swap', [True, False], ids=['one swap', 'two renames'])
def test_side_by_side(tmp_path, swap):
    "Three processes replace the same folder: none fails, and where it is swapped a reader never misses it"
    place = tmp_path/'report'; write(place, 'first')
    workers = [Worker(tmp_path/f'said{k}', writes, place, f'{k}-', 20, swap) for k in range(3)]
    while swap and any(w.process.is_alive() for w in workers):
        try: said(place)
        except FileNotFoundError: assert place.exists() # what was opened has been replaced and removed
    assert [(w.end(), w.text) for w in workers] == [(0, '')]*3
    assert said(place) in {f'{k}-19' for k in range(3)}
    assert sorted(p.name for p in tmp_path.iterdir() if 'said' not in p.name) == ['report']

@pytest.mark.parametrize('swap', [True, False], ids=['one swap', 'two renames'])
def test_killed_at_every_file_operation(tmp_path, swap):
    "The old folder or the new one is there, at once by a swap and else after the next writer came by"
    place = tmp_path/'report'
    for n in count(1):
        write(place, 'old')
        code = Worker(tmp_path/'said', writes, place, 'new', 1, swap, kill=(n, tmp_path)).end()
        if code == 0: break
        assert code == -signal.SIGKILL
        if not swap: clear(tmp_path)
        assert said(place) in ('old', 'new0')
        clear(tmp_path, 'report')
        assert sorted(p.name for p in tmp_path.iterdir()) in (['report'], ['report', 'said'])
    assert n > 6 and said(place) == 'new0'
