"""Loading: damaged or incomplete folders get one sentence, and a model has one hash in every precision."""

import json
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models import load
from fewstep.models.importers.weight_files import Place
from fewstep.models.load import load_network, network_hash, save_network
from fewstep.models.names import BUNDLED
from fewstep.models.network import Network
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


def test_a_merged_adapter_can_be_trained_like_any_model() -> None:
    assert all(parameter.requires_grad for parameter in load_network("gsm-student").module.parameters())


def test_a_student_keeps_the_threshold_and_gaps_chosen_for_it(tmp_path: Path) -> None:
    network = tiny_network("block_causal")
    chosen = Network(network.module, replace(network.role, threshold=0.97, gaps=2), network.tokenizer)
    save_network(chosen, tmp_path / "student")
    assert load_network(tmp_path / "student").role == chosen.role


def test_an_adapter_is_loaded_without_a_warning_and_other_warnings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_network("gsm-student")
    load_adapter = peft.PeftModel.from_pretrained

    def worried(*arguments: Any, **options: Any) -> Any:
        warnings.warn("this adapter is odd", FutureWarning, stacklevel=1)
        return load_adapter(*arguments, **options)

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", worried)
    with pytest.warns(FutureWarning, match="this adapter is odd"):
        load_network("gsm-student")


def test_a_saved_network_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_network(tiny_network(), tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_network_that_changes_its_role_forgets_how_a_causal_one_is_decoded(tmp_path: Path) -> None:
    network = tiny_network("autoregressive")
    causal = network.with_role(replace(network.role, jacobi_window=6, mask_token_id=2))
    save_network(causal, tmp_path / "causal")
    assert load_network(tmp_path / "causal").role.jacobi_window == 6
    assert network_hash(causal) == network_hash(causal.with_role(replace(causal.role, jacobi_window=None)))
    other = load_network(tmp_path / "causal", role="bidirectional")
    assert other.role.jacobi_window is None
    save_network(other, tmp_path / "other")
    assert load_network(tmp_path / "other").role == other.role


def test_a_student_that_changes_its_role_forgets_its_gaps(tmp_path: Path) -> None:
    network = tiny_network("block_causal")
    student = network.with_role(replace(network.role, gaps=2))
    save_network(student, tmp_path / "student")
    assert network_hash(student) == network_hash(network)
    other = load_network(tmp_path / "student", role="bidirectional")
    save_network(other, tmp_path / "other")
    assert load_network(tmp_path / "other").role == other.role


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


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("gsm-student/adapter_model.safetensors", r"adapter_model\.safetensors is damaged"),
        ("gsm-teacher/model.safetensors", "is no whole safetensors file"),
    ],
)
def test_cut_weights_are_refused(file: str, sentence: str, student: Path) -> None:
    path = student.parent / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FewstepError, match=sentence):
        load_network(student)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(FewstepError):
        load_network("gsm-ar", device="cuda:9")
    with pytest.raises(FewstepError, match="unknown device"):
        load_network("gsm-ar", device="gpu")


def test_a_model_has_one_hash_in_every_precision(tmp_path: Path) -> None:
    save_network(tiny_network("bidirectional"), tmp_path / "model")
    hashes = {network_hash(load_network(tmp_path / "model", dtype=dtype)) for dtype in ("float32", "bfloat16")}
    assert len(hashes) == 1


PARAMETERS = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
"""Of `tiny_network`: embeddings and head, two layers of attention, MLP and norms, the last norm."""


