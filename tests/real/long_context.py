"""Record what transformers makes of a text as long as SmolLM2's context, as the reference of test_served.py.

Run it from the repository's folder, with the checkpoint that smollm2.py makes; it takes minutes and 8 GB:

    python -m tests.real.long_context DIRECTORY

It writes long_context.json beside this module: of each 1,024 tokens the mean negative log-likelihood, in float32.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from tests.real.corpus import PROSE

RECORD = Path(__file__).with_name("long_context.json")
NUM_TOKENS, PART = 8160, 1024


def long_text() -> str:
    """Return more than 8,192 tokens: sentences in a random order, most of which the model has read before."""
    sentences = re.split(r"(?<=\.)\s+", PROSE.strip())
    return " ".join(random.Random(1).choices(sentences, k=500))


def main(directory: Path) -> None:
    """Compute and write the record."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    ids = torch.tensor(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(long_text()).ids[:NUM_TOKENS])
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model.model(ids[None]).last_hidden_state[0, :-1]
        losses = [
            torch.nn.functional.cross_entropy(model.lm_head(some), wanted, reduction="none")
            for some, wanted in zip(hidden.split(PART), ids[1:].split(PART), strict=True)
        ]
    record = {"transformers": transformers.__version__, "losses": [round(float(each.mean()), 6) for each in losses]}
    RECORD.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
