"""Write a model as large as Qwen3-0.6B with random weights: `python benchmarks/random_gguf.py DIR [--kind BF16 Q8_0]`.

For `benchmarks/cpu.py --gguf`, where no published file of that size is at hand. The files are named
`DIR/Qwen3-0.6B-random.KIND.gguf`. Speed does not depend on what the weights are. The vocabulary is made up, so the
model writes nonsense. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 28, 1024, 3072, 16, 8, 128, 151_936
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of all tensors; the head shares its matrix with the embedding."""
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for layer in range(LAYERS):
        sizes = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_q_norm": (HEAD_DIM,),
            "attn_k_norm": (HEAD_DIM,),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        for name, shape in sizes.items():
            yield f"blk.{layer}.{name}.weight", shape


def write(path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write the model; matrices in `kind`, vectors in float32."""
    writer = gguf.GGUFWriter(path, "qwen3")
    settings: dict[Any, int | float] = {
        writer.add_context_length: 40_960,
        writer.add_embedding_length: HIDDEN,
        writer.add_block_count: LAYERS,
        writer.add_feed_forward_length: INTERMEDIATE,
        writer.add_head_count: HEADS,
        writer.add_head_count_kv: KV_HEADS,
        writer.add_key_length: HEAD_DIM,
        writer.add_value_length: HEAD_DIM,
        writer.add_rope_dimension_count: HEAD_DIM,
        writer.add_rope_freq_base: 1e6,
        writer.add_layer_norm_rms_eps: 1e-6,
        writer.add_vocab_size: VOCAB,
        writer.add_eos_token_id: 0,
    }
    for add, value in settings.items():
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (VOCAB - 1))
    writer.add_token_merges(["t 0"])
    numbers = np.random.default_rng(0)
    for name, shape in shapes():
        values: NDArray[np.float32] = numbers.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + 0.1 * values)
        elif kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, 0.02 * values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(0.02 * values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write one file for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=["BF16", "Q8_0"])
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    for kind in args.kind:
        path = args.directory / f"Qwen3-0.6B-random.{kind}.gguf"
        write(path, gguf.GGMLQuantizationType[kind])
        print(path)


if __name__ == "__main__":
    main()
