"""Our attention against PyTorch's own module of the same weights: results, gradients, and how it starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smope.inference.record import record
from smope.inference.simplify import launches
from smope.networks.deformable import DecoderLayer
from smope.networks.self_attention import MultiheadAttention

WIDTH, HEADS, QUERIES, KEYS = 32, 4, 7, 5


def pair_of(dropout: float = 0.0) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    mine = MultiheadAttention(WIDTH, HEADS, dropout)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dropout, batch_first=True)
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def test_names_and_first_values_are_pytorchs() -> None:
    torch.manual_seed(3)
    mine = MultiheadAttention(WIDTH, HEADS)
    after = torch.rand(1)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert torch.equal(torch.rand(1), after)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value)


# query, key and value of three tensors
GIVEN: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "one": lambda a, b, c: (a, a, a),
    "placed": lambda a, b, c: (a, a, b),
    "memory": lambda a, b, c: (a, c, c),
    "apart": lambda a, b, c: (a, c, c.flip(1)),
    "returning": lambda a, b, c: (a, b, a),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", GIVEN)
def test_results_and_gradients_are_pytorchs(kind: str, masked: bool) -> None:
    mine, theirs = pair_of()
    tensors = [torch.randn(2, n, WIDTH) for n in (QUERIES, QUERIES, KEYS)]
    found = []
    for layer in (mine, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        query, key, value = GIVEN[kind](*leaves)
        blocked = torch.ones(QUERIES, key.shape[1], dtype=torch.bool).triu(1) if masked else None
        if isinstance(layer, nn.MultiheadAttention):
            y = layer(query, key, value, attn_mask=blocked, need_weights=False)[0]
        else:
            y = layer(query, key, value, blocked)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        found.append([y.detach(), *(x.grad for x in (*leaves, *layer.parameters()))])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_what_is_blocked_is_not_read() -> None:
    mine, _ = pair_of()
    x = torch.randn(1, QUERIES, WIDTH)
    blocked = torch.eye(QUERIES, dtype=torch.bool).roll(1, 1)
    changed = x.clone()
    changed[0, 3] += 1.0
    with torch.no_grad():
        before, after = (mine(x, x, value, blocked)[0] for value in (x, changed))
    assert [row for row in range(QUERIES) if torch.equal(before[row], after[row])] == [2]


def test_dropout_is_for_training_alone() -> None:
    mine, theirs = pair_of(dropout=0.5)
    x = torch.randn(1, QUERIES, WIDTH)
    with torch.no_grad():
        assert not torch.equal(mine(x, x, x), mine(x, x, x))
        mine.eval()
        theirs.eval()
        expected = theirs(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(mine(x, x, x), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_stays_near_float32() -> None:
    mine, _ = pair_of()
    a, b = torch.randn(2, QUERIES, WIDTH), torch.randn(2, QUERIES, WIDTH)
    exact = mine(a, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = mine(a, a, b)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - exact).norm() < 0.02 * exact.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_it_compiles_to_one_graph() -> None:
    mine, _ = pair_of()
    a, b = torch.randn(2, QUERIES, WIDTH), torch.randn(2, QUERIES, WIDTH)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, a, b), mine(a, a, b))


def test_a_recorded_layer_copies_nothing() -> None:
    """Two products before, one after, attention between; under autocast a cast of each input besides."""
    mine, _ = pair_of()
    a, b = torch.randn(1, QUERIES, WIDTH), torch.randn(1, QUERIES, WIDTH)
    with torch.no_grad():
        graph = record(lambda a, b: mine(a, a, b), (a, b))
        with torch.autocast("cpu", torch.bfloat16):
            narrow = record(lambda a, b: mine(a, a, b), (a, b))
    assert launches(graph) == 4
    assert launches(narrow) == 4 + 2


def test_a_decoder_layer_takes_weights_of_pytorchs_attention() -> None:
    layer = DecoderLayer(WIDTH, HEADS, 2, 2, 64)
    names = {name for name in layer.state_dict() if name.startswith("self_attn.")}
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).state_dict()
    assert names == {f"self_attn.{name}" for name in theirs}
