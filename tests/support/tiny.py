"""The tiny Llama that the tests train: weights, batches, DeepSpeed config, blocks and plain reference, all seeded."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.blocks.block import Block
from hift_ds.blocks.partition import partition_model
from hift_ds.evaluation.cost.plain_loop import NamedTensors, PlainHiFT

DEVICE = os.environ.get("DS_ACCELERATOR", "cpu")  # of all models and batches
LAYERS = 4  # hidden layers; with the embeddings and the head n = 6
ACCUMULATION = 2
MICRO_BATCH = 2
LENGTH = 12
LEARNING_RATE = 1e-3
DECAY = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One training run: what the engine is given, and what the reference has to be told."""

    stage: int = 0
    ranks: int = 1
    dtype: str = "fp32"
    offload: bool = False  # DeepSpeed's: the step runs on the host
    place: str = "cpu"  # hift.offload.device
    step: str = "auto"  # hift.offload.step
    waiting: str = "device"  # hift.offload.weights, or DeepSpeed's offload_param at stage 3
    moments: str = "fp32"  # hift.offload.moments
    strategy: str = "bottom2up"
    layers_per_block: int = 1
    max_block_numel: int | None = None
    balance: bool = False
    steps_per_block: int = 1
    optimizer: str = "AdamW"  # a key of OPTIMIZERS
    client_optimizer: bool = False  # passed as a torch optimizer instead of by the config
    scheduler: str | None = None  # a key of SCHEDULERS
    decay_groups: bool = False  # no weight decay on vectors, through `model_parameters`
    tied: bool = False
    checkpointing: bool = False  # of activations
    clip: float = 0.02
    cycles: int = 2
    in_files: str | None = None  # `hift.offload.nvme`, with the files in a temporary folder

    @property
    def k(self) -> int:
        return len(self.blocks)

    @property
    def blocks(self) -> list[list[str]]:
        """Parameter names of each block: as the paper cuts them, written down by hand, or finer as the model is cut."""
        return [list(block.parameter_names) for block in self._finer] or block_names(self.layers_per_block, self.tied)

    @property
    def rows(self) -> list[Mapping[str, tuple[int, int]]] | None:
        return [block.slices for block in self._finer] or None

    @functools.cached_property
    def _finer(self) -> list[Block]:
        if self.max_block_numel is None and not self.balance:
            return []
        llama = model(tied=self.tied)
        return partition_model(llama, self.layers_per_block, (), self.max_block_numel, self.balance)

    @property
    def steps(self) -> int:
        return self.cycles * self.k * self.steps_per_block

    def __str__(self) -> str:
        """Only what differs from the default: names the test."""
        shown = [f"stage{self.stage}", f"{self.ranks}rank", self.dtype]
        for name, default in Case.__dataclass_fields__.items():
            value = getattr(self, name)
            if name not in ("stage", "ranks", "dtype") and value != default.default:
                shown.append(name if value is True else f"{name}={value}")
        return "-".join(shown)


