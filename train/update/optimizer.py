"""Optimizers: an algorithm, a learning-rate schedule, and clipping of gradients by their global norm."""

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
    """Stochastic gradient descent (Robbins 1951): subtracts the gradient times the learning rate."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optax transformation with this learning-rate schedule."""
        return optax.sgd(rate)


@dataclasses.dataclass(frozen=True)
class Momentum(Checked):
    """SGD with momentum (Polyak 1964; Sutskever 2013, equations 1 to 4): subtracts a decaying sum of gradients."""

    momentum: float = 0.9
    """Decay of the sum of gradients per update, in [0, 1)."""
    nesterov: bool = False
    """Look ahead: use momentum * sum + gradient in place of the sum (Nesterov 1983). Needs a positive momentum."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optax transformation with this learning-rate schedule."""
        return optax.sgd(rate, momentum=self.momentum, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class AdaGrad(Checked):
    """AdaGrad (Duchi 2011): divides gradients by the root of the sum of all squared gradients so far."""

    initial: float = 0.1
    """Initial value of the sum. 0 makes the first update of every weight as large as the learning rate."""
    epsilon: float = 1e-7
    """Added to the sum under the root, against division by zero."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optax transformation with this learning-rate schedule."""
        return optax.adagrad(rate, initial_accumulator_value=self.initial, eps=self.epsilon)


@dataclasses.dataclass(frozen=True)
class Adam(Checked):
    """Adam (Kingma 2015, algorithm 1), with the defaults of Vaswani 2017, section 5.3."""

    beta1: float = 0.9
    """Decay of the first moment, the moving average of gradients, in [0, 1)."""
    beta2: float = 0.98
    """Decay of the second moment, the moving average of squared gradients, in [0, 1)."""
    epsilon: float = 1e-9
    """Added to the root of the second moment, against division by zero."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optax transformation with this learning-rate schedule."""
        return optax.adam(rate, b1=self.beta1, b2=self.beta2, eps=self.epsilon)


@dataclasses.dataclass(frozen=True)
class AdamW(Checked):
    """Adam with decoupled weight decay (Loshchilov 2019, algorithm 2). Only matrices decay, not norms and biases."""

    beta1: float = 0.9
    """Decay of the first moment, the moving average of gradients, in [0, 1)."""
    beta2: float = 0.98
    """Decay of the second moment, the moving average of squared gradients, in [0, 1)."""
    epsilon: float = 1e-9
    """Added to the root of the second moment, against division by zero."""
    weight_decay: float = 0.01
    """Each update subtracts learning rate * weight decay * weight; 0 for no decay."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optax transformation with this learning-rate schedule."""
        betas = {"b1": self.beta1, "b2": self.beta2, "eps": self.epsilon}
        # Masked: decay would pull the scales of norms to 0, although their neutral value is 1.
        return optax.adamw(rate, **betas, weight_decay=self.weight_decay, mask=matrices)


@dataclasses.dataclass(frozen=True)
class Muon(Checked):
    """Muon (Jordan 2024): orthogonalized momentum for matrices, AdamW for vectors, embeddings and output layers.

    The entries of an orthogonal matrix have the root mean square 1 / sqrt(longer side). Updates are scaled to a fixed
    root mean square, so that matrices and AdamW share one learning rate and weight decay (Liu 2025, equation 4). In an
    array of more than two axes, such as the weights of experts, the last two axes form a matrix.
    """

    momentum: float = 0.95
    """Decay of the moving average of the gradients of matrices, in [0, 1)."""
    root_mean_square: float = 0.2
    """Root mean square of the update of a matrix, before the learning rate. Adam's is about 0.2."""
    weight_decay: float = 0.01
    """Each update subtracts learning rate * weight decay * weight from matrices; 0 for no decay."""
    adam: tuple[str, ...] = ("*table*", "output/kernel", "head/output/kernel", "decoder/output/kernel")
    """Matrices that AdamW updates, as glob patterns of their paths; by default embeddings and output layers."""
    beta1: float = 0.9
    """AdamW's decay of the first moment, in [0, 1)."""
    beta2: float = 0.98
    """AdamW's decay of the second moment, in [0, 1)."""
    epsilon: float = 1e-9
    """AdamW's addend to the root of the second moment, against division by zero."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optax transformation with this learning-rate schedule."""
        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=_last_two_axes),
            # Before the decay: the scale is for the update, and the decay must not depend on the shape of a matrix.
            optax.stateless_with_tree_map(lambda update, _: self._scale(update.shape) * update),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        adam = AdamW(self.beta1, self.beta2, self.epsilon, self.weight_decay).transformation(rate)
        return optax.partition({"muon": muon, "adam": adam}, self._labels)

    def _scale(self, shape: tuple[int, ...]) -> float:
        # The root of the longer side undoes the size of an orthogonal matrix's entries, 1 / sqrt(longer side).
        return self.root_mean_square * max(shape[-2:]) ** 0.5

    def _labels(self, params: optax.Params) -> optax.Params:
        # Embeddings and output layers are matrices too, but Jordan 2024 recommends AdamW for them.
        by_muon = jax.tree.map(
            lambda is_matrix, to_adam: is_matrix and not to_adam, matrices(params), matching(params, self.adam)
        )
        return jax.tree.map(lambda muon: "muon" if muon else "adam", by_muon)


Algorithm = SGD | Momentum | AdaGrad | Adam | AdamW | Muon
"""Any optimization algorithm: `transformation(rate)` returns the optax transformation for a learning-rate schedule."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of a run: clipping, then the algorithm with its learning-rate schedule."""

    algorithm: Algorithm = AdamW()
    """Optimization algorithm."""
    schedule: Constant | Noam | InverseSquareRoot | Cosine | InverseTime = Cosine()
    """Learning-rate schedule."""
    clip_norm: float | None = 1.0
    """Maximum global norm of the gradients (Pascanu 2013); larger gradients are scaled down. None for no limit."""

    def make(self, steps: int) -> optax.GradientTransformation:
        """Returns the optax transformation for a run of `steps` updates.

        Its state is float32 or wider, whatever the dtype of the parameters. Updates have the dtype of the gradients.

        Raises:
            ValueError: `clip_norm` is not positive, or the schedule does not fit `steps`.
        """
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0, finite=False, hint=", or None for no limit")
        # The schedule counts inside the optimizer's state, so skipped updates do not advance it.
        update = self.algorithm.transformation(self.schedule.schedule(steps))
        # The identity keeps the state's structure, so that a resumed run may add or drop the limit.
        limit = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        # Clipping comes first: moments of unclipped gradients would remember an outlier for many updates.
        return _wide(optax.chain(limit, update))


def _wide(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps a transformation so that it computes and keeps its state in float32 or wider.

    Optax keeps second moments in the dtype of the parameters. In bfloat16 a decay of 0.999 rounds to 1, so the moments
    never fall, and the addend of one step is soon below half of their last bit.
    """

    def init(params: optax.Params) -> optax.OptState:
        # Optax takes the dtype of the moments from these parameters.
        return transformation.init(widened(params))

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = transformation.update(widened(gradients), state, widened(params))
        # Back to the dtypes of the gradients: the type of the state must not change from update to update.
        return jax.tree.map(lambda update, gradient: update.astype(gradient.dtype), updates, gradients), state

    return optax.GradientTransformation(init, update)


def _last_two_axes(params: optax.Params) -> optax.Params:
    """The axes that Muon orthogonalizes in each array: the last two. Earlier axes are batch axes."""
    # Optax's default takes every parameter for a single matrix, which stacked layers and experts are not.
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)
