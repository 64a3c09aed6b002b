"""Find the text that is most similar to a question, by the angle between their embeddings."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("VLLM_API_KEY", "none"),
)
model = client.models.list().data[0].id

TEXTS = ["The capital of Japan is Tokyo.", "Tom has a red kite.", "The little owl lived in a tree."]
QUESTION = "What is the capital of Japan?"

vectors = [entry.embedding for entry in client.embeddings.create(model=model, input=[QUESTION, *TEXTS]).data]


def similarity(left: list[float], right: list[float]) -> float:
    """Return the cosine of the angle; embeddings have length 1."""
    return sum(a * b for a, b in zip(left, right, strict=True))


question, *others = vectors
ranked = sorted(zip((similarity(question, vector) for vector in others), TEXTS, strict=True), reverse=True)
for score, text in ranked:
    print(f"{score:.2f}  {text}")
