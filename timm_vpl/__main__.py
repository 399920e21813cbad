"""`python -m timm_vpl`, also for torchrun: `torchrun --nproc-per-node 8 -m timm_vpl train ...`."""
import sys

from .cli import main

sys.exit(main())
