"""TRL's trainers with HiFT: weights of a replay in plain torch, losses by their formulas, resuming, recomputation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hift_ds
from tests.support import integrations as support
from tests.support import tiny
from tests.support.ranks import run_on_ranks

ACCUMULATION = 2
RATE = 1e-3
CLIP = 0.02
BETA = 0.1
STEPS = 8  # a cycle is 5
SAVED = 3  # every so many steps, in the middle of cycles
COLUMNS = {
    "sft": ("prompt", "completion"),
    "dpo": ("prompt", "chosen", "rejected"),
    "grpo": ("prompt",),
    "reward": ("prompt", "chosen", "rejected"),
}
SCALED = ("sft", "grpo")  # their losses already take the number of micro-batches into account, but not that of ranks


@dataclass(frozen=True)
class Case:
    """One training with a trainer of TRL."""

    kind: str
    stage: int
    ranks: int = 1
    lora: bool = False
    bf16: bool = False
    settings: tuple[tuple[str, Any], ...] = ()  # more arguments of the trainer's config

    def __str__(self) -> str:
        flags = [name for name in ("lora", "bf16") if getattr(self, name)]
        return "-".join([self.kind, f"stage{self.stage}", f"{self.ranks}rank", *flags, *dict(self.settings)])


@dataclass
class Result:
    """What a training left on this rank.

    Attributes:
        end: the weights after the last step; ``truth``: the same of the replay; ``start``: before the first step.
        resumed: the weights after the last step of a run that continued in the middle of a cycle.
        best: the weights after training, which are those of the best checkpoint; ``best_file``: its file.
        loss_error: largest difference between a loss of the trainer and of the replay, with the trainer's function.
        formula_error: the same, with the formula of the loss.
        other_tokens: the number of batches of completions that the replay's model does not generate.
        calls: in each step, the layers that ran with gradients, in order: forward and recomputation.
        logs: the trainer's log.
        frozen: parameters that require no gradient after training.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    truth: dict[str, Tensor]
    resumed: dict[str, Tensor]
    best: dict[str, Tensor]
    best_file: dict[str, Tensor]
    saved: dict[str, Tensor]
    loss_error: float
    formula_error: float
    other_tokens: int
    calls: list[list[int]]
    logs: list[dict[str, Any]]
    frozen: list[str]


