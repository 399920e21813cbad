#!/usr/bin/env python3
"""Train a CNN and a vision transformer together; `train_vpl.py --help` lists the options."""
import sys

from timm_vpl.cli import train

if __name__ == '__main__':
    sys.exit(train())
