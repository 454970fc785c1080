# SPDX-License-Identifier: Apache-2.0
"""The memory of past episodes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from ahm_networks.rl.replay import EpisodeReplay


def episodes(*numbers: int, cells: int = 3) -> dict[str, Tensor]:
    numbered = torch.tensor(numbers)
    return {"reward": numbered.float(), "cells": (numbered % 2 == 1).unsqueeze(1).expand(-1, cells)}


def kept(replay: EpisodeReplay) -> list[float]:
    """All that is stored, in the order of its places."""
    places = (torch.arange(len(replay)) + 0.5) / len(replay)
    return replay.sample(places)["reward"].tolist()


def test_the_oldest_make_way() -> None:
    replay = EpisodeReplay(5)
    lengths = []
    for batch in ((1, 2, 3), (4, 5, 6), (7, 8)):
        replay.add(episodes(*batch))
        lengths.append(len(replay))
    assert lengths == [3, 5, 5]
    assert kept(replay) == [6, 7, 8, 4, 5]


def test_of_a_batch_beyond_the_capacity_the_last_stay() -> None:
    replay = EpisodeReplay(2)
    replay.add(episodes(1, 2, 3, 4, 5))
    assert sorted(kept(replay)) == [4, 5]
    replay.add(episodes(6))
    assert sorted(kept(replay)) == [5, 6]


def test_what_belongs_together_stays_together() -> None:
    replay = EpisodeReplay(64)
    replay.add(episodes(*range(50)))
    drawn = replay.sample(torch.rand(200))
    assert drawn["cells"].dtype == torch.bool
    assert torch.equal(drawn["cells"][:, 0], drawn["reward"] % 2 == 1)


def test_every_episode_is_drawn_equally_often_and_only_stored_ones() -> None:
    replay = EpisodeReplay(100)
    replay.add(episodes(0, 1, 2, 3))
    counts = torch.bincount(replay.sample(torch.rand(8000))["reward"].long(), minlength=4)
    assert len(counts) == 4
    assert (counts / 8000 - 0.25).abs().max() < 0.03
    assert replay.sample(torch.tensor([1.0]))["reward"].tolist() == [3.0]  # rounding must not reach beyond the end


def test_later_changes_of_what_was_added_do_not_matter() -> None:
    replay, batch = EpisodeReplay(2), episodes(1, 2)
    replay.add(batch)
    batch["reward"].fill_(9.0)
    assert kept(replay) == [1, 2]


@pytest.mark.parametrize("method", ["deepcopy", "pickle"])
def test_copies_are_alone(method: str) -> None:
    replay = EpisodeReplay(4)
    replay.add(episodes(1, 2))
    other = copy.deepcopy(replay) if method == "deepcopy" else pickle.loads(pickle.dumps(replay))
    other.add(episodes(3))
    assert (kept(replay), kept(other)) == ([1, 2], [1, 2, 3])


def test_episodes_of_another_shape_are_refused() -> None:
    replay = EpisodeReplay(4)
    replay.add(episodes(1, 2))
    with pytest.raises(ValueError, match=r"replay: expected cells of shape \(3,\) .* got \(5,\); crop all images"):
        replay.add(episodes(3, cells=5))


def test_no_capacity() -> None:
    with pytest.raises(ValueError, match="capacity: expected at least 1 episode, got -1"):
        EpisodeReplay(-1)
