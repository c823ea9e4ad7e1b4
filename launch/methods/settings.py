"""The `method` section of a run and its checks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hift_ds.launch.errors import expected
from hift_ds.launch.methods.table import METHODS, TRAINED

CHOICES = {"adapter_kind": ("houlsby", "lin"), "badam_order": ("random", "ascending", "descending")}


@dataclass(frozen=True)
class AdapterSettings:
    """Sizes of the modules that adapter methods add to a model.

    Attributes:
        lora_rank, lora_alpha: r and alpha of LoRA, whose update is alpha / r times the product of its two matrices; 8
            and 16 as in MeZO (Malladi et al. 2023).
        lora_dropout: dropout of the input of LoRA's matrices.
        prefix_tokens: number of virtual tokens of "prefix", "prelayer" and "s4"; 5 as in MeZO.
        adapter_size: width of the bottleneck; Houlsby et al. (2019) use 8, 64 and 256.
        adapter_kind: "houlsby" puts one adapter after attention and one after the MLP; "lin" puts one with its own
            layer norm after each layer (Lin et al. 2020).
    """

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    prefix_tokens: int = 5
    adapter_size: int = 64
    adapter_kind: str = "houlsby"


@dataclass(frozen=True)
class MethodSettings(AdapterSettings):
    """The `method` section. The prefix of a key (`lora_`, `mezo_`, ...) names the methods that read it."""

    name: str = "hift"
    mezo_eps: float = 1e-3  # scale of the perturbation (Malladi et al. 2023)
    badam_switch_every: int = 50  # steps on one block (Luo et al. 2024)
    badam_order: str = "random"  # or ascending, descending
    galore_rank: int = 128  # rank of the projection of gradients (Zhao et al. 2024)
    galore_update_every: int = 200  # steps between two projections
    galore_scale: float = 0.25

    def problems(self, save_every: int | None, fp16: bool) -> list[str]:
        """Return every problem of the section, one line each, also together with checkpoints and fp16.

        Args:
            save_every: `training.save_every`.
            fp16: whether the deepspeed section enables fp16.
        """
        if self.name in METHODS and self.name not in TRAINED:
            reason = f"{self.name!r} trains nothing: compare it with `python -m evaluation.compare`"
            return [f"method.name: got {reason}. {expected(self.name, TRAINED)}"]
        if self.name not in TRAINED:
            return [f"method.name: got {self.name!r}. {expected(self.name, TRAINED)}"]
        method, found = TRAINED[self.name], []
        for entry in fields(self):
            value, is_dropout = getattr(self, entry.name), "dropout" in entry.name
            key = f"method.{entry.name}: got {value!r}"
            if entry.name != "name" and value != entry.default and entry.name.partition("_")[0] not in method.options:
                found.append(f"{key}, but method.name is {self.name!r}, which does not use it. Remove it.")
            elif isinstance(value, str):
                allowed = CHOICES.get(entry.name, (value,))
                if value not in allowed:
                    found.append(f"{key}. {expected(value, allowed)}")
            elif is_dropout and not 0 <= value < 1:
                found.append(f"{key}. Expected at least 0 and less than 1.")
            elif not is_dropout and value <= 0:
                found.append(f"{key}. Expected {'at least 1' if isinstance(entry.default, int) else 'more than 0'}.")
        if save_every and not method.resumable:
            found.append(
                f"training.save_every: got {save_every}, but the package of method {self.name!r} cannot save all of "
                "its state, so a run could not continue exactly. Set training.save_every=null."
            )
        if fp16 and not method.uses_deepspeed:
            found.append(f"deepspeed.fp16.enabled: true, but method {self.name!r} has no loss scale. Use bf16 or fp32.")
        return found
