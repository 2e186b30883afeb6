"""Models and losses as users write them."""

import math
import os
import random
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES = 6, 4


def mlp(*middle):
    """Two linear layers with other modules between them."""
    return nn.Sequential(nn.Linear(WIDTH, 8), *(middle or (nn.Tanh(),)), nn.Linear(8, CLASSES))


def convnet(*middle):
    """A small classifier of images with one channel, 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        *middle,
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def channels_last():
    return convnet().to(memory_format=torch.channels_last)


def lazy_convnet():
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(8), nn.LazyLinear(CLASSES)
    )


def lazy_normalized():
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )


class Recurrent(nn.Module):
    """An LSTM that flattens its weights in every pass, as code for several GPUs does."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.recurrent = kind(WIDTH, 5, batch_first=True, bidirectional=True)
        self.last = nn.Linear(10, CLASSES)

    def forward(self, inputs):
        self.recurrent.flatten_parameters()
        return self.last(self.recurrent(inputs)[0][:, -1])


class OfSentences(nn.Module):
    """Takes packed sequences of different lengths."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, 5)
        self.last = nn.Linear(5, CLASSES)

    def forward(self, packed):
        return self.last(self.recurrent(packed)[1][0])


class Moving(nn.Module):
    """Gives its parameters other memory in every pass.

    Args:
        turns: Between two memory layouts, too.
    """

    def __init__(self, *, turns=False):
        super().__init__()
        self.layers, self.turns = mlp(), turns

    def forward(self, inputs):
        for p in self.layers.parameters():
            if self.turns and p.ndim == 2 and p.is_contiguous():
                p.data = p.data.t().contiguous().t()
            else:
                p.data = p.data.contiguous().clone()
        return self.layers(inputs)


class UNet(nn.Module):
    """Scores of every pixel, with one skip connection."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(5, CLASSES, 1)

    def forward(self, images):
        up = self.up(torch.tanh(self.down(images)))
        return self.last(torch.cat([images, up], dim=1))


class Frames(nn.Module):
    """Log-probabilities of symbols, as CTC takes them: (frames, samples, symbols)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 5)

    def forward(self, inputs):
        return self.layer(inputs).log_softmax(dim=2).transpose(0, 1)


class ModelOutput(OrderedDict):
    """An ordered mapping whose items are attributes as well, as the outputs of transformers."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Scores:
    """Outputs as a plain dataclass."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Encoder(nn.Module):
    """A transformer that takes the fields of a tokenizer by keyword."""

    def __init__(self, output=ModelOutput):
        super().__init__()
        self.output = output
        self.embedding = nn.Embedding(10, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.layer(
            self.embedding(input_ids), src_key_padding_mask=attention_mask.logical_not()
        )
        logits = self.last(hidden[:, 0])
        if labels is None:
            return self.output(logits=logits, hidden=hidden)
        loss = functional.cross_entropy(logits, labels)
        return self.output(loss=loss, logits=logits)


def of_logits(outputs, targets):
    return functional.cross_entropy(outputs.logits, targets)


def own_loss(outputs, targets):
    return outputs.loss


def weight_normalized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, 8)), nn.Linear(8, CLASSES))


def weight_parametrized():
    normalized = nn.utils.parametrizations.weight_norm
    return nn.Sequential(normalized(nn.Linear(WIDTH, 8)), nn.Linear(8, CLASSES))


class Positive(nn.Module):
    def forward(self, weight):
        return functional.softplus(weight)


def parametrized():
    model = mlp()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Positive())
    return model


def orthogonal():
    return nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), mlp())


def spectral():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(WIDTH, 8)), nn.Linear(8, CLASSES))


def spectral_parametrized():
    normalized = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(normalized(nn.Linear(WIDTH, 8)), nn.Linear(8, CLASSES))


class Tied(nn.Module):
    """The output layer has the weights of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.last = nn.Linear(8, 10, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, ids):
        return self.last(torch.tanh(self.embedding(ids)).mean(dim=1))


def compiled():
    return torch.compile(mlp(), backend="eager")


def scripted(*middle):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.script(mlp(*middle))


