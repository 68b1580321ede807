"""Text from outside, as it may be shown in a terminal."""


def printable(text: str) -> str:
    r"""A line with every character that a terminal would act on, or that is not seen, as its escape code.

    >>> print(printable("sub-01\x1b[2K\r, \u202eabc, 5 µm"))
    sub-01\x1b[2K\r, \u202eabc, 5 µm
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same of several lines, which stay lines."""
    return "\n".join(map(printable, text.split("\n")))
