"""Every process of the tests computes with one thread on DeepSpeed's CPU accelerator."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

torch.set_num_threads(1)
