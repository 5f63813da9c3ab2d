"""The recorded pass against the eager one: what it holds, what it refuses, and when it is made anew."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_model import SIZE, TINY_PAPER, noise, small_model, thin_backbone
from test_model import COLUMNS
from torch import Tensor, nn

from smope import SMOPE, Poses
from smope.inference import engine
from smope.inference.record import NotRecordable, record
from smope.inference.simplify import launches, simplify
from smope.networks.backbone import EfficientNetLite2, ResNet50V2
from smope.networks.paper_find import PaperTokens
from smope.networks.resnet import Bottleneck
from smope.networks.smope_paper import SmopePaper, SmopePaperConfig
from smope.results import find_table

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def shared() -> SMOPE:
    return small_model()


@pytest.fixture
def model(shared: SMOPE) -> SMOPE:
    return copy.deepcopy(shared)


def assert_alike(found: Poses, expected: Poses, bound: float) -> None:
    assert found.names == expected.names
    for column in COLUMNS:
        torch.testing.assert_close(getattr(found, column), getattr(expected, column), rtol=bound, atol=bound)


def recorded(function: Callable[..., Tensor], *inputs: Tensor) -> torch.fx.GraphModule:
    with torch.no_grad():
        return record(function, inputs)


def test_what_follows_from_constants_is_not_in_the_graph_and_equal_steps_are_one() -> None:
    weight = torch.randn(4, 4)

    def function(x: Tensor) -> Tensor:
        scaled = (weight * 2).softmax(-1) @ torch.arange(4.0)
        return (x + scaled) * (x + scaled).relu_() + torch.zeros_like(x)

    x = torch.randn(3, 4)
    graph = recorded(function, x)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["aten.add.Tensor", "aten.relu.default", "aten.mul.Tensor", "aten.add.Tensor"]
    other = torch.randn(3, 4)
    assert torch.equal(graph(other), function(other))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero().float(),
        lambda x: x.relu_()[0] + x.view(-1)[0].add_(1) + x,
    ],
)
def test_what_waits_for_the_device_or_writes_through_a_view_is_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(NotRecordable):
        recorded(function, torch.randn(3, 4))


@pytest.mark.parametrize(("kind", "share"), [(EfficientNetLite2, 0.7), (ResNet50V2, 0.95)])
def test_backbones_keep_their_features_when_simplified(kind: type[nn.Module], share: float) -> None:
    torch.manual_seed(0)
    backbone = kind().eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)

    def features(images: Tensor) -> Tensor:
        return torch.cat([x.flatten() for x in backbone(images)])

    images = torch.rand(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    graph = recorded(features, images)
    before = launches(graph)
    simplify(graph)
    assert launches(graph) < share * before
    with torch.no_grad():
        expected = features(images)
        assert (graph(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_norms_of_a_bottleneck_are_folded_exactly() -> None:
    torch.manual_seed(0)
    block = Bottleneck(8, 4, 2, 1).eval()
    for norm in (block.bn1, block.bn2, block.bn3, block.downsample[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.bias.normal_()
    x = torch.randn(2, 8, 10, 12).contiguous(memory_format=torch.channels_last)
    graph = recorded(block, x)
    simplify(graph)
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), block(x), rtol=1e-5, atol=1e-5)


def test_the_fast_pass_is_the_default_on_a_gpu_alone(model: SMOPE) -> None:
    assert not model.fast
    model.predict(noise(0))
    assert not model._engine._programs
    model.fast = True
    assert copy.deepcopy(model).fast
    if torch.cuda.is_available():
        assert small_model().to("cuda").fast


def test_fast_pass_finds_what_the_eager_one_does(model: SMOPE) -> None:
    images = [noise(seed) for seed in range(3)]
    expected = model.predict(images, threshold=0.0)
    model.fast = True
    for found, wanted in zip(model.predict(images, threshold=0.0), expected, strict=True):
        assert_alike(found, wanted, 1e-3)
    assert_alike(model.predict(images[1], threshold=0.0), expected[1], 1e-3)


def test_fast_pass_of_the_authors_network(monkeypatch: pytest.MonkeyPatch) -> None:
    thin_backbone(monkeypatch)
    torch.manual_seed(0)
    like = small_model()
    config = SmopePaperConfig(**TINY_PAPER, classes=2)  # type: ignore[arg-type]
    tokens = {n: PaperTokens(torch.randn(1, config.width), m.centre[None]) for n, m in like.objects.items()}
    described = replace(like.config, architecture="smope-paper", network=config)
    model = SMOPE(SmopePaper(config), described, like.objects, tokens)
    expected = model.predict(noise(0), threshold=0.0)
    model.fast = True
    assert_alike(model.predict(noise(0), threshold=0.0), expected, 1e-3)


def test_graphs_are_made_once_a_shape_and_kept_to_a_bound(
    model: SMOPE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = []

    class Stand:
        """In place of a program: what it was made for, and the same result"""

        def __init__(
            self, function: Callable[..., Tensor], images: Tensor, K: Tensor, kind: torch.dtype, pool: object
        ) -> None:
            made.append(tuple(images.shape))
            self.function = function

        def start(self, images: list[Tensor], K: Tensor) -> None:
            assert len(images) == len(K)

        def table(self, count: int) -> Tensor:
            return torch.zeros(count, 4, 24)

    monkeypatch.setattr(engine, "Program", Stand)
    monkeypatch.setattr(engine, "KEPT", 2)
    monkeypatch.setattr(engine, "LARGEST_BATCH", 4)
    monkeypatch.setattr(engine, "find_table", lambda network, images, *rest: torch.ones(len(images), 4, 24))
    run, tokens = model._engine, model._tokens
    assert tokens is not None
    run.fast = True

    def ask(count: int, height: int = 64) -> Tensor:
        return run([torch.zeros(3, height, 96)] * count, torch.eye(3).repeat(count, 1, 1), tokens, 32)

    with caplog.at_level(logging.INFO, logger="smope"):
        assert len(ask(3)) == 3
        assert len(ask(4)) == 4
        assert len(ask(7)) == 7
    assert made == [(4, 3, 64, 96)]  # 7 are 4 and 3, and 3 fill up to 4
    assert len([r for r in caplog.records if "made the fast pass" in r.message]) == 1
    ask(1)
    assert made[1:] == [(1, 3, 64, 96)]
    assert ask(1, 32).all()  # a third shape goes without, until it has come three times
    assert ask(1, 32).all()
    assert not ask(1, 32).any()
    assert made[2:] == [(1, 3, 32, 96)]
    ask(1)
    ask(4)  # the one used least lately had to go
    assert made[3:] == []
    assert len(run._programs) == 2


def test_other_meshes_and_other_weights_are_recorded_anew(model: SMOPE) -> None:
    model.fast = True
    both = model.predict(noise(0), threshold=0.0)
    model.register_meshes(["brick"])
    assert set(model.predict(noise(0), threshold=0.0).names) == {"brick"}
    model.register_meshes(["ball", "brick"])
    with torch.no_grad():
        model.network.similarity.bias += 1.0  # type: ignore[operator,union-attr]
    changed = model.predict(noise(0), threshold=0.0)
    model.fast = False
    assert_alike(changed, model.predict(noise(0), threshold=0.0), 1e-3)
    assert changed.scores[0] > both.scores[0] + 0.01


def test_a_network_that_cannot_be_recorded_runs_eagerly_and_says_so(
    model: SMOPE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def waiting(*arguments: object) -> Tensor:
        table = find_table(*arguments)  # type: ignore[arg-type]
        assert float(table.sum()) != 0
        return table

    expected = model.predict(noise(0), threshold=0.0)
    monkeypatch.setattr(engine, "find_table", waiting)
    model.fast = True
    for _ in range(2):
        assert_alike(model.predict(noise(0), threshold=0.0), expected, 0.0)
    assert len([r for r in caplog.records if "cannot run as a recorded graph" in r.message]) == 1


def test_sixteen_bit_weights_stand_in_the_graph_and_scores_stay_near(model: SMOPE) -> None:
    """Under autocast, as on a GPU: no weight is rounded anew in each pass."""
    images = noise(0)[None].contiguous(memory_format=torch.channels_last)
    K = torch.tensor(model.config.K)[None]
    tokens = model._tokens
    assert tokens is not None

    def function(images: Tensor, K: Tensor) -> Tensor:
        return find_table(model.network, images, K, tokens, 8)

    with torch.no_grad():
        exact = function(images, K)
        with torch.autocast("cpu", torch.bfloat16):
            graph = record(function, (images, K))
        simplify(graph)
        narrow = graph(images, K)
    casts = [n for n in graph.graph.nodes if "_to_copy" in str(n.target)]
    assert not any(n.args[0].op == "get_attr" for n in casts)
    convolutions = [n for n in graph.graph.nodes if "convolution" in str(n.target)]
    assert {n.args[1].meta["val"].dtype for n in convolutions} == {torch.bfloat16}
    assert (narrow[..., 0] - exact[..., 0]).abs().max() < 0.02


@needs_gpu
@pytest.mark.parametrize("count", [1, 3])
def test_fast_pass_on_a_gpu_stays_near_float32(model: SMOPE, count: int) -> None:
    model.to("cuda")
    images = [noise(seed).cuda() for seed in range(count)]
    model.fast = False
    expected = model.predict(images, threshold=0.0)
    model.fast = True
    for _ in range(2):
        found = model.predict(images, threshold=0.0)
        (program,) = model._engine._programs.values()
        assert program.kernels
        for mine, wanted in zip(found, expected, strict=True):
            assert abs(float(mine.scores[0] - wanted.scores[0])) < 0.02


def test_uint8_on_the_models_device_is_not_copied_through_the_cpu(model: SMOPE) -> None:
    from smope.images import load_image

    images = noise(0)
    assert load_image(images, torch.device("cpu")).device == images.device
    assert model.config.image_size == SIZE
