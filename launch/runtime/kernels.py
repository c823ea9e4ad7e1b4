"""Compile DeepSpeed's kernels ahead of their first use: `python -m hift_ds.launch.runtime.kernels [BUILDER ...]`.

torch keeps what is compiled in `TORCH_EXTENSIONS_DIR`, so later runs load it at once. A kernel that cannot be compiled
here is skipped with the reason: only runs that need it fail.
"""

import sys
import time

from deepspeed.accelerator import get_accelerator

from hift_ds.launch.runtime import extensions

KERNELS = {  # DeepSpeed's builder -> what needs it
    "FusedAdamBuilder": "Adam and AdamW on the device",
    "ShareMemCommBuilder": "ranks of one machine without a GPU",
    "CPUAdamBuilder": "offload_optimizer: cpu with Adam and AdamW",
    "CPUAdagradBuilder": "offload_optimizer: cpu with Adagrad",
    "CPULionBuilder": "offload_optimizer: cpu with Lion",
    "AsyncIOBuilder": "hift.offload.device: nvme (needs libaio; Debian, Ubuntu: apt install libaio-dev)",
}


def main() -> None:
    """Compile the named kernels, by default every one that this machine can compile, and print one line for each."""
    extensions.prepare(rank=1)  # deletes locks of killed builds; prints as rank 0 alone does
    for name in sys.argv[1:] or KERNELS:
        need = KERNELS[name]
        builder = get_accelerator().create_op_builder(name)
        started = time.monotonic()
        try:
            if builder is None or not builder.is_compatible():
                raise RuntimeError("not available on this machine")
            builder.load(verbose=False)
        except Exception as error:  # of a compiler, a linker or DeepSpeed's checks
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"kernels: skipped {name}: {reason}; for {need}", file=sys.stderr)
        else:
            print(f"kernels: {name} is ready ({time.monotonic() - started:.0f} s); for {need}", flush=True)


if __name__ == "__main__":
    main()
