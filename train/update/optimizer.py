"""Gradients to updates: an algorithm over a schedule, gradients clipped by their global norm."""

import dataclasses

import jax
import optax
import optax.contrib

from seqattn.checks import check_number
from seqattn.precision import widened
from train.update.limits import Checked
from train.update.parameters import matching, matrices
from train.update.schedules import Constant, Cosine, InverseSquareRoot, InverseTime, Noam


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: the gradient times the learning rate (Robbins 1951)."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.sgd(rate)


@dataclasses.dataclass(frozen=True)
class Momentum(Checked):
    """A running sum of gradients times the learning rate (Polyak 1964; Sutskever 2013, equations 1 to 4)."""

    momentum: float = 0.9
    """Decay of the sum of gradients."""
    nesterov: bool = False
    """Look ahead: add the gradient once more to the sum after it decayed once more (Nesterov 1983)."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.sgd(rate, momentum=self.momentum, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class AdaGrad(Checked):
    """Gradients over the root of the sum of all squared gradients so far (Duchi 2011)."""

    initial: float = 0.1
    """What the sum starts from; 0 makes the first update of every weight as large as the learning rate."""
    epsilon: float = 1e-7
    """Added to the sum under the root."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.adagrad(rate, initial_accumulator_value=self.initial, eps=self.epsilon)


@dataclasses.dataclass(frozen=True)
class Adam(Checked):
    """Adam (Kingma 2015)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.adam(rate, b1=self.beta1, b2=self.beta2, eps=self.epsilon)


@dataclasses.dataclass(frozen=True)
class AdamW(Checked):
    """Adam with decoupled weight decay on matrices, not on norms and biases (Loshchilov 2019)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""
    weight_decay: float = 0.01
    """Share of each weight taken away in an update, times the learning rate."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        betas = {"b1": self.beta1, "b2": self.beta2, "eps": self.epsilon}
        return optax.adamw(rate, **betas, weight_decay=self.weight_decay, mask=matrices)


@dataclasses.dataclass(frozen=True)
class Muon(Checked):
    """Momentum of matrices, orthogonalised (Jordan 2024); everything else, tables and logits too, by AdamW.

    An orthogonal matrix has the root mean square 1 / sqrt(its longer side); the update is scaled to a fixed one, so
    that learning rate and weight decay of AdamW serve both (Liu 2025, equation 4). Of an array with more than two
    axes, as of the weights of experts, the last two are a matrix.
    """

    momentum: float = 0.95
    """Decay of the mean of gradients of matrices."""
    root_mean_square: float = 0.2
    """That of an update of a matrix, times the learning rate; 0.2 is about that of Adam."""
    weight_decay: float = 0.01
    """Share of each weight of a matrix taken away in an update, times the learning rate."""
    adam: tuple[str, ...] = ("*table*", "output/kernel", "head/output/kernel", "decoder/output/kernel")
    """Matrices that are left to AdamW, by globs of their paths: tables of vectors, and layers that give logits."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.98
    """AdamW's decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=_last_two_axes),
            optax.stateless_with_tree_map(lambda update, _: self._scale(update.shape) * update),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        adam = AdamW(self.beta1, self.beta2, self.epsilon, self.weight_decay).transformation(rate)
        return optax.partition({"muon": muon, "adam": adam}, self._labels)

    def _scale(self, shape: tuple[int, ...]) -> float:
        return self.root_mean_square * max(shape[-2:]) ** 0.5

    def _labels(self, params: optax.Params) -> optax.Params:
        by_muon = jax.tree.map(
            lambda is_matrix, to_adam: is_matrix and not to_adam, matrices(params), matching(params, self.adam)
        )
        return jax.tree.map(lambda muon: "muon" if muon else "adam", by_muon)


Algorithm = SGD | Momentum | AdaGrad | Adam | AdamW | Muon
"""How steps are scaled: `transformation(rate)` makes the optax transformation."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    algorithm: Algorithm = AdamW()
    """How steps are scaled."""
    schedule: Constant | Noam | InverseSquareRoot | Cosine | InverseTime = Cosine()
    """The learning rate over time."""
    clip_norm: float | None = 1.0
    """Most that the norm of all gradients together may be; None for no limit."""

    def make(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates.

        Its state is float32 at least, whatever the dtype of the parameters; updates have that of the gradients.
        """
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0, finite=False, hint=", or None for no limit")
        update = self.algorithm.transformation(self.schedule.schedule(steps))
        # With a limit or without one, the state has the same leaves: a run may go on with the other.
        limit = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return _wide(optax.chain(limit, update))


def _wide(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with gradients, parameters and so its own state in float32 at least.

    Optax keeps second moments in the dtype of the parameters. In bfloat16 a decay of 0.999 is 1, so that they never
    fall, and what one step adds to them is soon less than half of their last bit.
    """

    def init(params: optax.Params) -> optax.OptState:
        return transformation.init(widened(params))

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = transformation.update(widened(gradients), state, widened(params))
        return jax.tree.map(lambda update, gradient: update.astype(gradient.dtype), updates, gradients), state

    return optax.GradientTransformation(init, update)


def _last_two_axes(params: optax.Params) -> optax.Params:
    """What Muon orthogonalises of each array; all axes but the last two count matrices."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)
