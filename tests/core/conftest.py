"""One thread: several tests fork, which OpenMP's threads do not survive, and tensors this small gain nothing from more."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
