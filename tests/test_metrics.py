"""Metrics: losses per example as PyTorch computes them, little memory, and bad input says what to do."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparingly import metrics
from sparingly._data import batches
from sparingly.metrics import accuracy, agreement, as_metric, observe, perplexity

CLASSES = 11


class Language(nn.Module):
    """ids [n, T] -> logits [n, T, classes]."""

    def __init__(self, output=None):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.out = nn.Linear(8, CLASSES)
        self.output = output

    def forward(self, ids):
        logits = self.out(self.embed(ids))
        return self.output(logits) if self.output else logits


@pytest.fixture
def model():
    return Language()


@pytest.fixture
def ids():
    return torch.randint(CLASSES, (5, 9))


def expected(model, ids):
    losses = nn.functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1).double().detach()


@pytest.mark.parametrize("chunk", [1, 4 * CLASSES, 1 << 22])
def test_log_loss_per_window_a_few_logits_at_a_time(model, ids, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    sizes, real = [], nn.functional.cross_entropy
    monkeypatch.setattr(
        nn.functional,
        "cross_entropy",
        lambda part, *rest, **more: sizes.append(part.numel()) or real(part, *rest, **more),
    )
    losses = observe(perplexity, model, ids)
    assert max(sizes) <= max(chunk, CLASSES)
    torch.testing.assert_close(losses, expected(model, ids), rtol=1e-6, atol=0)
    assert losses.dtype == torch.float64 and losses.shape == (5,)
    assert perplexity.quality(losses, losses) == pytest.approx(math.exp(float(losses.mean())))


def test_batches_of_any_kind_give_the_same(model, ids):
    whole = observe(perplexity, model, ids)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2)
    for data in ([ids[:2], ids[2:]], (part for part in ids.split(3)), loader, (ids,), ids.int()):
        torch.testing.assert_close(observe(perplexity, model, data), whole)


def test_a_mapping_goes_in_by_keyword_and_padding_does_not_count(ids):
    class Named(Language):
        def forward(self, input_ids, attention_mask=None, use_cache=True):
            assert attention_mask is not None and use_cache is False
            return SimpleNamespace(logits=super().forward(input_ids))

    model = Named()
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[1, :3] = 0
    losses = observe(perplexity, model, {"input_ids": ids, "attention_mask": mask})
    plain = Language()
    plain.load_state_dict(model.state_dict())
    for row, part in ((0, ids[:1, :4]), (1, ids[1:2, 3:]), (2, ids[2:3])):
        assert float(losses[row]) == pytest.approx(float(expected(plain, part)), rel=1e-6)
    mask[2] = 0
    with pytest.raises(ValueError, match="attention_mask leaves in, got fewer in row 2"):
        observe(perplexity, model, {"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"attention_mask must be as token ids \[5, 9\], got \[5, 8\]"):
        observe(perplexity, model, {"input_ids": ids, "attention_mask": mask[:, 1:]})


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (3, 12))
    losses = observe(perplexity, model, ids)
    theirs = [float(model(input_ids=row[None], labels=row[None]).loss.detach()) for row in ids]
    assert losses.tolist() == pytest.approx(theirs, rel=1e-5)
    answers = observe(agreement, model, transformers.BatchEncoding({"input_ids": ids}))
    assert answers.shape == (3, 12)


def test_half_precision_is_summed_in_single(ids):
    model = Language().bfloat16()
    exact = nn.functional.cross_entropy(model(ids).float()[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(observe(perplexity, model, ids), exact.double().mean(1).detach(), rtol=1e-6, atol=0)


def test_accuracy_counts_right_answers():
    inputs, model = torch.eye(4), nn.Linear(4, 4, bias=False)
    nn.init.eye_(model.weight)
    targets = torch.tensor([0, 1, 2, 0])
    losses = observe(accuracy, model, (inputs, targets))
    assert losses.tolist() == [0, 0, 0, 1]
    assert accuracy.quality(losses, losses) == 0.75
    model.weight.data[0, 0] = -1
    worse = observe(accuracy, model, [(inputs, targets)])
    drops = accuracy.drops(losses, worse)
    assert drops.tolist() == [1, 0, 0, 0]
    assert accuracy.promise(0.1).bounds == (-1.0, 1.0)
    shares = observe(accuracy, Language(), (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)))
    assert shares.shape == (2,)


def test_agreement_is_with_the_dense_answers(ids):
    model = nn.Linear(4, 6)
    inputs = torch.randn(20, 4)
    dense = observe(agreement, model, inputs)
    assert torch.equal(dense, model(inputs).argmax(1))
    assert agreement.quality(dense, dense) == 1.0
    other = dense.clone()
    other[3] = (other[3] + 1) % 6
    drops = agreement.drops(dense, other)
    assert drops.dtype == torch.bool and drops.nonzero().tolist() == [[3]]
    assert agreement.quality(dense, other) == pytest.approx(0.95)
    # A loader over inputs and targets serves as well; for each position of a window there is an answer.
    assert torch.equal(observe(agreement, model, [[inputs, torch.zeros(20)]]), dense)
    windows = observe(agreement, Language(), ids)
    other = windows.clone()
    other[1, :3] += 1
    assert agreement.drops(windows, other).tolist() == pytest.approx([0, 1 / 3, 0, 0, 0])
    assert agreement.promise(0.01).bounds == (0.0, 1.0)


def test_relative_and_absolute_promises():
    assert perplexity.promise(0.01).limit == pytest.approx(math.log(1.01))
    assert perplexity.promise(0.01).bounds is None
    assert accuracy.promise(0.01, 0.9).limit == 0.01
    with pytest.raises(ValueError, match="max_drop"):
        accuracy.promise(1.0)


def test_your_own_metric(ids, model):
    def far(model, batch):
        return torch.full((len(batch),), 0.25)

    metric = as_metric(far)
    assert metric.name == "far" and metric.promise(0.1).bounds == (-1.0, 1.0)
    losses = observe(metric, model, ids)
    assert metric.quality(losses, losses) == 0.25
    assert as_metric("perplexity") is perplexity and as_metric(accuracy) is accuracy
    with pytest.raises(ValueError, match="one of perplexity, accuracy, agreement, or a callable, got 'bleu'"):
        as_metric("bleu")
    with pytest.raises(TypeError, match="a name or a callable, got int"):
        as_metric(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (lambda batch: torch.full((len(batch),), 1.5), ValueError, r"own must be in 0\.\.1, got 1.5 for example 0"),
        (lambda batch: torch.full((len(batch),), math.nan), ValueError, "got nan for example 0"),
        (lambda batch: torch.zeros(len(batch), 2), TypeError, r"one per example, got torch.float32 \[5, 2\]"),
        (lambda batch: torch.tensor(0.5), TypeError, "one per example"),
        (lambda batch: 0.5, TypeError, "got float"),
        (lambda batch: torch.zeros(len(batch), dtype=torch.int64), TypeError, "losses floating or bool"),
    ],
)
def test_what_a_metric_may_not_give(model, ids, answer, error, message):
    def own(model, batch):
        return answer(batch)

    with pytest.raises(error, match=message):
        observe(as_metric(own), model, [ids])


def test_the_first_bad_example_is_named_over_batches(model, ids):
    model.embed.weight.data[3] = math.nan
    ids[ids == 3] = 4
    ids[3, 0] = 3
    with pytest.raises(ValueError, match="perplexity must be finite, got nan for example 3"):
        observe(perplexity, model, list(ids.split(2)))
    with pytest.raises(ValueError, match="NaN for example 1 of a batch"):
        observe(agreement, model, list(ids.split(2)))


@pytest.mark.parametrize("data", [torch.zeros(0, 4, dtype=torch.int64), [], (), {}, iter(())])
def test_no_data_is_refused(model, data):
    with pytest.raises(ValueError, match="no examples"):
        observe(perplexity, model, data)


def test_only_empty_batches_are_refused():
    with pytest.raises(ValueError, match="every batch is empty"):
        observe(agreement, nn.Linear(4, 2), [torch.zeros(0, 4)])


@pytest.mark.parametrize(
    "batch, error, message",
    [
        (torch.zeros(2, 4), ValueError, r"int64 \[n, T\].*got torch.float32 \[2, 4\]"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"got torch.int64 \[4\]"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, "T of 2"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, r"got a mapping with \['ids'\]"),
        ("text", TypeError, "got str"),
        ([torch.zeros(2, 2), torch.zeros(2)], TypeError, "got list"),
    ],
)
def test_batches_that_perplexity_cannot_take(model, batch, error, message):
    with pytest.raises(error, match=message):
        observe(perplexity, model, [batch])


@pytest.mark.parametrize(
    "output, error, message",
    [
        (lambda logits: (logits,), TypeError, "must give logits.*got tuple"),
        (lambda logits: logits[:, :, 0].long(), TypeError, "got torch.int64"),
        (lambda logits: logits[:, 0], ValueError, r"logits must be \[n, T, classes\] for ids \[5, 9\], got \[5, 11\]"),
        (lambda logits: logits[..., :2], ValueError, r"token ids must be in 0\.\.1, got"),
    ],
)
def test_models_that_do_not_fit(ids, output, error, message):
    with pytest.raises(error, match=message):
        observe(perplexity, Language(output), ids)


@pytest.mark.parametrize(
    "batch, error, message",
    [
        (torch.zeros(2, 4), TypeError, r"\(inputs, targets\).*got Tensor"),
        ((torch.zeros(2, 4),), TypeError, "got 1 parts"),
        ((torch.zeros(2, 4), torch.zeros(2)), ValueError, r"targets must be int64 \[2\], got torch.float32 \[2\]"),
        ((torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64)), ValueError, r"got torch.int64 \[3\]"),
        ((torch.zeros(2, 4), torch.full((2,), 6)), ValueError, r"targets must be in 0\.\.5, got 6"),
        ((torch.zeros(2, 4), torch.full((2,), -100)), ValueError, r"targets must be in 0\.\.5, got -100"),
    ],
)
def test_batches_that_accuracy_cannot_take(batch, error, message):
    with pytest.raises(error, match=message):
        observe(accuracy, nn.Linear(4, 6), [batch])


def test_observations_of_other_examples_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"the same examples, got \[5\] and \[4\]"):
        perplexity.drops(observe(perplexity, model, ids), observe(perplexity, model, ids[1:]))
    with pytest.raises(ValueError, match=r"one shape per example over all batches, got \[8\], \[9\]"):
        observe(agreement, model, [ids, ids[:, 1:]])


def test_the_model_is_left_as_it_was(ids):
    model = nn.Sequential(Language(), nn.Dropout(0.5))
    model[0].eval()
    first = observe(perplexity, model, ids)
    assert torch.equal(first, observe(perplexity, model, ids))
    assert model.training and model[1].training and not model[0].training
    with pytest.raises(TypeError):
        observe(perplexity, model, ["text"])
    assert model.training and not model[0].training


@pytest.mark.parametrize(
    "data, error, message",
    [
        ("text", TypeError, "data must be a tensor.*got str"),
        (3, TypeError, "got int"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"need one length.*\[3\], \[4\]"),
        (torch.tensor(1.0), ValueError, "need one length"),
        ({"input_ids": [[1, 2]]}, TypeError, "must hold tensors, got list"),
    ],
)
def test_data_that_are_no_data_set(data, error, message):
    with pytest.raises(error, match=message):
        batches(data)


def test_a_data_set_is_cut_along_its_examples():
    cut = batches({"a": torch.arange(10), "b": torch.arange(20).view(10, 2)}, size=4)
    assert [len(batch["a"]) for batch in cut] == [4, 4, 2]
    assert cut[2]["b"].tolist() == [[16, 17], [18, 19]]
    assert [type(batch) for batch in batches((torch.zeros(3), torch.zeros(3)), 2)] == [tuple, tuple]
