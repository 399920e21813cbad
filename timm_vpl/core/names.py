"""Names and defaults that the options and the loss share; importing this is cheap."""

SIDES = ('a', 'b')
SIMILARITIES = ('cosine', 'dot')
SAME_CLASS = ('negative', 'ignore', 'positive')
DEFAULT_TAU = 0.2  # not given in the paper; docs/loss.md says how it was chosen


def partner_of(side: str) -> str:
    """Return the other side."""
    return SIDES[side == SIDES[0]]
