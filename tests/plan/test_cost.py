"""Check what a program costs, read from HLO that is small enough to count by hand."""

from __future__ import annotations

import pytest

from mmjax.plan import hlo
from mmjax.plan.cost import DCN, ICI, Cost, cost
from mmjax.plan.groups import Layout

ONE = Layout({"data": 1}, [0])
FOUR = Layout({"data": 2, "fsdp": 2}, [0] * 4)
SLICES = Layout({"data": 2, "fsdp": 4}, [0] * 4 + [1] * 4)


def read(body: str, more: str = "", layout: Layout = ONE, partitions: int = 1) -> Cost:
    """Return the cost of an entry with these lines, at 1 FLOP/s and 1 byte/s."""
    head = f"HloModule jit_f, is_scheduled=true, num_partitions={partitions}"
    text = f"{head}\n\n{more}\nENTRY %main.1 (p0: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return cost(hlo.parse(text), layout, 1.0, 1.0)


# --- FLOPs -------------------------------------------------------------------------------------


def test_a_dot() -> None:
    found = read("""  %p0 = f32[4,8,16]{2,1,0} parameter(0)
  %p1 = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,8,32]{2,1,0} dot(%p0, %p1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/dot_general"}""")
    assert found.flops == 2 * 4 * 8 * 16 * 32
    assert found.products == {"jit(f)/dot_general": 2 * 4 * 8 * 16 * 32}
    # Operands and result pass through memory once.
    assert found.memory == 4 * (4 * 8 * 16 + 4 * 16 * 32 + 4 * 8 * 32)


def test_a_complex_dot_is_four() -> None:
    found = read("""  %p0 = c64[8,16]{1,0} parameter(0)
  ROOT %dot.1 = c64[8,8]{1,0} dot(%p0, %p0), lhs_contracting_dims={1}, rhs_contracting_dims={1}""")
    assert found.flops == 8 * 8 * 8 * 16


def test_a_product_that_a_tpu_does_as_a_convolution() -> None:
    """A batch of 4 as a window with holes, so that no batch meets another."""
    found = read("""  %p0 = f32[4,8,16]{2,1,0} parameter(0)
  %p1 = f32[4,32,16]{2,1,0} parameter(1)
  ROOT %c = f32[4,8,32]{2,1,0} convolution(%p0, %p1), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0oi->0bf""")
    assert found.flops == 2 * 4 * 8 * 16 * 32


def test_padding_of_a_convolution_does_not_count() -> None:
    """3 taps over 5 elements, padded by 1 on both sides: 13 of 15 pairs meet."""
    found = read("""  %p0 = f32[2,5,8]{2,1,0} parameter(0)
  %p1 = f32[3,8,16]{2,1,0} parameter(1)
  ROOT %c = f32[2,5,16]{2,1,0} convolution(%p0, %p1), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f""")
    assert found.flops == 2 * 2 * 8 * 16 * 13


def test_a_window_without_dimensions() -> None:
    found = read("""  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,4]{1,0} parameter(1)
  ROOT %c = f32[8,4]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf""")
    assert found.flops == 2 * 8 * 16 * 4


def test_a_library_call_in_place_of_a_dot() -> None:
    found = read("""  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  ROOT %g = (bf16[8,4]{1,0}, s8[1024]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}""")
    assert found.flops == 2 * 8 * 16 * 4 and not found.unknown


@pytest.mark.parametrize(
    ("stated", "flops"), [(',"cost_estimate":{"flops":"12345","bytes_accessed":"7"}', 12345), ("", 0)]
)  # fmt: skip
def test_a_kernel_counts_what_it_states_and_is_named_if_it_states_nothing(
    stated: str, flops: int
) -> None:
    found = read(f"""  %p0 = f32[8]{{0}} parameter(0)
  ROOT %k = f32[8]{{0}} custom-call(%p0), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/splash"}}, backend_config={{"custom_call_config":{{"body":"TUzv"{stated}}}}}""")
    assert found.flops == flops
    assert found.unknown == (set() if flops else {"kernel jit(f)/splash"})


# --- loops, fusions, calls, branches -----------------------------------------------------------

