"""The summary in plain text."""

from hift_ds.launch.runtime.summary import _kept, _mib


def test_small_sizes_keep_their_digits() -> None:
    assert [_mib(int(size * 2**20)) for size in (0, 0.0471, 2.5, 42, 516.4, 4024)] == [
        "0",
        "0.0471",
        "2.5",
        "42",
        "516",
        "4024",
    ]
    kept = _kept({"device": {"parameters": 3 * 2**17, "gradients": 0}, "host": {"optimizer_state": 3 * 2**16}})
    assert kept == ["MiB kept           device 0.375 (parameters 0.375); host 0.188 (optimizer state 0.188)"]
