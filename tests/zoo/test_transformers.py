"""Language models of transformers: tied weights, experts in one tensor, bfloat16."""

from __future__ import annotations

from tests.zoo.language import gpt2, llama, logits, mixtral
from tests.zoo.ways import Model, cases, check

MODELS = {
    "tied": Model(lambda: llama(tie_word_embeddings=True), logits),
    "untied": Model(lambda: llama(tie_word_embeddings=False), logits),
    "experts": Model(mixtral, logits),
    "bfloat16 tied": Model(gpt2, logits),
}


@cases(MODELS)
def test_a_language_model(model: Model, way: str) -> None:
    check(model, way)
