"""Imports of the server whose forks are the ranks of tests: each takes a rank up to seconds.

pytest and hypothesis are what the test modules import, in which the work of the ranks is found.
"""
# ruff: noqa: F401

import gc

import coverage
import hypothesis.strategies
import numpy
import pytest
import torch
import torch._dynamo  # imported by torch's wrapper and its optimizers when they are first used

import ddp_sgd.engine.fit

gc.collect()
gc.freeze()  # a collection in a rank would copy the memory that is shared with the server
