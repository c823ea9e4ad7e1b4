"""Weights that wait in host memory: the same bits as on the device, in poisoned slots, with every wait in its place."""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hift_ds
import hift_ds.weights.turns
from hift_ds.state.transfer import Staging, mark
from hift_ds.weights.host import HostWeights
from hift_ds.weights.turns import Turns, Way
from tests.support import poisoned_slots, tiny
from tests.support.device_memory import DeviceMemory
from tests.support.lazy_streams import LazyStreams, MissingWait

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Each slot is full of NaN before it is filled."""
    with poisoned_slots.poisoned():
        yield


def made(model: nn.Module) -> HostWeights:
    weights = HostWeights(model, CPU, pin_memory=False)
    weights.start(Staging(CPU, None))
    return weights


def of_transformers(model_type: str, task: str = "CausalLM", **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    made = transformers.AutoConfig.for_model(model_type, **{**sizes, **config})
    return getattr(transformers, f"AutoModelFor{task}").from_config(made, dtype=torch.float32).train()


class Layer(nn.Module):
    def __init__(self, width: int = 8, inner: int = 16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.scales = nn.ParameterList([nn.Parameter(torch.full((width,), 1.5))])

    def forward(self, x: torch.Tensor, *, extra: torch.Tensor | None = None) -> Any:
        inner = torch.tanh(self.up(self.norm(x)))
        y = x + self.down(inner) * self.scales[0] + (0.0 if extra is None else extra)
        return {"states": [y, extra], "inner": inner}


class Net(nn.Module):
    """Layers of different sizes with keyword arguments and nested outputs."""

    def __init__(self, count: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer(inner=8 * (1 + number % 3)) for number in range(count))
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.run(self.embed(input_ids))
        return mock.Mock(loss=nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, extra=x.detach())["states"][0]
        return x


class Escaping(Net):
    """The loss also depends on what is inside of layers, through weights of the layers."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x, total = self.embed(input_ids), torch.zeros(())
        for layer in self.layers:
            found = layer(x)
            x, total = found["states"][0], total + found["inner"].square().mean()
        return mock.Mock(loss=total + self.head(x).square().mean())


class InParts(Net):
    """The layers themselves are never called."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.down(torch.tanh(layer.up(layer.norm(x))))
        return x


class InGroups(Net):
    """One checkpoint for several layers."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for group in (self.layers[:3], self.layers[3:]):

            def several(x: torch.Tensor, group: Any = group) -> torch.Tensor:
                for layer in group:
                    x = layer(x)["states"][0]
                return x

            x = checkpoint(several, x, use_reentrant=False)
        return x


class Repeating(Net):
    """Layers that are used in turn, out of order, and some in one pass alone."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for number in (0, 1, 2, 0, 1, 2, 4, 2, 4, 0):
            x = self.layers[number](x)["states"][0]
        if torch.is_grad_enabled():
            x = self.layers[3](x)["states"][0]
        return x


class Sharing(Net):
    """Weights that two layers share, and a layer and the head; a module that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[0].up.weight = nn.Parameter(torch.randn(16, 8))
        for layer in (self.layers[0], self.layers[2]):
            layer.up.bias, layer.down = nn.Parameter(torch.zeros(16)), self.layers[1].down
        self.layers[1].up = nn.Linear(8, self.layers[1].down.in_features)
        self.layers[0].down = self.layers[2].down = self.layers[1].down
        self.layers[4].up.weight = self.head.weight


