"""Export: each branch of a pair as a folder that timm loads by itself, on the Hub too, and as ONNX."""
import contextlib
import logging
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import create_model, save_for_hf

from ..core.names import SIDES
from ..data.data import names_of, read_class_map
from ..engine.build import pretrained_cfg_of, size_kwargs
from ..engine.trained import TrainedModel, branch_config, create_named, load_branches
from ..errors import RunError, UsageError, first_line
from .card import MARK, is_unedited, model_card

_logger = logging.getLogger(__name__)

EXPORT = 'export'  # the folder, in that of a run
ONNX_TOLERANCE = 1e-4


def export(args) -> list[Path]:
    """Export as the options of `timm-vpl export` say, and return the folders."""
    sides = ''.join(SIDES) if args.branch == 'both' else args.branch
    trained = load_branches(
        args.source, None if args.branch == 'both' else sides, args.ema, configs=_named_configs(args))
    names = branch_names(trained, {side: getattr(args, f'name_{side}') for side in SIDES})
    repo_ids = {side: f'{args.push_to}/{name}' for side, name in names.items()} if args.push_to else {}
    if repo_ids:
        _check_names_of_the_hub(repo_ids.values(), args.revision)
    elif args.push_to == '':
        raise UsageError('--push-to: empty, expected the name of an organisation or user')
    elif args.private or args.revision:
        _logger.warning('--private, --revision: no effect without --push-to')
    run_dir = args.source if os.path.isdir(args.source) else os.path.dirname(args.source)
    out = Path(args.out or os.path.join(run_dir, EXPORT))
    folders = {branch.side: out / names[branch.side] for branch in trained}
    for folder in folders.values():
        try:
            free = not folder.exists() or (
                _is_export(folder) if args.overwrite else args.out is None and _is_ours(folder))
        except (OSError, ValueError) as e:
            raise UsageError(f'--out {out}: can not be read: {getattr(e, "strerror", None) or first_line(e)}') from e
        if not free:
            found = 'is not an export of timm-vpl' if args.overwrite else 'exists; --overwrite replaces it'
            raise UsageError(f'--out {out}: {folder} {found}, another --out keeps it')
    for branch in trained:
        export_branch(
            branch, folders[branch.side], repo_ids.get(branch.side), license=args.license, onnx=args.onnx)
        print(f'{branch.label}: {folders[branch.side]}')
    for side, repo_id in repo_ids.items():
        print(f'{folders[side]}: {push(folders[side], repo_id, private=args.private, revision=args.revision)}')
    return list(folders.values())


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is as an export left it."""
    known = {'README.md', 'config.json', 'model.safetensors', 'model.onnx'}
    return _is_export(folder) and {path.name for path in folder.iterdir()} <= known and is_unedited(
        (folder / 'README.md').read_text(encoding='utf-8'))


def _is_export(folder: Path) -> bool:
    """Return whether an export made a folder, whatever was added or edited since."""
    card = folder / 'README.md'
    return card.is_file() and (folder / 'config.json').is_file() and MARK in card.read_text(encoding='utf-8')


def missing_exports(run_dir: str) -> list[tuple[TrainedModel, Path]]:
    """Return each branch of a run whose export does not hold its best epoch, averaged or raw, and its folder."""
    sides = ''.join(side for side in SIDES if os.path.exists(os.path.join(run_dir, f'best_{side}.pth.tar')))
    if not sides:
        return []
    trained = load_branches(run_dir, sides)
    names = branch_names(trained)
    return [
        (branch, folder) for branch, raw in zip(trained, load_branches(run_dir, sides, ema=False), strict=True)
        if not any(_holds(folder := Path(run_dir) / EXPORT / names[branch.side], each) for each in (branch, raw))]


def _holds(folder, trained):
    """Return whether a folder holds these weights."""
    try:
        state, written = trained.model.state_dict(), load_file(folder / 'model.safetensors')
    except (OSError, SafetensorError):
        return False
    return state.keys() == written.keys() and all(torch.equal(state[key], written[key]) for key in state)


def export_run(run_dir: str) -> None:
    """Export each branch of a finished run from its best epoch, unless it is; what somebody edited is kept."""
    for branch, folder in missing_exports(run_dir):
        if folder.exists() and not _is_ours(folder):
            _logger.error(f'Not exported: {folder} is not as an export left it, and is kept')
            continue
        export_branch(branch, folder)
        _logger.info(f"Exported {branch.label}: timm.create_model('local-dir:{folder}', pretrained=True)")


def branch_names(trained: list[TrainedModel], given: dict[str, str | None] | None = None) -> dict[str, str]:
    """Return a name for each branch: as given, or the method and the architecture.

    Raises:
        UsageError: A name that is not one of a folder, or two equal ones.
    """
    names = {}
    for branch in trained:
        architectures = list(branch.checkpoint['architectures'].values())  # of the pair, whichever is exported
        method = branch.checkpoint.get('args', {}).get('method')
        parts = [method] if method else []
        parts.append(branch.architecture)
        if architectures.count(branch.architecture) > 1:
            parts.append(branch.side)
        name = (given or {}).get(branch.side) or '-'.join(map(str, parts))
        # It becomes part of a path, and may come from a checkpoint of somebody else.
        if not re.fullmatch(r'\w[\w.-]{,95}', name, re.ASCII):
            raise UsageError(f'--name-{branch.side} {name!r}: expected at most 96 letters, digits, ".", "-" and "_"')
        names[branch.side] = name
    if len(set(names.values())) < len(names):
        raise UsageError(f'--name-a and --name-b are both {next(iter(names.values()))}')
    return names


def _named_configs(args):
    """Return timm's config of each model that the options name, for weights that do not say what they belong to."""
    configs = {}
    class_names = names_of(read_class_map(args.class_map)) if args.class_map else None
    for side in SIDES:
        name = getattr(args, f'model_{side}')
        if name:
            num_classes = args.num_classes or (len(class_names) if class_names else None)
            if num_classes is None:
                raise UsageError(f'--num-classes: needed with --model-{side} (or --class-map)')
            if class_names and len(class_names) > num_classes:
                raise UsageError(f'--num-classes {num_classes}: --class-map names {len(class_names)} classes')
            cfg = pretrained_cfg_of(name, f'--model-{side}')
            data_config = resolve_data_config(vars(args), pretrained_cfg=cfg)
            with torch.device('meta'):
                model = create_named(name, f'--model-{side} {name}', **{
                    'num_classes': num_classes,
                    'in_chans': data_config['input_size'][0],
                    **size_kwargs(cfg, data_config['input_size']),
                    **getattr(args, f'model_kwargs_{side}'),
                })
            configs[side] = branch_config(model, data_config, class_names)
    return configs


