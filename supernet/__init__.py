"""Differentiable architecture search under a latency budget.

Importing the package registers `timm.create_model("supernet_derived", architecture=...)`.
"""

from supernet.entrypoint import supernet_derived as _registered  # noqa: F401
from supernet.weights_file import load_network, save_network

__version__ = "0.1.0"
__all__ = ["load_network", "save_network"]
