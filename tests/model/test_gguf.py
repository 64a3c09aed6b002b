from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.gguf.files import random_blocks, write
from tests.model.as_stored import check_as_stored
from tests.model.families import SHAPED, SMALL, VOCAB
from tests.model.golden import FP32_TOLERANCE, Golden, max_difference
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint.gguf import FORMATS, open_gguf
from trio_llm.model.loading.loader import LoadedModel, inspect_model, load_model
from trio_llm.model.ops.matrices import Blocks, Stacked
from trio_llm.model.ops.torch_reference import dequantize

Q = gguf.GGMLQuantizationType
CPU = torch.device("cpu")


def _load(path: Path, *, as_stored: bool = False, **settings: Any) -> LoadedModel:
    return load_model(inspect_model(EngineConfig(model=str(path), block_size=4, **settings), as_stored=as_stored), CPU)


FAMILIES = (
    "llama", "llama3-rope-gqa-tied", "qwen2", "qwen3", "qwen3-moe", "mistral", "mixtral", "gemma4-e2b", "gemma4-26b",
    "gemma4-31b",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_it_was_made_from(
    family: str, golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """A float32 GGUF file gives transformers' logits: names, order of rows, experts and rope factors are right."""
    made = golden(family)
    path = write(made.oracle, tmp_path / "model.gguf")
    assert max_difference(_load(path, dtype="float32"), made, 7) < FP32_TOLERANCE


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_widened_as_the_library_does(name: str, tmp_path: Path) -> None:
    """Each element of a tensor of each format is what the gguf package makes of its block, across chunks, too."""
    kind = Q[name]
    rows, columns = 5, 512
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_token_list(["a", "b"])
    if name in ("F32", "F16"):
        data: Any = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.dtype(name.replace("F", "float")))
        writer.add_tensor("token_embd.weight", data)
    else:
        data = random_blocks(kind, rows, columns)
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, _, checkpoint = open_gguf(path)
    info = checkpoint.tensors["model.embed_tokens.weight"]
    assert (info.dtype, info.shape) == (name, (rows, columns))
    expected = gguf.dequantize(data, kind) if name not in ("F32", "F16") else data.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_llm.model.checkpoint.gguf._CHUNK_ELEMENTS", 2 * columns)
        reader = checkpoint.open()
        found = reader.read(info)
        torch.testing.assert_close(found.float(), torch.from_numpy(expected), rtol=0, atol=0)
    assert found.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
    if info.template is None:
        assert name in ("F32", "F16", "BF16")
    else:
        stored, template = reader.read_stored(info), info.template()
        torch.testing.assert_close(dequantize(stored), torch.from_numpy(expected.copy()), rtol=0, atol=0)
        assert stored.fits(Blocks.fused([stored, stored]))
        assert (template.nbytes, template.inputs, template.fits(stored)) == (stored.nbytes, columns, True)
    reader.close()


def _quantised(family: str, path: Path, kind_of: Callable[[str], gguf.GGMLQuantizationType]) -> Golden:
    """Write a family's model with quantised matrices; return transformers' logits for the same weights, widened."""
    torch.manual_seed(3)
    width = {"hidden_size": 64, "intermediate_size": 96} | ({"moe_intermediate_size": 32} if "moe" in family else {})
    model = SHAPED[family](**width).float().eval()
    write(model, path, kind_of)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1 and (kind := kind_of(name)) != Q.F32:
            tensor.data = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.data.numpy(), kind), kind).copy())
    prompts = [torch.randint(3, VOCAB, (n,)).tolist() for n in (33, 9)]
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
    return Golden(path, model, prompts, logits, [])


def _mixed(name: str) -> gguf.GGMLQuantizationType:
    """Quantise as published files do, values and the feed-forward's last matrix in more bits than the rest."""
    return Q.Q8_0 if "v_proj" in name or "down_proj" in name else Q.F32 if "k_proj" in name else Q.Q4_1


