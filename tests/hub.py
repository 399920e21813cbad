"""A Hugging Face Hub on loopback, as far as huggingface_hub and timm use its HTTP interface to push and load models.

It answers inside `with Hub(tokens) as hub:` and keeps everything in memory; `use_hub` makes this process its client.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

from huggingface_hub import constants

NOWHERE = 'http://127.0.0.1:9'  # the discard port, where nothing listens: a Hub out of reach


def use_hub(monkeypatch, address: str, cache: str | Path, token: str | None = None) -> None:
    """Let huggingface_hub of this process know this Hub alone, with a cache and a token of its own."""
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'HF_TOKEN'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    for name, value in {
            'ENDPOINT': address, 'HUGGINGFACE_CO_URL_TEMPLATE': template, 'HF_HUB_CACHE': str(cache),
            'HF_TOKEN_PATH': f'{cache}/token', 'HF_HUB_DISABLE_XET': True}.items():  # without Xet large files go by LFS
        monkeypatch.setattr(constants, name, value)
    if token is not None:
        monkeypatch.setenv('HF_TOKEN', token)


class Refused(Exception):
    """An answer that is an error: status, message and the code by which the client tells missing things apart."""


@dataclass
class Repository:
    """A model repository of one branch: contents by path; LFS keeps contents by SHA-256, None until they are sent."""
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes | None] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """The server, a context manager.

    Args:
        tokens: By token, a user and the organisations to which the user may write.

    Attributes:
        url: Its address.
        repositories: Each `Repository` by `NAMESPACE/NAME`.
    """

    def __init__(self, tokens: dict[str, tuple[str, set[str]]]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
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


class _Request(BaseHTTPRequestHandler):
    """One request: its action returns the answer or raises `Refused`."""
    hub: Hub

    def dispatch(self):
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        status, headers = 200, {}
        try:
            self.namespaces = self.find_namespaces()
            for pattern, action in _ACTIONS.items():
                if match := re.fullmatch(pattern, f'{self.command} {self.path.partition("?")[0]}'):
                    answer = action(self, **match.groupdict())
                    break
            else:
                raise Refused(404, 'No such page')
        except Refused as error:
            status, message, *code = error.args
            answer = {'error': message}
            headers = {'X-Error-Message': message, 'X-Error-Code': ''.join(code)}
        if isinstance(answer, tuple):
            answer, headers = answer
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {'Content-Length': str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def log_message(self, *args):
        pass

    def find_namespaces(self):
        """Return where the user may write, None without a token; an unknown one is refused anywhere."""
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in self.hub.tokens:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return {self.hub.tokens[token][0], *self.hub.tokens[token][1]} if token else None

    def find(self, name, write=False):
        """Return a repository that the user may see, and write to if asked."""
        repository, writable = self.hub.repositories.get(name), name.split('/')[0] in (self.namespaces or ())
        if repository is None or (repository.private and not writable):
            raise Refused(404 if self.namespaces else 401, 'Repository not found', 'RepoNotFound')
        if write and not writable:
            raise Refused(403, 'Authorization error.')
        return repository

    def create(self):
        wanted = json.loads(self.body)
        name = f'{wanted["organization"]}/{wanted["name"]}'
        if self.namespaces is None:
            raise Refused(401, 'Invalid username or password.')
        if wanted['organization'] not in self.namespaces:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace of "{name}"')
        self.hub.repositories.setdefault(name, Repository(wanted.get('visibility') == 'private'))
        return {'url': f'{self.hub.url}/{name}'}

    def check_card(self):
        return {'errors': [], 'warnings': []}

    def preupload(self, name):
        self.find(name, write=True)
        return {'files': [
            {'path': file['path'], 'uploadMode': 'lfs' if is_large(file['path']) else 'regular', 'shouldIgnore': False}
            for file in json.loads(self.body)['files']]}

    def announce_objects(self, name):
        repository, entries = self.find(name, write=True), json.loads(self.body)['objects']
        for entry in entries:
            if repository.objects.setdefault(entry['oid']) is None:
                entry['actions'] = {'upload': {'href': f'{self.hub.url}/storage/{name}/{entry["oid"]}'}}
        return {'transfer': 'basic', 'objects': entries}

    def store_object(self, name, sha):
        objects = self.hub.repositories[name].objects  # as a signed address, open to who knows it
        if sha not in objects or hashlib.sha256(self.body).hexdigest() != sha:
            raise Refused(403, 'Not announced, or not what was announced')
        objects[sha] = self.body
        return b''

    def commit(self, name):
        repository = self.find(name, write=True)
        for operation in map(json.loads, self.body.splitlines()[1:]):
            kind, value = operation['key'], operation['value']
            if kind == 'deletedFile':
                del repository.files[value['path']]
            else:
                repository.files[value['path']] = (
                    repository.objects[value['oid']] if kind == 'lfsFile' else base64.b64decode(value['content']))
        return {'success': True, 'commitOid': repository.commit, 'commitUrl': f'{self.hub.url}/{name}/commit/x'}

    def info(self, name):
        repository = self.find(name)
        return {'id': name, 'sha': repository.commit, 'private': repository.private,
                'siblings': [{'rfilename': path} for path in sorted(repository.files)]}

    def tree(self, name):
        return [{'type': 'file', 'path': path, 'size': len(data), 'oid': _oid(path, data)}
                for path, data in self.find(name).files.items()]

    def resolve(self, name, path):
        repository = self.find(name)
        if path not in repository.files:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        data = repository.files[path]
        return data, {'ETag': f'"{_oid(path, data)}"', 'X-Repo-Commit': repository.commit}


_NAME = '(?P<name>[^/]+/[^/]+)'
_ACTIONS = {
    'POST /api/repos/create': _Request.create,
    'POST /api/validate-yaml': _Request.check_card,
    f'POST /api/models/{_NAME}/preupload/main': _Request.preupload,
    f'POST /{_NAME}\\.git/info/lfs/objects/batch': _Request.announce_objects,
    f'PUT /storage/{_NAME}/(?P<sha>[0-9a-f]+)': _Request.store_object,
    f'POST /api/models/{_NAME}/commit/main': _Request.commit,
    f'GET /api/models/{_NAME}(/revision/main)?': _Request.info,
    f'GET /api/models/{_NAME}/tree/main': _Request.tree,
    f'(GET|HEAD) /{_NAME}/resolve/[^/]+/(?P<path>.+)': _Request.resolve,
}


def is_large(path: str) -> bool:
    """Tell whether the Hub keeps a file in LFS."""
    return path.endswith(('.safetensors', '.onnx'))


def _oid(path: str, content: bytes) -> str:
    """Return a file's ETag: SHA-256 in LFS, git's hash otherwise."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
