"""`fewstep import`: a checkpoint of another family -> one plain folder with its role."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Json
from fewstep.cli.report import note, write_report
from fewstep.cli.sources import Touches
from fewstep.errors import FewstepError
from fewstep.values import Count, Seed


def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A Dream, LLaDA, SDAR, Llama, Qwen2 or Qwen3 folder, or a GGUF file."),
        Touches.READS_MODEL,
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="The plain folder to write."), Touches.REPLACES
    ] = None,
    block_size: Annotated[
        Count | None, typer.Option(help="Tokens per block, if the checkpoint does not name them.")
    ] = None,
    mask_token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="The mask token of a causal model that is to become a diffusion teacher."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare logits with a plain forward of the source, in float32.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET if it exists.")] = False,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE", help="Import nothing: write random weights of a shape, such as dream-7b, to TARGET."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Data type of random weights: bfloat16 (default), float16 or float32.")
    ] = None,
    seed: Annotated[Seed | None, typer.Option(help="Seed of random weights (0).")] = None,
    json: Json = None,
) -> None:
    """Imports a checkpoint of another family as a plain folder that stock transformers loads."""
    if random_weights is not None:
        if target is not None or block_size is not None or mask_token is not None or check:
            raise FewstepError(
                "--random-weights SHAPE takes one folder to write, and no --block-size, --mask-token or --check"
            )
        _write_random(random_weights, source, dtype or "bfloat16", seed or 0, overwrite, json)
        return
    if target is None:
        raise FewstepError("name the folder to write: fewstep import SOURCE TARGET")
    if dtype is not None or seed is not None:
        raise FewstepError("--dtype and --seed belong to --random-weights; an import keeps the numbers as they are")
    from fewstep.models.importers.convert import import_checkpoint

    imported = import_checkpoint(
        source, target, block_size=block_size, mask_token=mask_token, check=check, overwrite=overwrite
    )
    write_report(json, {"source": str(source), **asdict(imported), "target": str(target)})
    checked = "" if imported.difference is None else f"; logits differ by at most {imported.difference:.1e}"
    note(
        f"{source} ({imported.family}) imported into {target}: {imported.num_parameters:,} parameters, "
        f"{imported.dtype}, role {imported.role}{checked}"
    )


def _write_random(shape: str, target: Path, dtype: str, seed: int, overwrite: bool, json: Path | None) -> None:
    from fewstep.models.importers.shapes import write_random

    num_parameters = write_random(shape, target, dtype=dtype, seed=seed, overwrite=overwrite)
    write_report(json, {"shape": shape, "target": str(target), "num_parameters": num_parameters, "dtype": dtype})
    note(f"{target}: {num_parameters:,} random parameters in the shape {shape}, {dtype}")
