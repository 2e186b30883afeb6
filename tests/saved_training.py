"""A training whose saves are watched."""

import time
from functools import partial

import torch
from torch import nn

from ddp_sgd.checkpointing.checkpointer import AsyncCheckpointer
from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.engine.train_state import State, run_state_dict
from ddp_sgd.optim.sgd import build_sgd
from ddp_sgd.plan import make_plan


class Training:
    """A model of which every step changes all weights, and what was told of its saves."""

    def __init__(self, folder, size=8):
        self.folder = folder
        self.model = nn.Linear(size, 1, bias=False)
        self.optimizer = build_sgd(self.model, momentum=0.9)
        self.state = State()
        self.told = []
        self.files_before = []
        config = RunConfig(data={"batch_size": 10}, epochs=10)
        self._plan = make_plan(config, samples=100, world_size=1)
        self._capture = partial(
            run_state_dict,
            model=self.model,
            optimizer=self.optimizer,
            plan=self._plan,
            config=config.model_dump(mode="json"),
            run_id="0a1b2c3d",
            loss="x()",
        )

    def step(self):
        self.model(torch.ones(1, self.model.in_features)).sum().backward()
        self.optimizer.step(0.1)
        self.state.step += 1

    def open(self, keep=3):
        return AsyncCheckpointer(
            CheckpointFolder(self.folder),
            self._capture(State())[1],
            device=torch.device("cpu"),
            keep=keep,
            before=lambda: self.files_before.append(sorted(self.folder.glob("step-*"))),
            report=lambda header, row: self.told.append((header.step, row)),
        )

    def state_dict(self):
        return self._capture(self.state)

    def saved(self):
        """What a resume would read."""
        entry = CheckpointFolder(self.folder).choose().manifest
        return read_tensors(self.folder / entry.file)


def until_over(checkpoints):
    while not checkpoints._going.written.done():
        time.sleep(0.001)


def save_steps(training, checkpoints, count):
    for _ in range(count):
        training.step()
        checkpoints.save(*training.state_dict())
        until_over(checkpoints)
        checkpoints.poll()
