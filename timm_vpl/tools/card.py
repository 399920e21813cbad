"""The model card of an exported branch: its README.md with the Hub's metadata, from the figures of its run."""
import hashlib
import math
import os
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..core.methods import METHODS
from ..core.names import partner_of
from ..engine.trained import TrainedModel
from ..options.train import build_parser, plain
from ..text import code, code_block, markdown, one_line
from .runs import COLUMNS, VALIDATION, number, short_name
from .tables import markdown_table, read_csv

MARK = '\n<!-- made by timm-vpl '  # before the hash that shows whether a card was edited
_SETS = {'real': 'ReaL labels', 'v2': 'ImageNet-V2'}


def model_card(trained: TrainedModel, name: str, repo_id: str, license: str = 'unknown') -> ModelCard:
    """Return the card of a branch.

    Args:
        trained: The branch.
        name: Name of the model.
        repo_id: Its name for `hf-hub:`.
        license: Identifier of its licence on the Hub.
    """
    args = trained.checkpoint.get('args', {})
    results = _results(trained)
    data_name, hub_id = dataset_name(args), _hub_dataset(args)
    metadata = ModelCardData(
        model_name=name, library_name='timm', pipeline_tag='image-classification', license=license,
        tags=['image-classification', 'timm', 'timm-vpl', *([one_line(args['method'])] if 'method' in args else [])],
        datasets=[hub_id] if hub_id else None,
        eval_results=[
            EvalResult(
                task_type='image-classification', task_name='Image Classification',
                dataset_type=hub_id or 'imagefolder',  # the Hub's name for data that it does not have
                dataset_name=f'{data_name} ({subset})',
                dataset_split=subset,  # results of one split share the name of the first
                metric_type='accuracy', metric_name=metric, metric_value=value)
            for (subset, weights), figures in results.items()
            if data_name and weights == ('ema' if trained.ema else 'raw')
            for metric, value in zip(('Top-1', 'Top-5'), figures, strict=True)
        ] or None)
    return ModelCard(_seal(
        f'---\n{metadata.to_yaml()}\n---\n\n{_text(trained, args, results, name, repo_id, data_name)}'))


def _seal(text: str) -> str:
    """Return a card with a last line that shows whether it was edited since."""
    return f'{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n'


def is_unedited(card: str) -> bool:
    """Return whether a card is unchanged since `model_card` made it."""
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


def _results(trained: TrainedModel) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (top-1, top-5) by (set, weights), as far as the run or `timm-vpl validate` measured them."""
    results = {}
    own = one_line(trained.checkpoint.get('args', {}).get('val_split') or 'validation')
    metrics, side = trained.checkpoint.get('metrics', {}), trained.side
    for weights, prefix in (('ema', 'ema_'), ('raw', '')):
        results[own, weights] = metrics.get(f'{prefix}top1_{side}'), metrics.get(f'{prefix}top5_{side}')
    config = trained.data_config
    ours = {
        'branch': side, 'epoch': trained.checkpoint.get('epoch'), 'img_size': config['input_size'][-1],
        'crop_pct': config['crop_pct'], 'interpolation': config['interpolation']}
    for row in read_csv(os.path.join(os.path.dirname(trained.source), VALIDATION), COLUMNS) if side else ():
        figures = number(row['top1']), number(row['top5'])
        if all(row[key] == str(value) for key, value in ours.items()) and row['set'] != own:
            data = os.path.basename(row['data'])
            name = f'{_SETS.get(row["set"], row["set"])}, {row["images"]} images of {data}'
            results[one_line(name), row['weights']] = figures
    return {key: pair for key, pair in results.items() if None not in pair and all(map(math.isfinite, pair))}


_USAGE = """
## Usage

```python
import timm
from PIL import Image

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0))
```

From a folder: `timm.create_model('local-dir:FOLDER', pretrained=True)`."""


def _text(trained, args, results, name, repo_id, data_name) -> str:
    """Return the card below its metadata."""
    weights = {True: ' (averaged weights, EMA)', False: ' (raw weights)', None: ''}[trained.ema]
    version = f' {markdown(trained.checkpoint["version"])}' if trained.checkpoint.get('version') else ''
    channels = trained.data_config['input_size'][0]
    mode = re.sub(r'\W', '', str(args.get('input_img_mode') or {1: 'L', 4: 'RGBA'}.get(channels, 'RGB')))
    method = METHODS.get(args.get('method'))  # None of one that user code added
    lines = [
        f'# {name}', '',
        f'A {code(trained.architecture)} image classification model{weights}, trained with timm-vpl{version}. It is a '
        f'plain timm model: nothing but timm is needed to load it.', '',
        '## Model', '', *(f'- {fact}' for fact in _facts(trained, args, method, data_name))]
    if results:
        lines += ['', '## Results', '', *markdown_table(('set', 'weights', 'top-1', 'top-5'), (
            (markdown(subset), markdown(weights), *(f'{figure:.3f}' for figure in figures))
            for (subset, weights), figures in results.items()))]
        lines.append('In percent, as measured by the run. A best epoch is selected by its results on validation.')
    lines.append(_USAGE.format(repo_id=repo_id, mode=mode))
    recipe = _recipe(args)
    if recipe:
        lines += [
            '', '## Recipe', '', 'Options of `timm-vpl train --config FILE`, others at their defaults:', '',
            *code_block(yaml.safe_dump(recipe, default_flow_style=False).rstrip(), 'yaml')]
    if method and method.citation:
        lines += ['', '## Citation', '', *code_block(method.citation, 'bibtex')]
    return '\n'.join(lines) + '\n'


def _facts(trained, args, method, data_name) -> list[str]:
    """Return the facts about the model and its training, one per line."""
    _, height, width = trained.data_config['input_size']
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    facts = [
        f'Architecture: {code(trained.architecture)}, {parameters / 1e6:.2f} M parameters',
        f'Images: {height} x {width}, {trained.model.num_classes} classes']
    if 'method' in args:
        facts.append(f'Method: {f"{method.description} " if method else ""}({code("--method " + args["method"])})')
        partner = args.get(f'model_{partner_of(trained.side)}')
        if partner:
            facts.append(f'Partner in training: {code(short_name(partner))}')
        if args.get('teacher'):
            facts.append(f'Teacher: {code(os.path.basename(str(args["teacher"]).rstrip("/")))}')
    if data_name:
        facts.append(f'Data: {markdown(data_name)}')
    if 'epoch' in trained.checkpoint:
        facts.append(f'Epoch: {trained.checkpoint["epoch"]}, counted from 0')
    return facts


def _recipe(args: dict[str, Any]) -> dict[str, Any]:
    """Return the options of what was trained, without local files."""
    entries = build_parser().entries
    return {
        key: short_name(value) if key in ('model_a', 'model_b')
        else os.path.basename(str(value)) if key == 'class_weights' else value
        for key, value in args.items()
        if key in entries and entries[key].in_card and (key == 'seed' or value != plain(entries[key].default))}
