"""What the ranks of the tests import: once, in the process that forks them. The garbage collector has no work in it."""

import functools
import gc

gc.disable()

import cpuinfo  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  with the compiler; DeepSpeed does so at ZeRO 1 to 3

import hift_ds.evaluation.compare.command  # noqa: E402
import hift_ds.launch.train  # noqa: E402, F401
import tests.support.tiny  # noqa: E402, F401

# DeepSpeed asks twice for each kernel that a process loads. Each answer takes a process and half a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()

gc.enable()
gc.freeze()
