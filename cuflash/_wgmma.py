"""The wgmma instructions of Hopper as C++: each width has its own, which names every register of its sum."""

from __future__ import annotations

from ._features import ELEMENTS
from ._kernel import NUMBERS

ARCH = "sm_90a"  # Hopper, with what only Hopper has
WIDTHS = range(8, 257, 8)


def wgmma(number: str, width: int) -> str:
    """The class ``cuflash::ptx::Wgmma<Element, width>`` for sums of this width (ptx/wgmma.cuh)."""
    if width not in WIDTHS:
        raise ValueError(f"width: {width} is no multiple of 8 up to 256")
    size = width // 2
    registers = ", ".join(f"%{i}" for i in range(size))
    sums = ", ".join(f'"+f"(sum[{i}])' for i in range(size))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{{0}}.{{0}}".format(NUMBERS[number][1])
    from_shared = f"%{size}"
    from_registers = "{" + ", ".join(f"%{size + i}" for i in range(4)) + "}"

    def multiply(template: str, type_of_a: str, a: str, inputs: str, b: int, across_a: str = "") -> str:
        """The function for one kind of a; b is the number of its register, behind those of a."""
        immediates = f"%{b + 2}" if not across_a else f"%{b + 2}, %{b + 3}"
        return f"""\
  template <{template}>
  static __device__ __forceinline__ void multiply(float (&sum)[{size}], {type_of_a}, TileDescriptor b, bool add) {{
    asm volatile("{{ .reg .pred add; setp.ne.b32 add, %{b + 1}, 0; {instruction} "
                 "{{{registers}}}, {a}, %{b}, add, 1, 1, {immediates}; }}"
                 : {sums}
                 : {inputs}, "l"(b), "r"(static_cast<int>(add)), {across_a}"n"(kAcrossB ? 1 : 0));
  }}
"""

    return f"""\
template <>
struct cuflash::ptx::Wgmma<{ELEMENTS[number]}, {width}> {{
{
        multiply(
            "bool kAcrossA, bool kAcrossB",
            "TileDescriptor a",
            from_shared,
            '"l"(a)',
            size + 1,
            across_a='"n"(kAcrossA ? 1 : 0), ',
        )
    }
{
        multiply(
            "bool kAcrossB",
            "const unsigned (&a)[4]",
            from_registers,
            ", ".join(f'"r"(a[{i}])' for i in range(4)),
            size + 4,
        )
    }}};
"""
