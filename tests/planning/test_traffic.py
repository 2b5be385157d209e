import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.planning.hlo import Module, element_bytes
from rlaif_jax.planning.traffic import _largest_group, traffic
from tests.helpers import eight_device_mesh

LAYERS, WIDTH, ROWS = 6, 64, 32


@functools.cache
def compiled(trips_are_known: bool) -> Module:
    """Layers whose weights are gathered anew in each pass of a loop, with rows of their own on 4 x 2 devices."""
    mesh = eight_device_mesh()
    with jax.set_mesh(mesh):

        def layer(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, PartitionSpec())
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), PartitionSpec("fsdp"))

        def known(weights, x):
            return jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, weights)[0].sum()

        def unknown(weights, x):
            return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: layer(x, weights[0]), x)

        weights = jax.ShapeDtypeStruct(
            (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
        )
        x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        function = known if trips_are_known else unknown
        return Module(jax.jit(function).lower(weights, x).compile().as_text())


def test_what_a_loop_gathers_counts_as_often_as_it_runs():
    moved = dict(traffic(compiled(True), [0] * 8, trips=1).by_kind)
    assert moved["all-gather"] == LAYERS * 4 * WIDTH * WIDTH * 3 / 4  # 3 of 4 parts are of other devices
    assert moved["all-reduce"] == 2 * 4 * 3 / 4  # the sum of the rows


def test_a_loop_whose_length_the_data_decide_counts_as_often_as_is_said():
    once, often = (traffic(compiled(False), [0] * 8, trips) for trips in (1, 11))
    # The weights are the same in every pass, and gathered before.
    assert dict(once.by_kind)["all-gather"] == dict(often.by_kind)["all-gather"] == 4 * WIDTH * WIDTH * 3 / 4
    # The sum that decides is made in each.
    assert dict(once.by_kind)["all-reduce"] == 2 * 4 * 3 / 4
    assert dict(often.by_kind)["all-reduce"] == 11 * 2 * 4 * 3 / 4


def test_what_crosses_to_another_slice_goes_over_the_network():
    # The gathering devices are those along `fsdp`: 0, 2, 4, 6. In two islands of four, two are on each side.
    alone, split = (traffic(compiled(True), islands, 1) for islands in ([0] * 8, [0] * 4 + [1] * 4))
    gathered = LAYERS * 4 * WIDTH * WIDTH
    assert alone.network == 0
    assert alone.links == split.links + split.network
    # Half of all comes from the other island, and each of the two takes half of that.
    assert split.network == pytest.approx(gathered / 2 / 2, rel=0.01)


def test_memory_is_what_instructions_read_and_write_and_slices_count_as_their_own_size():
    module = Module(
        """HloModule m
%fused (p0: f32[100,8], p1: s32[], p2: f32[1,8]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[100,8]{1,0} dynamic-update-slice(%p0, %p2, %p1, %zero)
}

ENTRY %main (a: f32[100,8], i: s32[], b: f32[1,8]) -> (f32[100,8], f32[1,8]) {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %taken = f32[1,8]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,8}
  %sum = f32[1,8]{1,0:S(1)} add(%taken, %b)
  %new = f32[100,8]{1,0} fusion(%a, %i, %sum), kind=kLoop, calls=%fused
  ROOT %both = (f32[100,8]{1,0}, f32[1,8]{1,0}) tuple(%new, %taken)
}
"""
    )
    row = 4 * 8
    taken, summed, updated = 2 * row, 2 * row, row + 4  # the sum stays on the chip; the row's number is read
    assert traffic(module, [0], 1).memory == taken + summed + updated


def test_what_a_fusion_within_a_fusion_passes_on_is_read_whole():
    module = Module(
        """HloModule m
%view (p: f32[8,64]) -> f32[512] {
  %p = f32[8,64]{1,0} parameter(0)
  ROOT %flat = f32[512]{0} bitcast(%p)
}
%outer (q: f32[8,64]) -> f32[512] {
  %q = f32[8,64]{1,0} parameter(0)
  %seen = f32[512]{0} fusion(%q), kind=kLoop, calls=%view
  ROOT %twice = f32[512]{0} add(%seen, %seen)
}
ENTRY %main (a: f32[8,64]) -> f32[512] {
  %a = f32[8,64]{1,0} parameter(0)
  ROOT %b = f32[512]{0} fusion(%a), kind=kLoop, calls=%outer
}
"""
    )
    assert traffic(module, [0], 1).memory == 2 * 4 * 512


def test_one_collective_in_the_fusions_that_help_it_along_counts_once():
    module = Module(
        """HloModule m
%start (p: bf16[8]) -> bf16[64] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}
%done (q: bf16[8]) -> bf16[64] {
  %q = bf16[8]{0} parameter(0)
  ROOT %h = bf16[64]{0} all-gather(%q), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}
ENTRY %main (a: bf16[8]) -> bf16[64] {
  %a = bf16[8]{0} parameter(0)
  %kernel = bf16[8]{0} custom-call(%a), custom_call_target="k", backend_config={
"words": "of several lines"
}}
  %s = bf16[64]{0} fusion(%kernel), kind=kCustom, calls=%start
  ROOT %d = bf16[64]{0} fusion(%kernel), kind=kCustom, calls=%done
}
"""
    )
    assert traffic(module, [0] * 8, 1).links == 2 * 64 * 7 / 8


def test_what_the_runtime_brings_from_other_slices_goes_over_the_network():
    module = Module(
        """HloModule m
ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%a, %after), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64]{0}, u32[], token[]) recv(%after), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send)
  %received = (f32[64]{0}, token[]) recv-done(%recv)
  ROOT %b = f32[64]{0} get-tuple-element(%received), index=0
}
"""
    )
    moved = traffic(module, [0, 0, 1, 1], 1)
    assert moved.network == 2 * 4 * 64 / 2 and moved.links == 0
    assert dict(moved.by_kind) == {"all-reduce": moved.network}


@pytest.mark.parametrize(
    ("printed", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [0, 1]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_are_read_however_they_are_printed(printed, group):
    assert _largest_group(f"channel_id=1, {printed}, dimensions={{0}}", 8) == group


def test_bytes_of_shapes():
    assert element_bytes("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}") == (12,)
    assert element_bytes("(f32[4]{0:S(1)}, s4[3]{0}, pred[])", main_memory=True) == (0, 2, 1)
