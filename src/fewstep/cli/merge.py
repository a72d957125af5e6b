"""`fewstep merge`: adapter + base -> one plain folder."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json
from fewstep.cli.report import note, write_report
from fewstep.cli.sources import Touches
from fewstep.errors import FewstepError
from fewstep.models.checkpoint_files import ADAPTER_CONFIG


def merge(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="A folder with adapter_config.json, or a bundled name."),
        Touches.READS_MODEL,
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The plain folder to write."), Touches.REPLACES],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; float32 loses nothing.")] = "float32",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Sum in float64, in twice the memory: the same weights, to the last bit, on every machine.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FOLDER if it exists.")] = False,
    json: Json = None,
) -> None:
    """Merges an adapter into its base and writes a plain folder that stock transformers loads."""
    check_model_name(adapter)
    import torch

    from fewstep.files import write_folder_whole
    from fewstep.models.load import load_network, resolve, save_network, weights_hash

    source = resolve(adapter)
    if not (source / ADAPTER_CONFIG).exists():
        raise FewstepError(
            f"{adapter} has no {ADAPTER_CONFIG}, so there is nothing to merge; it is a plain model already"
        )
    merged_in = torch.float64 if exact else torch.float32
    network = load_network(source, dtype=dtype, device="cpu", merged_in=merged_in)
    if network.adapter is not None:
        raise FewstepError(
            f"{adapter} is a gated adapter, which applies only to the rows that draft: merged into the weights, its "
            "gate would be lost; load it as it is"
        )
    with write_folder_whole(output, overwrite=overwrite) as folder:
        save_network(network, folder)
    write_report(
        json,
        {
            "adapter": adapter,
            "output": str(output),
            "role": network.role.name,
            "num_parameters": network.num_parameters,
            "weights_hash": weights_hash(network),
        },
    )
    note(f"{adapter} merged into {output}: {network.num_parameters / 1e6:.1f} M parameters, role {network.role.name}")
