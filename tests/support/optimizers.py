"""The optimizers of transformers' Trainer over a Llama whose matrices are larger than the thresholds of 8-bit state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hift_ds.evaluation.cost.plain_loop import NamedTensors, PlainHiFT
from tests.support import tiny

CYCLES = 3
RATE = 1e-2  # large enough to move bf16 weights
RATES = {"sgd": 1.0}
SMALL = {"buffer_size": 65536}  # of a slot: every block has more elements than a chunk
LOW_RANK = ("galore", "apollo")
MODES = ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16"))  # ZeRO stage, type of weights
# What is true of each `optim` of the Trainer: the ZeRO stages at which training is exact, or a part of the refusal.
ALL, WHOLE = "0 to 3", "0"
EXACT = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"), ALL),
    **dict.fromkeys(("lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), ALL),
    **dict.fromkeys(("adafactor", "stable_adamw", "ademamix"), WHOLE),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit"), WHOLE),
}
TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")  # exact at stage 0; the package is not in the tests' environment
REFUSED = {
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), "train() and eval()"),
    **dict.fromkeys(
        [f"paged_{kind}_{bits}bit" for kind in ("adamw", "ademamix", "lion") for bits in (32, 8)], "managed"
    ),
    **dict.fromkeys(("galore_adamw", "galore_adafactor"), "GaLoreProjector"),
    "galore_adamw_8bit": "GaLoreProjector" if tiny.DEVICE != "cpu" else "CUDA",
    "apollo_adamw": "constructor made state",
    "grokadamw": "in its parameter groups",
    "lomo": "inside the backward pass",
    "adalomo": "inside the backward pass" if tiny.DEVICE != "cpu" else "CUDA",  # its constructor needs a GPU
}
BY_TRANSFORMERS = {  # raised before HiFT sees an optimizer
    **dict.fromkeys([f"galore_{kind}_layerwise" for kind in ("adamw", "adamw_8bit", "adafactor")], "DDP"),
    "apollo_adamw_layerwise": "DDP",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
}
EMBEDDINGS = "model.embed_tokens.weight"


def model(dtype: str = "fp32") -> LlamaForCausalLM:
    """Matrices of 4,608 to 7,200 elements, no multiples of a quantization block, and vectors of 72."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=72,
            intermediate_size=100,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            use_cache=False,
        )
    )
    with torch.no_grad():
        for p in llama.parameters():
            p.data = (3 * p if p.dim() > 1 else p).to(tiny.DTYPES[dtype])
    return llama.train().to(tiny.DEVICE)


def block_names(llama: LlamaForCausalLM) -> list[list[str]]:
    """The blocks, written down by hand."""
    names = [name for name, _ in llama.named_parameters()]
    layers = [[n for n in names if f".layers.{i}." in n] for i in range(2)]
    return [[EMBEDDINGS], *layers, [n for n in names if n == "model.norm.weight" or n.startswith("lm_head")]]


def made(name: str, llama: LlamaForCausalLM, named: Iterable[tuple[str, Tensor]] | None = None) -> Any:
    """What the Trainer makes of ``optim=name``, over the tensors ``named`` or the model's own, in two groups.

    Raises:
        ValueError, ImportError: a package or a device is missing.
    """
    low_rank, rate = name.startswith(LOW_RANK), RATES.get(name, RATE)
    arguments = TrainingArguments(
        "unused",
        optim=name,
        learning_rate=rate,
        weight_decay=tiny.DECAY,
        use_cpu=tiny.DEVICE == "cpu",
        report_to=[],
        optim_target_modules="all-linear" if low_rank else None,
        optim_args="rank=4" if low_rank else None,
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, llama)
    if "params" in options or "model" in options or "optimizer_dict" in options:
        return kind(**options)
    pairs = list(named or llama.named_parameters())
    if "bitsandbytes" in str(kind) and options.get("optim_bits") == 8:  # as the Trainer does
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        if named is None:
            manager.register_module_override(llama.model.embed_tokens, "weight", {"optim_bits": 32})
        else:
            manager.override_config([t for n, t in pairs if n == EMBEDDINGS], "optim_bits", 32)
    groups = [
        {"params": [p for _, p in pairs if p.dim() > 1], "weight_decay": tiny.DECAY},
        {"params": [p for _, p in pairs if p.dim() <= 1], "weight_decay": 0.0, "lr": rate / 2},
    ]
    return kind([group for group in groups if group["params"]], **options)


