"""What the bits of a run depend on, besides options and data."""
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import PIL
import timm
import torch

from .. import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the bits of a run depend on: versions, the code, the device and the CPU threads."""
    return {
        'timm_vpl': _code(),
        'torch': str(torch.__version__),
        'timm': timm.__version__,
        'pillow': PIL.__version__,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type}, {_processor()}',
        'threads': torch.get_num_threads(),
    }


def _code() -> str:
    """Return the tag and commit of the clone that this package is in, else its version."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return __version__
    try:
        described = subprocess.run(
            ['git', '-C', root, 'describe', '--tags', '--always', '--dirty'],
            capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return described.stdout.strip()


def _processor() -> str:
    """Return the processor's model and the instructions that torch uses on it."""
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        text = ''
    found = dict(re.findall(r'^(model name|cpu family|model)\s*: (.*)$', text.partition('\n\n')[0], re.MULTILINE))
    numbers = f' ({found["cpu family"]}/{found["model"]})' if {'cpu family', 'model'} <= found.keys() else ''
    name = found.get('model name') or platform.processor() or platform.machine()
    return f'{name}{numbers}, {torch.backends.cpu.get_cpu_capability()}'
