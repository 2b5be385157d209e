import importlib.util

import pytest

from rlaif_jax.errors import UserError
from rlaif_jax.planning.machines import find_machine


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v5litepod-16", 1, "--topology=v5litepod-16 is none of v5e:AxB, v5p:AxBxC"),
        ("v5e:4x4x4", 1, "is none of v5e:AxB"),
        ("v5p:4x4", 1, "is none of"),
        ("v5e:0x4", 1, "is none of"),
        ("gpu:a100:1x8", 1, "gpu:h100:NODESxGPUS"),
        ("gpu:h100:8", 1, "is none of"),
        ("cpu:0", 1, "cpu or cpu:N"),
        ("", 1, "is none of"),
        ("gpu:h100:2x8", 2, "--slices=2 must be 1"),
        ("v5e:4x4", 0, "--slices=0 must be 1 or more"),
    ],
)
def test_a_machine_that_is_none_is_one_line_with_those_that_are(topology, slices, message):
    with pytest.raises(UserError) as error:
        find_machine(topology, slices)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:4x4", "gpu:h200:1x8"])
def test_what_is_not_installed_is_named_with_the_file_that_installs_it(monkeypatch, topology):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs (libtpu|jax_cuda12_plugin).*requirements-plan\.txt"):
        find_machine(topology, 1)


def test_devices_are_held_to_the_figures_of_their_kind(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    machine = find_machine("v5p:2x2x1", 1)
    assert machine.device.flops == 459e12 and machine.device.source
    assert machine.memory == machine.device.memory < 95.74 * 2**30
    assert find_machine("cpu", 1).device is None
    assert find_machine("cpu:2", 1).memory == find_machine("cpu", 1).memory // 2