def export_branch(
        trained: TrainedModel,
        folder: Path,
        repo_id: str | None = None,
        license: str = 'unknown',
        onnx: bool = False,
) -> None:
    """Write a branch's folder: model.safetensors, config.json, README.md, and model.onnx on request.

    The folder appears complete or not at all, and only after timm has loaded it back with equal weights and logits.

    Args:
        trained: The branch.
        folder: Where to; a folder that is there is replaced.
        repo_id: What `hf-hub:` will load it by, for the card.
        license: Identifier of its licence on the Hub.
        onnx: Write model.onnx too.

    Raises:
        RunError: It can't be written, or what was written does not give the same model.
    """
    model = trained.model.to(memory_format=torch.contiguous_format)  # safetensors takes no other layout
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as work:
            part = Path(work) / folder.name
            part.mkdir()
            save_for_hf(
                model,
                str(part),
                model_config={'label_names': trained.class_names, 'pretrained_cfg': {'license': license}},
                data_config=trained.data_config,
                safe_serialization=True,
            )
            _check_reload(trained, part)
            card = model_card(trained, folder.name, repo_id or f'ORG/{folder.name}', license)
            (part / 'README.md').write_text(str(card), encoding='utf-8')
            if onnx:
                export_onnx(trained, part / 'model.onnx')
            for path in part.iterdir():
                path.chmod(part.stat().st_mode & 0o666)  # the user's umask; safetensors gives the owner alone
            if folder.exists():
                os.replace(folder, Path(work) / 'replaced')
            os.replace(part, folder)
    except (OSError, SafetensorError) as e:
        raise RunError(f'{folder}: can not be written: {getattr(e, "strerror", None) or first_line(e)}') from e


