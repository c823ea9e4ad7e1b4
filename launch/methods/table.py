"""The training methods by name. A new method is one more entry of `METHODS`; adapters.py has a function per adapter.

An entry says what of the model is trained (`adapters.py`), which engine trains it (`package_engines.py`) and how it
takes a step (`steps.py`). The training loop is the same for all methods.
"""

from __future__ import annotations

from dataclasses import dataclass

RESUMABLE = ("mezo", "lomo")  # engines without DeepSpeed whose whole state can be saved


@dataclass(frozen=True)
class Method:
    """How a method trains.

    Attributes:
        engine: "hift": one block a step; "deepspeed": DeepSpeed's own engine; "mezo", "lomo", "badam", "galore": an
            engine of `package_engines.py`; None: the method trains nothing, it only evaluates.
        adapter: what is trained, a key of `hift_ds.launch.methods.adapters.ADAPTERS`; None for the whole model.
        forward_only: a step takes forward passes and no backward pass.
        options: prefixes of the keys of `MethodSettings` that the method reads.
    """

    engine: str | None
    adapter: str | None = None
    forward_only: bool = False
    options: tuple[str, ...] = ()

    @property
    def block_wise(self) -> bool:
        """Whether a step trains one block of layers."""
        return self.engine == "hift"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether a DeepSpeed engine trains, with ZeRO and loss scaling."""
        return self.engine in ("hift", "deepspeed")

    @property
    def resumable(self) -> bool:
        """Whether a run can be saved and continued exactly."""
        return self.uses_deepspeed or self.engine in RESUMABLE


METHODS = {
    "hift": Method("hift"),
    "full": Method("deepspeed"),
    "lora": Method("deepspeed", "lora", options=("lora",)),
    "prefix": Method("deepspeed", "prefix", options=("prefix",)),
    "bitfit": Method("deepspeed", "bitfit"),
    "adapter": Method("deepspeed", "adapter", options=("adapter",)),
    "prelayer": Method("deepspeed", "prelayer", options=("prefix",)),
    "s4": Method("deepspeed", "s4", options=("adapter", "lora", "prefix")),
    "full-top2": Method("deepspeed", "full-top2"),
    "linear-probing": Method("deepspeed", "linear-probing"),
    "mezo": Method("mezo", forward_only=True, options=("mezo",)),
    "mezo-adam": Method("mezo", forward_only=True, options=("mezo",)),
    "mezo-lora": Method("mezo", "lora", forward_only=True, options=("mezo", "lora")),
    "mezo-prefix": Method("mezo", "prefix", forward_only=True, options=("mezo", "prefix")),
    "lomo": Method("lomo"),
    "badam": Method("badam", options=("badam",)),
    "galore": Method("galore", options=("galore",)),
    "zero-shot": Method(None),
    "icl": Method(None),
}
TRAINED = {name: method for name, method in METHODS.items() if method.engine}
