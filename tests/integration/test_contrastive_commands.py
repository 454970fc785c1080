# SPDX-License-Identifier: Apache-2.0
"""Contrastive pretraining as users type it."""

from __future__ import annotations

import math
from pathlib import Path

from tests.bundles.running import CONFIGS, TINY, assert_same_state, checkpoint, command, finish, start, write_cases


def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data")
    state = "$torch.save(@network.module.state_dict(), @output_dir + f'/rank{torch.distributed.get_rank()}.pt')"
    options = {**TINY, "dataset_dir": data, "output_dir": tmp_path / "run", "val_fraction": 0.5}
    options["finalize"] = str([state, "$torch.distributed.destroy_process_group()"])
    files = str([str(CONFIGS / name) for name in ("train.json", "contrastive.json", "multi_gpu_train.json")])
    words = command(options, files=files)
    torchrun = [words[0], "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", *words[1:]]
    text = finish(start(torchrun))
    assert_same_state(*(checkpoint(tmp_path / f"run/rank{rank}.pt") for rank in (0, 1)))
    assert text.count("Key metric: contrastive_loss") == 2
    assert math.isfinite(checkpoint(tmp_path / "run/models/model.pt")["best"]["metric"])
