"""Optional dependencies: which extra installs what."""

import importlib.util

from fewstep.errors import FewstepError

EXTRAS = {
    "train": {"accelerate": "accelerate", "pyarrow": "pyarrow", "tensorboard": "tensorboard"},
    "eval": {"matplotlib": "matplotlib", "math-verify": "math_verify"},
    "gsm": {"reasoning-gym": "reasoning_gym"},
    "gguf": {"gguf": "gguf"},
    "quantize": {"torchao": "torchao"},
    "serve": {
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
        "prometheus-client": "prometheus_client",
        "httpx2": "httpx2",
        "pydantic": "pydantic",
    },
}
"""Extra -> distribution -> module that it installs."""


def missing_sentence(module: str) -> str | None:
    """What to do about a missing module (`pyarrow.parquet` is pyarrow's); None if no extra installs it."""
    top = module.split(".", maxsplit=1)[0]
    extra = next((extra for extra, modules in EXTRAS.items() if top in modules.values()), None)
    if extra is None:
        return None
    return f"this needs {top}, which is not installed; install it with: pip install 'fewstep[{extra}]'"


def require(module: str) -> None:
    """FewstepError if `module`, of an extra, is not installed: asked before long work whose end needs it."""
    if importlib.util.find_spec(module) is None:
        raise FewstepError(missing_sentence(module) or f"this needs {module}, which is not installed")
