"""timm's own train script, unmodified, with a pair instead of its model and PairTask instead of its task.

    python examples/timm_script.py PATH/TO/timm/train.py DIR --model resnet50 --model-b vit_base_patch16_224

All else is the script's, and its options hold for both branches, but for --model-kwargs, --pretrained-path and
--initial-checkpoint, which are of branch a, --model. Both see the images that the script prepares for a, b with its own
statistics. The stages are parts of --epochs. Each validation shows both branches, the script ranks by --report-branch.
"""
import runpy
import sys

from timm.utils import ParseKwargs, is_primary, unwrap_model

from timm_vpl import PairTask, VPLLoss
from timm_vpl.engine.boundary import refusing
from timm_vpl.engine.models import create_beside
from timm_vpl.options.train import exit_on_usage_error

# Options of the script that a pair does not have, each with the value at which it does nothing.
REFUSED = {'aug_splits': 0, 'head_init_bias': None, 'head_init_scale': None, 'jsd_loss': False, 'kd_model_name': None,
           'naflex_loader': False, 'split_bn': False, 'torchscript': False}


def main(path):
    with refusing(f"{path}: expected the path of timm's train script", ImportError, KeyError, OSError):
        script = runpy.run_path(path, run_name='train')['main'].__globals__
    script['parser'].add_argument('--model-b', required=True, metavar='MODEL', help='branch b, beside --model as a')
    script['parser'].add_argument('--model-kwargs-b', nargs='*', default={}, action=ParseKwargs)
    script['parser'].add_argument('--report-branch', default='b', choices=('a', 'b'), help='whose top-1 ranks epochs')
    args, text = script['_parse_args']()
    for name, inert in REFUSED.items():
        if getattr(args, name, inert) != inert:
            script['parser'].exit(2, f"timm_script.py: error: --{name.replace('_', '-')}: a pair does not have it\n")
    timms, last = dict(script), {}

    def create_pair(name, **kwargs):
        return create_beside(timms['create_model'](name, **kwargs), args.model_b, args, **args.model_kwargs_b)

    def train_pair(epoch, *given, task, **kwargs):
        task.set_epoch(epoch)
        return timms['train_one_epoch'](epoch, *given, task=task, **kwargs)

    def validate_both(model, *given, log_suffix='', **kwargs):
        pair, last['weights'] = unwrap_model(model), log_suffix
        for side in pair.sides:
            last[side] = timms['validate'](pair.alone(side), *given, log_suffix=f' {side}{log_suffix}', **kwargs)
        return last[args.report_branch]

    script.update(
        create_model=create_pair, train_one_epoch=train_pair, validate=validate_both, _parse_args=lambda: (args, text),
        ClassificationTask=lambda model, criterion, **kwargs: PairTask(
            model, VPLLoss(args.epochs, base_loss=criterion), **kwargs))
    script['main']()
    if last and is_primary(args):
        script['_logger'].info('Top-1{weights}: branch a {a[top1]:.3f} %, b {b[top1]:.3f} %'.format(**last))


if __name__ == '__main__':
    with exit_on_usage_error('timm_script.py'):
        main(sys.argv.pop(1) if len(sys.argv) > 1 else 'nothing')
