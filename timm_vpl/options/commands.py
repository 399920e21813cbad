"""The options of the smaller commands, a class each."""
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..core.names import SIDES
from ..core.option import Count, CropPct, Number, Positive, Whole, option
from ..errors import UsageError
from .checks import check_dataset, check_trained
from .parser import OptionParser, flag_of
from .sections import INTERPOLATIONS, Output, Source
from .train import name_data_dir


@dataclass(frozen=True)
class Export:
    """Options."""
    source: str = option(
        '', "checkpoint, or folder of a run: each branch's best epoch", metavar='CHECKPOINT_OR_RUN_DIR',
        positional=True)
    branch: str = option('both', 'branch to export', choices=(*SIDES, 'both'))
    ema: bool | None = option(
        None, 'averaged weights (--no-ema: the raw ones)', shown='averaged where they were evaluated')
    out: str | None = option(
        None, 'folder for the exports', shown='export, in the folder of the run', metavar='DIR')
    name_a: str | None = option(None, 'name of branch a', shown='the method and the architecture', metavar='NAME')
    name_b: str | None = option(None, 'name of branch b', shown='likewise', metavar='NAME')
    overwrite: bool = option(False, 'replace existing exports, even edited ones')
    license: str = option('unknown', "licence of the weights, by the Hub's identifier", metavar='ID')
    onnx: bool = option(False, 'also write model.onnx and compare its outputs with torch (extra: onnx)')
    push_to: str | None = option(
        None, 'upload each branch to this organisation or user of the Hugging Face Hub, one repository per branch',
        metavar='ORG')
    private: bool = option(False, 'create private repositories')


@dataclass(frozen=True)
class _Trained:
    model: str = option(
        '', 'folder of a run or checkpoint (both branches), exported folder, hf-hub:ID or timm name', metavar='MODEL',
        positional=True)

    @property
    def models(self) -> tuple[str, ...]:
        """The one model."""
        return (self.model,)


@dataclass(frozen=True)
class Forward(Output):
    """Options."""
    in_chans: Count | None = option(None, 'channels of the images', shown="the model's")
    img_size: Count | None = option(None, 'height and width of the images', shown="the model's")
    input_size: tuple[Count, Count, Count] | None = option(
        None, 'channels, height, width of the images', shown="the model's")
    crop_pct: CropPct | None = option(None, 'centre crop, as a fraction', shown="the model's")
    mean: tuple[Number, ...] | None = option(None, 'mean of the pixels', shown="the model's")
    std: tuple[Positive, ...] | None = option(None, 'standard deviation of the pixels', shown="the model's")
    interpolation: str = option('', 'interpolation', shown="the model's", choices=('', *INTERPOLATIONS), metavar='NAME')
    batch_size: Count = option(256, 'images per step and process', '-b')
    channels_last: bool = option(False, 'use the channels-last memory layout')
    device: str | None = option(None, 'device', shown='cuda, then mps, then cpu', metavar='DEVICE')
    amp: bool = option(False, 'run in mixed precision')
    amp_dtype: str = option('float16', 'lower-precision type', choices=('float16', 'bfloat16'))
    workers: Whole = option(4, 'processes that load data', '-j')
    pin_mem: bool = option(False, 'pin the memory of the loader')
    local_rank: Whole = option(0, '', '--local_rank')


@dataclass(frozen=True)
class Evaluation(Forward, Source):  # DIR comes after a model, and before what Forward has
    """Dataset parameters."""
    val_split: str = option('validation', 'split to validate on', '--split', metavar='NAME')
    val_num_samples: Count | None = option(None, 'number of images, if the data set does not give it', '--num-samples')
    imagenet_v2: bool = option(False, 'the class folders are named 0 to 999, as in ImageNet-V2')


@dataclass(frozen=True)
class Validate(Evaluation, _Trained):  # MODEL comes before DIR
    """Dataset parameters."""
    real_labels: str | None = option(
        None, "also score ImageNet's validation images by their ReaL labels (timm's, or those of a JSON file)",
        const='', metavar='FILE')
    per_class: str | None = option(
        None, "also report the accuracy of each class: mean and lowest on screen, all in a CSV file if one is given",
        const='', metavar='FILE')
    check_data: str | None = option(
        None, "list the images that are also in the training split (SPLIT if it is not 'train'), by file content",
        const='train', metavar='SPLIT')
    results_file: str | None = option(
        None, 'CSV or JSON file for the results', shown='validation.csv, in the folder of a run', metavar='FILE')


@dataclass(frozen=True)
class _Models:
    models: tuple[str, ...] = option(
        (), 'a pair (folder of a run, or checkpoint), or two models, each as `validate` takes it', metavar='MODEL',
        positional=True)


@dataclass(frozen=True)
class Inspect(Evaluation, _Models):
    """Dataset parameters."""
    results_file: str | None = option(None, 'CSV or JSON file for the accuracy of each class', metavar='FILE')
    contact_sheet: str | None = option(
        None, 'PNG file for the images on which the models disagree, the most confident first', metavar='FILE')
    html: str | None = option(None, 'HTML file for all results', metavar='FILE')
    num_images: Count = option(24, 'maximum number of images to show')