_BODY = """%body.1 (arg: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %arg = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%arg), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="dot"}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}
"""
_CONDITION = """%cond.1 (arg: (s32[], f32[8,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %arg.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT
}
"""
_LOOP = """  %p0 = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %p0)
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%start), condition=%cond.1, body=%body.1"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    assert read(_LOOP, _BODY + _CONDITION).flops == 5 * 2 * 8**3


def test_a_loop_that_begins_later() -> None:
    assert read(_LOOP.replace("constant(0)", "constant(2)"), _BODY + _CONDITION).flops == 3 * 2 * 8**3  # fmt: skip


@pytest.mark.parametrize(
    "grows",
    [
        "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n",
        "  %half = s32[] add(%i, %one)\n  %same = s32[] copy(%half)\n  %next = s32[] add(%one, %same)\n",
    ],
)
def test_a_loop_that_the_compiler_unrolled(grows: str) -> None:
    """Its counter grows by 2: 0, 2 and 4 of five."""
    body = _BODY.replace("  %next = s32[] add(%i, %one)\n", grows)
    assert body != _BODY and read(_LOOP, body + _CONDITION).flops == 3 * 2 * 8**3


def test_what_the_compiler_states_of_a_loop_comes_first() -> None:
    stated = _LOOP + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert read(stated, _BODY + _CONDITION).flops == 7 * 2 * 8**3


def test_a_comparison_in_a_fusion() -> None:
    compared = """%fused.1 (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %bound = s32[] constant(5)
  ROOT %le = pred[] compare(%a, %bound), direction=LE
}
"""
    condition = _CONDITION.replace("  %bound = s32[]{:T(128)} constant(5)\n", "").replace(
        "compare(%j, %bound), direction=LT", "fusion(%j), kind=kLoop, calls=%fused.1"
    )
    assert read(_LOOP, compared + _BODY + condition).flops == 6 * 2 * 8**3


def test_a_loop_in_a_loop() -> None:
    outer = (_BODY + _CONDITION).replace("body.1", "outer").replace("cond.1", "until")
    outer = outer.replace("constant(5)", "constant(3)").replace(
        '%y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="dot"}',
        "%z = s32[] constant(0)\n  %s = (s32[], f32[8,8]{1,0}) tuple(%z, %x)\n"
        "  %v = (s32[], f32[8,8]{1,0}) while(%s), condition=%cond.1, body=%body.1\n"
        "  %y = f32[8,8]{1,0} get-tuple-element(%v), index=1",
    )
    entry = _LOOP.replace("%cond.1", "%until").replace("%body.1", "%outer")
    assert read(entry, _BODY + _CONDITION + outer).flops == 3 * 5 * 2 * 8**3


def test_a_loop_whose_end_is_not_known_counts_once_and_is_named() -> None:
    unknown = _CONDITION.replace("constant(5)", "get-tuple-element(%arg.1), index=0")
    found = read(_LOOP, _BODY + unknown)
    assert found.flops == 2 * 8**3 and found.unknown == {"loop w"}


_FUSED = """%fused_computation (a: f32[32,8,8], i: s32[]) -> f32[8,8] {
  %a = f32[32,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,8,8]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  %b = f32[8,8]{1,0} bitcast(%s)
  ROOT %d = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="d"}
}
"""


def test_of_a_fusion_the_products_count_and_of_a_stack_the_slice() -> None:
    found = read(
        """  %p0 = f32[32,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %f = f32[8,8]{1,0} fusion(%p0, %p1), kind=kOutput, calls=%fused_computation""",
        _FUSED,
    )
    assert found.flops == 2 * 8**3
    assert found.memory == 4 * (8 * 8 + 8 * 8 + 1)  # the slice, the result, the index
    assert found.seconds == max(found.flops, found.memory)


def test_what_lies_on_the_chip_is_no_traffic() -> None:
    found = read("""  %p0 = f32[8]{0:T(128)} parameter(0)
  %a = f32[8]{0:T(128)S(1)} negate(%p0)
  ROOT %b = f32[8]{0:T(128)S(1)} negate(%a)""")
    assert found.memory == 4 * 8


def test_an_update_in_place_counts_what_it_writes() -> None:
    found = read("""  %p0 = f32[1024]{0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = f32[1024]{0} dynamic-update-slice(%p0, %p1, %p2)""")
    assert found.memory == 2 * 4 * 8


def test_calls_count_and_of_branches_the_longest() -> None:
    parts = "".join(
        f"""%branch.{n} (a: f32[{n},8]) -> f32[{n},{n}] {{
  %a = f32[{n},8]{{1,0}} parameter(0)
  ROOT %d = f32[{n},{n}]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}
"""
        for n in (2, 4)
    )
    found = read("""  %p0 = f32[2,8]{1,0} parameter(0)
  %p1 = f32[4,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %x = f32[4,4]{1,0} call(%p1), to_apply=%branch.4
  ROOT %y = f32[4,4]{1,0} conditional(%p2, %p0, %p1), branch_computations={%branch.2, %branch.4}""", parts)  # fmt: skip
    assert found.flops == 2 * (2 * 4 * 4 * 8)


# --- collectives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "axes", "sent"),
    [
        ("f32[8,8]{1,0} all-gather(%p0), dimensions={0}, replica_groups={{0,1},{2,3}}", "all-gather", "fsdp", 256 / 2),
        ("f32[8,8]{1,0} all-gather(%p0), dimensions={0}, replica_groups=[2,2]<=[4]", "all-gather", "fsdp", 256 / 2),
        ("f32[4,8]{1,0} all-reduce(%p0), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", "all-reduce", "data", 128),
        ("f32[4,8]{1,0} all-reduce(%p0), replica_groups={}, to_apply=%add", "all-reduce", "data+fsdp", 2 * 128 * 3 / 4),
        ("f32[2,8]{1,0} reduce-scatter(%p0), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, to_apply=%add",
         "reduce-scatter", "data", 128 / 2),
        ("f32[2,8]{1,0} reduce-scatter(%p0), replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) "
         "{'axis_0'}, to_apply=%add", "reduce-scatter", "fsdp", 128 / 2),
        ("f32[4,8]{1,0} all-to-all(%p0), replica_groups={{0,2},{1,3}}, dimensions={0}", "all-to-all", "data", 128 / 2),
        ("f32[4,8]{1,0} collective-permute(%p0), source_target_pairs={{0,2},{2,0}}", "collective-permute", "data", 128),
        ("(f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p0), dimensions={0}, replica_groups={{0,1},{2,3}}",
         "all-gather", "fsdp", 256 / 2),
        ("(f32[4,8]{1,0}, f32[4,8]{1,0}) all-reduce-start(%p0), replica_groups={{0,1},{2,3}}, to_apply=%add",
         "all-reduce", "fsdp", 128),
    ],
)  # fmt: skip
def test_bytes_that_a_device_sends(line: str, kind: str, axes: str, sent: float) -> None:
    """A shard of 4x8 numbers is 128 bytes."""
    body = f"  %p0 = f32[4,8]{{1,0}} parameter(0)\n  ROOT %c = {line}, channel_id=1"
    assert read(body, layout=FOUR, partitions=4).wires == {(ICI, kind, axes): sent}


def test_groups_that_span_slices_are_dcn() -> None:
    body = "  %p0 = f32[4,8]{1,0} parameter(0)\n  ROOT %c = f32[4,8]{1,0} all-reduce(%p0), replica_groups="
    for groups, wire, axes in (
        ("{{0,4},{1,5},{2,6},{3,7}}", DCN, "data"),
        ("[2,4]<=[8]", ICI, "fsdp"),
    ):
        found = read(body + groups, layout=SLICES, partitions=8)
        assert [key[::2] for key in found.wires] == [(wire, axes)]


_MEGASCALE = (
    "  %p0 = f32[4,8]{{1,0}} parameter(0)\n  %a = token[] after-all()\n"
    "  %s = (f32[4,8]{{1,0}}, u32[], token[]) send(%p0, %a), channel_id=2, is_host_transfer=true, frontend_attributes="
    '{{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="{}"}}\n'
    "  ROOT %d = token[] send-done(%s), channel_id=2"
)


@pytest.mark.parametrize(
    ("transfer", "kind", "sent"),
    [
        ("ALL_REDUCE", "all-reduce", 128),
        ("ALL_GATHER", "all-gather", 128),
        ("ALL_TO_ALL", "all-to-all", 64),
        ("ONE_TO_ONE", "collective-permute", 128),
    ],
)
def test_transfers_between_slices_by_the_host(transfer: str, kind: str, sent: float) -> None:
    found = read(_MEGASCALE.format(transfer), layout=SLICES, partitions=4)
    assert found.wires == {(DCN, kind, "data"): sent}


def test_groups_of_a_slice_count_its_own_devices() -> None:
    """A program of several slices names the devices of one."""
    body = "  %p0 = f32[4,8]{1,0} parameter(0)\n  ROOT %c = f32[16,8]{1,0} all-gather(%p0), dimensions={0}, replica_groups={{0,1,2,3}}"
    found = read(body, layout=SLICES, partitions=4)
    assert found.wires == {(ICI, "all-gather", "fsdp"): 512 * 3 / 4}


def test_pieces_of_one_collective_count_once() -> None:
    """A TPU fuses parts of an asynchronous collective into what runs meanwhile."""

    def piece(name: str, flag: int) -> str:
        config = f'{{"async_collective_fusion_config":{{"flag_start":"{flag}","flag_end":"15"}}}}'
        return f"""%{name} (a: f32[4,8]) -> f32[8,8] {{
  %a = f32[4,8]{{1,0}} parameter(0)
  ROOT %g = f32[8,8]{{1,0}} all-gather(%a), dimensions={{0}}, replica_groups={{{{0,1}},{{2,3}}}}, backend_config={config}
}}
"""

    found = read("""  %p0 = f32[4,8]{1,0} parameter(0)
  %s = f32[8,8]{1,0} fusion(%p0), kind=kCustom, calls=%start
  %m = f32[8,8]{1,0} fusion(%p0), kind=kCustom, calls=%meanwhile
  ROOT %d = f32[8,8]{1,0} fusion(%p0), kind=kCustom, calls=%done""",
        piece("start", -1) + piece("meanwhile", 2) + piece("done", 2), FOUR, 4)  # fmt: skip
    assert found.wires == {(ICI, "all-gather", "fsdp"): 128}


def test_an_all_reduce_of_which_a_shard_is_kept_is_a_reduce_scatter() -> None:
    fused = """%all-reduce-scatter.1 (a: f32[4,8]) -> f32[2,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %r = f32[4,8]{1,0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %s = f32[2,8]{1,0} slice(%r), slice={[0:2], [0:8]}
}
"""
    found = read(
        """  %p0 = f32[4,8]{1,0} parameter(0)
  ROOT %f = f32[2,8]{1,0} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.1""",
        fused,
        FOUR,
        4,
    )
    assert found.wires == {(ICI, "reduce-scatter", "fsdp"): 64}
