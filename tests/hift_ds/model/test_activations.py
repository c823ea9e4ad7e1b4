"""Checkpoints of activations in host memory: the same bits, copied only where backward passes, never too early."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hift_ds
import hift_ds.model.activations
from hift_ds.model.activations import HostCheckpoints, checkpoint_activations, limit_recomputation
from hift_ds.state import transfer as offload
from hift_ds.state.allocator import HostMemory
from tests.support import tiny
from tests.support.device_memory import DeviceMemory
from tests.support.lazy_streams import LazyStreams, MissingWait

HIDDEN_BYTES = tiny.MICRO_BATCH * tiny.LENGTH * 32 * 4  # of a layer's fp32 input


def steps(checkpoints: Callable[[], HostCheckpoints] | None, count: int = 12) -> list[torch.Tensor]:
    """The gradients of steps on one part of the model after the other; every fourth backward ends half way down."""
    model = tiny.model()
    checkpoint_activations(model)
    if checkpoints is not None:
        checkpoints().install(model)
    blocks = [[model.get_parameter(name) for name in names] for names in tiny.block_names()]
    found = []
    for step in range(count):
        block = (0, 3, 1, 2)[step % 4]
        active = blocks[block] + (blocks[3] if step % 4 == 3 else [])  # with the layer above, which then is all
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in active))
        wanted = active if step % 4 < 3 else blocks[3]
        gradients = torch.autograd.grad(model(**tiny.micro_batch(step, 0)).loss, wanted)
        with torch.no_grad():
            for parameter, gradient in zip(wanted, gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
        found += [gradient.clone() for gradient in gradients]
    return found


def hosted(**changes: Any) -> Callable[[], HostCheckpoints]:
    """Makes what keeps checkpoints in host memory, with some of its transfers exchanged."""

    def make() -> HostCheckpoints:
        transfers = {"Lane": offload.Lane, "mark": offload.mark, "wait": offload.wait}
        return HostCheckpoints(HostMemory(), SimpleNamespace(**{**transfers, **changes}))

    return make


def same(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("arguments", [{"use_reentrant": True}, {"use_reentrant": False}, {"preserve_rng_state": True}])
def test_no_layer_below_the_active_block_is_recomputed(arguments: dict[str, bool]) -> None:
    model = tiny.model()
    for _ in range(3):  # each time, transformers adds a hook and forgets the one before
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    limit_recomputation(model)
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    model(**tiny.micro_batch(0, 0)).loss.backward()
    assert calls[: tiny.LAYERS] == [0, 1, 2, 3]
    assert calls[tiny.LAYERS :] == [3, 2]


def test_host_memory_changes_no_bit() -> None:
    assert same(steps(hosted()), steps(None))


def test_lazy_streams_change_nothing() -> None:
    truth = steps(None, 40)
    with LazyStreams() as machine:
        assert same(steps(hosted(), 40), truth)
    assert machine.copies > 100


class Unmarked(offload.Lane):
    """Nobody waits for what was copied on it."""

    def mark(self) -> Any:
        return None


class Forgetful(offload.Lane):
    """The allocator is not told that it uses a tensor."""

    def outlives(self, tensor: torch.Tensor) -> None: ...


def lanes(storing: type, fetching: type) -> Callable[[], Any]:
    kinds = iter((storing, fetching))
    return lambda: next(kinds)()


def within(method: str) -> Callable[[], HostCheckpoints]:
    """The lane does not wait for computations before what that method copies."""

    def make() -> HostCheckpoints:
        checkpoints = hosted()()
        original, mark = getattr(checkpoints, method), checkpoints._mark

        def call(entry: Any) -> None:
            checkpoints._mark = lambda: None
            try:
                original(entry)
            finally:
                checkpoints._mark = mark

        setattr(checkpoints, method, call)
        return checkpoints

    return make


MUTATIONS: dict[str, Callable[[], Callable[[], HostCheckpoints]]] = {
    "used before it is back": lambda: hosted(wait=lambda _: None),
    "fetched before it is there": lambda: hosted(Lane=lanes(Unmarked, offload.Lane)),
    "stored before it is computed": lambda: within("_store"),
    "fetched to memory in use": lambda: within("_fetch"),
    "freed while it leaves": lambda: hosted(Lane=lanes(Forgetful, offload.Lane)),
    "freed while it comes, unused": lambda: hosted(Lane=lanes(offload.Lane, Forgetful)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_wait_can_be_taken_out(mutation: str) -> None:
    truth = steps(None)
    with LazyStreams():
        try:
            ours = steps(MUTATIONS[mutation]())
        except MissingWait:
            return
    assert not same(ours, truth), "nobody would notice"


def test_checkpoints_leave_the_device() -> None:
    """All are gone after the forward pass; in backward those of the layer at work and of the next one are back."""

    def held(offload: bool) -> tuple[int, int]:
        model = tiny.model()
        checkpoint_activations(model, offload=offload)
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)
        with DeviceMemory() as memory, memory.labelled("activations"):
            loss = model(**tiny.micro_batch(0, 0)).loss
            after_forward = memory.live["activations"]
            loss.backward()
            return after_forward, memory.peak["activations"]

    saved = [(there - gone) / HIDDEN_BYTES for there, gone in zip(held(False), held(True), strict=True)]
    assert saved == [tiny.LAYERS, tiny.LAYERS - 2]


def test_layers_below_the_active_block_copy_nothing() -> None:
    model = tiny.model()
    checkpoints = checkpoint_activations(model, offload=True)
    assert checkpoints is not None
    copied = []
    for names in tiny.block_names():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        before = checkpoints.stored, checkpoints.fetched
        model(**tiny.micro_batch(0, 0)).loss.backward()
        copied.append((checkpoints.stored - before[0], checkpoints.fetched - before[1]))
    # Embeddings, four layers, head. A layer's own input does not require a gradient, but is what it is recomputed from.
    assert copied == [(count, count) for count in (4, 4, 3, 2, 1, 0)]
    with torch.no_grad():
        model(**tiny.micro_batch(0, 0))
    assert checkpoints.stored == 14


def test_host_memory_does_not_grow() -> None:
    """Over steps, over batches of all lengths, and over losses that nobody takes the gradient of."""
    model = tiny.model()
    checkpoints = checkpoint_activations(model, offload=True)
    assert checkpoints is not None
    for step in range(20):
        model(**tiny.micro_batch(step, 0)).loss.backward()
        assert checkpoints.host.nbytes == tiny.LAYERS * HIDDEN_BYTES
    for step in range(20):
        given = {name: tensor[:, : 3 + step % 10] for name, tensor in tiny.micro_batch(step, 0).items()}
        loss = model(**given).loss
        if step % 3:
            loss.backward()
        del loss
        assert checkpoints.host.nbytes == tiny.LAYERS * HIDDEN_BYTES


class Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients


def test_what_torch_saves_beside_hidden_states_is_not_taken_for_them() -> None:
    """Before 2.13 it first saved an empty tensor; the checkpoints then stayed on the device without a word."""
    model = tiny.model()
    checkpoints = checkpoint_activations(model, offload=True)
    assert checkpoints is not None

    def as_it_was(layer: Any, *args: Any, **options: Any) -> Any:
        Saved.apply(torch.empty(0, requires_grad=True))
        return checkpoint(layer, *args, **options)

    with mock.patch.object(hift_ds.model.activations, "checkpoint", as_it_was):
        model(**tiny.micro_batch(0, 0)).loss.backward()
    assert checkpoints.host.nbytes == tiny.LAYERS * HIDDEN_BYTES


def test_longer_batches_replace_buffers() -> None:
    model = tiny.model()
    checkpoints = checkpoint_activations(model, offload=True)
    assert checkpoints is not None
    for length in range(2, tiny.LENGTH + 1):
        given = {name: tensor[:, :length] for name, tensor in tiny.micro_batch(0, 0).items()}
        model(**given).loss.backward()
        assert checkpoints.host.nbytes == tiny.LAYERS * HIDDEN_BYTES * length // tiny.LENGTH


def test_a_graph_can_be_used_twice() -> None:
    model = tiny.model()
    checkpoint_activations(model, offload=True)
    loss = model(**tiny.micro_batch(0, 0)).loss
    weights = list(model.parameters())
    assert same(*(list(torch.autograd.grad(loss, weights, retain_graph=True)) for _ in range(2)))


def test_a_layer_without_hidden_states_as_its_first_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="the first argument of this model's layers is not their hidden"):
        hosted()()(lambda **_: None)


def test_the_launcher_takes_it_from_the_settings() -> None:
    from hift_ds.launch.model import loading
    from hift_ds.launch.model.settings import ModelSettings

    config = tiny.model().config
    mapping = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    mapping |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    with mock.patch.object(hift_ds, "checkpoint_activations") as called:
        for value in (False, True, "cpu"):
            loading.load_model(ModelSettings(config=mapping, gradient_checkpointing=value), config, "float32")
    assert [call.kwargs for call in called.call_args_list] == [{"offload": False}, {"offload": True}]
