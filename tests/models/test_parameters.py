import jax
import numpy as np
import pytest

from rlaif_jax.models import parameters
from rlaif_jax.models.parameters import (
    Placement,
    check_host_memory,
    move_parameters,
    place_parameters,
    to_device,
    to_host_memory,
)
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import make_mesh
from tests.helpers import axes, eight_devices, random_params, tiny

MODEL = LanguageModel(tiny())


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_parameters_go_to_host_memory_and_back_as_they_were_split():
    placed = place_parameters(MODEL, random_params(MODEL), eight_devices())
    waiting = to_host_memory(placed)
    back = to_device(waiting)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(waiting)} == {"pinned_host"}
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, placed)
    assert same(placed, back) and to_host_memory(None) is None
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (back, to_device(back))), strict=True))  # no copy


def test_devices_without_host_memory_are_one_line(monkeypatch):
    check_host_memory()
    monkeypatch.setattr(parameters, "_HOST", "hbm_of_another")
    with pytest.raises(ValueError, match="cpu devices have no hbm_of_another memory"):
        check_host_memory()


def test_parameters_move_to_another_mesh_of_the_same_devices():
    judges = Placement(make_mesh(axes(data=2, tensor=4), jax.devices()[::-1]), replicated=("kv_heads",))
    placed = place_parameters(MODEL, random_params(MODEL), eight_devices())
    moved = move_parameters(MODEL, placed, judges)
    assert jax.tree.map(lambda x: x.sharding, moved) == judges.parameters(MODEL)
    assert same(placed, moved)
