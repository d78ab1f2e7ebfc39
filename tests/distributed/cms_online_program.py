"""Run by torchrun: FSDP2 against the whole model, with CMS levels that learn within each clip."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hopescale.parallel.process_group import end_process
from tests.distributed import fsdp_program

ONLINE = [
    "model.block_pattern=[H,S,H]",
    "model.cms.mode=online",
    "model.cms.levels=[{period: 1, hidden_multiplier: 1.0, teach_scale: 2.0},{period: 2, hidden_multiplier: 1.0}]",
    "model.cms.online={teach_scale: 1.0, warmup_steps: 2}",
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp_program.OVERRIDES += ONLINE
    fsdp_program.main(Path(sys.argv[1]), sys.argv[2])
    end_process(0)