class Frozen(nn.Module):
    """Keeps its batch normalization in evaluation mode, by a method of its own."""

    def __init__(self):
        super().__init__()
        self.layers = convnet(nn.BatchNorm2d(4))

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images):
        return self.layers(images)


def frozen_by_parts():
    model = convnet(nn.BatchNorm2d(4))
    model[1].eval()
    return model


def frozen_backbone():
    model = mlp()
    model[0].requires_grad_(False)
    return model


class LowRank(nn.Module):
    """A frozen layer with a trained update of rank 2, which begins at zero."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(WIDTH, 2))
        self.up = nn.Parameter(torch.zeros(2, CLASSES))

    def forward(self, inputs):
        return self.base(inputs) + inputs @ self.down @ self.up


class Complex(nn.Module):
    """A filter in the frequency domain, with complex weights."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))
        self.last = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)

    def forward(self, inputs):
        return self.last(torch.fft.irfft(torch.fft.rfft(inputs) * self.filter, n=WIDTH))


class Checkpointed(nn.Module):
    """Computes its activations a second time in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.layers = mlp()
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        first = self.layers[0](inputs)
        if not self.training:
            return self.layers[1:](first)
        return checkpoint(self.layers[1:], first, use_reentrant=self.use_reentrant)


class TwoOutputs(nn.Module):
    """Gives its features as well, which the loss keeps small."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, inputs):
        features = torch.tanh(self.first(inputs))
        return self.last(features), features


def with_small_features(outputs, targets):
    scores, features = outputs
    return functional.cross_entropy(scores, targets) + 0.1 * features.square().mean()


class OddParameters(nn.Module):
    """A parameter without dimensions, one without elements, and one of one element."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return self.layers(inputs) * self.scale + self.shift + self.nothing.sum()


class OfLists(nn.Module):
    """Takes a list of one tensor per sample, of any length, as detection models do."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, samples, targets=None):
        return torch.stack([self.layers(each).mean(dim=0) for each in samples])


class Siamese(nn.Module):
    """Compares two inputs by the same layers."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, one, other):
        return (self.layers(one) - self.layers(other)).square().sum(dim=1)


class OfMapping(nn.Module):
    """Takes a mapping as its one argument."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, inputs):
        return self.layers(inputs["left"] + 2 * inputs["right"])


class OfKeywords(nn.Module):
    """Takes the entries of a mapping by keyword."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, *, left, right):
        return self.layers(left + 2 * right)


class ArcFace(nn.Module):
    """Cosines to the centers of classes, with a margin for the class of the sample."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.centers = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, inputs, labels):
        return arc_scores(self.layers(inputs), self.centers, labels)


def arc_scores(features, centers, labels, margin=0.3, scale=4.0):
    cosine = functional.linear(functional.normalize(features), functional.normalize(centers))
    angle = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))
    is_target = functional.one_hot(labels, len(centers)).bool()
    return scale * torch.where(is_target, torch.cos(angle + margin), cosine)


class ArcFaceLoss(nn.Module):
    """The same in the loss, with parameters that nobody would train."""

    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, outputs, targets):
        return functional.cross_entropy(arc_scores(outputs, self.centers, targets), targets)


def focal(outputs, targets, gamma=2.0):
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return ((1 - (-each).exp()) ** gamma * each).mean()


class FocalModule(nn.Module):
    def __init__(self, gamma=2.0, reduction="mean"):
        super().__init__()
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, outputs, targets):
        return focal(outputs, targets, self.gamma)


class FocalCrossEntropy(nn.CrossEntropyLoss):
    """Focal loss that takes its options from the class of torch."""

    def forward(self, outputs, targets):
        return focal(outputs, targets)


class Dice(nn.Module):
    """One minus the overlap of each image, then the mean."""

    def forward(self, outputs, targets):
        chosen = functional.one_hot(targets, CLASSES).movedim(-1, 1).to(outputs.dtype)
        shares = outputs.softmax(dim=1)
        overlap = (shares * chosen).sum(dim=(1, 2, 3))
        return (1 - 2 * overlap / (shares + chosen).sum(dim=(1, 2, 3))).mean()


