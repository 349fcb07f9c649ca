"""Shipped scorer ``arithmetic``: the last number of the completion is the right one."""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from mint_scorers.options import known_options, number_option
from mint_scorers.scorer import Sample, field_of

__all__ = ["Arithmetic", "evaluate", "last_number"]

_NUMBER = re.compile(
    # A minus is a sign only where it cannot mean "less": not in 7-5, not in x-5.
    r"(?:(?<![\w.)])[-\u2212])?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+(?![\w]))?"
    r"|(?:(?<![\w.)])[-\u2212])?(?<![0-9])\.[0-9]+"
)

_MAX_CHARS = 1000
"""Of an expression, and of a number."""
_MAX_BITS = 4096
"""Of a numerator or denominator; 1233 decimal digits."""

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Reward 1 if the last number in the completion is the right one, else 0.

    Right is the value of the example's field ``expression`` (:func:`evaluate`), or where there is none the number in
    its field ``answer``: a JSON number, or a text whose last number counts. How numbers are found and written is
    said at :func:`last_number`. All values are exact fractions, so that 0.1 + 0.2 is 0.3.

    Options:

    * ``tolerance``: how far the number may be off and still count as right. Default 1e-6, so that six decimals are
      enough for 10 / 3; 0 wants the exact value.
    """

    tolerance: Fraction = Fraction(1, 1_000_000)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The factory. Raises :class:`ValueError` for bad options."""
        known_options(options, "tolerance")
        return cls(Fraction(repr(number_option(options, "tolerance", default=1e-6, low=0.0, high=1e9))))

    def __call__(self, sample: Sample) -> float:
        """Raises :class:`ValueError` or :class:`TypeError` if the example does not say what is right."""
        right = _right_number(sample.example)
        number = last_number(sample.completion)
        return float(number is not None and abs(number - right) <= self.tolerance)


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, or None if there is none, or if it is too long to be meant.

    Written as -12, 1,234,567 (the commas between groups of three), .5, 3.25 or 6.02e23; a full stop that ends the
    sentence does not belong to it, units do not matter. 1/3 is two numbers.
    """
    numbers = _NUMBER.findall(text)
    return _fraction(numbers[-1]) if numbers else None


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression in Python's notation and order of operations.

    Decimal numbers, parentheses, signs, ``+ - * / // % **``; the exponent of ``**`` is a whole number. Nothing is
    executed: the syntax tree is walked, and sizes are bounded before anything is computed. Raises :class:`ValueError`
    for everything else, for a division by zero and for values of more than 4096 bits.
    """
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters: at most {_MAX_CHARS} are evaluated")
    try:
        with warnings.catch_warnings(action="ignore"):  # the parser warns of "1if"; it is refused below
            tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, MemoryError, RecursionError) as error:  # MemoryError: the parser's way to say "too deep"
        raise ValueError(f"the expression {expression!r} cannot be read: {error}") from None
    except ZeroDivisionError:
        raise ValueError(f"the expression {expression!r} divides by zero") from None


def _right_number(example: Mapping[str, Any]) -> Fraction:
    if "expression" in example:
        expression = example["expression"]
        if not isinstance(expression, str):
            raise TypeError(f"the example's field 'expression' is {expression!r}: expected text")
        return evaluate(expression)
    answer = field_of(example, "answer")
    number = None if isinstance(answer, bool) else last_number(str(answer))
    if number is None:
        raise ValueError(f"the example's field 'answer' is {answer!r}: expected a number, or a text with one")
    return number


def _fraction(text: str) -> Fraction | None:
    """None where the digits, written out, would be more than a number of 4096 bits has."""
    mantissa, _, exponent = text.replace(",", "").replace("\u2212", "-").lower().partition("e")
    if len(mantissa) > _MAX_CHARS or len(exponent) > 4 or abs(int(exponent or 0)) > _MAX_CHARS:
        return None
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and math.isfinite(number):
            # The shortest decimal that is this float is what was written: 0.1 is a tenth.
            return _bounded(Fraction(repr(number)))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand)
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left), _value(node.right))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _value(node.left), _value(node.right)
            return _bounded(Fraction(_OPERATORS[type(node.op)](left, right)))
        case _:
            raise ValueError(
                f"the expression has {ast.unparse(node)!r}: only numbers, parentheses, signs and + - * / // % ** count"
            )


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError(f"the expression has the exponent {exponent}: expected a whole number")
    if base in (0, 1, -1):
        exponent = exponent if exponent < 2 else Fraction(2 - exponent.numerator % 2)
    elif _num_bits(base) * abs(exponent.numerator) > 2 * _MAX_BITS:
        raise ValueError(f"the expression has a power of more than {_MAX_BITS} bits: {base} ** {exponent}")
    return _bounded(Fraction(base**exponent.numerator))


def _bounded(value: Fraction) -> Fraction:
    if _num_bits(value) > _MAX_BITS:
        raise ValueError(f"the expression has a value of more than {_MAX_BITS} bits; use smaller numbers")
    return value


def _num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
