"""Quadriga: PyTorch-native pre-training of Llama 3, 3.1 and 3.2 models, from a laptop CPU to a GPU cluster.

The names below are the Python API, which docs/python-api.md explains. They are imported when they are first used, so
`import quadriga` loads neither torch nor pydantic.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than that of this module
if TYPE_CHECKING:
    from quadriga.api import Config, estimate, load_config, resolve
    from quadriga.errors import Fault, Problem, UserError
    from quadriga.trainer import Stopped, Trainer, build

__all__ = [
    "Config",
    "Fault",
    "Problem",
    "Stopped",
    "Trainer",
    "UserError",
    "__version__",
    "build",
    "estimate",
    "load_config",
    "resolve",
]

if not TYPE_CHECKING:  # a type checker would accept any name for it

    def __getattr__(name):
        """Import a name of the API from its module."""
        modules = {"Trainer": "trainer", "build": "trainer", "Stopped": "trainer"}
        modules |= dict.fromkeys(("Fault", "Problem", "UserError"), "errors")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{modules.get(name, 'api')}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
