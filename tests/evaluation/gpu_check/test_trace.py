"""The summary of a trace, on one written by hand: times in microseconds, two steps of 100 each."""

from typing import Any

from hift_ds.evaluation.gpu_check.trace import FORWARD, LAST, STEP, summary


def event(category: str, name: str, start: float, duration: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1, "args": args}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    event("user_annotation", STEP, 0, 100),
    event("user_annotation", STEP, 100, 90),
    event("gpu_user_annotation", STEP, 500, 90),  # the same on the device's time line
    event("user_annotation", LAST, 200, 50),
    event("user_annotation", FORWARD, 0, 20),
    event("kernel", "gemm", -10, 20, stream=7),  # the first half is before the first step
    event("kernel", "gemm", 50, 40, stream=7),
    event("kernel", "adam", 70, 40, stream=8),
    event("kernel", "gemm", 190, 40, stream=7),  # ends after the last step
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 60, 60, stream=9, bytes=2**20),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 120, 20, stream=10, bytes=2**21),
    event("cpu_op", "aten::item", 10, 8),
    event("cpu_op", "aten::_local_scalar_dense", 11, 6),
    event("cuda_runtime", "cudaStreamSynchronize", 12, 4),  # in the forward pass
    event("cuda_runtime", "cudaEventSynchronize", 80, 10),
    event("cuda_runtime", "cudaDeviceSynchronize", 210, 10),  # after the last step
    event("cuda_runtime", "cudaLaunchKernel", 80, 1),
    event("cuda_runtime", "cudaMalloc", 150, 1),
]


def test_times_and_counts_are_means_of_the_steps_in_the_window() -> None:
    found = summary(EVENTS)
    assert found["steps"] == 2 and found["wall_ms"] == 0.1
    assert found["kernel_ms"] == 0.04  # 0 to 10, 50 to 110, 190 to 200: 80 of two steps
    assert found["h2d_ms"] == 0.03 and found["d2h_ms"] == 0.01
    assert found["device_ms"] == 0.055  # 0 to 10, 50 to 140, 190 to 200
    assert found["stream_ms"] == {"7": 0.03, "8": 0.02, "9": 0.03, "10": 0.01}
    assert found["kernels"] == 2 and found["copies"] == {"HtoD": 0.5, "DtoH": 0.5}
    assert found["copied_mib"] == {"HtoD": 0.5, "DtoH": 1.0} and found["pageable_copies"] == 0.5
    assert found["allocations"] == 0.5 and found["operations"] == 1


def test_waits_are_counted_with_their_operation_and_apart_in_the_forward_pass() -> None:
    found = summary(EVENTS)
    assert found["waits"] == 1 and found["waits_in_forward"] == 0.5 and found["wait_ms"] == 0.007
    assert found["waits_by"] == {
        "cudaStreamSynchronize in aten::item": 0.5,
        "cudaEventSynchronize in no operation": 0.5,
    }
