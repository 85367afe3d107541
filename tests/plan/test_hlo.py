"""The text of compiled HLO, read."""

from __future__ import annotations

import pytest

from mmjax.plan.hlo import Array, Module, arrays_of, parse

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

%body (p: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %p = (s32[], f32[2,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[2,3]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[2,3]{1,0}) tuple(%next, %x)
}

%condition (p.1: (s32[], f32[2,3])) -> pred[] {
  %p.1 = (s32[], f32[2,3]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %last = s32[] constant(11)
  ROOT %less = pred[] compare(%j, %last), direction=DIRECTION
}

ENTRY %main.1 (a: f32[2,3], b: bf16[3]) -> f32[2,3] {
  %b = bf16[3]{0:S(1)} parameter(1)
  %a = f32[2,3]{1,0} parameter(0), sharding={replicated}
  %first = s32[] constant(1)
  %start = (s32[], f32[2,3]{1,0}) tuple(%first, %a)
  %loop = (s32[], /*index=1*/f32[2,3]{1,0}) while(%start), condition=%condition, body=%body
  %fused = f32[2,3]{1,0} fusion(%a, %b), kind=kLoop, calls=%body, metadata={op_name="jit(step)/dot"}
  ROOT %out = f32[2,3]{1,0} get-tuple-element(%loop), index=1
}
"""


def module(direction: str = "LT") -> Module:
    return parse(TEXT.replace("DIRECTION", direction))


def test_computations_and_their_entry() -> None:
    read = module()
    assert list(read.computations) == ["body", "condition", "main.1"]
    assert (read.entry, read.partitions) == ("main.1", 4)
    entry = read.computations["main.1"]
    assert [i.name for i in entry] == ["b", "a", "first", "start", "loop", "fused", "out"]
    assert entry.root.name == "out"
    assert [i.name for i in entry.parameters] == ["a", "b"]
    assert {n: [i.name for i in users] for n, users in entry.users.items()} == {
        "first": ["start"], "a": ["start", "fused"], "start": ["loop"], "b": ["fused"], "loop": ["out"],
    }  # fmt: skip


def test_an_instruction_says_what_it_makes_of_what() -> None:
    entry = module().computations["main.1"].instructions
    fused = entry["fused"]
    assert (fused.opcode, fused.operands, fused.called) == ("fusion", ("a", "b"), ("body",))
    assert (fused.source, entry["a"].source) == ("jit(step)/dot", "")
    assert (fused.attribute("kind"), fused.attribute("absent")) == ("kLoop", "")
    assert entry["loop"].arrays == (Array("s32", ()), Array("f32", (2, 3)))
    assert entry["loop"].bytes == 4 + 2 * 3 * 4
    # A loop runs its body as often as it likes: it is none that it calls once.
    assert entry["loop"].called == () and entry["loop"].attribute("body") == "body"
    assert (entry["first"].text, entry["first"].operands) == ("1", ())


@pytest.mark.parametrize(
    ("text", "array", "size"),
    [
        ("f32[2,3]{1,0}", Array("f32", (2, 3)), 24),
        ("bf16[3]{0:S(1)}", Array("bf16", (3,), 1), 6),
        ("pred[]", Array("pred", ()), 1),
        ("f8e4m3fn[5]", Array("f8e4m3fn", (5,)), 5),
        ("c128[2]", Array("c128", (2,)), 32),
        ("token[]", Array("token", ()), 0),
        ("s32[<=8]", Array("s32", (8,)), 32),
    ],
)
def test_an_array_has_dtype_shape_space_and_bytes(text: str, array: Array, size: int) -> None:
    assert arrays_of(text) == (array,) and array.bytes == size


@pytest.mark.parametrize(("direction", "trips"), [("LT", 5), ("LE", 6), ("GT", None)])
def test_a_loop_from_1_by_2_to_11(direction: str, trips: int | None) -> None:
    """1, 3, 5, 7 and 9 are below 11, and 11 is not above it; of other conditions nothing is known."""
    read = module(direction)
    entry = read.computations["main.1"]
    assert read.trips(entry.instructions["loop"], entry) == trips


def test_branches_of_both_spellings() -> None:
    read = parse(
        "HloModule m\n\nENTRY %main (p: pred[]) -> f32[] {\n"
        "  %p = pred[] parameter(0)\n"
        "  %c = f32[] conditional(%p, %p, %p), true_computation=%yes, false_computation=%no\n"
        "  ROOT %d = f32[] conditional(%p, %p, %p), branch_computations={%one, %two}\n}\n"
    )
    entry = read.computations["main"].instructions
    assert entry["c"].branches == ("yes", "no") and entry["d"].branches == ("one", "two")
    assert read.partitions == 1


def test_a_line_that_is_cut_is_no_instruction() -> None:
    with pytest.raises(ValueError, match="no closing parenthesis"):
        parse("ENTRY %m (p: f32[]) -> f32[] {\n  %p = (f32[], f32[] tuple(\n}\n")