class OfTriplets(nn.Module):
    """Triplet loss with the hardest positive and negative within the batch."""

    def forward(self, features, labels):
        apart = torch.cdist(features, features)
        same = labels[:, None] == labels[None, :]
        far = torch.where(same, apart, 0.0).amax(dim=1)
        near = torch.where(same, torch.inf, apart).amin(dim=1)
        return functional.relu(far - near.clamp(max=1e3) + 0.5).mean()


class Hierarchical(nn.Module):
    """A variational autoencoder: draws a code, and gives what its loss needs."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(WIDTH, 4), nn.Linear(2, WIDTH)

    def forward(self, inputs):
        mean, log_variance = self.encode(inputs).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decode(code), mean, log_variance


def evidence(outputs, targets):
    decoded, mean, log_variance = outputs
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
    return ((decoded - targets).square().sum(dim=1) + divergence).mean()


class Codebook(nn.Module):
    """Vector quantization; codes follow the features by a moving average.

    Args:
        way: How the buffers change: ``in place``, ``assigned``, or by their ``data``.
        is_saved: Whether the codes belong to the ``state_dict``.
    """

    def __init__(self, way, *, is_saved=True):
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.register_buffer("codes", torch.randn(5, 8), persistent=is_saved)
        self.register_buffer("counts", torch.ones(5), persistent=is_saved)

    def forward(self, inputs):
        features = self.first(inputs)
        chosen = torch.cdist(features, self.codes).argmin(dim=1)
        if self.training:
            self._follow(features.detach(), functional.one_hot(chosen, 5).to(features.dtype))
        codes = self.codes[chosen]
        return self.last(features + (codes - features).detach() + 0.1 * codes)

    def _follow(self, features, chosen):
        counts = 0.9 * self.counts + 0.1 * chosen.sum(dim=0)
        means = chosen.T @ features / chosen.sum(dim=0).clamp(min=1)[:, None]
        codes = torch.where(chosen.any(dim=0)[:, None], 0.9 * self.codes + 0.1 * means, self.codes)
        if self.way == "assigned":
            self.codes, self.counts = codes, counts
        elif self.way == "data":
            self.codes.data, self.counts.data = codes, counts
        else:
            self.codes.copy_(codes)
            self.counts.copy_(counts)


class Centered(nn.Module):
    """Keeps a mean of its features in a buffer that the first forward pass makes.

    Args:
        registers: Whether ``__init__`` registers it, as None; else the forward pass does.
        is_saved: Whether it belongs to the ``state_dict``.
    """

    def __init__(self, *, registers=True, is_saved=True):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.is_saved = is_saved
        if registers:
            self.register_buffer("center", None, persistent=is_saved)

    def forward(self, inputs):
        features = self.first(inputs)
        mean = features.detach().mean(dim=0)
        if getattr(self, "center", None) is None:
            self.register_buffer("center", mean, persistent=self.is_saved)
        elif self.training:
            self.center = 0.9 * self.center + 0.1 * mean
        return self.last(features - self.center)


class Rotary(nn.Module):
    """Rotates features by position, with a cache for the longest sequence so far."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("angles", torch.zeros(0, 1), persistent=False)

    def forward(self, sequences):
        longest = max(len(each) for each in sequences)
        if longest > len(self.angles):
            self.angles = torch.arange(longest, dtype=self.last.weight.dtype)[:, None] / 10
        turned = [each * torch.cos(self.angles[: len(each)]) for each in sequences]
        return self.last(torch.stack([each.mean(dim=0) for each in turned]))