class Skipping(Net):
    """Neighbors that have the same slot."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[::2]:
            x = layer(x)["states"][0]
        return x


def llama(checkpoints: str = "", tied: bool = False) -> Any:
    model = tiny.model("bf16", tied=tied)
    if checkpoints == "transformers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif checkpoints:
        hift_ds.checkpoint_activations(model, offload=checkpoints == "offloaded")
    return model


T5 = {"decoder_start_token_id": 0, "pad_token_id": 0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "checkpoints": lambda: llama("ours"),
    "checkpoints on the host": lambda: llama("offloaded"),
    "checkpoints of transformers": lambda: llama("transformers"),
    "t5": lambda: of_transformers("t5", "Seq2SeqLM", d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, **T5),
    "albert": lambda: of_transformers("albert", "MaskedLM", embedding_size=16, num_hidden_layers=3),
    "mixtral": lambda: of_transformers(
        "mixtral", num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
    ),
    "one layer": lambda: Net(1),
    "nested outputs": Net,
    "escaping": Escaping,
    "in parts": InParts,
    "in groups": InGroups,
    "repeating": Repeating,
    "skipping": Skipping,
    "sharing": Sharing,
}


def batch(number: int) -> dict[str, torch.Tensor]:
    ids = tiny.micro_batch(number, 0)["input_ids"] % 16
    return {"input_ids": ids, "labels": ids}


def parts(model: Any) -> list[list[str]]:
    """Names that are trained together."""
    blocks = hift_ds.partition_model(model)
    return [list(block.parameter_names) for block in blocks]


def trained(model: Any, host: HostWeights | None, order: list[int]) -> list[torch.Tensor]:
    """Losses, gradients and in the end all weights of steps of plain descent, two passes in each, and evaluations."""
    blocks, found = parts(model), []
    for step, index in enumerate(order):
        active = [model.get_parameter(name) for name in blocks[index]]
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in active))
            parameter.grad = None
        for micro in range(2):
            loss = model(**batch(2 * step + micro)).loss
            if loss.requires_grad:
                loss.backward()
            found.append(loss.detach())
            if host is not None:
                host.prepare()
        if step % 3 == 1:
            with torch.no_grad():
                found.append(model(**batch(200 + step)).loss)
        if host is not None:
            host.before_change(active)
        with torch.no_grad():
            for parameter in (one for one in active if one.grad is not None):
                if host is None:
                    parameter.sub_(parameter.grad, alpha=0.1)
                else:
                    update_in_host_memory(host, parameter)
                found.append(parameter.grad.clone())
        if host is not None:
            host.changed(active, host._staging.storing.mark())
            host.prepare()
        if step % 3 == 1:
            with torch.no_grad():
                found.append(model(**batch(100 + step)).loss)
    found += [value.clone() for value in model.state_dict().values()]
    return found


def update_in_host_memory(host: HostWeights, parameter: nn.Parameter) -> None:
    """On the device, with the weights coming and going as they would in a step."""
    assert parameter.grad is not None
    weights = torch.empty(parameter.shape, dtype=parameter.dtype)
    weights.copy_(host.of(parameter))
    weights.sub_(parameter.grad, alpha=0.1)
    storing = host._staging.storing
    with storing.after(mark()):
        host.of(parameter).copy_(weights, non_blocking=True)
        storing.outlives(weights)


def same(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return len(ours) == len(truth) and all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


def orders(count: int) -> list[list[int]]:
    return [list(range(count)), list(range(count))[::-1], [(3 * number + 1) % count for number in range(count)]]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_weights_on_the_device(name: str) -> None:
    for order in orders(len(parts(MODELS[name]()))):
        torch.manual_seed(1)  # of dropout
        truth = trained(MODELS[name](), None, 2 * order)
        torch.manual_seed(1)
        model = MODELS[name]()
        assert same(trained(model, made(model), 2 * order), truth), order


@pytest.mark.parametrize("checkpoints", ("", "ours", "offloaded"))
def test_a_layer_is_copied_ahead_once_on_its_way_up_and_once_on_its_way_down(checkpoints: str) -> None:
    model = llama(checkpoints)
    host = made(model)
    turns = host._turns
    assert turns is not None
    layers = [[name for name in names if "layers" in name] for names in tiny.block_names()][1:-1]

    bring = Turns._bring

    def in_time(turns: Turns, unit: Any) -> None:
        assert unit.slot.holds is unit, "it is fetched when it is needed, and not before"
        bring(turns, unit)

    def step(lowest: int) -> int:
        before = turns.fills
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in layers[lowest])
        model(**batch(0)).loss.backward()
        host.prepare()
        return turns.fills - before

    for _ in range(2):
        # Up: 2 and 3, because 0 and 1 were prepared. Down to the lowest: 1 and 0. Then 0 and 1, unless they are there.
        with mock.patch.object(Turns, "_bring", in_time):
            assert [step(lowest) for lowest in (3, 2, 1, 0)] == [4, 4, 4, 4]
    before = turns.fills
    with torch.no_grad():
        model(**batch(0))
        model(**batch(1))
    assert turns.fills - before == 3 + 4  # 2 and 3, then 0 for the next pass; 1, 2, 3, and 0 again


def test_layers_that_backward_does_not_reach_are_not_fetched() -> None:
    model = Net(8)
    host = made(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.4."))
    filled = []
    model(**batch(0)).loss.backward()
    with mock.patch.object(Turns, "_fill", lambda _, unit: filled.append(unit)):
        host._turns.enter(host._layers[4], Way.BACKWARD)  # type: ignore[union-attr]
    assert not filled


def test_the_device_holds_two_layers_and_what_is_outside() -> None:
    model = llama()
    memory = DeviceMemory()
    with memory:
        memory.declare([*model.parameters()], "host")
        memory.declare([*model.buffers()], label="buffers")
        host = made(model)
        bound = memory.live["total"] - memory.live["buffers"]
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
        outside = sum(p.nbytes for p in model.parameters()) - sum(layers)
        assert bound < 2 * layers[0] + outside + 3 * 256 * 10
        with torch.no_grad():
            memory.reset()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            model(**batch(0))
        assert all(memory.is_host(weights) for weights in model.state_dict().values())
        host.release()
        assert all(memory.is_host(parameter.data) for parameter in model.parameters())


ORDER = [2, 1, 3, 4, 1, 0, 5, 4]


def run_lazily() -> list[torch.Tensor]:
    with LazyStreams():
        model = llama()
        return trained(model, made(model), ORDER)


def test_nothing_is_read_or_overwritten_too_early() -> None:
    assert same(run_lazily(), trained(llama(), None, ORDER))


changed = Turns.changed
MISSING = {
    "wait": lambda: mock.patch.object(hift_ds.weights.turns, "wait", lambda event: None),
    "mark of a fill": lambda: mock.patch.object(hift_ds.weights.turns, "mark", lambda: None),
    "events of an update": lambda: mock.patch.object(
        Turns, "changed", lambda turns, units, _: changed(turns, units, ())
    ),
    "before_change": lambda: mock.patch.object(Turns, "before_change", lambda turns, units: None),
}


@pytest.mark.parametrize("name", MISSING)
def test_each_wait_is_noticed_if_it_is_missing(name: str) -> None:
    with MISSING[name](), pytest.raises(MissingWait):
        run_lazily()


def test_state_of_the_model_is_that_in_host_memory() -> None:
    model, other = Net(), Net()
    host = made(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    model(**batch(0)).loss.backward()
    model.load_state_dict(other.state_dict())
    for name, parameter in other.named_parameters():
        assert torch.equal(host.of(model.get_parameter(name)), parameter)
        assert torch.equal(model.state_dict()[name], parameter)
    part, whole = model.layers[3].state_dict(), other.layers[3].state_dict()
    assert all(torch.equal(part[name], value) for name, value in whole.items())
    assert torch.equal(model(**batch(1)).loss, other(**batch(1)).loss)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.state_dict(), "head.bias": torch.zeros(3)})
    host.release()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(**batch(1)).loss, other(**batch(1)).loss)


def test_weights_that_are_flattened_together_keep_their_places() -> None:
    """As ZeRO flattens a block: matrices of two layers and the head in one tensor, vectors in another."""
    model, other = Net(), Net()
    host = HostWeights(model, CPU, pin_memory=False)
    members = [p for part in (model.layers[1], model.layers[2], model.head) for p in part.parameters()]
    flats = []
    with host.on_device(members):
        for group in ([p for p in members if p.dim() > 1], [p for p in members if p.dim() == 1]):
            flat = torch.cat([torch.zeros(2), *(p.data.flatten() for p in group), torch.zeros(6)])
            start = 2
            for p in group:
                p.data = flat[start : start + p.numel()].view(p.shape)
                start += p.numel()
            flats.append(host.keep(flat, group))
    host.start(Staging(CPU, None))
    assert [len(unit.sources) for unit in host._layers] == [1, 2, 2, 1, 1] and len(host._outside.sources) == 3
    assert all(host.of(p).untyped_storage().data_ptr() in {flat.data_ptr() for flat in flats} for p in members)
    blocks = len(parts(model))
    assert same(trained(model, host, list(range(blocks))), trained(other, None, list(range(blocks))))


def test_a_copy_of_the_model_in_inference_mode_may_be_trained_afterwards() -> None:
    model, other = Net(), Net()
    made(model)
    with torch.inference_mode():
        model(**batch(0))
    for one in (model, other):
        one(**batch(1)).loss.backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)


def test_autograd_sees_no_change_in_a_fill() -> None:
    model = copy.deepcopy(Net())
    made(model)
    versions = [parameter._version for parameter in model.parameters()]
    model(**batch(0)).loss.backward()
    assert [parameter._version for parameter in model.parameters()] == versions


def test_a_layer_that_is_about_to_change_is_not_fetched() -> None:
    model = Net()
    host = made(model)
    first, second = host._layers[:2]
    host.forget_slots()
    host.before_change(model.layers[0].parameters())
    host.prepare()
    assert first.slot.holds is None and second.slot.holds is second
    host.unchanged(model.layers[0].parameters())
    host.prepare()
    assert first.slot.holds is first
