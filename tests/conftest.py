"""Fixtures that several files of tests name."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Also where there is a GPU: what is compared bit for bit is compared on a processor. `test_cuda.py` asks for the GPU.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def double() -> Iterator[None]:
    """fp64 unless told otherwise, and the same random numbers in every test."""
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(standard)


@pytest.fixture
def one_thread() -> None:
    """One thread, as tiny networks are faster with, and the same random numbers in every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nBe brief.</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template, on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(["two and two are four, said the user to the assistant"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return folder