def quantized():
    """Quantization-aware training: observers widen their ranges in every pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        from torch.ao import quantization

        model = nn.Sequential(
            quantization.QuantStub(),
            nn.Linear(WIDTH, 8),
            nn.ReLU(),
            nn.Linear(8, CLASSES),
            quantization.DeQuantStub(),
        )
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model.train())


class Drawing(nn.Module):
    """Adds noise in training.

    Args:
        source: Draws numbers: ``torch``, ``numpy`` or ``random``.
    """

    def __init__(self, source):
        super().__init__()
        self.layers, self.source = mlp(), source

    def forward(self, inputs):
        if self.training:
            inputs = inputs + 0.1 * self._draw(inputs)
        return self.layers(inputs)

    def _draw(self, inputs):
        if self.source == "torch":
            return torch.randn_like(inputs)
        if self.source == "numpy":
            return torch.as_tensor(np.random.standard_normal(inputs.shape), dtype=inputs.dtype)
        return random.gauss(0.0, 1.0)


class StochasticDepth(nn.Module):
    """Leaves a block out by chance, of all samples of a batch at once."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, inputs):
        hidden = self.first(inputs)
        for block in self.blocks:
            # Every parameter takes part in each pass; what is left out has a gradient of zero.
            kept = not self.training or random.random() < 0.5
            hidden = hidden + float(kept) * torch.tanh(block(hidden))
        return self.last(hidden)


class OddBuffers(nn.Module):
    """Buffers that are hard to copy or to send: expanded, strided, of rare types, sparse."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.register_buffer("expanded", torch.tensor([2.0]).expand(WIDTH))
        self.register_buffer("strided", torch.arange(12.0)[::2], persistent=False)
        self.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).T)
        self.register_buffer("int16", torch.arange(4, dtype=torch.int16))
        self.register_buffer("uint16", torch.arange(4).to(torch.uint16), persistent=False)
        self.register_buffer("float8", torch.ones(4).to(torch.float8_e4m3fn), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True, True, True, True]))
        self.register_buffer("graph", torch.eye(WIDTH).to_sparse(), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("none", None)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, inputs):
        if self.training:
            self.seen += 1
        features = inputs * self.expanded * self.mask + self.strided
        return self.layers(torch.sparse.mm(self.graph.to(inputs.dtype), features.T).T)


class OfGraph(nn.Module):
    """Saves a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.register_buffer("graph", torch.eye(WIDTH).to_sparse())

    def forward(self, inputs):
        return self.layers(torch.sparse.mm(self.graph, inputs.T).T)


def sharing_buffers():
    """Two layers that share one running mean."""
    one, other = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    other.running_mean = one.running_mean
    return mlp(one, nn.Tanh(), other)


class Inception(nn.Module):
    """Gives a second output in training, by a classifier that evaluation leaves out."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.aux = (
            nn.Linear(WIDTH, 8),
            nn.Linear(8, CLASSES),
            nn.Linear(8, CLASSES),
        )

    def forward(self, inputs):
        features = torch.tanh(self.first(inputs))
        if self.training:
            return self.last(features), self.aux(features)
        return self.last(features)


def with_auxiliary(outputs, targets):
    if isinstance(outputs, torch.Tensor):
        return functional.cross_entropy(outputs, targets)
    weights = (1.0, *(0.3 for _ in outputs[1:]))
    losses = [functional.cross_entropy(each, targets) for each in outputs]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def googlenet():
    from torchvision.models import googlenet as build

    return build(num_classes=CLASSES, init_weights=False, aux_logits=True, dropout=0, dropout_aux=0)


class Energy(nn.Module):
    """Gives an energy and its derivative by the inputs, which the loss compares as well."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs):
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            energy = self.layers(inputs)[:, 0]
            (force,) = torch.autograd.grad(energy.sum(), inputs, create_graph=True)
        return energy, force


def of_energy(outputs, targets):
    energy, force = outputs
    return (energy - targets).square().mean() + force.square().sum(dim=1).mean()


class Mixture(nn.Module):
    """Experts that only some samples reach, and a scale that no gradient reaches in evaluation."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def forward(self, inputs):
        shares = self.gate(inputs).softmax(dim=1)
        best = shares.argmax(dim=1)
        outputs = inputs.new_zeros(len(inputs), CLASSES)
        for number, expert in enumerate(self.experts):
            rows = (best == number).nonzero()[:, 0]
            outputs = outputs.index_add(0, rows, shares[rows, number, None] * expert(inputs[rows]))
        return outputs


class Cumulative(torch.autograd.Function):
    """A function with a backward pass of its own."""

    @staticmethod
    def forward(context, inputs):
        return inputs.sign()

    @staticmethod
    def backward(context, gradient):
        return gradient


class Binary(nn.Module):
    """Binary weights, with a straight-through gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))

    def forward(self, inputs):
        return functional.linear(inputs, Cumulative.apply(self.weight)) / math.sqrt(WIDTH)


