"""Every layout gives the single process's numbers: loss, gradients, parameters after three steps, and the very same noise."""

import itertools

import pytest

from tests.parallel.layouts import Outcome, train_layout
from tests.tiny import tiny_config

STREAMS = {
    "one-stream": {"timestep_per": "document"},
    "two-stream": {"block_size": 4, "timestep_per": "block"},
}


def _config(streams: str, **parallel):
    """Four layers, so that two stages of two chunks have one each; eight samples in four micro-batches at least."""
    return tiny_config(
        model={"num_layers": 4, "qk_norm": True},
        parallel={"context_chunk_size": 4, **parallel},
        diffusion=STREAMS[streams],
        training={"global_batch_size": 8, "micro_batch_size": 1},
    )


def _layouts():
    for tensor, pipeline, virtual, context, data in itertools.product((1, 2), repeat=5):
        if tensor * pipeline * context * data <= 8 and not (virtual > 1 and pipeline == 1):
            yield {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "context": context}, data


def _name(layout):
    parallel, data = layout
    return f"tp{parallel['tensor']}-pp{parallel['pipeline']}-vpp{parallel['virtual_pipeline']}-cp{parallel['context']}-dp{data}"


LAYOUTS = list(_layouts())
_references: dict[str, Outcome] = {}


def reference(streams: str) -> Outcome:
    """The single process, computed once."""
    if streams not in _references:
        _references[streams] = train_layout(_config(streams, distributed_optimizer=False))
    return _references[streams]


def assert_equal_numbers(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.noise == expected.noise, "corruption is bit-identical"
    for step, (loss, wanted) in enumerate(zip(outcome.losses, expected.losses, strict=True)):
        assert abs(loss - wanted) <= 1e-6 * abs(wanted), f"loss of step {step}: {loss} instead of {wanted}"
    for name, gradient in outcome.gradients.items():
        error = (gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()
        assert error <= 1e-5, f"gradient of {name}: relative error {error:.1e}"
    assert outcome.parameters.keys() == expected.parameters.keys()
    for name, parameter in outcome.parameters.items():
        error = (parameter - expected.parameters[name]).norm() / expected.parameters[name].norm()
        assert error <= 1e-6, f"{name} after the last step: relative error {error:.1e}"


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_equals_the_single_process(layout, streams):
    parallel, data = layout
    sequence = parallel["tensor"] > 1
    outcome = train_layout(_config(streams, **parallel, sequence=sequence, distributed_optimizer=False), data)
    assert_equal_numbers(outcome, reference(streams))
