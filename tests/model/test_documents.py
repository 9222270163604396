"""--document-mask in the model: a window of several documents is these documents, each computed alone."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt2xla.config import ModelConfig
from gpt2xla.generation.decoding import generate
from gpt2xla.model.attention import chunked_attention, kept_attention
from gpt2xla.model.documents import document_starts
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels

CONFIG = ModelConfig(vocab_size=31, seq_length=23, d_model=32, num_layers=2, num_heads=2)
END = 7  # the id that begins a document
# The places of end-of-text tokens in each window: at both ends, in runs, at chunks' borders and beside them, everywhere.
ENDS = [[0, 4, 5, 6, 11, 12, 22], [1, 17, 18], [], list(range(23))]
KERNELS = {
    "sdpa": Kernels(),
    "kept": Kernels(attention=kept_attention),
    "chunked": Kernels(attention=chunked_attention, separate_qkv=True),
    "checkpointed": Kernels(attention=kept_attention, checkpoint=partial(checkpoint, use_reentrant=False)),
}


def model_with(kernels: Kernels, end_of_text: int | None, config: ModelConfig = CONFIG) -> GPT2:
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    model.kernels, model.end_of_text = kernels, end_of_text
    return model.double()


def windows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(END + 1, 31, (len(ENDS), 24), generator=torch.Generator().manual_seed(0))
    for row, places in zip(ids, ENDS, strict=True):
        row[places] = END
    return ids[:, :-1], ids[:, 1:]


def one_by_one(ids_BT: Tensor) -> list[tuple[int, slice]]:
    """Return the row and the place of each document."""
    found = []
    for row, ids in enumerate(ids_BT.tolist()):
        cuts = sorted({0, len(ids), *(place for place, i in enumerate(ids) if i == END)})
        found += [(row, slice(*pair)) for pair in itertools.pairwise(cuts)]
    return found


def test_starts_are_those_of_a_loop() -> None:
    ids, _ = windows()
    expected = torch.empty_like(ids)
    for row, place in one_by_one(ids):
        expected[row, place] = place.start
    assert document_starts(ids, END).tolist() == expected.tolist()
    assert document_starts(ids[:, :1], END).tolist() == [[0]] * len(ids)


@pytest.mark.parametrize("name", KERNELS)
def test_a_window_is_its_documents_one_by_one(name: str) -> None:
    """Logits, loss and gradients, in float64; of chunked attention, whose scores are fp32, to fp32's digits."""
    ids, labels = windows()
    documents = one_by_one(ids)
    assert len(documents) == 7 + 4 + 1 + 23
    packed, alone = model_with(KERNELS[name], END), model_with(Kernels(), None)
    logits = packed.logits(ids)
    most = 1e-6 if name == "chunked" else 1e-12
    expected_loss = torch.zeros(())
    for row, place in documents:
        pieces = ids[row : row + 1, place], labels[row : row + 1, place]
        expected = alone.logits(pieces[0])
        torch.testing.assert_close(logits[row : row + 1, place], expected, rtol=0, atol=most * 10)
        loss, _ = alone(*pieces)
        loss.backward()
        expected_loss += loss.detach()
    loss, count = packed(ids, labels)
    loss.backward()
    assert count == ids.numel()
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-6, atol=0)  # losses are summed in fp32
    for (parameter, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= most * theirs.grad.norm(), parameter


@pytest.mark.parametrize("name", KERNELS)
def test_a_window_of_one_document_is_the_same_to_the_last_bit(name: str) -> None:
    ids, labels = (x[2:3] for x in windows())
    masked, plain = (model_with(KERNELS[name], end).float() for end in (END, None))
    if name == "sdpa":  # which torch computes in another way if there is a mask
        torch.testing.assert_close(masked(ids, labels)[0], plain(ids, labels)[0], rtol=1e-6, atol=0)
    else:
        assert torch.equal(masked.logits(ids), plain.logits(ids))


def test_dropout_stays_within_documents_too() -> None:
    """Other tokens before a document change nothing in it, whatever was dropped."""
    config = dataclasses.replace(CONFIG, dropout=0.3)
    model = model_with(Kernels(), END, config).train()
    ids = windows()[0][1:2]
    other = ids.clone()
    other[0, 2:17] = 30
    drawn = []
    for each in (ids, other):
        torch.manual_seed(5)
        drawn.append(model.logits(each)[0, 17:])
    assert torch.equal(*drawn)


def test_generation_does_not_look_at_it() -> None:
    prompt = windows()[0][0, :9].tolist()
    texts = [list(generate(model_with(Kernels(), end), [prompt], 8)) for end in (END, None)]
    assert texts[0] == texts[1]