class Lion(torch.optim.Optimizer):
    """Lion as in algorithm 2 of Chen et al. 2023, arXiv:2302.06675. Where a weight has no gradient and no momentum, the
    sign is 0; in DeepSpeed's kernel for the CPU it is 1 (`zero_is_positive`), and such weights drift by the rate."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, zero_is_positive: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.sign = (lambda x: torch.copysign(torch.ones_like(x), x)) if zero_is_positive else torch.sign

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = self.sign(torch.lerp(p.grad, momentum, fast))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - slow)


# name: (type in the DeepSpeed config, its parameters, the same as a torch optimizer). eps is above the usual 1e-8,
# with which Adam magnifies the rounding of gradients that nearly cancel into whole steps, and proofs into luck.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "AdamW": ("AdamW", {"betas": [0.9, 0.95], "eps": 1e-6}, torch.optim.AdamW),
    "Adam": ("Adam", {"betas": [0.9, 0.95], "eps": 1e-6, "adam_w_mode": False}, torch.optim.Adam),
    "SGD": ("SGD", {"lr": 0.5}, torch.optim.SGD),
    "momentum": ("SGD", {"lr": 0.5, "momentum": 0.9}, torch.optim.SGD),
    "Adagrad": ("Adagrad", {"eps": 1e-6}, torch.optim.Adagrad),
    "Lion": ("Lion", {"betas": [0.9, 0.99]}, Lion),
    "ties": ("Lion", {"lr": 2.0**-14, "weight_decay": 0.0}, Lion),  # most masters end half way between two bf16 numbers
    "RMSprop": ("RMSprop", {"alpha": 0.9, "eps": 1e-6}, torch.optim.RMSprop),
    "NAdam": ("NAdam", {"eps": 1e-6}, torch.optim.NAdam),
    "Adafactor": ("Adafactor", {"lr": 1e-2}, torch.optim.Adafactor),
}


def _norm_of_stage_0(grads: list[Tensor]) -> Tensor:
    squares = [norm.square() for norm in torch._foreach_norm(grads)]
    return sum(squares[1:], squares[0]).double().sqrt()


def _norm_of_stages_1_and_2(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square().sum().float().sqrt()


def _norm_of_stage_3(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square().sum().sqrt()


# The stages round the gradient's norm differently. In 16 bit that last digit decides whole units of some weights.
NORMS = [_norm_of_stage_0, _norm_of_stages_1_and_2, _norm_of_stages_1_and_2, _norm_of_stage_3]

SCHEDULERS: dict[str, dict[str, Any]] = {  # by the DeepSpeed config, unless the name is "torch"
    "torch": {},
    "WarmupLR": {"warmup_min_lr": 1e-4, "warmup_max_lr": LEARNING_RATE, "warmup_num_steps": 2},
    "WarmupDecayLR": {
        "warmup_min_lr": 1e-4,
        "warmup_max_lr": LEARNING_RATE,
        "warmup_num_steps": 2,
        "total_num_steps": 4,
    },
    "WarmupCosineLR": {"total_num_steps": 4, "warmup_num_steps": 2, "warmup_min_ratio": 0.1},
    "OneCycle": {
        "cycle_min_lr": 1e-4,
        "cycle_max_lr": LEARNING_RATE,
        "cycle_first_step_size": 2,
        "cycle_momentum": False,
    },
}


ONE_RATE = ("WarmupLR", "WarmupDecayLR", "OneCycle")  # they set one rate for all parameter groups


def halved_each_tick(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda tick: 0.5**tick)


def model(dtype: str = "fp32", tied: bool = False, layers: int = LAYERS) -> LlamaForCausalLM:
    """A Llama whose weights always are the same; the buffers stay in fp32, as DeepSpeed leaves them."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )
    with torch.no_grad():
        for p in llama.parameters():
            p.data = (3 * p if p.dim() > 1 else p).to(DTYPES[dtype])  # 3: gradients far from zero in every layer
    return llama.train().to(DEVICE)


def block_names(layers_per_block: int = 1, tied: bool = False, layers: int = LAYERS) -> list[list[str]]:
    """The blocks of `model` as the paper cuts them, written down by hand."""
    names = [name for name, _ in model(tied=tied, layers=layers).named_parameters()]
    by_layer = [[n for n in names if "embed_tokens" in n]]
    by_layer += [[n for n in names if f".layers.{i}." in n] for i in range(layers)]
    by_layer += [[n for n in names if n == "model.norm.weight" or n.startswith("lm_head")]]
    return [sum(by_layer[i : i + layers_per_block], []) for i in range(0, len(by_layer), layers_per_block)]


