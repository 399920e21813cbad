"""Export: each branch of a pair as a folder that timm loads without this package, also on the Hub and as ONNX."""
import logging
import os
import re
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import create_model, save_for_hf

from ..core.names import SIDES
from ..engine.boundary import refusing
from ..engine.trained import TrainedModel, load_branch, load_branches
from ..errors import RunError, UsageError, first_line
from ..options.commands import Export
from .card import MARK, is_unedited, model_card

_logger = logging.getLogger(__name__)

EXPORT = 'export'  # the folder, in that of a run
FILES = {'README.md', 'config.json', 'model.safetensors', 'model.onnx'}
ONNX_TOLERANCE = 1e-4


def export_branches(options: Export) -> list[Path]:
    """Export by the options of `timm-vpl export`, and return the folders.

    Raises:
        UsageError: The options do not fit the checkpoint, or a folder exists already.
        RunError: Something can't be read, written or uploaded.
    """
    trained = load_branches(options.source, None if options.branch == 'both' else options.branch, options.ema)
    names = branch_names(trained, {side: getattr(options, f'name_{side}') for side in SIDES})
    repo_ids = {side: f'{options.push_to}/{name}' for side, name in names.items() if options.push_to is not None}
    for repo_id in repo_ids.values():
        with refusing(f'--push-to: {repo_id} is not a name that the Hub takes', HFValidationError):
            validate_repo_id(repo_id)
    if options.private and not repo_ids:
        _logger.warning('--private: no effect without --push-to')
    run_dir = options.source if os.path.isdir(options.source) else os.path.dirname(options.source)
    out = Path(options.out or os.path.join(run_dir, EXPORT))
    folders = {side: out / name for side, name in names.items()}
    for folder in folders.values():
        with refusing(f'--out {out}: cannot be read', OSError, ValueError):
            free = not folder.exists() or (
                _is_export(folder) if options.overwrite else options.out is None and _is_ours(folder))
        if not free:
            found = 'is not an export of timm-vpl' if options.overwrite else 'exists; --overwrite replaces it'
            raise UsageError(f'--out {out}: {folder} {found}; another --out keeps it')
    for branch in trained:
        export_branch(branch, folders[branch.side], repo_ids.get(branch.side), options.license, options.onnx)
        print(f'{branch.label}: {folders[branch.side]}')
    for side, repo_id in repo_ids.items():
        print(f'{folders[side]}: {push(folders[side], repo_id, options.private)}')
    return list(folders.values())


