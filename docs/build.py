"Build the site: python docs/build.py [TARGET], by default _docs/html. Runs no notebook, needs no network"
import shutil, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))

def source(folder):
    "The folder that Sphinx reads: pages that are made, and the files of reports"
    from companion import notebooks, pages
    written = set()
    def write(name, content): # only what changed, so that Sphinx reads no more
        path, content = folder/name, content.encode() if isinstance(content, str) else content
        written.add(path); path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content: path.write_bytes(content)
    notebooks.make(write); pages.make(write)
    for p in folder.rglob('*'):
        if p.is_file() and p not in written: p.unlink() # of a run or a notebook that went
    return folder

def build(target):
    "The exit status: 0 without a warning"
    from sphinx.cmd.build import main
    work = target.parent
    strict = ['-q', '-n', '-W', '--keep-going', '-j', 'auto']
    status = main([*strict, '-c', str(ROOT/'docs'), '-d', str(work/'doctrees'),
                   str(source(work/'source')), str(target)])
    shutil.rmtree(work/'jupyter_execute', ignore_errors=True)
    return status

if __name__ == '__main__':
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs'/'html').resolve()
    if not (status := build(target)): print(f'the site: {target}/index.html')
    sys.exit(status)
