#!/usr/bin/env python3
"""What a training step computes and moves, and the least time that a device needs for it. Nothing runs: meta tensors.

Operations are counted as PyTorch dispatches them in eager mode, forward and backward: floating-point operations by
torch's own formulas (two for a multiply-add), and bytes as every operation reads its inputs and writes its outputs
once. Attention counts as one fused operation. Weights and activations are counted in bfloat16, optimizer and averages
in float32; where autocast keeps float32 (LayerNorm, residual sums of a ViT) a step moves more than is counted here.
"""
import collections

import common
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from timm_vpl.core import losses

# Dense bfloat16 TFLOP/s and memory TB/s by the makers' data sheets, for the default of --device-peak.
PEAKS = {'H100 SXM': (989.4, 3.35), 'H200 SXM': (989.4, 4.8)}
_NO_TRAFFIC = ('empty', '_unsafe_view', 'new_empty', 'empty_like')


class Traffic(TorchDispatchMode):
    """Collects operations, floating-point operations and bytes of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.ops = []  # (name, FLOP, bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if not func.is_view and name not in _NO_TRAFFIC:
            tensors = _tensors(args) + _tensors(kwargs) + _tensors(output)
            if not _tensors(output):  # in place, on lists of tensors
                tensors += [
                    tensor for argument, value in zip(func._schema.arguments, args, strict=False)
                    if argument.alias_info is not None and argument.alias_info.is_write for tensor in _tensors(value)]
            count = flop_registry.get(func._overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=output) if count else 0
            self.add(name, flop, tensors)
        return output

    def add(self, name, flop, tensors):
        self.ops.append((name, flop, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))

    @property
    def flop(self):
        return sum(flop for _, flop, _ in self.ops)

    @property
    def bytes(self):
        return sum(size for _, _, size in self.ops)

    def seconds(self, peak, bandwidth):
        """Return the least time if no operation overlaps another: each bound by arithmetic or by memory."""
        return sum(max(flop / peak, size / bandwidth) for _, flop, size in self.ops)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class FusedAttention(torch.autograd.Function):
    """Attention that moves its inputs and outputs only; counted by hand, with two products forward, four backward."""

    traffic = None

    @staticmethod
    def forward(ctx, q, k, v):
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output)
        ctx.flop = 4 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
        FusedAttention.traffic.add('attention', ctx.flop, [q, k, v, output])
        return output

    @staticmethod
    def backward(ctx, grad):
        q, k, v, output = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        FusedAttention.traffic.add('attention_backward', 2 * ctx.flop, [q, k, v, output, grad, *grads])
        return grads


def count(function) -> Traffic:
    """Return what a function dispatches."""
    saved = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **kwargs: FusedAttention.apply(q, k, v)
    try:
        with torch.device('meta'), Traffic() as traffic:
            FusedAttention.traffic = traffic
            function()
    finally:
        F.scaled_dot_product_attention = saved
    return traffic


def parts(options) -> tuple[dict, dict]:
    """Return what each part of a step dispatches, and the parameters of each branch."""
    size, found, parameters, widths = options.img_size, {}, {}, {}
    for side in 'ab':
        name = getattr(options, f'model_{side}')
        with torch.device('meta'):
            model = timm.create_model(name, num_classes=options.num_classes).train()
            images = torch.empty(options.batch_size, 3, size, size)
            with FlopCounterMode(display=False) as counter:  # with the attention as it is written out
                model(images).sum().backward()
        parameters[side] = sum(parameter.numel() for parameter in model.parameters())
        widths[side] = model.num_features if not hasattr(model, 'head_hidden_size') else model.head_hidden_size
        model.zero_grad()
        half, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
        found[f'{side}, forward'] = count(lambda half=half, images=images: half(images))
        both = count(lambda half=half, images=images: half(images).sum().backward())
        found[f'{side}, forward and backward'] = both
        if abs(both.flop / counter.get_total_flops() - 1) > 1e-3:
            print(f'# {name}: FlopCounterMode has {counter.get_total_flops()}, the count here {both.flop}')

    affine = None
    if widths['a'] != widths['b']:
        with torch.device('meta'):
            affine = torch.nn.Linear(widths['b'], widths['a'])
        parameters['affine layer'] = sum(parameter.numel() for parameter in affine.parameters())
    found['pair terms, forward and backward'] = count(lambda: _pair_terms(options, widths, affine))

    total = sum(parameters.values())
    weights = torch.nn.Module()
    weights.weight = torch.nn.Parameter(torch.empty(total, device='meta'))
    weights.weight.grad = torch.empty(total, device='meta')
    for name, kwargs in (('AdamW, foreach', {'foreach': True}), ('AdamW, fused', {'fused': True})):
        try:
            optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-3, weight_decay=0.05, **kwargs)
            optimizer.step()
            found[name] = count(optimizer.step)
        except RuntimeError:  # no fused step on meta tensors: reads p, g, m, v and writes p, m, v
            found[name] = Traffic()
            found[name].ops.append(('fused', 0, 28 * total))
    average = torch.empty(total, device='meta')  # timm's ModelEmaV3 does this
    found['EMA'] = count(lambda: torch._foreach_lerp_([average], [weights.weight.detach()], weight=2e-4))
    for name, per_parameter in (
            ('autocast: weights to bf16, gradients to fp32', 12),
            ('check of the gradients (fp16: with the scale)', 8),
            ('--clip-grad: norms and factor', 12),
    ):
        found[name] = Traffic()
        found[name].ops.append((name, 0, per_parameter * total))
    return found, parameters


def _pair_terms(options, widths, affine):
    rows = options.batch_size
    embed_a = torch.empty(rows, widths['a'])
    embed_b = torch.empty(rows, widths['b'], requires_grad=True)
    if affine is not None:
        embed_b = affine(torch.cat([embed_b, embed_b.detach()])).chunk(2)[0]
    logits = torch.empty(rows, options.num_classes, requires_grad=True)
    reference = torch.empty(rows, options.num_classes)
    (losses.contrastive(embed_a, embed_b, tau=0.2) + losses.kl_divergence(logits, reference)).backward()


def main(argv=None):
    parser = common.create_parser(__doc__)
    parser.add_argument('--device-peak', nargs=2, type=float, metavar=('TFLOP/S', 'TB/S'), help='of another device')
    options = common.parse(parser, argv, cpu=common.DEFAULTS['cuda'])
    peaks = {'the device': options.device_peak} if options.device_peak else PEAKS
    report = common.Report('bounds', options)
    found, parameters = parts(options)
    report.table('parameters', ['part', 'millions'], [
        *([name, f'{value / 1e6:.2f}'] for name, value in parameters.items()),
        ['together', f'{sum(parameters.values()) / 1e6:.2f}']])

    header = ['part', 'operations', 'GFLOP', 'GB']
    header += [f'{what}, {name}' for name in peaks for what in ('compute ms', 'memory ms', 'each operation ms')]
    rows = [_row(name, traffic, peaks) for name, traffic in found.items()]
    report.table(f'a step of {options.batch_size} images', header, rows)

    names = [
        'a, forward and backward', 'b, forward and backward', 'pair terms, forward and backward',
        'check of the gradients (fp16: with the scale)', 'AdamW, fused', 'EMA',
        'autocast: weights to bf16, gradients to fp32']
    steps = {
        'pair': names,
        'solo a + solo b': [name for name in names if not name.startswith('pair')],
        'dml (one more forward of a)': [*(name for name in names if not name.startswith('pair')), 'a, forward'],
        'dml with four forwards': [
            *(name for name in names if not name.startswith('pair')), 'a, forward', 'b, forward'],
    }
    totals = {}
    for step, members in steps.items():
        totals[step] = Traffic()
        for member in members:
            totals[step].ops += found[member].ops
    report.table('whole steps', header, [_row(name, traffic, peaks) for name, traffic in totals.items()])
    rows = []
    for name, (peak, bandwidth) in peaks.items():
        pair = totals['pair'].seconds(peak * 1e12, bandwidth * 1e12)
        rows.append([
            name, f'{pair * 1e3:.1f}', f'{options.batch_size / pair:.0f}', f'{8 * options.batch_size / pair:.0f}',
            *(f'{100 * found[part].seconds(peak * 1e12, bandwidth * 1e12) / pair:.2f}' for part in names[2:]),
            *(f'{totals[step].seconds(peak * 1e12, bandwidth * 1e12) / pair:.3f}' for step in list(steps)[1:])])
    report.table('the pair at its bound', [
        'device', 'ms a step', 'images/s to decode', 'images/s, 8 devices', *(f'{part} %' for part in names[2:]),
        *(f'{step} / pair' for step in list(steps)[1:])], rows)
    largest = collections.Counter()
    for operation, _, size in totals['pair'].ops:
        largest[operation] += size
    report.table('the pair by operation', ['operation', 'GB', '%'], [
        [operation, f'{size / 1e9:.2f}', f'{100 * size / totals["pair"].bytes:.1f}']
        for operation, size in largest.most_common(12)])
    report.save()


def _row(name, traffic, peaks):
    row = [name, len(traffic.ops), f'{traffic.flop / 1e9:.1f}', f'{traffic.bytes / 1e9:.2f}']
    for peak, bandwidth in peaks.values():
        row += [
            f'{traffic.flop / peak / 1e9:.2f}', f'{traffic.bytes / bandwidth / 1e9:.2f}',
            f'{traffic.seconds(peak * 1e12, bandwidth * 1e12) * 1e3:.2f}']
    return row


if __name__ == '__main__':
    main()
