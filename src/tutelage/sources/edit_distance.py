"""How many characters must be put in, taken out or changed to turn one text into another."""


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance, by bit vectors: one pass over `b` on integers of len(a) bits.

    >>> edit_distance("kitten", "sitting"), edit_distance("", "abc"), edit_distance("same", "same")
    (3, 3, 0)

    Source:
        Myers 1999 in Hyyrö's 2003 form: `up` and `down` mark rows where the column's values rise and fall by one.
    """
    if not a or not b:
        return len(a) + len(b)
    where: dict[str, int] = {}
    for i, c in enumerate(a):
        where[c] = where.get(c, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for c in b:
        same = where.get(c, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        rises, falls = (down | ~(diagonal | up)) & every, up & diagonal
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & every, falls << 1 & every
        up, down = (falls | ~(diagonal | rises)) & every, rises & diagonal
    return distance