class Attention(nn.Module):
    """Attention with learned keys and values, and parameters in lists and mappings."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True, batch_first=True)
        self.scales = nn.ParameterDict({"in": torch.ones(WIDTH), "out": torch.ones(WIDTH)})
        self.shifts = nn.ParameterList([torch.zeros(WIDTH), torch.zeros(WIDTH)])
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs):
        inputs = inputs * self.scales["in"] + self.shifts[0]
        outputs = self.attention(inputs, inputs, inputs)[0].mean(dim=1)
        return self.last(outputs * self.scales["out"] + self.shifts[1])


class Renormalized(nn.Module):
    """Normalizes by running statistics in training as well, which each pass updates."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, 8), Running(8), nn.Linear(8, CLASSES)

    def forward(self, inputs):
        return self.last(self.norm(self.first(inputs)))


class Running(nn.BatchNorm1d):
    """Batch normalization by the statistics of all passes so far."""

    def forward(self, inputs):
        if self.training:
            super().forward(inputs)
        scale = (self.running_var + self.eps).rsqrt()
        return (inputs - self.running_mean) * scale * self.weight + self.bias


class MadeInForward(nn.Module):
    """Builds a layer when it sees its first inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), None

    def forward(self, inputs):
        features = self.first(inputs)
        if self.last is None:
            self.last = nn.Linear(8, CLASSES, dtype=inputs.dtype)
        return self.last(features)


class Replaced(nn.Linear):
    """Keeps its weights in a ball, by a new parameter in every pass."""

    def __init__(self):
        super().__init__(WIDTH, CLASSES)

    def forward(self, inputs):
        self.weight = nn.Parameter(self.weight.detach().clamp(-0.3, 0.3))
        return super().forward(inputs)


class Clipped(nn.Linear):
    """Keeps its weights in a ball.

    Args:
        by_data: Give the parameter other memory instead of writing to it.
    """

    def __init__(self, *, by_data):
        super().__init__(WIDTH, CLASSES)
        self.by_data = by_data

    def forward(self, inputs):
        if self.by_data:
            self.weight.data = self.weight.data.clamp(-0.3, 0.3)
        else:
            with torch.no_grad():
                self.weight.clamp_(-0.3, 0.3)
        return super().forward(inputs)


class FailsInTraining(nn.Module):
    """Works in evaluation mode only."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, inputs):
        return self.layers(inputs)[:, :CLASSES] + (torch.zeros(3, 5) if self.training else 0)


class OfWords(nn.Module):
    """Scores a text by an embedding with options."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, **options)
        self.last = nn.Linear(8, 10)

    def forward(self, ids):
        return self.last(self.embedding(ids).mean(dim=1))


class Unused(nn.Module):
    """Has a layer that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.layers, self.unused = mlp(), nn.Linear(2, 2)

    def forward(self, inputs):
        return self.layers(inputs)


def with_gaps():
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(8, 2 * WIDTH)[:, ::2])
    return model


def detached(outputs, targets):
    return functional.cross_entropy(outputs.detach(), targets)


def as_mapping(outputs, targets):
    return {"loss": functional.cross_entropy(outputs, targets), "each": outputs.mean(dim=1)}


def each_alone(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="none")


def summed(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="sum")


def summed_of_logits(outputs, targets):
    return summed(outputs.logits, targets)


class PerRank(nn.Module):
    """Class weights that depend on the rank, as from the labels that each one sees."""

    def __init__(self):
        super().__init__()
        rank = int(os.environ.get("RANK", "0"))
        self.inner = nn.CrossEntropyLoss(torch.ones(CLASSES, dtype=torch.float64) + rank)

    def forward(self, outputs, targets):
        return self.inner(outputs, targets)
