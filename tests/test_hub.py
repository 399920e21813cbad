"""Both branches to the Hub and back: the real clients of huggingface_hub and timm against a server on loopback."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import NOWHERE, Hub

from timm_vpl.cli import train
from timm_vpl.engine.trained import load_branches

ROOT = Path(__file__).resolve().parent.parent
TOKENS = {'hf_writer': ('alice', {'org'}), 'hf_reader': ('bob', set())}

# Processes that have timm and not this package.
LOAD = '''
import sys
sys.modules['timm_vpl'] = None
import timm, torch
images = torch.load(sys.argv[1])
with torch.inference_mode():
    logits = [timm.create_model(f'hf-hub:{name}', pretrained=True).eval()(images) for name in sys.argv[2:]]
torch.save(logits, sys.argv[1])
'''


@pytest.fixture(scope='module')
def run_dir(digits_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp('runs')
    assert train([
        str(digits_folder), '--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '-b', '8',
        '--epochs', '1', '--warmup-epochs', '0', '--workers', '0', '--device', 'cpu', '--output', str(output),
        '--experiment', 'run', '--no-export']) == 0
    return output / 'run'


def export(environment, *argv):
    """Run `timm-vpl export` in a process of its own."""
    return subprocess.run(
        [sys.executable, '-m', 'timm_vpl', 'export', *map(str, argv)],
        env={**environment, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=120)


def test_push_and_load(run_dir, tmp_path):
    with Hub(TOKENS) as hub:
        writer = hub.environment(tmp_path / 'writer', token='hf_writer')
        result = export(writer, run_dir, '--push-to', 'org', '--name-b', 'vpl-vitb')
        assert result.returncode == 0, result.stderr[-2000:]
        assert sorted(hub.repositories) == ['org/vpl-test_resnet', 'org/vpl-vitb']
        assert 'hf_writer' not in result.stdout + result.stderr
        for repository in hub.repositories.values():
            assert {'README.md', 'config.json', 'model.safetensors'} <= set(repository.files('main'))
            assert not repository.private
            assert not any(b'hf_writer' in data for data in repository.files('main').values())
        assert b"hf-hub:org/vpl-vitb" in hub.repositories['org/vpl-vitb'].files('main')['README.md']

        # A private repository, and a revision that is not there yet.
        result = export(writer, run_dir, '--branch', 'b', '--no-ema', '--push-to', 'org', '--name-b', 'private',
                        '--private', '--revision', 'raw/v1')
        assert result.returncode == 0, result.stderr[-2000:]
        assert hub.repositories['org/private'].private
        assert 'model.safetensors' in hub.repositories['org/private'].files('raw/v1')
        assert 'model.safetensors' not in hub.repositories['org/private'].files('main')

        images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.save(images, tmp_path / 'images.pt')
        names = ['org/vpl-test_resnet', 'org/vpl-vitb', 'org/private@raw/v1']
        result = subprocess.run(
            [sys.executable, '-c', LOAD, str(tmp_path / 'images.pt'), *names],
            env=hub.environment(tmp_path / 'empty', token='hf_writer'), capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
    branches = [*load_branches(str(run_dir)), *load_branches(str(run_dir), 'b', ema=False)]
    with torch.inference_mode():
        for logits, branch in zip(torch.load(tmp_path / 'images.pt'), branches, strict=True):
            assert torch.equal(logits, branch.model(images))


# Several exports in one process: (token, arguments) each, ended by its status on a line of stderr.
REFUSALS = '''
import os, sys
from timm_vpl.cli import main
for token, argv in eval(sys.argv[1]):
    os.environ.pop('HF_TOKEN', None)
    if token:
        os.environ['HF_TOKEN'] = token
    status = main(argv)
    print(f'status {status}', file=sys.stderr)
'''


def refused(environment, run_dir, out, *cases):
    """Return the status and the last line of each export: (token, name of branch b)."""
    jobs = [
        (token, ['export', str(run_dir), '--branch', 'b', '--push-to', 'org', '--out', str(out), '--overwrite',
                 '--name-b', name])
        for token, name in cases
    ]
    result = subprocess.run(
        [sys.executable, '-c', REFUSALS, repr(jobs)], env={**environment, 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=120)
    assert 'Traceback' not in result.stderr and 'hf_w' not in result.stdout + result.stderr, result.stderr[-2000:]
    lines = result.stderr.strip().splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith('status')]
    return [(int(lines[i].split()[1]), lines[i - 1]) for i in ends]


def test_refusals(run_dir, tmp_path):
    with Hub(TOKENS) as hub:
        results = refused(
            hub.environment(tmp_path / 'home'), run_dir, tmp_path / 'out', ('hf_writer', 'not..good'),
            (None, 'vit'), ('hf_wrong', 'vit'), ('hf_reader', 'vit'))
        assert [status for status, _ in results] == [2, 1, 1, 1]
        assert 'org/not..good' in results[0][1]
        for (_, line), reason in zip(results[1:], ('(401)', '(401)', '(403)'), strict=True):
            assert line.startswith('timm-vpl export: error: org/vit: not uploaded') and reason in line
            assert str(tmp_path / 'out' / 'vit') in line
        assert not hub.repositories and not any('not..good' in path for _, path in hub.requests)
        assert sorted(os.listdir(tmp_path / 'out' / 'vit')) == ['README.md', 'config.json', 'model.safetensors']


def test_no_network(run_dir, tmp_path):
    with Hub(TOKENS) as hub:
        environment = {**hub.environment(tmp_path / 'home'), 'HF_ENDPOINT': NOWHERE}
    [(status, line)] = refused(environment, run_dir, tmp_path / 'out', ('hf_writer', 'vit'))
    assert status == 1 and 'org/vit: not uploaded' in line and 'Connect' in line
    assert (tmp_path / 'out' / 'vit' / 'model.safetensors').exists()