def forget_overrides() -> None:
    """Empty bitsandbytes' settings of single parameters, which it keeps for the whole process."""
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()


def engine_of(
    llama: LlamaForCausalLM, optimizer: Any, stage: int, dtype: str, offload: dict[str, Any] | None = None
) -> Any:
    """A HiFT engine without clipping.

    Args:
        optimizer: an optimizer, or the section of a DeepSpeed config.
        offload: more keys of ``hift.offload``.
    """
    import hift_ds

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": tiny.MICRO_BATCH,
        "gradient_accumulation_steps": tiny.ACCUMULATION,
        "gradient_clipping": 0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
        "bf16": {"enabled": dtype == "bf16"},
        "hift": {"offload": {**({} if (offload or {}).get("step") == "block" else SMALL), **(offload or {})}},
    }
    if isinstance(optimizer, dict):
        config["optimizer"], optimizer = optimizer, None
    return hift_ds.initialize(model=llama, optimizer=optimizer, config=config)[0]


def take_steps(engine: Any, steps: range) -> None:
    for step in steps:
        tiny.optimizer_step(engine, step)


def difference(name: str, stage: int, dtype: str) -> float | str:
    """In a rank: the largest difference between the weights of an engine, with the optimizer that the Trainer makes of
    a name, and those of the plain loop; or the refusal."""
    forget_overrides()
    return _difference(stage, dtype, lambda llama: made(name, llama), lambda named, copy: made(name, copy, named))


def config_difference(kind: str, params: dict[str, Any], stage: int, dtype: str) -> float | str:
    """In a rank: :func:`difference` for an optimizer by the DeepSpeed config."""
    options = {"lr": RATES.get(kind.lower(), RATE), "weight_decay": tiny.DECAY, **params}

    def plain(named: NamedTensors, copy: LlamaForCausalLM) -> Any:
        if kind != "Muon":  # DeepSpeed's Adam has decoupled weight decay, unless `adam_w_mode` is false
            return getattr(torch.optim, "AdamW" if kind == "Adam" else kind)([tensor for _, tensor in named], **options)
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        matrices = [t for n, t in named if t.dim() == 2 and "embed" not in n and "lm_head" not in n]
        others = [t for _, t in named if not any(t is matrix for matrix in matrices)]
        groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
        return MuonWithAuxAdam(
            [{**group, **options} for group in groups if group["params"]],
            adam_optimizer=torch.optim.AdamW,
        )

    return _difference(stage, dtype, lambda _: {"type": kind, "params": options}, plain)


def _difference(stage: int, dtype: str, ours: Callable[..., Any], plain: Callable[..., Any]) -> float | str:
    torch.manual_seed(1)
    llama, copy = model(dtype), model(dtype)
    blocks = block_names(copy)
    start = tiny.copies(dict(copy.named_parameters()))
    try:
        optimizer = ours(llama)
    except Exception as error:  # transformers or the optimizer's package refuses
        return str(error)
    try:
        engine = engine_of(llama, optimizer, stage, dtype)
    except ValueError as error:
        assert stage == 3 or tiny.identical(start, tiny.copies(dict(llama.named_parameters()))), "weights changed"
        return str(error)
    try:
        assert [list(block.parameter_names) for block in engine.blocks] == blocks
        truth = PlainHiFT(copy, blocks, lambda named: plain(named, copy))
        steps = CYCLES * len(blocks)
        take_steps(engine, range(steps))
        for step in range(steps):
            truth.step([tiny.micro_batch(step, micro) for micro in range(tiny.ACCUMULATION)])
        end = tiny.copies(dict(copy.named_parameters()))
        same = [n for n in end if torch.equal(start[n], end[n])]
        assert not same, f"the plain loop does not train {same}"
        assert not engine.memory_ledger()["device"]["optimizer_state"], "state stays on the device"
        return tiny.largest_difference(tiny.weights(engine), end)
    finally:
        engine.destroy()
