"""The Hub of the tests serves the real clients of huggingface_hub and timm, and refuses what the real one refuses."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub import NOWHERE, Hub

TOKENS = {'hf_writer': ('alice', {'org'}), 'hf_reader': ('bob', set())}
BRANCHES = {'main': 0, 'runs/v1': 1}  # seed of the weights in each
CARD = '---\nlicense: apache-2.0\nlibrary_name: timm\ntags: [timm]\n---\n# A model\n'
LARGE = 2**20


def create_inputs_and_model(seed=0):
    import timm
    import torch
    torch.manual_seed(seed)
    return torch.randn(2, 3, 160, 160), timm.create_model('test_vit', num_classes=10).eval()


def push(folder):
    """Create a public and a private repository, each with the model, and a branch with another model."""
    from huggingface_hub import HfApi
    api = HfApi()
    for name, private in (('org/vit', False), ('org/hidden', True)):
        api.create_repo(name, private=private)
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder / 'main')
    for _ in range(2):
        api.create_branch('org/vit', branch='runs/v1', exist_ok=True)
    api.upload_folder(repo_id='org/vit', folder_path=folder / 'runs/v1', revision='runs/v1')
    info = api.model_info('org/vit')
    return {
        'user': api.whoami()['name'],
        'files': api.list_repo_files('org/vit', revision='runs/v1'),
        'private': [api.model_info(name).private for name in ('org/vit', 'org/hidden')],
        'commit': info.sha,
        'license': info.card_data.license,
        'library': info.library_name,
    }


def load(folder):
    """Save the logits of the public model, of its branch and of the private model, all by timm."""
    import timm
    import torch
    inputs, _ = create_inputs_and_model()
    for i, name in enumerate(('org/vit', 'org/vit@runs/v1', 'org/hidden')):
        model = timm.create_model(f'hf-hub:{name}', pretrained=True).eval()
        with torch.no_grad():
            torch.save(model(inputs), folder / f'logits{i}.pt')


def refuse(folder):
    """Return the class and the status of the error of each case."""
    from huggingface_hub import HfApi
    errors = {}
    for case, (token, call, *_) in REFUSALS.items():
        try:
            errors[case] = ['none', call(HfApi(token=token), folder)]
        except Exception as error:
            errors[case] = [type(error).__name__, getattr(getattr(error, 'response', None), 'status_code', None)]
    return errors


def reach(folder):
    """Return the classes of the errors where there is no Hub: create a repository, a branch, upload a folder."""
    from huggingface_hub import HfApi
    errors = []
    for call in (create('org/new'), branch('org/vit', 'v2'), upload('org/vit')):
        try:
            call(HfApi(), folder)
        except Exception as error:
            errors.append(type(error).__name__)
    return errors


def upload(name, revision=None):
    return lambda api, folder: api.upload_folder(repo_id=name, folder_path=folder / 'main', revision=revision)


def download(name, path='config.json', revision=None):
    return lambda api, folder: bool(api.hf_hub_download(name, path, revision=revision))


def create(name, **kwargs):
    return lambda api, folder: api.create_repo(name, **kwargs)


def branch(name, revision):
    return lambda api, folder: api.create_branch(name, branch=revision)


def read(name):
    return lambda api, folder: api.model_info(name).id


def write_card(content):
    def call(api, folder):
        (folder / 'card').mkdir(exist_ok=True)
        (folder / 'card/README.md').write_text(content)
        return api.upload_folder(repo_id='org/vit', folder_path=folder / 'card')
    return call


REFUSALS = {  # token, call, name of the error, status
    'create, bad token': ('hf_unknown', create('org/new'), 'HfHubHTTPError', 401),
    'create, no token': (False, create('org/new'), 'HfHubHTTPError', 401),
    'create, no rights': ('hf_reader', create('org/new', exist_ok=True), 'HfHubHTTPError', 403),
    'create, exists': ('hf_writer', create('org/vit'), 'HfHubHTTPError', 409),
    'branch, no rights': ('hf_reader', branch('org/vit', 'v2'), 'HfHubHTTPError', 403),
    'branch, exists': ('hf_writer', branch('org/vit', 'runs/v1'), 'HfHubHTTPError', 409),
    'branch, no repository': ('hf_writer', branch('org/none', 'v2'), 'RepositoryNotFoundError', 404),
    'branch, bad name': ('hf_writer', branch('org/vit', 'v2..'), 'BadRequestError', 400),
    'upload, bad token': ('hf_unknown', upload('org/vit'), 'HfHubHTTPError', 401),
    'upload, no token': (False, upload('org/vit'), 'RepositoryNotFoundError', 401),
    'upload, no rights': ('hf_reader', upload('org/vit'), 'HfHubHTTPError', 403),
    'upload, no repository': ('hf_writer', upload('org/none'), 'RepositoryNotFoundError', 404),
    'upload, no branch': ('hf_writer', upload('org/vit', 'v2'), 'RevisionNotFoundError', 404),
    'upload, private': ('hf_reader', upload('org/hidden'), 'RepositoryNotFoundError', 404),
    'upload, bad YAML': ('hf_writer', write_card('---\ntags: {\n---\n'), 'ValueError', None),
    'upload, bad license': ('hf_writer', write_card('---\nlicense: Apache License\n---\n'), 'ValueError', None),
    'read, bad token': ('hf_unknown', read('org/vit'), 'HfHubHTTPError', 401),
    'read, private': ('hf_reader', read('org/hidden'), 'RepositoryNotFoundError', 404),
    'read, private, no token': (False, read('org/hidden'), 'RepositoryNotFoundError', 401),
    'download, no repository': ('hf_reader', download('org/none'), 'RepositoryNotFoundError', 404),
    'download, no revision': (False, download('org/vit', revision='v2'), 'RevisionNotFoundError', 404),
    'download, no file': (False, download('org/vit', 'none.json'), 'RemoteEntryNotFoundError', 404),
    'download, private': ('hf_reader', download('org/hidden'), 'RepositoryNotFoundError', 404),
    'download': (False, download('org/vit'), 'none', True),
}


def run_client(hub, action, folder, token=None, **environ):
    """Run a function of this file in a process of its own with an empty cache and return its result."""
    process = subprocess.run(
        [sys.executable, __file__, action.__name__, str(folder)],
        env={**hub.environment(folder / f'cache-{action.__name__}', token), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert not any(secret in process.stdout + process.stderr for secret in TOKENS)
    return json.loads(process.stdout)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """The Hub after `push`, the folder of the models, what `push` returned."""
    from timm.models import save_for_hf
    folder = tmp_path_factory.mktemp('hub')
    for name, seed in BRANCHES.items():
        save_for_hf(create_inputs_and_model(seed)[1], folder / name, safe_serialization=True)
        (folder / name / 'README.md').write_text(CARD)
    with Hub(TOKENS) as hub:
        yield hub, folder, run_client(hub, push, folder, 'hf_writer')


def test_push(served):
    hub, folder, pushed = served
    repository = hub.repositories['org/vit']
    names = ['README.md', 'config.json', 'model.safetensors']
    assert pushed == {
        'user': 'alice',
        'files': ['.gitattributes', *names],
        'private': [False, True],
        'commit': repository.branches['main'],
        'license': 'apache-2.0',
        'library': 'timm',
    }
    for revision in BRANCHES:
        files = repository.files(revision)
        assert all(files[name] == (folder / revision / name).read_bytes() for name in names)
        assert len(files['model.safetensors']) > LARGE
    sent = {path for method, path in hub.requests if method == 'PUT'}
    assert sent == {f'/storage/{name}/{sha}' for name in hub.repositories for sha in hub.repositories[name].objects}
    assert len(sent) == 3  # each file of weights by LFS


def test_load(served):
    import torch
    hub, folder, _ = served
    start = len(hub.requests)
    run_client(hub, load, folder, 'hf_writer')
    for i, seed in enumerate((0, 1, 0)):
        inputs, _ = create_inputs_and_model()
        model = create_inputs_and_model(seed)[1]
        with torch.no_grad():
            assert torch.equal(torch.load(folder / f'logits{i}.pt'), model(inputs))
    for path in ('/org/vit/resolve/main', '/org/vit/resolve/runs%2Fv1', '/org/hidden/resolve/main'):
        assert ('GET', f'{path}/model.safetensors') in hub.requests[start:]


def test_refusals(served):
    hub, folder, _ = served
    before = {name: dict(repository.branches) for name, repository in hub.repositories.items()}
    assert run_client(hub, refuse, folder) == {case: list(wanted) for case, (_, _, *wanted) in REFUSALS.items()}
    assert {name: repository.branches for name, repository in hub.repositories.items()} == before


@pytest.mark.parametrize('environ, error', [
    ({'HF_ENDPOINT': NOWHERE}, 'ConnectError'),
    ({'HF_HUB_OFFLINE': '1'}, 'OfflineModeIsEnabled'),
])
def test_out_of_reach(served, environ, error):
    hub, folder, _ = served
    start = len(hub.requests)
    assert run_client(hub, reach, folder, 'hf_writer', **environ) == [error] * 3
    assert len(hub.requests) == start


if __name__ == '__main__':
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
