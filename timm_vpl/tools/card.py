"""The model card of an exported branch: its README.md with the Hub's metadata, from figures that its run measured."""
import csv
import hashlib
import math
import os
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..core.methods import METHODS, partner_of
from ..engine.trained import TrainedModel
from ..errors import RunError, first_line
from ..options.options import build_parser
from ..text import code, code_block, markdown, one_line

VALIDATION = 'validation.csv'  # where `timm-vpl validate` leaves its figures, in the folder of a run

# Options that name files of a machine, and what a checkpoint keeps beside the options.
_PRIVATE = (
    'num_classes', 'class_names', 'data_config', 'class_map', 'teacher', 'pretrained_path_a', 'pretrained_path_b',
    'initial_checkpoint_a', 'initial_checkpoint_b')
MARK = '\n<!-- made by timm-vpl '  # before what tells whether somebody has edited a card
_SETS = {'real': 'ReaL labels', 'v2': 'ImageNet-V2'}


def model_card(trained: TrainedModel, name: str, repo_id: str, license: str = 'unknown') -> ModelCard:
    """Return the card of a branch.

    Args:
        trained: The branch.
        name: Name of the model.
        repo_id: What `hf-hub:` loads it by.
        license: Identifier of its licence on the Hub.
    """
    args = trained.checkpoint.get('args', {})
    results = _results(trained)
    data_name = dataset_name(args)
    hub_id = _hub_dataset(args)
    metadata = ModelCardData(
        model_name=name,
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        tags=['image-classification', 'timm', 'timm-vpl', *([one_line(args['method'])] if 'method' in args else [])],
        datasets=[hub_id] if hub_id else None,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                task_name='Image Classification',
                dataset_type=hub_id or 'imagefolder',  # what the Hub calls data that it does not have
                dataset_name=f'{data_name} ({subset})',
                metric_type='accuracy',
                metric_name=metric,
                metric_value=value,
            )
            for (subset, weights), figures in results.items()
            if data_name and weights == ('ema' if trained.ema else 'raw')
            for metric, value in zip(('Top-1', 'Top-5'), figures, strict=True)
        ] or None,
    )
    return ModelCard(_seal(
        f'---\n{metadata.to_yaml()}\n---\n\n{_text(trained, args, results, name, repo_id, data_name)}'))


def _seal(text: str) -> str:
    """Return a card with a last line that tells whether somebody has edited it since."""
    return f'{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n'


def is_unedited(card: str) -> bool:
    """Return whether a card is as `model_card` made it."""
    text, mark, _ = card.rpartition(MARK)
    return bool(mark) and _seal(text) == card


def dataset_name(args: dict[str, Any]) -> str | None:
    """Return the name of a run's data set: the one given, without its kind, or that of the folder."""
    kind, slash, name = str(args.get('dataset') or '').partition('/')
    folder = os.path.basename(str(args.get('data_dir') or '').rstrip('/'))
    return one_line(name if slash else kind or folder) or None


def _hub_dataset(args: dict[str, Any]) -> str | None:
    """Return the name of a run's data set on the Hub; None where it is a folder, or from elsewhere."""
    kind, _, name = str(args.get('dataset') or '').partition('/')
    is_name = re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', name, re.ASCII)
    return name if kind.lower() in ('hfds', 'hfids') and is_name and not os.path.exists(name) else None


def _source(name) -> str:
    """Return a model's name without the folder that it may be in."""
    name = one_line(name)
    return os.path.basename(name.rstrip('/')) if name.startswith('local-dir:') else name