@dataclass(frozen=True)
class Predict(Forward, _Trained):
    """Options."""
    images: tuple[str, ...] = option((), 'image, or folder to search for images', metavar='IMAGE', positional=True)
    input_img_mode: str | None = option(None, 'mode that images are converted to', shown='RGB', metavar='MODE')
    topk: Count | None = option(None, 'number of classes to list per image', shown='5, in a CSV 1')
    results_file: str | None = option(
        None, 'CSV or JSON file for the results', shown='on screen, of a folder as CSV', metavar='FILE')


@dataclass(frozen=True)
class Report:
    """Options."""
    run_dirs: tuple[str, ...] = option((), 'folder of a run', metavar='RUN_DIR', positional=True)
    format: str = option('md', 'format of the table', choices=('md', 'json'))
    plot: str | None = option(
        None, 'draw the curves of the rows, or of the only run, to a PNG or SVG file (extra: plot)', metavar='FILE')
    html: str | None = option(None, 'write the report with its curves as one HTML page', metavar='FILE')


@dataclass(frozen=True)
class Study(Output):
    """Options."""
    plan: str = option(
        '', 'base recipe, seeds and rows (a name and options each)', metavar='PLAN.yaml', positional=True)
    data_dir: str | None = option(None, "folder of images; the plan's `data` names a folder in it", metavar='DIR')
    output: str | None = option(None, 'folder of all runs', shown='output/study/PLAN', metavar='PATH')
    jobs: Count = option(1, 'runs at a time')
    nproc_per_node: Count = option(1, 'processes per run, started by torchrun')
    limit_minutes: Positive | None = option(None, 'start no run that would not finish within this time')
    print_commands: bool = option(False, 'print the commands of the remaining runs, one per line, without running them')
    dry_run: bool = option(False, 'print the estimated time of the remaining runs, measured by one epoch of each row')


# Of each command: the class of its options, and what it does.
COMMANDS: dict[str, tuple[type, str]] = {
    'validate': (Validate, 'Validate trained models, raw and averaged weights: loss, top-1 and top-5 accuracy.'),
    'predict': (Predict, 'Classify images with trained models.'),
    'inspect': (Inspect, 'Compare two models, or the branches of a pair, image by image.'),
    'export': (
        Export, 'Write each branch of a trained pair as a folder that timm loads without this package.'),
    'report': (Report, 'Compare finished runs: accuracy over seeds, cost, speed of convergence.'),
    'study': (Study, 'Train each row of a plan with each seed, compare the rows, and report the best.'),
}


def command_parser(name: str, prog: str = '') -> OptionParser:
    """Return the parser of a command."""
    section, description = COMMANDS[name]
    return OptionParser([section], prog=prog or f'timm-vpl {name}', description=description)


def parse_command(name: str, argv: Sequence[str], prog: str = '') -> Any:
    """Return the options of a command, with all checks that need no data: an instance of its class.

    Raises:
        UsageError: The input is wrong.
    """
    section = COMMANDS[name][0]
    given = name_data_dir(command_parser(name, prog).parse(argv))
    options: Any = section(**{field.name: given[field.name] for field in fields(section) if field.name in given})
    if section is Inspect and not (options.data_dir or options.dataset) and len(options.models) > 1:
        *models, data_dir = options.models  # no option names the data
        options = replace(options, models=tuple(models), data_dir=data_dir)
    for model in getattr(options, 'models', ()):
        check_trained('MODEL', model)
    if isinstance(options, Evaluation):
        _check_evaluation(options)
    suffixes = {
        'results_file': ('.csv', '.json'), 'contact_sheet': ('.png',), 'html': ('.html', '.htm'),
        'plot': ('.png', '.svg')}
    for name in suffixes:
        if getattr(options, name, None):
            _check_file(flag_of(name), getattr(options, name), *suffixes[name])
    return options


def _check_evaluation(options: Evaluation) -> None:
    real_labels, check_data = (getattr(options, name, None) for name in ('real_labels', 'check_data'))
    check_dataset(options, ('val_split', *(['check_data'] if check_data else [])))
    others = {'--class-map': options.class_map != '', '--real-labels': real_labels is not None}
    for flag in [flag for flag, given in others.items() if given and options.imagenet_v2]:
        raise UsageError(f'--imagenet-v2: it defines the labels and cannot be combined with {flag}')
    if real_labels and not os.path.isfile(real_labels):
        raise UsageError(f'--real-labels {real_labels}: no such file')


def _check_file(flag: str, file: str, *suffixes: str) -> None:
    """Refuse a file to write whose name or folder can't be right."""
    if os.path.splitext(file)[1].lower() not in suffixes:
        raise UsageError(f'{flag} {file}: expected a file name that ends in {" or ".join(suffixes)}')
    if not os.path.isdir(os.path.dirname(file) or '.'):
        raise UsageError(f'{flag} {file}: no such folder')
