"""`fewstep doctor`: what this machine can run, and what is missing."""

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import fewstep
from fewstep.cli.extras import EXTRAS
from fewstep.cli.options import Json
from fewstep.cli.report import print_table, write_report


def doctor(json: Json = None) -> None:
    """Says what this machine can run and what is missing."""
    report = _examine()
    write_report(json, report)
    missing = [
        f"{extra} (pip install 'fewstep[{extra}]')" for extra, names in report["missing_extras"].items() if names
    ]
    print_table(
        ["what", "here"],
        [
            ["fewstep", report["fewstep"]],
            ["python", report["python"]],
            ["platform", report["platform"]],
            *([name, version] for name, version in report["packages"].items()),
            ["cpu", f"{report['cpu_threads']} threads"],
            ["engine on the cpu", report["cpu_engine"]],
            ["gpu", ", ".join(f"{gpu['name']}, {gpu['memory_gb']} GB" for gpu in report["gpus"]) or "none"],
            ["free disk here", f"{report['free_disk_gb']} GB"],
            ["bundled models", ", ".join(report["bundled_models"]) or "none"],
            ["extras not installed", ", ".join(missing) or "none"],
            ["a small random model", report["self_check"]],
        ],
        num_texts=2,
    )


def _examine() -> dict[str, Any]:
    import torch

    from fewstep.models.names import bundled_names

    return {
        "fewstep": fewstep.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {
            name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "peft")
        },
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "cpu_engine": _cpu_engine(),
        "gpus": [
            {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9)}
            for index in range(torch.cuda.device_count())
            for properties in [torch.cuda.get_device_properties(index)]
        ],
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9),
        "bundled_models": bundled_names(),
        "missing_extras": {
            extra: [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
            for extra, modules in EXTRAS.items()
        },
        "self_check": _self_check(),
    }


def _cpu_engine() -> str:
    """The numbers in which the engine computes what may be rounded, or why there is none."""
    from fewstep.engine.cpu import has_bfloat16
    from fewstep.engine.language_model import LanguageModel
    from fewstep.models.tiny import tiny_network

    note = LanguageModel(tiny_network()).choice().note
    return note or ("bfloat16" if has_bfloat16() else "float32, since the processor does not multiply bfloat16")


def _self_check() -> str:
    """Decode a few tokens of a random network through the cache and without it, which must agree."""
    from fewstep.engine.language_model import LanguageModel
    from fewstep.models.tiny import tiny_network

    lm = LanguageModel(tiny_network(head_scale=20.0))
    cached, uncached = (
        lm.generate("2 + 2 =", decoder=decoder, threshold=0.5, max_new_tokens=24) for decoder in ("block", "diffusion")
    )
    if cached.token_ids != uncached.token_ids:
        return "FAILED: decodes other tokens with the cache than without"
    return f"ok: decodes {cached.num_tokens} tokens, cached and uncached alike"
