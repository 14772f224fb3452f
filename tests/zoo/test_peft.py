"""LoRA adapters of peft, as a part of the adapted model and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.language import llama, logits
from tests.zoo.ways import Model, cases, check

peft = pytest.importorskip("peft")


def adapted() -> Any:
    """A model with an adapter that changes its outputs."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(llama(tie_word_embeddings=True), config)


def adapter_only() -> Any:
    """The same model each time, with another adapter."""
    seed = torch.randint(2**31, ()).item()
    torch.manual_seed(7)
    model = adapted()
    torch.manual_seed(int(seed))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def adapter(model: Any) -> Any:
    """The state that peft saves of it, under shorter names than those of the model."""
    return peft.get_peft_model_state_dict(model)


def parameters(model: Any) -> Any:
    """The parameters of the adapter under the names that peft saves them with."""
    return peft.get_peft_model_state_dict(model, model.state_dict(keep_vars=True))


def load_adapter(model: Any, state: Any) -> Any:
    found = peft.set_peft_model_state_dict(model, state)
    assert not found.unexpected_keys
    return model


MODELS = {
    "whole": Model(adapted, logits),
    "adapter": Model(adapter_only, logits, load_adapter, state=adapter, destination=parameters),
    "adapter into the model": Model(
        adapter_only,
        logits,
        load_adapter,
        state=adapter,
        refused=dict.fromkeys(["into", "staged", "double"], r"lora_A\.default\.weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@cases(MODELS)
def test_an_adapter(model: Model, way: str) -> None:
    check(model, way)
