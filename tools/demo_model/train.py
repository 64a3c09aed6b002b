"""Train the demo model and its draft from the grammar: `python -m tools.demo_model.train --minutes 15`.

Short documents in windows of 512 tokens first, where facts and copying are learned fastest; then all documents in
windows of 1,024, and every sixth step 2,048, so that long chats work. Only answers and plain texts are targets, and
long free texts weigh less than short exact answers.

Matrices learn with Muon, the rest with AdamW, in float32 (on a CPU without bfloat16 units autocast is four times
slower); the learning rate is constant, then falls to zero.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import attrs
import torch
import torch.nn.functional as F
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from tools.demo_model.checkpoint import load, save, train_tokenizer
from tools.demo_model.corpus_grammar import corpus
from tools.demo_model.evaluate import evaluate
from tools.demo_model.network import Network, Shape
from trio_llm.demo import demo_model_path, draft_model_path

VOCAB_SIZE = 1536
STEP_TOKENS = 3072
SHAPES = {
    "model": Shape(
        vocab_size=VOCAB_SIZE, hidden_size=160, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2
    ),
    "draft": Shape(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2, num_kv_heads=1
    ),
}
PROMPT_WEIGHT, ANSWER_WEIGHT, LONG_WEIGHT = 0.0, 1.0, 0.25
LONG_TOKENS = 56  # answers that are longer are free texts
SHORT_TOKENS = 400  # documents for the first windows


@attrs.frozen
class Document:
    """Token ids of one document and how much each weighs as a target."""

    token_ids: list[int]
    weights: list[float]


def weigh(token_ids: list[int], assistant: int) -> list[float]:
    """Weigh each token as a target: prompts not at all, short answers fully, long texts less.

    A turn is `<|im_start|>` (1), role, newline, text, `<|im_end|>` (2), newline.
    """
    weights = [PROMPT_WEIGHT] * len(token_ids)
    if token_ids[0] != 1:
        return [LONG_WEIGHT if len(token_ids) > LONG_TOKENS else ANSWER_WEIGHT] * len(token_ids)
    for start, token_id in enumerate(token_ids):
        if token_id == 1 and token_ids[start + 1] == assistant:
            end = token_ids.index(2, start) + 1
            weight = LONG_WEIGHT if end - start > LONG_TOKENS else ANSWER_WEIGHT
            weights[start + 3 : end] = [weight] * (end - start - 3)
            weights[end - 1] = ANSWER_WEIGHT
    return weights


def read_corpus(tokenizer: Tokenizer, count: int, seed: int) -> list[Document]:
    """Tokenize `count` documents of the grammar; each ends with the end of text (0)."""
    assistant = tokenizer.encode("assistant").ids[0]
    encodings: list[Encoding] = tokenizer.encode_batch_fast(list(corpus(count, seed)))
    return [Document([*e.ids, 0], [*weigh(e.ids, assistant), PROMPT_WEIGHT]) for e in encodings]


def windows(documents: list[Document], length: int, random: Random) -> Iterator[Document]:
    """Pack documents, in random order without end, into windows that begin with the start of a document.

    A document that was cut by the end of a window begins the next one, so that its end is learned too.
    """
    token_ids: list[int] = []
    weights: list[float] = []
    while True:
        for document in random.sample(documents, len(documents)):
            token_ids += document.token_ids
            weights += document.weights
            while len(token_ids) > length:
                yield Document(token_ids[: length + 1], weights[: length + 1])
                cut = length + 1 < len(token_ids)
                again = cut and len(document.token_ids) <= length
                token_ids, weights = (list(document.token_ids), list(document.weights)) if again else ([], [])


def batches(documents: list[Document], length: int, random: Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids [B, S + 1] and target weights [B, S] of one step each."""
    packed = windows(documents, length, random)
    while True:
        rows = [next(packed) for _ in range(max(1, STEP_TOKENS // length))]
        token_ids = torch.tensor([row.token_ids for row in rows])
        yield token_ids, torch.tensor([row.weights for row in rows])[:, 1:]


def weighted_loss(network: Network, token_ids: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy per target, averaged by weight."""
    wanted = weights > 0
    losses = F.cross_entropy(network(token_ids[:, :-1], wanted), token_ids[:, 1:][wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


def make_optimizers(network: Network, scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Give matrices to Muon and the rest to AdamW; `scale` lowers both learning rates."""
    matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in network.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.AdamW(others, lr=4e-3 * scale, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        torch.optim.Muon(matrices, lr=0.02 * scale, momentum=0.95, weight_decay=0.01),
    ]


def schedule(progress: float, step: int) -> float:
    """Scale the learning rate: a short warm-up, constant, and a linear fall over the last 45 percent."""
    return min(1.0, (step + 1) / 30) * min(1.0, max(0.02, (1 - progress) / 0.45))


def window_tokens(progress: float, step: int) -> int:
    """Choose a step's window: short ones for the first 55 percent, then long ones, some as long as the context."""
    if progress < 0.55:
        return 512
    return 2048 if step % 6 == 0 else 1024


def train(
    network: Network, documents: list[Document], options: argparse.Namespace, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    """Train for `options.minutes` of CPU time; write a checkpoint every two minutes and at the end."""
    optimizers = make_optimizers(network, options.learning_rate)
    bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    short = [document for document in documents if len(document.token_ids) <= SHORT_TOKENS]
    sources = {512: batches(short, 512, Random(512))}
    sources |= {length: batches(documents, length, Random(length)) for length in (1024, 2048)}
    start_s, step, saved_s, progress = time.process_time(), 0, 0.0, 0.0
    while progress < 1:
        for optimizer, rates in zip(optimizers, bases, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(progress, step)
        token_ids, weights = next(sources[window_tokens(progress, step)])
        loss = weighted_loss(network, token_ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed_s = time.process_time() - start_s
        progress = elapsed_s / (60 * options.minutes)
        if step % 20 == 0:
            print(f"step {step}  {elapsed_s:.0f} s  loss {loss.item():.3f}", flush=True)
        if elapsed_s - saved_s > 120 or progress >= 1:
            saved_s = elapsed_s
            save(checkpoint, network, tokenizer)
            print(evaluate(checkpoint), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="of CPU time, all threads together")
    parser.add_argument("--documents", type=int, default=16_000)
    parser.add_argument("--which", choices=list(SHAPES), default="model")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--resume", type=Path, default=None, help="start from this checkpoint instead of at random")
    parser.add_argument("--learning-rate", type=float, default=1.0, help="scales the learning rates")
    parser.add_argument("--seed", type=int, default=2, help="of the corpus")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.resume:
        network, tokenizer = load(options.resume)
        network.float().train()
    else:
        network, tokenizer = Network(SHAPES[options.which]), train_tokenizer(corpus(4_000, seed=1), VOCAB_SIZE)
    documents = read_corpus(tokenizer, options.documents, options.seed)
    print(f"{len(documents)} documents, {sum(len(d.token_ids) for d in documents)} tokens", flush=True)
    out = options.out or {"model": demo_model_path(), "draft": draft_model_path()}[options.which]
    train(network, documents, options, out, tokenizer)


if __name__ == "__main__":
    main()