def _is_export(folder: Path) -> bool:
    """Return whether an export made a folder, even if it was edited since."""
    card = folder / 'README.md'
    return card.is_file() and (folder / 'config.json').is_file() and MARK in card.read_text(encoding='utf-8')


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is unchanged since its export."""
    return _is_export(folder) and {path.name for path in folder.iterdir()} <= FILES and is_unedited(
        (folder / 'README.md').read_text(encoding='utf-8'))


def missing_exports(run_dir: str) -> list[tuple[TrainedModel, Path]]:
    """Return each branch of a run whose export is not of its best epoch, averaged or raw, and its folder."""
    sides = ''.join(side for side in SIDES if os.path.exists(os.path.join(run_dir, f'best_{side}.pth.tar')))
    if not sides:
        return []
    averaged, raw = load_branches(run_dir, sides), load_branches(run_dir, sides, ema=False)
    names = branch_names(averaged)
    missing = []
    for branch, other in zip(averaged, raw, strict=True):
        folder = Path(run_dir, EXPORT, names[branch.side])
        try:
            held = load_file(folder / 'model.safetensors')
        except (OSError, SafetensorError):
            held = {}
        if not any(_equal(trained.model.state_dict(), held) for trained in (branch, other)):
            missing.append((branch, folder))
    return missing


def _equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def branch_names(trained: list[TrainedModel], given: dict[str, str | None] | None = None) -> dict[str, str]:
    """Return a name for each branch: the given one, or method and architecture.

    Raises:
        UsageError: A name that is not one of a folder, or two equal ones.
    """
    names = {}
    for branch in trained:
        architectures = list(branch.checkpoint['architectures'].values())  # of the pair, whichever is exported
        parts = [branch.checkpoint.get('args', {}).get('method'), branch.architecture]
        if architectures.count(branch.architecture) > 1:
            parts.append(branch.side)
        name = (given or {}).get(branch.side) or '-'.join(str(part) for part in parts if part)
        # It becomes part of a path, and may come from an untrusted checkpoint.
        if not re.fullmatch(r'\w[\w.-]{,95}', name, re.ASCII):
            raise UsageError(f'--name-{branch.side} {name!r}: expected at most 96 letters, digits, ".", "-" and "_"')
        names[branch.side] = name
    if len(set(names.values())) < len(names):
        raise UsageError(f'--name-a and --name-b are both {next(iter(names.values()))}')
    return names


def export_branch(
        trained: TrainedModel, folder: Path, repo_id: str | None = None, license: str = 'unknown', onnx: bool = False,
) -> None:
    """Write a branch's folder: model.safetensors, config.json, README.md, and model.onnx on request.

    The folder appears complete or not at all, and only after timm has loaded it back with equal weights and logits.

    Args:
        trained: The branch.
        folder: The folder; an existing one is replaced.
        repo_id: Its future name for `hf-hub:`, for the card.
        license: Identifier of its licence on the Hub.
        onnx: Write model.onnx too.

    Raises:
        RunError: It can't be written, or the written files do not give the same model.
    """
    model = trained.model.to(memory_format=torch.contiguous_format)  # safetensors supports no other layout
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as work:
            part = Path(work) / folder.name
            part.mkdir()
            config = {'label_names': trained.class_names, 'pretrained_cfg': {'license': license}}
            save_for_hf(model, str(part), config, data_config=trained.data_config, safe_serialization=True)
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
        raise RunError(f'{folder}: cannot be written: {getattr(e, "strerror", None) or first_line(e)}') from e


@torch.inference_mode()
def _check_reload(trained: TrainedModel, folder: Path) -> None:
    """Load an exported folder as a user will, and compare it with the branch to the bit."""
    logging.disable(logging.INFO)  # timm names the folder, which is a temporary one
    try:
        reloaded = create_model(f'local-dir:{folder}', pretrained=True).eval()
    finally:
        logging.disable(logging.NOTSET)
    state, input = trained.model.state_dict(), example_images(trained, 1)
    if not all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point()):
        _logger.warning(f'{folder.name}: some weights are not finite')
    elif not (_equal(state, reloaded.state_dict()) and torch.equal(trained.model(input), reloaded(input))):
        raise RunError(f'{folder.name}: the exported model differs from the trained one after loading')


def example_images(trained: TrainedModel, count: int) -> torch.Tensor:
    """Return random images (count, C, H, W), the same for each call."""
    return torch.randn(count, *trained.data_config['input_size'], generator=torch.Generator().manual_seed(0))


def export_onnx(trained: TrainedModel, path: Path) -> None:
    """Write a model as ONNX with a dynamic batch, and compare it with torch through onnxruntime.

    Raises:
        UsageError: The packages of the extra `onnx` are missing.
        RunError: torch can't export the model, or onnxruntime's logits differ by more than 1e-4.
    """
    from timm.utils.onnx import onnx_export, onnx_forward
    differences = []
    try:
        onnx_export(trained.model, str(path), example_images(trained, 2), use_dynamo=True, input_names=['images'],
                    output_names=['logits'])
        for count in (1, 3):
            images = example_images(trained, count)
            with torch.inference_mode():
                logits = trained.model(images)
            differences.append((logits - torch.from_numpy(onnx_forward(str(path), images))).abs().max().item())
    except ImportError as e:
        raise UsageError(f"--onnx: {first_line(e)} (pip install 'timm-vpl[onnx]')") from e
    except Exception as e:  # the exporter and the runtime raise errors of many classes
        raise RunError(f'--onnx: {trained.architecture} cannot be exported: {first_line(e)}') from e
    if not all(difference <= ONNX_TOLERANCE for difference in differences):
        raise RunError(f'--onnx: {trained.architecture} differs from torch by {max(differences):.2g}, more than '
                       f'{ONNX_TOLERANCE:g}')


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder to the Hub and return its address; create the repository if necessary.

    Raises:
        RunError: No token, no rights, no network, or a public repository instead of a private one.
    """
    api = HfApi(library_name='timm-vpl')
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise RunError(f'{repo_id}: exists and is public, so nothing was uploaded; {folder} is kept')
        return api.upload_folder(  # without a model.onnx of earlier weights, where these have none
            repo_id=repo_id, folder_path=str(folder), commit_message=f'Upload {folder.name}',
            delete_patterns='model.onnx')
    except (HTTPError, OSError, RuntimeError, ValueError) as e:  # the Hub's errors, the connection's, an upload's
        raise RunError(
            f'{repo_id}: not uploaded, {folder} is kept; it needs a connection and a token with write access (`hf auth '
            f'login`, or HF_TOKEN): {" ".join(str(e).split())[:200]}') from e


class ExportObserver:
    """Exports each branch of a run from its best epoch when the run ends."""

    def start(self, run) -> None:
        """Build the model and the card of each branch as for an export, but write nothing.

        Raises:
            UsageError: It can't be exported, which would otherwise only show at the end.
        """
        checkpoint = {'state_dict': run.pair.state_dict(), 'branches': run.saver.branches, 'args': run.saver.args}
        path = os.path.join(run.output_dir, 'last.pth.tar')
        try:
            with torch.random.fork_rng(devices=[]):
                trained = [load_branch(path, checkpoint, side) for side in run.pair.sides]
            for branch, name in zip(trained, branch_names(trained).values(), strict=True):
                model_card(branch, name, f'ORG/{name}')
        except (RunError, UsageError, ValueError) as e:
            raise UsageError(f'{e}; --no-export trains without an export') from e

    def finished(self, folder: str) -> bool:
        """Return whether a run's folder contains the exports."""
        return not missing_exports(folder)

    def end(self, run) -> None:
        """Export what is missing, except edited exports; log an error if that fails, and keep what was trained."""
        try:
            for branch, folder in missing_exports(run.output_dir):
                if folder.exists() and not _is_ours(folder):
                    _logger.error(f'Not exported: {folder} was changed after its export, and is kept')
                    continue
                export_branch(branch, folder)
                _logger.info(f"Exported {branch.label}: timm.create_model('local-dir:{folder}', pretrained=True)")
        except (OSError, RunError, UsageError, ValueError) as e:
            _logger.error(f'Not exported: {e}')
