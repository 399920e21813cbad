"""A CUDA device without one: tensors of the CPU are real, those of `cuda:0` have shape, type and device, but no values.

Operations on these are checked by torch (FakeTensorMode): a tensor of another device is refused. What would wait for
the device is refused too: a value that is read, a copy to the host, a shape that depends on values. So is a generator
of another device. Autograd's engine wants a real device; in its place the graph is walked here, node by node.
"""
import contextlib
from collections import defaultdict
from functools import partialmethod
from unittest import mock

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

CUDA = torch.device('cuda:0')
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class HostRead(RuntimeError):
    """The host would wait for the device."""


class Generator(list):
    """A generator of the device: the seeds that it was given."""
    device = CUDA

    def manual_seed(self, seed):
        self.append(seed)
        return self


class AnyGenerator(torch.Generator):
    """In the place of torch's class: makes generators of any device."""

    def __new__(cls, device='cpu'):
        return Generator() if torch.device(device).type == 'cuda' else cls.__base__(device)


class Cuda(TorchDispatchMode):
    """Lets what has to do with CUDA be fake and all else be real, and says what was done on the device.

    Attributes:
        seeds: The generator of the device.
        done: Name of each operation on the device, and type of what it returned.
        moved: What parameters have become there; torch keeps the object, here it is another one.
    """

    def __init__(self):
        super().__init__()
        self.seeds, self.done, self.moved = Generator(), [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        device = torch.device(kwargs.get('device') or 'cpu')
        if device.type == 'cpu' and not any(isinstance(each, FakeTensor) for each in given):
            with _disable_current_modes():
                return func(*args, **kwargs)
        generator = kwargs.get('generator')
        if generator is not None and generator.device.type != 'cuda':
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device}'")
        result = func(*args, **kwargs)
        source = args[1] if func is COPIES[1] else args[0] if func is COPIES[0] else None
        made = next((each for each in tree_iter(result) if isinstance(each, torch.Tensor)), None)
        if source is not None and source.device.type == 'cuda' and made.device.type == 'cpu':
            raise HostRead(f'{func} copies from {source.device} to the host')
        self.done.append((func.overloadpacket.__name__, None if made is None else made.dtype))
        return result


def move(module, moved, *args, **kwargs):
    """Move a module to the fake device, as its method `to`, which fails for fake tensors."""
    device, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != 'cuda':
        return to(module, *args, **kwargs)
    moved.update({
        tensor: nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
        for tensor in [*module.parameters(), *module.buffers()] for there in [tensor.detach().to(device)]})
    for each in module.modules():
        for slots in (each._parameters, each._buffers):
            slots.update({name: moved[tensor] for name, tensor in slots.items() if tensor is not None})
    return module


to = nn.Module.to


def nodes_of(root):
    """Return the nodes of the graph of a tensor, each after all that it leads to."""
    order, seen, pending = [], set(), [(root.grad_fn, False)]
    while pending:
        node, left = pending.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            pending += [(node, True), *((after, False) for after, _ in node.next_functions if after is not None)]
    return order


@torch.no_grad()
def walk(root, wanted=None):
    """Run the graph of a scalar backward; return the gradient of each leaf, or those of `wanted`."""
    incoming, leaves = defaultdict(dict), {}
    incoming[root.grad_fn][root.output_nr] = torch.ones_like(root)
    with getattr(torch.utils.checkpoint, 'GraphExecGroup', contextlib.nullcontext)():  # checkpointing computes once
        for node in reversed(nodes_of(root)):
            if node not in incoming:
                continue
            grads = incoming.pop(node)
            if hasattr(node, 'variable'):
                leaves[node.variable] = grads[0]
                continue
            given = [grads.get(i) for i in range(len(node._input_metadata))]
            if isinstance(node, torch.autograd.function.BackwardCFunction):  # written in Python: zeros, not None
                given = [torch.zeros(data.shape, dtype=data.dtype, device=data.device) if grad is None else grad
                         for grad, data in zip(given, node._input_metadata, strict=True)]
                found = node.apply(*given)
            else:
                found = node(*given)
            found = found if isinstance(found, tuple) else (found,)
            for (after, i), grad in zip(node.next_functions, found, strict=True):
                if after is None or grad is None:
                    continue
                data = after._input_metadata[i]
                if grad.device != data.device:
                    raise RuntimeError(f'{after.name()} got a gradient on {grad.device}, expected {data.device}')
                grad = grad.sum_to_size(data.shape).to(data.dtype)
                incoming[after][i] = incoming[after][i] + grad if i in incoming[after] else grad
    return leaves if wanted is None else tuple(leaves.get(leaf) for leaf in wanted)


def backward(root):
    """Accumulate gradients."""
    for leaf, grad in walk(root).items():
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


@contextlib.contextmanager
def fake_cuda():
    """Have the device."""
    device = Cuda()
    patches = {
        (nn.Module, 'to'): partialmethod(move, device.moved),
        (torch.Tensor, 'backward'): backward,
        (torch.autograd, 'grad'): lambda root, leaves, **kwargs: walk(root, leaves),
        (torch.cuda.amp.common, 'amp_definitely_not_available'): lambda: False,
        (torch, 'Generator'): AnyGenerator,
        (torch.cuda, 'is_bf16_supported'): lambda: True,
        (torch.cuda, 'default_generators'): (device.seeds,),
        (torch.cuda, 'max_memory_allocated'): lambda: 0,
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), stand_in in patches.items():
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(device)
