"""Lets `python minirlhf/ppo.py` find the package.

That command puts this folder, not its parent, on the module path, so `import minirlhf` arrives
here. Naming this folder as `__path__` makes this module the package.
"""

import os

__path__ = [os.path.dirname(os.path.abspath(__file__))]
