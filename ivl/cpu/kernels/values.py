"""The values of a kernel under construction, whose operators emit LLVM's instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir


def _operator(whole: str, real: str = "", *first: str, flipped: bool = False) -> Callable[[Value, Any], Value]:
    """Return an operator by its instruction for integers and that for floats, with what stands before the operands."""

    def operate(self: Value, other: Any) -> Value:
        is_real = isinstance(getattr(self.type, "element", self.type), ir.FloatType)
        operands = (other, self) if flipped else (self, other)
        return getattr(self.b, real if is_real else whole)(*first, *map(self.like, operands))

    return operate


class Value:
    """A number, a vector or a pointer of a kernel.

    An operator emits the instruction for integers or for floats, as the value has them. A number of Python beside it is a
    constant of its type, in every lane. Integers have no sign for `//`, `%` and `>>`, and one for `<` and `>`.
    """

    def __init__(self, b: Builder, raw: Any) -> None:
        self.b, self.raw = b, raw

    @property
    def type(self) -> Any:
        return self.raw.type

    def like(self, number: Any) -> Any:
        """Return a number as a constant of this type; another value as it is."""
        if not isinstance(number, int | float):
            return number
        return ir.Constant(self.type, [number] * self.type.count if isinstance(self.type, ir.VectorType) else number)

    __add__, __radd__ = _operator("add", "fadd"), _operator("add", "fadd", flipped=True)
    __sub__, __rsub__ = _operator("sub", "fsub"), _operator("sub", "fsub", flipped=True)
    __mul__, __rmul__ = _operator("mul", "fmul"), _operator("mul", "fmul", flipped=True)
    __truediv__, __rtruediv__ = _operator("", "fdiv"), _operator("", "fdiv", flipped=True)
    __floordiv__, __mod__ = _operator("udiv"), _operator("urem")
    __lshift__, __rshift__ = _operator("shl"), _operator("lshr")
    __and__, __or__ = _operator("and_"), _operator("or_")
    __lt__, __gt__ = (_operator("icmp_signed", "fcmp_ordered", sign) for sign in "<>")

    def __neg__(self) -> Value:
        return self.b.fneg(self)


Operand = Value | ir.Constant
"""What an instruction takes. A constant of llvmlite's has no operators."""


class Builder:
    """llvmlite's builder of instructions, which takes and returns Values."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        build = getattr(self._builder, name)

        def emit(*operands: Any, **options: Any) -> Any:
            built = build(*map(_raw, operands), **{name: _raw(option) for name, option in options.items()})
            return Value(self, built) if isinstance(built, ir.Value) else built

        return emit if callable(build) else build


def _raw(operand: Any) -> Any:
    """Return what llvmlite takes in place of a Value, or of a list of some."""
    if isinstance(operand, list | tuple):
        return [_raw(each) for each in operand]
    return operand.raw if isinstance(operand, Value) else operand