def reward(completions: list[str], **_: Any) -> list[float]:
    """Any deterministic reward."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def make(case: Case, folder: Path, rows: Path, output: Path) -> Any:
    """The trainer of a case, with the HiFT line of the documentation."""
    import trl
    from datasets import Dataset

    deepspeed: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case.stage},
    }
    if case.stage == 3:  # vectors persist on every rank, matrices are gathered: both ways are run
        deepspeed["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 1000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    own: dict[str, Any] = {
        "sft": {"max_length": 48},
        "dpo": {"max_length": 64, "beta": BETA},
        "grpo": {"beta": BETA, "num_generations": 2, "max_completion_length": 8},
        "reward": {},
    }[case.kind]
    names = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "reward": "Reward"}
    arguments = getattr(trl, f"{names[case.kind]}Config")(
        output_dir=str(output),
        deepspeed=deepspeed,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        weight_decay=0.1,
        adam_epsilon=1e-6,
        max_grad_norm=CLIP,
        bf16=case.bf16,
        use_cpu=tiny.DEVICE == "cpu",
        logging_steps=1,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=SAVED,
        save_steps=SAVED,
        load_best_model_at_end=True,
        disable_tqdm=True,
        report_to="none",
        **own | dict(case.settings),
    )
    more: dict[str, Any] = {"reward_funcs": reward} if case.kind == "grpo" else {}
    if case.lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    return getattr(trl, f"{names[case.kind]}Trainer")(
        model=str(folder),
        args=arguments,
        train_dataset=Dataset.from_list(data[4:]),
        eval_dataset=Dataset.from_list(data[:4]),
        callbacks=[hift_ds.HiFTCallback(layers_per_block=1)],
        **more,
    )


class Calls:
    """Keeps what a trainer's loss function got and gave in training, and what it generated with which random state.

    Attributes:
        losses: for each micro-batch its inputs, the number of items, the loss and the generation before it.
        layers: for each step, the layers that ran with gradients, in order.
        end: the weights after the last step.
    """

    def __init__(self, trainer: Any):
        from transformers import TrainerCallback

        self.losses: list[dict[str, Any]] = []
        self.layers: list[list[int]] = [[]]
        self.end: dict[str, Tensor] = {}
        self.compute_loss, trainer.compute_loss = trainer.compute_loss, self._compute_loss
        self._generation: Any = None
        if hasattr(trainer, "_generate_single_turn"):
            self._generate, trainer._generate_single_turn = trainer._generate_single_turn, self._note_generation
        calls = self

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                calls.layers.append([])
                if state.global_step == args.max_steps:
                    calls.end = support.all_weights(trainer.model_wrapped.module)

        trainer.add_callback(Steps())
        layers = trainer.model.get_decoder().layers
        for index, layer in enumerate(layers):
            layer.input_layernorm.register_forward_pre_hook(lambda *_, index=index: self._note_layer(index))

    def _note_layer(self, index: int) -> None:
        if torch.is_grad_enabled():
            self.layers[-1].append(index)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], **rest: Any) -> Any:
        given = {key: value.clone() if torch.is_tensor(value) else value for key, value in inputs.items()}
        loss = self.compute_loss(model, inputs, **rest)
        if torch.is_grad_enabled():
            items = rest.get("num_items_in_batch")
            self.losses.append({"inputs": given, "items": items, "loss": loss.item(), "generation": self._generation})
            self._generation = None
        return loss

    def _note_generation(self, prompts: Any, *rest: Any, **more: Any) -> Any:
        state = torch.get_rng_state()
        result = self._generate(prompts, *rest, **more)
        self._generation = (state, copy.deepcopy(prompts), copy.deepcopy(result[0]))
        return result


def plain_model(case: Case, trainer: Any, folder: Path, weights: dict[str, Tensor] | None) -> Any:
    """The model as TRL makes it, without DeepSpeed; with other weights if given."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.trainer.utils import add_fused_lm_head

    outputs = {
        "sft": ("log_probs", "entropy", "is_top1"),
        "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
        "grpo": ("log_probs", "entropy"),
    }
    if case.kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = trainer.processing_class.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        add_fused_lm_head(model, temperature=getattr(trainer, "temperature", 1.0), outputs=outputs[case.kind])
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    if weights is not None:
        model.load_state_dict(weights)
    if case.bf16:
        for parameter in model.parameters():  # the buffers stay in fp32
            parameter.data = parameter.data.bfloat16()
    return model


def log_probabilities(
    model: nn.Module, ids: Tensor, attention: Tensor | None, wanted: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Of each token after the first, given those before it; 0 where it is not wanted. From the model's logits."""
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * wanted[:, 1:]


def formula(case: Case, model: Any, reference: Any, call: dict[str, Any]) -> Tensor:
    """The loss of a micro-batch as the papers define it, from logits of the model and of the reference model."""
    inputs = call["inputs"]
    if case.kind == "reward":
        scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
        chosen, rejected = scores.chunk(2)
        return -functional.logsigmoid(chosen - rejected).mean()
    if case.kind == "sft":
        wanted = inputs["labels"] != -100
        packed = inputs.get("attention_mask"), wanted, inputs.get("position_ids")
        ours = log_probabilities(model, inputs["input_ids"], *packed)
        return -ours.sum() / call["items"] * case.ranks
    if case.kind == "dpo":
        tokens = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        with torch.no_grad():
            theirs = log_probabilities(reference, *tokens).sum(1)
        chosen, rejected = (log_probabilities(model, *tokens).sum(1) - theirs).chunk(2)
        return -functional.logsigmoid(BETA * (chosen - rejected)).mean()
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    tokens = (torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), mask, mask)
    count = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        theirs = log_probabilities(reference, *tokens)[:, -count:]
    ours = log_probabilities(model, *tokens)[:, -count:]
    divergence = torch.exp(theirs - ours) - (theirs - ours) - 1
    ratio = torch.exp(ours - inputs.get("old_per_token_logps", ours.detach()))
    advantages = inputs["advantages"][:, None]
    each = BETA * divergence * ratio - torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (each * inputs["completion_mask"]).sum() / inputs["num_items_in_batch"] * case.ranks