def micro_batch(step: int, micro: int, rank: int = 0) -> dict[str, Tensor]:
    """Token ids and labels, each MICRO_BATCH x LENGTH, different for every step, micro step and rank."""
    generator = torch.Generator().manual_seed(step * 1000 + micro * 100 + rank)
    ids = torch.randint(64, (MICRO_BATCH, LENGTH), generator=generator).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def decay_groups(named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Parameter groups as most recipes have them: no weight decay on norms and biases, and a lower rate there too."""
    named = list(named)
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0, "lr": LEARNING_RATE / 2},
    ]


def torch_optimizer(case: Case, params: Any) -> torch.optim.Optimizer:
    """The optimizer of a case as torch has it, or as its paper does."""
    _, options, kind = OPTIMIZERS[case.optimizer]
    options = {key: value for key, value in options.items() if key != "adam_w_mode"}
    if kind is Lion and case.offload:
        options["zero_is_positive"] = True
    return kind(params, **{"lr": LEARNING_RATE, "weight_decay": DECAY, **options})


def ds_config(case: Case, stock: bool = False) -> dict[str, Any]:
    """The DeepSpeed config of a case, with the `hift` section unless stock."""
    kind, options, _ = OPTIMIZERS[case.optimizer]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": case.clip,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
    }
    if case.stage == 3:  # vectors persist on every rank, matrices are gathered: both ways are run
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    if case.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if case.waiting == "cpu" and case.stage == 3:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if case.dtype != "fp32":
        config[case.dtype] = {"enabled": True}
    if stock and kind in ("Adam", "AdamW") and not case.offload:
        options = options | {"torch_adam": True}  # which the engine takes by itself on a CPU
    if not case.client_optimizer:
        config["optimizer"] = {"type": kind, "params": {"lr": LEARNING_RATE, "weight_decay": DECAY, **options}}
    if case.scheduler not in (None, "torch"):
        config["scheduler"] = {"type": case.scheduler, "params": SCHEDULERS[case.scheduler]}
    if not stock:
        config["hift"] = {
            "enabled": True,
            "layers_per_block": case.layers_per_block,
            "strategy": case.strategy,
            "seed": 3,
            "steps_per_block": case.steps_per_block,
            "max_block_numel": case.max_block_numel,
            "balance": case.balance,
        }
        if not case.offload:  # the smallest slices: several to a block
            config["hift"]["offload"] = {"device": case.place, "step": case.step}
            if case.place != "none" and case.step != "block":
                config["hift"]["offload"]["buffer_size"] = 65536
            weights = case.waiting if case.stage < 3 else "device"
            config["hift"]["offload"] |= {"weights": weights, "moments": case.moments}
        if case.in_files:  # they have no names
            files = {"device": "nvme", "nvme_path": tempfile.gettempdir(), "nvme": case.in_files}
            config["hift"]["offload"] |= files
    return config


def initialize(case: Case, stock: bool = False, llama: LlamaForCausalLM | None = None) -> Any:
    """The engine of a case, in this process, as a user would make it; around `model` unless another one is given."""
    import deepspeed

    import hift_ds

    llama = llama or model(case.dtype, case.tied)
    if case.checkpointing:
        hift_ds.checkpoint_activations(llama)
    arguments: dict[str, Any] = {"model": llama, "config": ds_config(case, stock)}
    params = decay_groups(llama.named_parameters()) if case.decay_groups else list(llama.parameters())
    if case.client_optimizer:
        arguments["optimizer"] = torch_optimizer(case, params)
    elif case.decay_groups:
        arguments["model_parameters"] = params
    if case.scheduler == "torch":
        arguments["lr_scheduler"] = halved_each_tick
    return (deepspeed if stock else hift_ds).initialize(**arguments)[0]


def optimizer_step(engine: Any, step: int) -> list[float]:
    """One accumulation window of the engine on this rank's batches; returns the micro losses."""
    losses = []
    for micro in range(ACCUMULATION):
        loss = engine(**micro_batch(step, micro, torch.distributed.get_rank())).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    """The whole model's weights on every rank, copied."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=engine.zero_optimization_stage() == 3):
        if getattr(engine, "_host_weights", None) is not None:  # the parameters have what is in the slots
            state = engine.module.state_dict()
            return copies({name: state[name] for name in named})
        return copies(named)


def copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors wherever they are, in host memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}


def masters(engine: Any) -> dict[str, Tensor]:
    """The whole model's fp32 masters on every rank, flat; none at stage 0, where DeepSpeed does not tell them."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        return {}
    return copies({n: safe_get_full_fp32_param(p).reshape(-1) for n, p in engine.module.named_parameters()})


def learning_rate(case: Case) -> float:
    """The rate that the case's optimizer is made with."""
    return OPTIMIZERS[case.optimizer][1].get("lr", LEARNING_RATE)


def scheduled_rates(case: Case) -> list[float] | None:
    """Learning rate of each cycle, by the schedule itself ticking on an optimizer of its own; None without one."""
    if case.scheduler is None:
        return None
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate(case))
    if case.scheduler == "torch":
        scheduler: Any = halved_each_tick(optimizer)
    else:
        from deepspeed.runtime import lr_schedules

        scheduler = getattr(lr_schedules, case.scheduler)(optimizer, **SCHEDULERS[case.scheduler])
    rates = []
    for _ in range(case.cycles + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@dataclass
class Outcome:
    """What a run left: the updated weights and what each step did."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    active: list[int]  # the block of each step
    rates: list[float]  # the learning rate of each step
    norms: list[float]  # gradient norms before clipping
    masters: dict[str, Tensor] = field(default_factory=dict)  # fp32 copies of 16-bit weights


@functools.cache
def reference(case: Case, order: tuple[int, ...]) -> Outcome:
    """The plain loop on the batches of all ranks of the case. The fields that it does not know must be default."""
    llama = model(case.dtype, case.tied)
    start = copies(dict(llama.named_parameters()))
    rates = scheduled_rates(case)
    loop = PlainHiFT(
        llama,
        case.blocks,
        lambda named: torch_optimizer(case, _groups(case, named)),
        make_scheduler=(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: rates[t] / learning_rate(case)))
        if rates
        else None,
        rows=case.rows,
        order=order,
        steps_per_block=case.steps_per_block,
        clip=case.clip,
        loss_scale=2.0**16 if case.dtype == "fp16" else 1.0,  # DeepSpeed's first
        norm=NORMS[case.stage],
    )
    active, lrs, norms = [], [], []
    for step in range(case.steps):
        active.append(loop.active_block)
        lrs.append(loop.lr)
        loop.step([micro_batch(step, m, r) for m in range(ACCUMULATION) for r in range(case.ranks)])
        norms.append(loop.grad_norm)
    end = copies(dict(llama.named_parameters()))
    masters: dict[str, Tensor] = {}
    for names, tensors in zip(case.blocks, loop.masters, strict=True):
        for name, master in copies(dict(zip(names, tensors, strict=True))).items():
            masters[name] = torch.cat([masters[name], master] if name in masters else [master])
    return Outcome(start, end, active, lrs, norms, masters)


def _groups(case: Case, named: NamedTensors) -> Any:
    if not case.decay_groups:
        return [p for _, p in named]
    return [g for g in decay_groups(named) if g["params"]]


def update_error(ours: dict[str, Tensor], truth: Outcome) -> float:
    """Relative L2 error of the whole update, ||(ours - start) - (truth - start)|| / ||truth - start||."""
    wrong = sum((ours[n].double() - truth.end[n].double()).square().sum() for n in truth.end)
    size = sum((truth.end[n].double() - truth.start[n].double()).square().sum() for n in truth.end)
    return (wrong / size).sqrt().item()


def largest_difference(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert set(ours) == set(truth)
    return max(((ours[n].double() - truth[n].double()).abs().max().item() for n in ours), default=0.0)


def tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor inside nested dicts and lists, copied, by where it stands."""
    if isinstance(state, Tensor):
        return copies({path: state})
    if isinstance(state, dict):
        entries: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, (list, tuple)):
        entries = enumerate(state)
    else:
        return {}
    return {k: v for key, value in entries for k, v in tensors(value, f"{path}/{key}").items()}


def block_entries(engine: Any) -> list[list[dict[str, Any]]]:
    """What a checkpoint holds of each block's optimizer on this rank: masters, moments, counts."""
    found = []
    for block in engine.block_optimizers.optimizers:
        with block.decoded(changes=False):
            masters = block.block_state.saved([[]] * len(block.masters()), ("step",), with_masters=True)
            found.append([master.entry() for master in masters])
    return found


def block_states(engine: Any) -> list[dict[str, Tensor]]:
    """All that each block's optimizer keeps on this rank (masters, moments, step counts), copied."""
    return [tensors(entries) for entries in block_entries(engine)]


def identical(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> bool:
    return ours.keys() == truth.keys() and all(torch.equal(ours[n], truth[n]) for n in ours)
