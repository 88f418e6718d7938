"""Reads Triton's first intermediate code for addresses that may pass 2**31: such an offset must be made in 64 bits."""

import re
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

DEFINED = re.compile(r"^%([\w$]+)(?::\d+)? = \"?([a-z]+\.[a-z_]+)\"?(.*)$")
USED = re.compile(r"%([\w$]+)")
CARRIES = re.compile("addi|splat|broadcast|expand_dims|extsi|trunci|minsi|maxsi|select|trans|reshape").fullmatch


@dataclass(frozen=True)
class Origin:
    """What a value of the code depends on.

    Attributes:
        read: a number read from memory, such as that of a row; it grows with the data.
        tile: the number of a program, of a turn of a loop, or a quotient: it grows with the data too.
        width: an integer argument of the kernel.
        constant: a number known when the kernel is compiled, and nothing else.
        narrow: the 32-bit products, of a row and a width, that it is a sum of.
    """

    read: bool = False
    tile: bool = False
    width: bool = False
    constant: bool = False
    narrow: tuple[str, ...] = ()

    def __or__(self, other: "Origin") -> "Origin":
        return Origin(
            self.read or other.read,
            self.tile or other.tile,
            self.width or other.width,
            self.constant and other.constant,
            tuple(dict.fromkeys(self.narrow + other.narrow)),
        )

    def counted(self) -> "Origin":
        """Of a quotient, or of a counter with these bounds."""
        return Origin(tile=self.read or self.tile, width=self.width)

    def may_overflow(self, other: "Origin") -> bool:
        """A row times a width. A tile times a constant is where its rows begin, not where a row lies."""
        return (self.read and (other.width or other.constant)) or (self.tile and other.width)


def narrow_addresses(ttir: str) -> list[str]:
    """The 32-bit products of a row and a width, in code order, that are part of an address.

    Not followed: integers that a loop changes from turn to turn, and what a branch yields.
    """
    known: dict[str, Origin] = {}
    found: list[str] = []
    for raw in ttir.splitlines():
        line = raw.split(" loc(")[0].strip()
        if line.startswith("tt.func"):
            known |= {name: Origin(width=True) for name in re.findall(r"%([\w$]+): i\d+", raw)}
        definition = DEFINED.match(line)
        if definition is None:
            continue
        name, operation, rest = definition.groups()
        operation = operation.split(".")[1]
        origins = [known.get(used, Origin()) for used in USED.findall(rest)]
        together = reduce(or_, origins) if origins else Origin()
        if operation == "for":
            enter(rest, known)
        elif operation == "addptr":
            found += [product for product in origins[1].narrow if product not in found]
        elif operation == "get_program_id":
            known[name] = Origin(tile=True)
        elif operation == "constant":
            known[name] = Origin(constant=True)
        elif operation == "load" and re.search(r"tt\.ptr<i\d+>", rest):
            known[name] = Origin(read=True)
        elif operation == "muli":
            left, right = origins
            narrow = re.search(r"(: |x)i32\W*$", rest) and (left.may_overflow(right) or right.may_overflow(left))
            known[name] = replace(together, narrow=(*together.narrow, line) if narrow else together.narrow)
        elif operation == "subi":  # what is left of a program's number, less a product with another, is small again
            known[name] = replace(together, narrow=())
        elif operation == "divsi":
            known[name] = origins[0].counted()
        elif operation == "remsi":
            known[name] = replace(origins[0], narrow=())
        elif CARRIES(operation):
            known[name] = together
        else:
            known.pop(name, None)
    return found


def enter(rest: str, known: dict[str, Origin]) -> None:
    """What a loop defines for its body: the counter, from its bounds, and what is carried, from its first values."""
    counter, first, last = re.match(r"\s*%([\w$]+) = %([\w$]+) to %([\w$]+)", rest).groups()
    known[counter] = (known.get(first, Origin()) | known.get(last, Origin())).counted()
    for name, start in re.findall(r"[(,]\s*%([\w$]+) = %([\w$]+)", rest):
        known[name] = known.get(start, Origin())
