"""Types of config fields that say which values a field may have, and their check.

Imports nothing of ours but the checks.
"""

from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from minirlhf.engine.options import check_choice, check_range

Count = Annotated[int, 1, 10**9]
Natural = Annotated[int, 0, 10**9]              # what 0 means, none or all, is in the comment
Amount = Annotated[float, 0, 1e6]
Share = Annotated[float, 0, 1]
Mass = Annotated[float, 1e-6, 1]                # of a distribution
Rate = Annotated[float, 0, 10]                  # a learning rate, a weight decay
Positive = Annotated[float, 1e-6, 1e6]          # a temperature, a largest norm
Seed = Annotated[int, -2**63, 2**63 - 1]
Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16"]


def check_fields(config) -> None:
    """Check each field whose type names its values: `Annotated[type, low, high]` or `Literal`.

    Raises: ValueError with the field, its value and the values allowed.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        if get_origin(kind) is Literal:
            check_choice(config, name, get_args(kind))
        elif get_origin(kind) is Annotated:
            check_range(config, name, *kind.__metadata__)