KINDS = {"Q4_0": lambda _: Q.Q4_0, "Q4_1": lambda _: Q.Q4_1, "Q8_0": lambda _: Q.Q8_0, "mixed": _mixed}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SHAPED)
def test_stored_blocks_compute_what_widened_weights_do(family: str, kind: str, tmp_path: Path) -> None:
    """Every family, dense and sparse, fused and stacked: exactly by the reference, within the rounding by kernels."""
    made = _quantised(family, tmp_path / "model.gguf", KINDS[kind])
    path, names = made.directory, {"Q4_1", "Q8_0"} if kind == "mixed" else {kind}
    loaded = check_as_stored(lambda: _load(path, as_stored=True, dtype="float32"), made, family)
    assert set(loaded.plan.kept_formats) == names
    first = loaded.model.layers[0].attention.qkv  # type: ignore[attr-defined]
    assert isinstance(first, Stacked if kind == "mixed" else Blocks)
    assert loaded.plan.weight_bytes < _load(path, dtype="float32").plan.weight_bytes * (0.5 if kind == "mixed" else 0.4)


def test_a_quantised_file_equals_its_widened_twin(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """Widened, 8-bit blocks give the logits of a model that holds the same values in float32."""
    import transformers

    torch.manual_seed(3)
    shape = {**SMALL, "hidden_size": 64, "intermediate_size": 96}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).float().eval()
    path = write(model, tmp_path / "model-q8.gguf", lambda _: Q.Q8_0)
    for tensor in model.parameters():
        if tensor.ndim == 2:
            tensor.data = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.data.numpy(), Q.Q8_0), Q.Q8_0).copy())
    twin = write(model, tmp_path / "twin.gguf")
    first, second = (_load(file, dtype="float32") for file in (path, twin))
    for ours, theirs in zip(first.model.layers, second.model.layers, strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(ours.attention.qkv.weight, theirs.attention.qkv.weight, rtol=0, atol=0)
        torch.testing.assert_close(ours.mlp.down.weight, theirs.mlp.down.weight, rtol=0, atol=0)
    assert first.plan.stored_bytes < 0.4 * second.plan.stored_bytes
    assert set(first.plan.stored_formats) == {"Q8_0", "F32"}


def test_shards_are_one_checkpoint(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """A model split over files is named by its first one; a directory with only that is enough; a gap is an error."""
    made = golden("qwen3")
    whole = write(made.oracle, tmp_path / "whole.gguf")
    shards = _split(whole, tmp_path / "parts", 3)
    assert max_difference(_load(shards[0], dtype="float32"), made, None) < FP32_TOLERANCE
    assert max_difference(_load(shards[0].parent, dtype="float32"), made, None) < FP32_TOLERANCE
    with pytest.raises(CheckpointError, match="name the first one"):
        _load(shards[1])
    shards[2].unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf: no such file"):
        _load(shards[0])


def _split(path: Path, directory: Path, count: int) -> list[Path]:
    directory.mkdir()
    reader = gguf.GGUFReader(path)
    paths = [directory / f"model-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    for number, target in enumerate(paths):
        writer = gguf.GGUFWriter(target, "qwen3")
        for name, field in reader.fields.items() if number == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind = field.types[0]
                writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_what_is_not_here_is_refused_by_name(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """An architecture and a format that nothing here computes are named, with those that are."""
    path = tmp_path / "model.gguf"
    for architecture, kind, expected in (
        ("falcon", Q.F32, "general.architecture = 'falcon' is not supported; llama"),
        ("qwen2", Q.IQ1_S, "token_embd.weight is stored as IQ1_S; F32, F16"),
    ):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_token_list(["a", "b"])
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((2, 256 // block * block_bytes), np.uint8)
        writer.add_tensor("token_embd.weight", data if block > 1 else data.view(np.float32), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedError, match=expected):
            inspect_model(EngineConfig(model=str(path)))


def test_several_files_in_a_directory_are_a_question(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """Quantisations of one model side by side: the error lists them, to name one."""
    for name in ("a-Q4.gguf", "a-Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files; name one of them: a-Q4\.gguf, a-Q8\.gguf"):
        inspect_model(EngineConfig(model=str(tmp_path)))