@torch.inference_mode()
def _check_reload(trained, folder):
    """Load an exported folder as a user will, and compare it with the branch to the bit."""
    with _quiet('timm.models'):
        reloaded = create_model(f'local-dir:{folder}', pretrained=True).eval()
    state, written = trained.model.state_dict(), reloaded.state_dict()
    input = example_images(trained, 1)
    finite = all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    if not finite:
        _logger.warning(f'{folder.name}: weights that are not finite')
    equal = state.keys() == written.keys() and all(torch.equal(state[key], written[key]) for key in state)
    if finite and not (equal and torch.equal(trained.model(input), reloaded(input))):
        raise RunError(f'{folder.name}: the exported model, loaded back, is not the trained one')


@contextlib.contextmanager
def _quiet(name):
    """Hold back what a logger has to say below warnings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def example_images(trained: TrainedModel, count: int) -> torch.Tensor:
    """Return random images (count, C, H, W), the same for each call."""
    return torch.randn(count, *trained.data_config['input_size'], generator=torch.Generator().manual_seed(0))


def export_onnx(trained: TrainedModel, path: Path) -> None:
    """Write a model as ONNX with a dynamic batch, and compare it with torch through onnxruntime.

    Raises:
        UsageError: The packages of the extra `onnx` are missing.
        RunError: torch can't export the model, or onnxruntime's logits differ by more than 1e-4.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UsageError(f"--onnx: needs the package {e.name} (pip install 'timm-vpl[onnx]')") from e
    from timm.utils.onnx import onnx_export
    try:
        onnx_export(trained.model, str(path), example_images(trained, 2), use_dynamo=True, input_names=['images'],
                    output_names=['logits'])
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        differences = []
        for count in (1, 3):
            images = example_images(trained, count)
            logits = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
            with torch.inference_mode():
                differences.append((trained.model(images) - logits).abs().max().item())
    except Exception as e:  # the exporter and the runtime raise errors of their own, of many classes
        raise RunError(f'--onnx: {trained.architecture} can not be exported: {first_line(e)}') from e
    if not max(differences) <= ONNX_TOLERANCE:
        raise RunError(f'--onnx: {trained.architecture} differs from torch by {max(differences):.2g}, more than '
                       f'{ONNX_TOLERANCE:g}')


def _check_names_of_the_hub(repo_ids, revision) -> None:
    """Refuse names that break the Hub's rules, before anything is sent."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    for repo_id in repo_ids:
        try:
            validate_repo_id(repo_id)
            if repo_id.count('/') != 1 or repo_id.startswith('/'):
                raise HFValidationError('expected ORG without a slash')
        except HFValidationError as e:
            raise UsageError(f'--push-to: {repo_id} is not a name that the Hub takes: {first_line(e)}') from e
    if revision is not None and (not re.fullmatch(r'[\w./-]+', revision, re.ASCII) or '..' in revision
                                 or revision[0] in './-' or revision.endswith(('/', '.', '.lock'))):
        raise UsageError(f'--revision {revision!r}: not the name of a branch')


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a folder to the Hub and return its address; the repository and the revision are created if need be.

    Raises:
        RunError: No token, no rights, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    api = HfApi(library_name='timm-vpl')
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise RunError(f'{repo_id}: exists and is public, nothing was uploaded; {folder} is kept')
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            commit_message=f'Upload {folder.name}',
            delete_patterns='model.onnx',  # of earlier weights, where these have none
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as e:  # the Hub's errors, the connection's, an upload's
        raise RunError(f'{repo_id}: not uploaded, {_reason(e)}; {folder} is kept') from e


def _reason(error) -> str:
    """Return what went wrong at the Hub, in words."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    known = {
        401: 'the token is missing or not valid (`hf auth login`, or HF_TOKEN)',
        403: 'the token has no right to write there',
        404: 'there is no such repository or revision',
    }
    if status in known:
        return f'{known[status]} ({status})'
    message = getattr(error, 'server_message', None) or str(error.__cause__ or error)
    return f'{type(error).__name__}: {" ".join(message.split())[:160]}'