def generates(trainer: Any, model: Any, generation: Any) -> bool:
    """Whether the model generates the same completions from the same random state."""
    state, prompts, completions = generation
    length, padding = max(map(len, prompts)), trainer.processing_class.pad_token_id
    ids = torch.tensor([[padding] * (length - len(one)) + one for one in prompts], device=tiny.DEVICE)
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts], device=tiny.DEVICE)
    torch.set_rng_state(state)
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config)
    ours, end = found[:, length:].tolist(), trainer.processing_class.eos_token_id
    return [one[: one.index(end) + 1] if end in one else one for one in ours] == completions


def replay(case: Case, trainer: Any, folder: Path, calls: Calls, start: dict[str, Tensor]) -> dict[str, Any]:
    """The plain loop with the trainer's loss function, over what all ranks gave to it."""
    windows = [calls.losses[i : i + ACCUMULATION] for i in range(0, len(calls.losses), ACCUMULATION)]
    of_ranks: list[Any] = [None] * case.ranks
    torch.distributed.all_gather_object(of_ranks, windows)
    model, reference = (plain_model(case, trainer, folder, one).to(tiny.DEVICE) for one in (start, None))
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model = reference.eval()
    found: dict[str, Any] = {"loss_error": 0.0, "formula_error": 0.0, "other_tokens": 0}

    def share(module: nn.Module, call: Any, count: int) -> Tensor:
        if call["generation"] is not None:
            found["other_tokens"] += not generates(trainer, module, call["generation"])
        loss = calls.compute_loss(module, dict(call["inputs"]), num_items_in_batch=call["items"])
        found["loss_error"] = max(found["loss_error"], abs(loss.item() - call["loss"]))
        with torch.no_grad():
            by_formula = formula(case, module, reference, call).item()
        found["formula_error"] = max(found["formula_error"], abs(by_formula - loss.item()))
        return loss / case.ranks if case.kind in SCALED else loss / count

    def make_optimizer(named: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        groups = [
            {"params": [tensor for _, tensor in named if tensor.dim() > 1], "weight_decay": 0.1},
            {"params": [tensor for _, tensor in named if tensor.dim() == 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=RATE, eps=1e-6, fused=True)

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts: list[Callable[[str], bool]] = [lambda name: "embed_tokens" in name]
    parts += [lambda name, i=i: f".layers.{i}." in name for i in range(support.LAYERS)]  # type: ignore[misc]
    parts += [lambda name: name.endswith(("model.norm.weight", "lm_head.weight", "score.weight"))]
    blocks = [block for part in parts if (block := [name for name in names if part(name)])]
    rates = support.step_rates(
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS), RATE, STEPS
    )
    found["truth"] = support.replay(
        model,
        support.steps_of_ranks(of_ranks),
        support.held(rates, len(blocks)),
        make_optimizer,
        blocks=blocks,
        clip=CLIP,
        stage=case.stage,
        ranks=case.ranks,
        share=share,
    )
    return found


def train(case: Case, folder: Path, rows: Path, output: Path) -> Result:
    """In a rank: evaluate, train with evaluations and checkpoints, replay, and resume in the middle of a cycle."""
    from safetensors.torch import load_file
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with support.fresh_process():
        trainer = make(case, folder, rows, output)
        start = support.all_weights(trainer.model)
        calls = Calls(trainer)
        trainer.train()
        engine = trainer.model_wrapped
        frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
        best = support.all_weights(engine.module)
        trainer.save_model(str(output / "model"))
        torch.distributed.barrier()
        files = [Path(trainer.state.best_model_checkpoint), output / "model"]
        name = "adapter_model.safetensors" if case.lora else "model.safetensors"
        best_file, saved = (load_file(file / name) for file in files)
        unset_hf_deepspeed_config()
        replayed = replay(case, trainer, folder, calls, start)
        logs = trainer.state.log_history
        engine.destroy()
    with support.fresh_process():
        trainer = make(case, folder, rows, output)
        again = Calls(trainer)
        trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}"))
        trainer.model_wrapped.destroy()
    return Result(
        start=start,
        end=calls.end,
        resumed=again.end,
        best=best,
        best_file=best_file,
        saved=saved,
        calls=calls.layers[:STEPS],
        logs=logs,
        frozen=frozen,
        **replayed,
    )


def expected_layers(block: int) -> list[int]:
    """The layers that run with gradients in a step: forward, and those from the active block up again in backward."""
    forward = list(range(support.LAYERS))
    recomputed = [layer for layer in reversed(forward) if layer + 1 >= block]
    return (forward + recomputed) * ACCUMULATION


def largest_in_file(weights: dict[str, Tensor], file: dict[str, Tensor]) -> float:
    """The largest difference between weights and those in a file, which for an adapter lacks a part of the names."""
    by_name = {name.replace(".default.", "."): weight for name, weight in weights.items()}
    return tiny.largest_difference({name: by_name[name] for name in file}, file)


def check(case: Case, place: Path) -> Result:
    """Hold a training against the replay and against what the documentation promises; return it."""
    folder = support.model_folder(place / "model")
    rows = support.rows_file(place / "rows.jsonl", *COLUMNS[case.kind], count=36)
    results = run_on_ranks(case.ranks, train, case, folder, rows, place / "output")
    ours = results[0]
    for other in results[1:]:
        assert tiny.identical(other.end, ours.end), "the ranks hold different weights"
    trained = [name for name in ours.end if "lora" in name or not case.lora]
    if not case.bf16:  # where the steps are too small for some weights
        assert not any(torch.equal(ours.end[name], ours.start[name]) for name in trained)
    error = tiny.largest_difference(ours.end, ours.truth)
    assert error <= support.bound(case.stage, case.ranks), f"{case}: weights differ by {error}"
    assert max(result.loss_error for result in results) <= (1e-5 if support.bound(case.stage, case.ranks) else 0)
    assert max(result.formula_error for result in results) <= (5e-2 if case.bf16 else 5e-6)
    assert sum(result.other_tokens for result in results) == 0
    assert tiny.identical(ours.resumed, ours.end), "the resumed run has other weights"
    assert largest_in_file(ours.best, ours.best_file) == largest_in_file(ours.best, ours.saved) == 0
    assert [name for name in ours.frozen if not case.lora or "lora" in name] == []
    cycle, first = (support.LAYERS, 1) if case.lora else (support.LAYERS + 2, 0)
    assert ours.calls == [expected_layers(first + step % cycle) for step in range(STEPS)]
    logged = [log for log in ours.logs if "hift/block" in log and "loss" in log]
    assert [log["hift/block"] for log in logged] == [step % cycle for step in range(STEPS)]
    assert [log["hift/cycle"] for log in logged] == [step // cycle for step in range(STEPS)]
    assert [log["step"] for log in ours.logs if "eval_loss" in log] == [0, SAVED, 2 * SAVED, STEPS]
    return ours


CASES = [Case("sft", 3), Case("dpo", 0), Case("dpo", 1, lora=True), Case("grpo", 2, ranks=2), Case("reward", 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trains_as_the_plain_loop(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
