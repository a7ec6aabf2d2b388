"""What is made beside the model's stream: the numbers are the same, nothing is overwritten, and the host does not wait for the model."""

import time

import pytest
import torch

from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.runtime.streams import hand_over, side_stream, tensors_in

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.training import forward  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402


def test_every_tensor_of_an_object_is_found():
    """Those that are missed could be overwritten by the next ones while a kernel reads them."""

    class Slotted:
        __slots__ = ("nested",)

    class Plan:
        pass

    tensors = [torch.zeros(1) for _ in range(4)]
    slotted, plan = Slotted(), Plan()
    slotted.nested = (tensors[0], [{"name": tensors[1]}])
    plan.first, plan.again, plan.other, plan.number = slotted, plan, tensors[2], 3
    found = list(tensors_in((plan, tensors[3])))
    assert {id(tensor) for tensor in found} == {id(tensor) for tensor in tensors}
    assert len(found) == 4


def _inputs(block_size=4):
    config = tiny_config(diffusion={"block_size": block_size})
    return config, corrupt(packed_batch(range(2)), config.diffusion, 0)


def test_every_tensor_of_the_inputs_is_found():
    config, noisy = _inputs()
    inputs = rank_inputs(noisy, config)
    model, plan = inputs.model, inputs.model.attention_plan
    wanted = [model.input_ids, model.positions, model.segment_index, model.segment_timesteps, model.logit_positions]
    wanted += [plan.visibility.endpoints, plan.kernel_plan.mask]
    wanted += [inputs.rows.targets, inputs.rows.weights, inputs.rows.timesteps, inputs.rows.num_masked, inputs.rows.num_tokens]
    assert {id(tensor) for tensor in wanted} <= {id(tensor) for tensor in tensors_in((inputs, inputs.targets))}


def test_inputs_are_made_on_their_own_stream_and_handed_over(monkeypatch):
    """Without a GPU, its streams' calls in order: all of it is made inside, then waited for, then kept for the model's stream."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append((self.name, "waits for", other.name))

        def __enter__(self):
            events.append(("enter", self.name))

        def __exit__(self, *_error):
            events.append(("leave", self.name))

    config, noisy = _inputs()
    rank_inputs(noisy, config)  # the backend is chosen, for this machine as it is
    model, side = Stream("model"), Stream("inputs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: model)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(forward, "_input_stream", lambda: side)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((id(tensor), stream.name)))

    def batches():
        events.append("corruption")
        yield noisy

    prepared = forward._next_inputs(config, batches())
    assert events == [("enter", "inputs"), "corruption", ("leave", "inputs"), ("model", "waits for", "inputs")]
    handed_over = {id(tensor) for tensor in tensors_in(prepared)}
    inputs, row_terms, work = prepared
    assert {id(tensor) for tensor in (row_terms["cross_entropy"].targets, work, inputs.rows.timesteps, inputs.rows.weights)} <= handed_over
    assert set(recorded) == {(tensor, "model") for tensor in handed_over}


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_model():
    """The model's stream is busy for a second; a number that another stream computes is there long before."""
    device = torch.device("cuda", torch.cuda.current_device())
    stream = side_stream("test", device)
    with torch.cuda.stream(stream):
        torch.ones(4, device=device).nonzero()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    started = time.perf_counter()
    with torch.cuda.stream(stream):
        found = torch.ones(4, device=device).nonzero()
    hand_over(found, stream)
    spent = time.perf_counter() - started
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert spent < (time.perf_counter() - started) / 4


@pytest.mark.gpu
def test_memory_is_not_given_away_before_it_was_read():
    """The host forgets the tensor at once; the model's stream reads it a second later."""
    stream = side_stream("test", torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(stream):
        made = torch.full((1 << 20,), 3.0, device="cuda")
    hand_over([made], stream)
    torch.cuda._sleep(1_000_000_000)
    total = made.sum()
    del made
    with torch.cuda.stream(stream):
        others = [torch.zeros(1 << 20, device="cuda") for _ in range(8)]
    assert total.item() == 3.0 * (1 << 20)
    assert len(others) == 8