@pytest.mark.parametrize(
    ("dtype", "size", "advice"),
    [("float32", 4, "choose dtype bfloat16 or another device"), ("bfloat16", 2, "choose another device")],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    dtype: str, size: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(tiny_network(), tmp_path / "model")
    monkeypatch.setattr(load, "free_memory", lambda device: PARAMETERS * size)
    assert load_network(tmp_path / "model", dtype=dtype, device="cpu").num_parameters == PARAMETERS
    monkeypatch.setattr(load, "free_memory", lambda device: PARAMETERS * size - 1)
    monkeypatch.delattr(load.AutoModelForCausalLM, "from_pretrained")
    with pytest.raises(FewstepError, match=rf"model needs 0\.0 GB .* in {dtype}, and cpu has 0\.0 GB free; {advice}"):
        load_network(tmp_path / "model", dtype=dtype, device="cpu")


def test_the_refusal_names_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = [Place(name="w", file=tmp_path, dtype="BF16", shape=(7_650, 1_000_000), start=0, num_bytes=0)]
    monkeypatch.setattr(load, "read_places", lambda folder: headers)
    monkeypatch.setattr(load, "free_memory", lambda device: 11_200_000_000)
    save_network(tiny_network(), tmp_path / "model")
    with pytest.raises(FewstepError, match=r"needs 15\.3 GB .*, and cpu has 11\.2 GB free"):
        load_network(tmp_path / "model", dtype="bfloat16", device="cpu")


def test_an_adapter_is_merged_in_float32_and_must_fit_so(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_network(student.parent / "gsm-teacher").num_parameters
    monkeypatch.setattr(load, "free_memory", lambda device: 4 * base - 1)
    with pytest.raises(FewstepError, match="in float32, and cpu has"):
        load_network(student, dtype="bfloat16", device="cpu")


def test_free_host_memory_is_what_linux_calls_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_MEMORY", tmp_path / "meminfo")
    assert load.free_memory(torch.device("cpu")) is None
    (tmp_path / "meminfo").write_text("MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    1500 kB\n")
    assert load.free_memory(torch.device("cpu")) == 1500 * 1024


@pytest.mark.parametrize("device", ["mps", "mps:0", "xpu", "meta"])
def test_other_devices_are_refused_also_where_they_exist(device, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(FewstepError, match=f"the device '{device}' is not supported: .* run on cpu and cuda"):
        load_network("gsm-ar", device=device)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("right_shift_logits", "false"),
        ("right_shift_logits", 1),
        ("block_size", 2.5),
        ("block_size", "4"),
        ("block_size", True),
        ("mask_token_id", "2"),
        ("mask_token_id", 2.0),
        ("threshold", "0.9"),
        ("gaps", float("nan")),
        ("gaps", 2**63),
        ("role", 5),
        ("role", "student"),
        ("context_attention", "full"),
        ("jacobi_window", []),
    ],
)
def test_keys_of_the_role_are_checked_by_type(key: str, value: Any, tmp_path: Path) -> None:
    save_network(tiny_network(), tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(FewstepError, match=rf"config\.json.*{key}"):
        load_network(tmp_path / "model", device="cpu")


@pytest.mark.parametrize(
    "choice", ["flex_attention", "flash_attention_2", "paged|eager", "some/kernel", 5, {"": "eager"}]
)
def test_a_config_never_chooses_the_attention_back_end(choice: Any, tmp_path: Path) -> None:
    save_network(tiny_network(), tmp_path / "model")
    usual = load_network(tmp_path / "model", device="cpu").module.config._attn_implementation
    config = tmp_path / "model/config.json"
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        config.write_text(json.dumps({**json.loads(config.read_text()), key: choice}))
    assert load_network(tmp_path / "model", device="cpu").module.config._attn_implementation == usual == "sdpa"


def test_a_network_of_absurd_sizes_is_refused_before_it_is_built(tmp_path: Path) -> None:
    save_network(tiny_network(), tmp_path / "model")
    config = tmp_path / "model/config.json"
    whole = json.loads(config.read_text())
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size"):
        config.write_text(json.dumps({**whole, key: 10**9}))
        started = time.monotonic()
        with pytest.raises(FewstepError, match=r"config\.json"):
            load_network(tmp_path / "model", device="cpu")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "name", ["runs/stu dent", "a/b/c", "../x", "x--y/z", "org/", "/org/name", "a" * 5000, "a\0/b", "~/m"]
)
def test_what_cannot_be_a_hub_id_is_told_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "hub_folder", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(FewstepError, match="no model"):
        load_network(name)


def test_a_mistyped_folder_is_told_with_the_closest_one_where_the_hub_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def silent(name: str, **options: Any) -> Path:
        asked.update(options)
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", silent)
    monkeypatch.chdir(tmp_path)
    save_network(tiny_network(), "runs/student")
    with pytest.raises(FewstepError, match="the hub does not answer; did you mean 'runs/student'"):
        load_network("runs/stdent")
    assert asked["etag_timeout"] <= 5


def test_a_hub_id_is_fetched_into_a_folder_and_loaded_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(tiny_network(), tmp_path / "there")
    fetched: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        for pattern in allow_patterns:
            for file in (tmp_path / "there").glob(pattern):
                fetched.append(file.name)
                (tmp_path / "here").mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / "here")
        return str(tmp_path / "here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_network("some/model", device="cpu").name == "some/model"
    assert sorted(fetched) == ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                               "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


def with_tokenizer(folder: Path, **changes: Any) -> Path:
    network = tiny_network("bidirectional")
    for name, value in changes.items():
        if name == "words":
            network.tokenizer.add_tokens(value)
        else:
            network.tokenizer.add_special_tokens({name: value})
    network.module.save_pretrained(folder)
    for key, value in network.role.to_config().items():
        setattr(network.module.config, key, value)
    network.module.config.save_pretrained(folder)
    network.tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_a_row_in_the_embeddings_is_told_by_name_and_sizes(tmp_path: Path) -> None:
    model = LanguageModel(load_network(with_tokenizer(tmp_path / "word", words=["hello"]), device="cpu"))
    assert model.generate("fine", max_new_tokens=4).num_tokens
    sentence = r"embeddings for 64 tokens, and none for the token 'hello' with the id 64 of its tokenizer, which has 65"
    with pytest.raises(FewstepError, match=sentence):
        model.generate("hello", max_new_tokens=4)
    with pytest.raises(FewstepError, match="'hello' with the id 64"):
        model.infill("hello", num_tokens=4)
    with pytest.raises(FewstepError, match="none for the token '<end>' with the id 64"):
        load_network(with_tokenizer(tmp_path / "end", eos_token="<end>"), device="cpu")


def test_a_pad_token_without_a_row_is_not_needed(tmp_path: Path) -> None:
    added = LanguageModel(load_network(with_tokenizer(tmp_path / "pad", pad_token="[PAD]"), device="cpu"))
    usual = LanguageModel(load_network(with_tokenizer(tmp_path / "usual"), device="cpu"))
    prompts = ["hi", "a longer prompt than the other"]
    for one, other in zip(*(m.generate(prompts, max_new_tokens=8) for m in (added, usual)), strict=True):
        assert one.token_ids == other.token_ids
