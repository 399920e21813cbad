"""Names and defaults that the options and the loss share; importing this costs nothing."""

SIDES = ('a', 'b')
SIMILARITIES = ('cosine', 'dot')
SAME_CLASS = ('negative', 'ignore', 'positive')
DEFAULT_TAU = 0.2  # not given in the paper; docs/loss.md says how it was chosen