def _results(trained: TrainedModel) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (top-1, top-5) by (set, weights), as far as the run or `timm-vpl validate` measured them."""
    results = {}
    own = one_line(trained.checkpoint.get('args', {}).get('val_split') or 'validation')
    metrics, side = trained.checkpoint.get('metrics', {}), trained.side
    for weights, prefix in (('ema', 'ema_'), ('raw', '')):
        if f'{prefix}top1_{side}' in metrics and f'{prefix}top5_{side}' in metrics:
            results[own, weights] = (metrics[f'{prefix}top1_{side}'], metrics[f'{prefix}top5_{side}'])
    file = os.path.join(os.path.dirname(trained.source), VALIDATION)
    epoch, size = str(trained.checkpoint.get('epoch')), str(trained.data_config['input_size'][-1])
    if side and os.path.isfile(file):
        try:
            with open(file, newline='', encoding='utf-8') as f:
                for row in csv.DictReader(f):
                    ours = [row[key] for key in ('branch', 'epoch', 'img_size', 'crop_pct', 'interpolation')] == [
                        side, epoch, size, str(trained.data_config['crop_pct']), trained.data_config['interpolation']]
                    if ours and row['set'] != own and row['top1'] != '':
                        data = os.path.basename(row['data'])
                        name = f'{_SETS.get(row["set"], row["set"])}, {row["images"]} images of {data}'
                        results[one_line(name), row['weights']] = (float(row['top1']), float(row['top5']))
        except (KeyError, OSError, TypeError, ValueError, csv.Error) as e:
            raise RunError(f'{file}: not the figures of timm-vpl validate ({first_line(e, 80)})') from e
    return {key: figures for key, figures in results.items() if all(map(math.isfinite, figures))}


def _text(trained, args, results, name, repo_id, data_name):
    config = trained.data_config
    in_chans, height, width = config['input_size']
    mode = re.sub(r'\W', '', str(args.get('input_img_mode') or {1: 'L', 4: 'RGBA'}.get(in_chans, 'RGB')))
    weights = {True: ' (averaged weights, EMA)', False: ' (raw weights)', None: ''}[trained.ema]
    version = f' {markdown(trained.checkpoint["version"])}' if trained.checkpoint.get('version') else ''
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    lines = [
        f'# {name}',
        '',
        f'A {code(trained.architecture)} image classification model{weights}, trained with timm-vpl{version}. It is a '
        f'plain timm model: nothing but timm is needed to load it.',
        '',
        '## Model',
        '',
        f'- Architecture: {code(trained.architecture)}, {parameters / 1e6:.2f} M parameters',
        f'- Images: {height} x {width}, {trained.model.num_classes} classes',
    ]
    method = METHODS.get(args.get('method'))  # None of one that user code added
    if 'method' in args:
        description = f'{method.description} ' if method else ''
        lines.append(f'- Method: {description}({code("--method " + args["method"])})')
        partner = args.get(f'model_{partner_of(trained.side)}')
        if partner:
            lines.append(f'- Partner in training: {code(_source(partner))}')
        if args.get('teacher'):
            lines.append(f'- Teacher: {code(os.path.basename(str(args["teacher"]).rstrip("/")))}')
    if data_name:
        lines.append(f'- Data: {markdown(data_name)}')
    if 'epoch' in trained.checkpoint:
        lines.append(f'- Epoch: {trained.checkpoint["epoch"]}, counted from 0')
    if results:
        lines += ['', '## Results', '', '| set | weights | top-1 | top-5 |', '|---|---|---|---|']
        lines += [f'| {markdown(subset)} | {markdown(weights)} | {top1:.3f} | {top5:.3f} |'
                  for (subset, weights), (top1, top5) in results.items()]
        lines += ['', 'In percent, as measured by the run. A best epoch is chosen by its figures on validation.']
    lines += [
        '',
        '## Usage',
        '',
        '```python',
        'import timm',
        'from PIL import Image',
        '',
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()",
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)',
        f"logits = model(transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0))",
        '```',
        '',
        "From a folder: `timm.create_model('local-dir:FOLDER', pretrained=True)`.",
    ]
    parser = build_parser()
    recipe = {
        key: _source(value) if key in ('model_a', 'model_b') else value
        for key, value in args.items()
        if key == 'seed' or not (key in _PRIVATE or key in parser.how or value == parser.presets.get(key))}
    if recipe:
        lines += [
            '', '## Recipe', '', 'Options of `timm-vpl train --config FILE`, others at their defaults:', '',
            *code_block(yaml.safe_dump(recipe, default_flow_style=False).rstrip(), 'yaml')]
    if method and method.citation:
        lines += ['', '## Citation', '', *code_block(method.citation, 'bibtex')]
    return '\n'.join(lines) + '\n'
