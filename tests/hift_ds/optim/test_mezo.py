"""MeZO: the formula, with noise drawn here from its seeds; where bits return; memory; ranks; resume; refusals."""

import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hift_ds.config import noise_chunk
from hift_ds.optim import mezo
from hift_ds.optim.mezo import MeZO
from hift_ds.planner.simulation import LiveMemory
from tests.support import tiny

EPS = 1e-3
HALF = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALF)


def noise(seed: int, step: int, index: int, like: Tensor, piece: int = noise_chunk("cpu")) -> Tensor:
    """The direction for a whole parameter, as its recipe says, made at once."""
    drawn = []
    for number in range(-(-like.numel() // piece)):
        key = hashlib.blake2b(repr((seed, step, index, number)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        size = min(piece, like.numel() - number * piece)
        drawn.append(torch.randn(size, generator=generator, dtype=torch.promote_types(like.dtype, torch.float32)))
    return torch.cat(drawn).view(like.shape)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float32, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 5, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype),
    )


def squared_error(model: Callable[..., Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().sum()


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def values(*losses: float) -> Callable[[], Tensor]:
    """A closure that returns one after the other, and the last for ever."""
    left = list(losses)
    return lambda: torch.tensor(left.pop(0) if len(left) > 1 else left[0])


def weights(dtype: torch.dtype, std: float = 0.02, size: int = 20_000) -> nn.Parameter:
    return nn.Parameter((torch.randn(size, generator=torch.Generator().manual_seed(1)) * std).to(dtype))


def on_grid(dtype: torch.dtype, std: float = 0.02) -> tuple[nn.Parameter, MeZO]:
    """Weights after the first step, which has made them multiples of their units."""
    parameter = weights(dtype, std)
    optimizer = MeZO([parameter], lr=0.0, eps=EPS)
    optimizer.step(values(1.0))
    return parameter, optimizer


# --- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_update_is_the_formula(adam: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, where rounding hides nothing, over four steps, with parameters of several pieces and two groups."""
    monkeypatch.setattr(mezo, "noise_chunk", lambda device: 16)
    model, reference = network(torch.float64), network(torch.float64)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 2e-3}]
    optimizer = MeZO(groups, lr=1e-2, eps=EPS, adam=adam, betas=(0.8, 0.9), adam_eps=1e-6, seed=7)
    settings = [(p, 1e-2, 0.1) for p in reference.parameters() if p.dim() > 1]
    settings += [(p, 2e-3, 0.0) for p in reference.parameters() if p.dim() == 1]
    theta = [p.detach().clone() for p, _, _ in settings]
    m, v = [torch.zeros_like(t) for t in theta], [torch.zeros_like(t) for t in theta]

    def loss_at(shift: float, z: list[Tensor]) -> float:
        with torch.no_grad():
            for (p, _, _), t, direction in zip(settings, theta, z, strict=True):
                p.copy_(t + shift * direction)
            return squared_error(reference, data).item()

    for step in range(4):
        data = batch(step, torch.float64)
        before = copies(model)
        loss = optimizer.step(lambda: squared_error(model, data))  # noqa: B023
        z = [noise(7, step, index, t, piece=16) for index, t in enumerate(theta)]
        above, below = loss_at(EPS, z), loss_at(-EPS, z)
        g = (above - below) / (2 * EPS)
        assert loss == pytest.approx((above + below) / 2, rel=1e-9)
        assert optimizer.projected_gradient == pytest.approx(g, rel=1e-7)
        for i, (_, lr, decay) in enumerate(settings):
            direction = g * z[i]
            if adam:
                m[i] = 0.8 * m[i] + 0.2 * direction
                v[i] = 0.9 * v[i] + 0.1 * direction**2
                direction = m[i] / (1 - 0.8 ** (step + 1)) / ((v[i] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6)
            start, theta[i] = theta[i], theta[i] - lr * (direction + decay * theta[i])
            ours = [*matrices, *vectors][i].detach()
            update = theta[i] - start
            assert (ours - theta[i]).norm() < 1e-6 * update.norm(), step
        assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_update_of_fp32_weights_is_the_formula() -> None:
    """With the g that was measured: what rounding leaves of it is below a millionth of a large update."""
    parameter = weights(torch.float32)
    start = parameter.detach().double()
    optimizer = MeZO([parameter], lr=1e-2, eps=EPS, weight_decay=0.1)
    optimizer.step(values(1.002, 1.0))
    assert optimizer.projected_gradient == pytest.approx(1.0, rel=1e-3)
    truth = -1e-2 * (optimizer.projected_gradient * noise(0, 0, 0, start.float()).double() + 0.1 * start)
    assert (parameter.detach().double() - start - truth).norm() < 1e-6 * truth.norm()


def test_weights_are_where_the_losses_are_taken() -> None:
    """Within half a unit of theta +- eps z, and just as far from theta on both sides."""
    for dtype in TYPES:
        parameter, optimizer = on_grid(dtype)
        theta, seen = parameter.detach().clone(), []
        optimizer.step(lambda: seen.append(parameter.detach().clone()) or torch.tensor(1.0))  # noqa: B023
        above, below = (w.double() - theta.double() for w in seen)
        assert torch.equal(above, -below)
        half = torch.finfo(dtype).eps * (theta.double().abs() + 2**-7) * (0.5 + 1e-2)
        assert ((above - (EPS * noise(0, 1, 0, theta)).double()).abs() <= half).all()


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_return(dtype: torch.dtype) -> None:
    """From the first step on, without exception; and that one moves a weight by at most a unit."""
    for std in (1e-4, 0.02, 0.1):
        parameter, optimizer = on_grid(dtype, std)
        start, first = weights(dtype, std).detach().double(), parameter.detach().clone()
        assert ((first.double() - start).abs() <= torch.finfo(dtype).eps * (start.abs() + 2**-6)).all()
        for _ in range(20):
            optimizer.step(values(1.0))
            assert torch.equal(parameter, first)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_return_after_updates(dtype: torch.dtype) -> None:
    """What an update leaves survives a step that is skipped."""
    parameter = weights(dtype)
    optimizer = MeZO([parameter], lr=1e-3, eps=EPS)
    for _ in range(20):
        optimizer.step(values(1.003, 1.0))
        before = parameter.detach().clone()
        optimizer.step(values(math.nan))
        assert torch.equal(parameter, before)
    assert optimizer.steps == optimizer.skipped == 20


def test_bits_of_all_numbers_return() -> None:
    """Of every bf16 number up to 128 and its negative; the one that may move for a rare draw is 2 less two units."""
    numbers = torch.arange(torch.tensor(128.0, dtype=torch.bfloat16).view(torch.int16).item(), dtype=torch.int16)
    parameter = nn.Parameter(torch.cat([numbers.view(torch.bfloat16), -numbers.view(torch.bfloat16)]))
    optimizer = MeZO([parameter], lr=0.0, eps=EPS)
    optimizer.step(values(1.0))
    before = parameter.detach().clone()
    for _ in range(30):
        optimizer.step(values(1.0))
    assert set(before[parameter.detach() != before].abs().tolist()) <= {2 - 2 * 2**-7}


@pytest.mark.parametrize(("dtype", "rms"), [(torch.bfloat16, 4.2e-5), (torch.float32, 6.3e-10)], ids=str)
def test_drift_over_a_thousand_steps(dtype: torch.dtype, rms: float) -> None:
    """That of the first step alone: a sixtieth of what plain arithmetic drifts by, which grows with every step."""
    parameter = weights(dtype, size=4000)
    start, plain = parameter.detach().clone(), parameter.detach().clone()
    optimizer = MeZO([parameter], lr=0.0, eps=EPS)
    for step in range(1000):
        optimizer.step(values(1.0))
        z = noise(0, step, 0, start)
        for shift in (1, -2, 1):
            plain.copy_(plain.float() + shift * EPS * z)

    def drift(ours: Tensor) -> float:
        return (ours.double() - start.double()).square().mean().sqrt().item()

    assert drift(parameter.detach()) == pytest.approx(rms, rel=0.05)
    assert drift(plain) > 50 * drift(parameter.detach())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_updates_are_right_on_average(dtype: torch.dtype) -> None:
    """Weight decay of a hundredth of a unit: nearly every weight stays, and the sum falls as it should."""
    parameter = nn.Parameter(torch.full((200_000,), 0.1, dtype=dtype))
    start = parameter.detach().double()
    unit = torch.finfo(dtype).eps / 16
    optimizer = MeZO([parameter], lr=0.01 * unit / 0.1, eps=EPS, weight_decay=1.0)
    for _ in range(3):
        optimizer.step(values(1.0))
    moved = parameter.detach().double() - start
    assert (moved == 0).double().mean() > 0.95
    assert moved.mean().item() == pytest.approx(-0.03 * unit, rel=0.1)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_memory_above_the_weights_is_pieces(dtype: torch.dtype, adam: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a parameter of forty pieces; during the closure there is nothing."""
    monkeypatch.setattr(mezo, "noise_chunk", lambda device: 1000)
    parameter = nn.Parameter(torch.randn(40, 1000).to(dtype))
    optimizer = MeZO([parameter], lr=1e-3, adam=adam)
    memory, during = LiveMemory(), []
    memory.ignore([parameter])

    def closure() -> tuple[float, float]:
        during.append(sum(memory.now.values()))
        return 1.0 + len(during), 1.0

    with memory:
        for _ in range(2):
            optimizer.step(closure)
    moments = 2 * 4 * parameter.numel() if adam else 0
    assert during == [0, 0, moments, moments]
    peak = max(sum(peak.values()) for peak in memory.peaks.values())
    pieces = 4 if dtype == torch.bfloat16 else 3
    assert peak - moments == pieces * 4000


# --- training -------------------------------------------------------------------------------------------------------


def test_convex_problem_is_solved() -> None:
    target = torch.randn(10, generator=torch.Generator().manual_seed(3))
    for adam, lr in ((False, 0.03), (True, 0.03)):
        parameter = nn.Parameter(torch.zeros(10))
        optimizer = MeZO([parameter], lr=lr, adam=adam)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 600)
        for _ in range(600):
            optimizer.step(lambda: (parameter - target).square().sum())  # noqa: B023
            scheduler.step()
        assert (parameter - target).norm() < 0.02 * target.norm(), adam
        before = parameter.detach().clone()
        assert optimizer.param_groups[0]["lr"] == 0
        optimizer.step(lambda: (parameter - target).square().sum())  # noqa: B023
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tiny_llama_learns_a_batch(dtype: str) -> None:
    llama = tiny.model(dtype, layers=2)
    data = tiny.micro_batch(0, 0)
    buffers = {name: b.clone() for name, b in llama.named_buffers()}
    optimizer = MeZO(llama, lr=1e-3, eps=EPS)
    losses = [optimizer.step(lambda: llama(**data).loss) for _ in range(150)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(torch.equal(b, buffers[name]) for name, b in llama.named_buffers())
    assert all(p.grad is None for p in llama.parameters())


def test_lora_moves_adapters_only() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model(layers=2), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before, data = copies(model), tiny.micro_batch(0, 0)
    optimizer = MeZO(model, lr=1e-3)
    for _ in range(3):
        optimizer.step(lambda: model(**data).loss)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 8


def test_tied_weights_are_moved_once() -> None:
    llama = tiny.model(tied=True, layers=1)
    other = nn.Parameter(llama.model.embed_tokens.weight.data)  # the same memory under a name of its own
    entries = [*llama.named_parameters(remove_duplicate=False), ("other", other)]
    optimizer = MeZO(entries, lr=0.0, eps=EPS)
    optimizer.step(values(1.0))
    theta, seen = other.detach().clone(), []
    optimizer.step(lambda: seen.append(other.detach().clone()) or torch.tensor(1.0))
    assert torch.allclose(seen[0] - theta, EPS * noise(0, 1, 0, theta), atol=1e-7)


def test_every_step_has_a_direction_of_its_own() -> None:
    """Also after one that was skipped: the same batch may come again, and would fail again."""
    parameter, optimizer = on_grid(torch.float32)
    seen = []
    for loss in (math.nan, math.nan, 1.0, 1.0):
        seen.append([])
        optimizer.step(lambda: seen[-1].append(parameter.detach().clone()) or torch.tensor(loss))  # noqa: B023
    above = [moved[0] for moved in seen]
    assert not any(torch.equal(above[i], above[j]) for i in range(4) for j in range(i))


def test_both_losses_see_the_same_dropout() -> None:
    masks = []
    optimizer = MeZO([weights(torch.float32)], lr=0.0)
    for _ in range(2):
        optimizer.step(lambda: masks.append(torch.dropout(torch.ones(64), 0.5, True)) or torch.tensor(1.0))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_resume_is_bit_for_bit(dtype: torch.dtype, adam: bool) -> None:
    def run(model: nn.Module, optimizer: MeZO, steps: range) -> None:
        for step in steps:
            data = batch(step, dtype)
            closure = values(math.inf) if step == 2 else lambda: squared_error(model, data)  # noqa: B023
            optimizer.step(closure)

    straight, first = network(dtype), network(dtype)
    run(straight, MeZO(straight, lr=1e-2, adam=adam, seed=5), range(8))
    optimizer = MeZO(first, lr=1e-2, adam=adam, seed=5)
    run(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = network(dtype)
    second.load_state_dict(saved["model"])
    resumed = MeZO(second, lr=1.0, eps=0.5, adam=adam)
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.steps, resumed.skipped) == (3, 1)
    run(second, resumed, range(4, 8))
    assert tiny.identical(copies(second), copies(straight))


# --- ranks ----------------------------------------------------------------------------------------------------------


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2])
def test_a_closure_that_raises_leaves_the_weights(calls: int) -> None:
    parameter, optimizer = on_grid(torch.bfloat16)
    before, left = parameter.detach().clone(), [calls]

    def closure() -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return torch.tensor(1.0)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(parameter, before) and optimizer.steps == 1
    with pytest.raises(ValueError, match="0 tokens"):
        optimizer.step(lambda: (torch.tensor(0.0), 0))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        optimizer.step(lambda: torch.zeros(2))
    assert torch.equal(parameter, before)
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()


def partitioned() -> nn.Module:
    """As ZeRO 3 leaves it: empty, with an id."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data, model.weight.ds_id = torch.empty(0), 0
    return model


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        (partitioned, {}, "weight is partitioned by ZeRO-3"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), {}, "nothing to train"),
        (lambda: [], {}, "nothing to train"),
        (lambda: [("x", nn.Parameter(torch.randn(4, 3).t()))], {}, "x is not contiguous"),
        (lambda: [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], {}, "complex64"),
        (lambda: [("a", nn.Parameter((t := torch.zeros(9))[:6])), ("b", nn.Parameter(t[3:]))], {}, "a and b overlap"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, "weight is on the meta device"),
        (lambda: nn.Linear(2, 2), {"eps": 0.0}, "eps=0.0: expected"),
        (lambda: nn.Linear(2, 2), {"lr": -1.0, "weight_decay": math.nan}, "lr=-1.0: .*weight_decay=nan: "),
        (lambda: nn.Linear(2, 2), {"betas": (0.9, 1.0)}, "betas="),
    ],
)
def test_refusals(params: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO(params(), **{"lr": 1e-3, **settings})


def test_a_foreign_state_is_refused() -> None:
    model = network()
    optimizer = MeZO(model, lr=1e-3)
    with pytest.raises(ValueError, match="not the state of a MeZO"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())
    with pytest.raises(ValueError, match="adam=True"):
        optimizer.load_state_dict(MeZO(model, lr=1e-3, adam=True).state_dict())
