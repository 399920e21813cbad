"""A Hugging Face Hub on loopback, as far as the clients in huggingface_hub and timm use its HTTP interface.

It answers inside `with Hub(tokens) as hub:` and keeps everything in memory. huggingface_hub reads the address at
import, so a client is a fresh process with the environment `hub.environment(cache_dir, token)`.
"""
import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import unquote

import yaml

NOWHERE = 'http://127.0.0.1:9'  # the discard port, where nothing listens: a Hub out of reach
LFS_SUFFIXES = ('.bin', '.ckpt', '.h5', '.onnx', '.pt', '.pth', '.safetensors', '.tar', '.zip')
LFS_SIZE = 10_000_000  # larger files go to LFS whatever their name


class Refused(Exception):
    """An answer that is an error: status, message and the code by which the client tells missing things apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(status, message)
        header = message.encode('ascii', 'backslashreplace').decode()
        self.headers = {'X-Error-Message': header, **({'X-Error-Code': code} if code else {}), **headers}


@dataclass
class Repository:
    """A model repository: a commit maps paths to contents, a branch names a commit, LFS keeps contents by SHA-256."""
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes | None] = field(default_factory=dict)  # None: announced but not sent

    def find_commit(self, revision: str) -> str:
        """Return the id of the commit that a branch or an id names."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    def files(self, revision: str = 'main') -> dict[str, bytes]:
        """Return the contents of a revision by path."""
        return self.commits[self.find_commit(revision)]

    def add_commit(self, branch: str, files: dict[str, bytes], summary: str) -> str:
        """Make `files` the head of a branch; the id of the commit follows from its history and contents."""
        parts = self.branches.get(branch), summary, sorted((path, oid(path, files[path])) for path in files)
        commit = hashlib.sha1(repr(parts).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit


class Hub:
    """The server, a context manager.

    Args:
        tokens: By token, a user and the organisations to which the user may write.

    Attributes:
        url: Its address.
        repositories: Each `Repository` by `NAMESPACE/NAME`.
        requests: (method, path as sent, without the query) of each request so far.
    """

    def __init__(self, tokens: dict[str, tuple[str, set[str]]]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        # Not http.server's own class, which looks up the name of the host.
        self._server = ThreadingTCPServer(('127.0.0.1', 0), type('BoundRequest', (_Request,), {'hub': self}))
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache_dir: str | Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client: this Hub, a cache and a token of its own, nothing of the user's."""
        kept = {
            key: value for key, value in os.environ.items()
            if not key.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_')) and not key.lower().endswith('_proxy')}
        return {
            **kept,
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(cache_dir),
            'HF_HUB_DISABLE_XET': '1',  # large files by LFS
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'OMP_NUM_THREADS': '1',
            **({} if token is None else {'HF_TOKEN': token}),
        }


class _Request(BaseHTTPRequestHandler):
    """One request: its action answers or raises `Refused`."""
    hub: Hub

    def dispatch(self):
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        path = self.path.partition('?')[0]
        self.hub.requests.append((self.command, path))
        try:
            self.user, self.namespaces = self.find_user()
            for pattern, action in _ACTIONS.items():
                if match := re.fullmatch(pattern, f'{self.command} {path}'):
                    return action(self, **{key: unquote(value) for key, value in match.groupdict().items() if value})
            raise Refused(404, 'No such page')
        except Refused as error:
            self.answer({'error': error.args[1]}, error.args[0], error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def log_message(self, *args):
        pass  # `Hub.requests` is the log

    def answer(self, content, status=200, headers=None):
        """Send bytes, or anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content, default=str).encode()
        self.send_response(status)
        for key, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def find_user(self):
        """Return the user and the namespaces to which the user may write; an unknown token is refused anywhere."""
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if not token:
            return None, set()
        if token not in self.hub.tokens:
            raise Refused(401, 'Invalid credentials in Authorization header')
        user, organisations = self.hub.tokens[token]
        return user, {user, *organisations}

    def find(self, name, write=False):
        """Return a repository that the user may see, and write to if asked.

        The real Hub may leave out the code with 401: at an https address the client takes the repository for missing.
        """
        repository, writable = self.hub.repositories.get(name), name.split('/')[0] in self.namespaces
        hidden = repository is None or (repository.private and not writable)
        if self.user is None and (hidden or write):
            raise Refused(401, 'Invalid username or password.', 'RepoNotFound')
        if hidden:
            raise Refused(404, 'Repository not found', 'RepoNotFound')
        if not writable and write:
            raise Refused(403, 'Authorization error.')
        return repository

    def whoami(self):
        if self.user is None:
            raise Refused(401, 'Invalid username or password.')
        organisations = sorted(self.namespaces - {self.user})
        self.answer({'type': 'user', 'name': self.user, 'orgs': [{'name': name} for name in organisations]})

    def create(self):
        if self.user is None:
            raise Refused(401, 'Invalid username or password.')
        wanted = json.loads(self.body)
        namespace = wanted.get('organization') or self.user
        if namespace not in self.namespaces:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        name = f'{namespace}/{wanted["name"]}'
        exists = name in self.hub.repositories
        if not exists:
            repository = self.hub.repositories[name] = Repository(wanted.get('visibility') == 'private')
            lines = [f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES]
            repository.add_commit('main', {'.gitattributes': ''.join(lines).encode()}, 'initial commit')
        # As JSON rather than refused: the client wants the address of a repository that exists, too.
        error = {'error': 'You already created this model repo'} if exists else {}
        self.answer({'url': f'{self.hub.url}/{name}', **error}, 409 if exists else 200)

    def create_branch(self, name, revision):
        repository = self.find(name, write=True)
        if re.search(_BAD_BRANCH, revision):
            raise Refused(400, f'Invalid reference for a branch: {revision}')
        if revision in repository.branches:
            raise Refused(409, f'Reference already exists: refs/heads/{revision}')
        start = json.loads(self.body).get('startingPoint', 'main')
        repository.branches[revision] = repository.find_commit(start)
        self.answer({})

    def check_card(self):
        metadata, errors = read_card(json.loads(self.body)['content'])
        warnings = [] if metadata or errors else ['empty or missing yaml metadata in repo card']
        lists = {'errors': errors, 'warnings': warnings}
        self.answer({key: [{'message': text} for text in lists[key]] for key in lists}, 400 if errors else 200)

    def preupload(self, name, revision):
        present = self.find(name, write=True).files(revision)
        files = [(file['path'], file['size']) for file in json.loads(self.body)['files']]
        self.answer({'files': [
            {
                'path': path,
                'uploadMode': 'lfs' if is_large(path, size) else 'regular',
                'shouldIgnore': False,
                'oid': oid(path, present[path]) if path in present else None,
            } for path, size in files]})

    def announce_objects(self, name):
        repository = self.find(name, write=True)
        entries = json.loads(self.body)['objects']
        for entry in entries:
            if repository.objects.setdefault(entry['oid']) is None:
                entry['actions'] = {'upload': {'href': f'{self.hub.url}/storage/{name}/{entry["oid"]}'}}
        self.answer({'transfer': 'basic', 'objects': entries})

    def store_object(self, name, sha):
        objects = self.hub.repositories[name].objects  # as a signed address, open to who knows it
        if sha not in objects or hashlib.sha256(self.body).hexdigest() != sha:
            raise Refused(403, 'Not announced, or not what was announced')
        objects[sha] = self.body
        self.answer(b'')

    def commit(self, name, revision):
        repository = self.find(name, write=True)
        files = dict(repository.files(revision))
        if revision not in repository.branches:
            raise Refused(400, f'Not a branch: {revision}')
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        for operation in operations:
            key, value = operation['key'], operation['value']
            if key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile' and repository.objects.get(value['oid']) is not None:
                files[value['path']] = repository.objects[value['oid']]
            elif key == 'deletedFile' and value['path'] in files:
                del files[value['path']]
            else:
                raise Refused(400, f'No content or no file for {key} {value["path"]}')
        commit = repository.add_commit(revision, files, header['value']['summary'])
        self.answer({'success': True, 'commitOid': commit, 'commitUrl': f'{self.hub.url}/{name}/commit/{commit}'})

    def info(self, name, revision='main'):
        repository = self.find(name)
        files = repository.files(revision)
        card, _ = read_card(files.get('README.md', b'').decode())
        self.answer({
            'id': name,
            'sha': repository.find_commit(revision),
            'private': repository.private,
            'siblings': [{'rfilename': path} for path in sorted(files)],
            'cardData': card,
            **{key: card[key] for key in ('tags', 'library_name', 'pipeline_tag', 'model-index') if key in card},
        })

    def tree(self, name, revision):
        files = sorted(self.find(name).files(revision).items())
        self.answer([{'type': 'file', 'path': path, 'size': len(data), 'oid': oid(path, data)} for path, data in files])

    def resolve(self, name, revision, path):
        repository = self.find(name)
        headers, files = {'X-Repo-Commit': repository.find_commit(revision)}, repository.files(revision)
        if path not in files:
            raise Refused(404, 'Entry not found', 'EntryNotFound', **headers)
        self.answer(files[path], headers={'ETag': f'"{oid(path, files[path])}"', **headers})


_BAD_BRANCH = r'^(refs/|[-./])|[\s~^:?*\[\\]|\.\.|//|@\{|(/|\.|\.lock)$'  # what git does not take
_NAME, _REVISION = '(?P<name>[^/]+/[^/]+)', '(?P<revision>[^/]+)'
_MODEL = f'/api/models/{_NAME}'
_ACTIONS = {
    'GET /api/whoami-v2': _Request.whoami,
    'POST /api/repos/create': _Request.create,
    'POST /api/validate-yaml': _Request.check_card,
    f'POST {_MODEL}/branch/{_REVISION}': _Request.create_branch,
    f'POST {_MODEL}/preupload/{_REVISION}': _Request.preupload,
    f'POST /{_NAME}\\.git/info/lfs/objects/batch': _Request.announce_objects,
    f'PUT /storage/{_NAME}/(?P<sha>[0-9a-f]+)': _Request.store_object,
    f'POST {_MODEL}/commit/{_REVISION}': _Request.commit,
    f'GET {_MODEL}(/revision/{_REVISION})?': _Request.info,
    f'GET {_MODEL}/tree/{_REVISION}': _Request.tree,
    f'(GET|HEAD) /{_NAME}/resolve/{_REVISION}/(?P<path>.+)': _Request.resolve,
}


def is_large(path: str, size: int) -> bool:
    """Tell whether the Hub keeps a file in LFS; an empty one never is."""
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


def oid(path: str, content: bytes) -> str:
    """Return a file's ETag: SHA-256 in LFS, git's hash otherwise."""
    if is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def read_card(card: str) -> tuple[dict, list[str]]:
    """Return the metadata at the top of a model card, and what is wrong with them (not all that the Hub checks)."""
    match = re.match(r'---\s*\n(.*?)\n---\s*(\n|$)', card, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return {}, [f'invalid YAML: {error}']
    if not isinstance(metadata, dict):
        return {}, ['the metadata must be of type object']
    if not re.fullmatch('[a-z0-9.-]+', str(metadata.get('license', 'unknown'))):
        return metadata, ['"license" must be one of [apache-2.0, mit, ...]']
    return metadata, []
