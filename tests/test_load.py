"""Loading: damaged or incomplete folders get one sentence, and a model has one hash in every precision."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fewstep.errors import FewstepError
from fewstep.models.load import BUNDLED, load_network, network_hash, save_network
from fewstep.models.tiny import tiny_network


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """The bundled student beside its teacher, to be damaged."""
    for name in ("gsm-teacher", "gsm-student"):
        shutil.copytree(BUNDLED / name, tmp_path / name)
    return tmp_path / "gsm-student"


def test_an_adapter_is_merged_into_the_base_beside_it(student: Path) -> None:
    assert network_hash(load_network(student)) == network_hash(load_network("gsm-student"))
    assert network_hash(load_network(student)) != network_hash(load_network("gsm-teacher", role="block_causal"))


def test_an_adapter_without_weights_is_refused(student: Path) -> None:
    (student / "adapter_model.safetensors").unlink()
    with pytest.raises(FewstepError, match=r"no adapter_model\.safetensors"):
        load_network(student)


def test_an_adapter_that_lost_a_tensor_is_refused(student: Path) -> None:
    tensors = load_file(student / "adapter_model.safetensors")
    lost = sorted(tensors)[5]
    save_file({name: t for name, t in tensors.items() if name != lost}, student / "adapter_model.safetensors")
    with pytest.raises(FewstepError, match="missing or left over"):
        load_network(student)


def test_cut_weights_are_refused(student: Path) -> None:
    for path in (student / "adapter_model.safetensors", student.parent / "gsm-teacher" / "model.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FewstepError, match="cannot load the model"):
            load_network(student)
        path.write_bytes(whole)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(FewstepError):
        load_network("gsm-ar", device="cuda:9")
    with pytest.raises(FewstepError, match="unknown device"):
        load_network("gsm-ar", device="gpu")


def test_a_model_has_one_hash_in_every_precision(tmp_path: Path) -> None:
    save_network(tiny_network("bidirectional"), tmp_path / "model")
    hashes = {network_hash(load_network(tmp_path / "model", dtype=dtype)) for dtype in ("float32", "bfloat16")}
    assert len(hashes) == 1
