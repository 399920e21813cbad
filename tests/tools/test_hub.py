"""Both branches to the Hub and back: the real clients of huggingface_hub and timm against a server on loopback."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from hub import NOWHERE, Hub, Repository

from timm_vpl.engine.trained import load_branches

ROOT = Path(__file__).resolve().parents[2]
TOKENS = {'hf_writer': ('alice', {'org'}), 'hf_reader': ('bob', set())}

# One process: exports, each with a token and the address of a Hub, ended by its status on a line; then timm loads.
CLIENT = '''
import os, sys
from huggingface_hub import constants
from timm_vpl.cli import main
for token, address, argv in eval(sys.argv[1]):
    os.environ.pop('HF_TOKEN', None)
    if token:
        os.environ['HF_TOKEN'] = token
    constants.ENDPOINT = address or os.environ['HF_ENDPOINT']
    print(f'status {main(argv)}', file=sys.stderr)
import timm, torch
os.environ['HF_TOKEN'], constants.ENDPOINT = 'hf_writer', os.environ['HF_ENDPOINT']
images = torch.load('images.pt')
with torch.inference_mode():
    torch.save([
        timm.create_model(f'hf-hub:{name}', pretrained=True).eval()(images) for name in sys.argv[2:]], 'logits.pt')
'''


def test_round_trip(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / 'run')
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / 'images.pt')

    def b_as(name, *options):
        return ['export', 'run', '--branch', 'b', '--push-to', 'org', '--out', 'out', '--overwrite', '--name-b', name,
                *options]

    jobs = [
        ('hf_writer', None, ['export', 'run', '--push-to', 'org', '--name-b', 'vpl-vitb']),
        ('hf_writer', None, b_as('hidden', '--private', '--no-ema')),
        ('hf_writer', None, b_as('vpl-vitb', '--private')),  # it is public
        ('hf_writer', None, b_as('not..good')),
        (None, None, b_as('vit')),
        ('hf_wrong', None, b_as('vit')),
        ('hf_reader', None, b_as('vit')),
        ('hf_writer', NOWHERE, b_as('vit')),
    ]
    names = ['org/vpl-test_resnet', 'org/vpl-vitb', 'org/hidden']
    with Hub(TOKENS) as hub:
        hub.repositories['org/vpl-vitb'] = Repository(files={'model.onnx': b'of earlier weights'})
        result = subprocess.run(
            [sys.executable, '-c', CLIENT, repr(jobs), *names], cwd=tmp_path, capture_output=True, text=True,
            env={**hub.environment(tmp_path / 'home'), 'PYTHONPATH': str(ROOT)}, timeout=120)
    printed = result.stdout + result.stderr
    assert result.returncode == 0 and 'Traceback' not in printed, printed[-3000:]

    # What was pushed: each branch whole, no token, nothing of what was refused.
    assert sorted(hub.repositories) == sorted(names)
    assert [hub.repositories[name].private for name in names] == [False, False, True]
    files = [hub.repositories[name].files for name in names]
    assert all(set(each) == {'README.md', 'config.json', 'model.safetensors'} for each in files)
    assert b'hf-hub:org/vpl-vitb' in files[1]['README.md']
    assert 'hf_w' not in printed and not any(b'hf_w' in data for each in files for data in each.values())

    # What timm loads is the branch, to the bit.
    branches = [*load_branches(str(tmp_path / 'run')), *load_branches(str(tmp_path / 'run'), 'b', ema=False)]
    with torch.inference_mode():
        for logits, branch in zip(torch.load(tmp_path / 'logits.pt'), branches, strict=True):
            assert torch.equal(logits, branch.model(images))

    # Each refusal: a status, one line that says why, and the folder is kept.
    lines = result.stderr.strip().splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith('status')]
    assert [int(lines[i].split()[1]) for i in ends] == [0, 0, 1, 2, 1, 1, 1, 1]
    for i, words in zip(ends[2:], (
            ['org/vpl-vitb: exists and is public'], ['--push-to: org/not..good'], ['401', 'hf auth login'], ['401'],
            ['403'], ['org/vit: not uploaded', 'Connection refused', 'out/vit is kept']), strict=True):
        assert lines[i - 1].startswith('timm-vpl export: error: ') and all(word in lines[i - 1] for word in words)
    assert sorted(os.listdir(tmp_path / 'out' / 'vit')) == ['README.md', 'config.json', 'model.safetensors']
