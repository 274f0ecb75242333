"""The distillation loss and its gradients against plain PyTorch on whole logits."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.distill.losses import CHUNK_POSITIONS, Distributions, distilled_loss
from adaptfleet.core.distill.teachers import log_probs

NUM, WIDTH, VOCABULARY = CHUNK_POSITIONS + 7, 16, 50
SPECS = [
    {"divergence": "forward_kl"},
    {"divergence": "forward_kl", "temperature": 2.5, "alpha": 0.7},
    {"divergence": "reverse_kl", "temperature": 0.7, "alpha": 1.0},
    {"divergence": "reverse_kl", "alpha": 0.2},
    {"divergence": "jsd", "beta": 0.1, "temperature": 2.0},
    {"divergence": "jsd", "alpha": 1.0},
]


def spec(**values: object) -> Distillation:
    return Distillation(teacher=ModelSpec(), **values)


def plain_divergence(s: Distillation, logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    p, q = (logits_p / s.temperature).softmax(-1), (logits_q / s.temperature).softmax(-1)
    kl = F.kl_div
    if s.divergence == "forward_kl":
        return kl(q.log(), p, reduction="sum") * s.temperature**2
    if s.divergence == "reverse_kl":
        return kl(p.log(), q, reduction="sum") * s.temperature**2
    m = s.beta * p + (1 - s.beta) * q
    return (s.beta * kl(m.log(), p, reduction="sum") + (1 - s.beta) * kl(m.log(), q, reduction="sum")) * s.temperature**2


@pytest.fixture
def heads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden": draw(NUM, WIDTH).requires_grad_(),
        "weight": (0.3 * draw(VOCABULARY, WIDTH)).requires_grad_(),
        "bias": draw(VOCABULARY).requires_grad_(),
        "theirs": draw(NUM, 24),
        "their_weight": 0.3 * draw(VOCABULARY, 24),
        "labels": torch.randint(0, VOCABULARY, (NUM,), generator=generator),
        "hard": (torch.rand(NUM, generator=generator) > 0.3).float(),
    }


def gradients(h: dict[str, torch.Tensor], loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(0.37 * loss, [h["hidden"], h["weight"], h["bias"]]))


def assert_equal(h: dict[str, torch.Tensor], ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert float(ours.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    for mine, theirs in zip(gradients(h, ours), gradients(h, reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", SPECS, ids=lambda v: "-".join(map(str, v.values())))
def test_the_loss_and_its_gradients_are_those_of_plain_pytorch(values: dict, heads: dict[str, torch.Tensor]) -> None:
    s, h = spec(**values), heads
    ours = distilled_loss(
        h["hidden"], h["weight"], h["bias"], h["labels"], h["hard"],
        lambda part: Distributions(log_probs(h["theirs"][part], h["their_weight"], None, s.temperature, VOCABULARY)), s,
    )  # fmt: skip
    logits = F.linear(h["hidden"], h["weight"], h["bias"])
    soft = plain_divergence(s, h["theirs"] @ h["their_weight"].T, logits)
    hard = (F.cross_entropy(logits, h["labels"], reduction="none") * h["hard"]).sum()
    assert_equal(h, ours, s.alpha * soft + (1 - s.alpha) * hard)


@pytest.mark.parametrize("values", SPECS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("k", [5, VOCABULARY])
def test_kept_tokens_and_the_bucket_of_the_rest(values: dict, k: int, heads: dict[str, torch.Tensor]) -> None:
    s, h = spec(**values), heads
    their_log_probs = ((h["theirs"] @ h["their_weight"].T) / s.temperature).log_softmax(-1)
    ids = their_log_probs.topk(k, dim=-1).indices
    logits = F.linear(h["hidden"], h["weight"], h["bias"])

    def merged(log_p: torch.Tensor) -> torch.Tensor:
        p = log_p.exp()
        top = p.gather(1, ids)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1) if k < VOCABULARY else top

    log_p = merged(their_log_probs).log()
    ours = distilled_loss(
        h["hidden"], h["weight"], h["bias"], h["labels"], h["hard"], lambda part: Distributions(log_p[part], ids[part]), s
    )  # fmt: skip
    # logits of the coarser distributions are their log probabilities times the temperature
    coarse = merged((logits / s.temperature).log_softmax(-1)).log() * s.temperature
    soft = plain_divergence(s, log_p * s.temperature, coarse)
    hard = (F.cross_entropy(logits, h["labels"], reduction="none") * h["hard"]).sum()
    assert_equal(h, ours, s.alpha * soft + (1 - s.alpha) * hard)
    assert float(soft.detach()) <= float(plain_divergence(s, h["theirs"] @ h["their_weight"].T, logits).detach()) * (1 + 1e-5)


def test_jsd_goes_to_the_two_kls_at_its_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4, 9, generator=generator) for _ in range(2))
    forward, reverse = (plain_divergence(spec(divergence=name), p, q) for name in ("forward_kl", "reverse_kl"))
    assert float(plain_divergence(spec(divergence="jsd", beta=1e-3), p, q)) / 1e-3 == pytest.approx(float(forward), rel=1e-2)
    assert float(plain_divergence(spec(divergence="jsd", beta=0.999), p, q)) / 1e-3 == pytest.approx(float(reverse), rel=1e-2)


def test_gradients_keep_their_size_at_any_temperature(heads: dict[str, torch.Tensor]) -> None:
    h = heads
    norms = []
    for temperature in (4.0, 16.0, 64.0):
        s = spec(temperature=temperature, alpha=1.0)
        loss = distilled_loss(
            h["hidden"], h["weight"], None, h["labels"], h["hard"],
            lambda part, s=s: Distributions(log_probs(h["theirs"][part], h["their_weight"], None, s.temperature, VOCABULARY)), s,
        )  # fmt: skip
        norms.append(float(torch.autograd.grad(loss, h["hidden"])[0].norm()))
    assert norms[2] == pytest.approx(norms[1], rel=0.2) and norms[1] == pytest.approx(norms[0], rel=0.5)


def test_heads_padded_to_different_sizes_are_compared_where_both_have_tokens(heads: dict[str, torch.Tensor]) -> None:
    s, h = spec(alpha=1.0), heads
    for theirs in (h["their_weight"][: VOCABULARY - 6], torch.cat([h["their_weight"], h["their_weight"][:6]])):
        ours = distilled_loss(
            h["hidden"], h["weight"], h["bias"], h["labels"], h["hard"],
            lambda part, theirs=theirs: Distributions(log_probs(h["theirs"][part], theirs, None, s.temperature, VOCABULARY)), s,
        )  # fmt: skip
        shared = min(len(theirs), VOCABULARY)
        logits = F.linear(h["hidden"], h["weight"], h["bias"])[:, :shared]
        assert_equal(h, ours, plain_divergence(s, h["theirs"] @ theirs[:shared].T, logits))


def test_no_position_gives_no_loss_and_no_gradient(heads: dict[str, torch.Tensor]) -> None:
    h = heads
    loss = distilled_loss(
        h["hidden"][:0], h["weight"], None, h["labels"][:0], h["hard"][:0], lambda part: Distributions(torch.zeros(0, VOCABULARY)), spec()
    )  # fmt: skip
    assert float(loss.detach()) == 0 and all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(loss, [h["hidden"], h["weight"]]))
