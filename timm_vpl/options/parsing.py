from .parser import did_you_mean, show  # noqa: F401
from .recipes import option_tokens, read_recipe, read_yaml  # noqa: F401
