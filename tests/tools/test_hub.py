"""Both branches to the Hub and back: the real clients of huggingface_hub and timm against a server on loopback."""
import os
import shutil

import timm
import torch
from hub import NOWHERE, Hub, Repository, use_hub
from runs import status_of

from timm_vpl.cli import main
from timm_vpl.engine.trained import load_branches

TOKENS = {'hf_writer': ('alice', {'org'}), 'hf_reader': ('bob', set())}


def b_as(name, *options):
    return ['export', 'run', '--branch', 'b', '--push-to', 'org', '--out', 'out', '--overwrite', '--name-b', name,
            *options]


# Token, address of the Hub, command; its status, and words of the line that says why it is refused.
JOBS = [
    ('hf_writer', None, ['export', 'run', '--push-to', 'org', '--name-b', 'vpl-vitb'], 0),
    ('hf_writer', None, b_as('hidden', '--private', '--no-ema'), 0),
    ('hf_writer', None, b_as('vpl-vitb', '--private'), 1, 'org/vpl-vitb: exists and is public'),
    ('hf_writer', None, b_as('not..good'), 2, '--push-to: org/not..good'),
    (None, None, b_as('vit'), 1, '401', 'hf auth login'),
    ('hf_wrong', None, b_as('vit'), 1, '401'),
    ('hf_reader', None, b_as('vit'), 1, '403'),
    ('hf_writer', NOWHERE, b_as('vit'), 1, 'org/vit: not uploaded', 'Connection refused', 'out/vit is kept'),
]


def test_round_trip(run_dir, tmp_path, monkeypatch, capfd):
    shutil.copytree(run_dir, tmp_path / 'run')
    monkeypatch.chdir(tmp_path)
    names, printed = ['org/vpl-test_resnet', 'org/vpl-vitb', 'org/hidden'], ''
    with Hub(TOKENS) as hub:
        hub.repositories['org/vpl-vitb'] = Repository(files={'model.onnx': b'of earlier weights'})
        for token, address, argv, status, *words in JOBS:
            with monkeypatch.context() as patch:
                use_hub(patch, address or hub.url, tmp_path / 'home', token)
                assert status_of(main, argv) == status, argv
            out, err = capfd.readouterr()
            line = err.strip().splitlines()[-1]
            assert not words or line.startswith('timm-vpl export: error: ') and all(word in line for word in words)
            printed += out + err
        use_hub(monkeypatch, hub.url, tmp_path / 'home', 'hf_writer')
        models = [timm.create_model(f'hf-hub:{name}', pretrained=True).eval() for name in names]
    assert sorted(os.listdir('out/vit')) == ['README.md', 'config.json', 'model.safetensors']

    # What was pushed: each branch whole, no token, nothing of what was refused.
    assert sorted(hub.repositories) == sorted(names)
    assert [hub.repositories[name].private for name in names] == [False, False, True]
    files = [hub.repositories[name].files for name in names]
    assert all(set(each) == {'README.md', 'config.json', 'model.safetensors'} for each in files)
    assert b'hf-hub:org/vpl-vitb' in files[1]['README.md'] and 'Traceback' not in printed
    assert 'hf_w' not in printed and not any(b'hf_w' in data for each in files for data in each.values())

    # What timm loads is the branch, to the bit.
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    branches = [*load_branches('run'), *load_branches('run', 'b', ema=False)]
    with torch.inference_mode():
        for model, branch in zip(models, branches, strict=True):
            assert torch.equal(model(images), branch.model(images))
