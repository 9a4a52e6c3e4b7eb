"""Refuses settings that would have no effect, when a run starts or resumes.

Constructing a config does not check this, so that runs of earlier versions can still be loaded.
"""

import dataclasses
import logging
import math
from typing import Any

import jax
from flax import nnx

from seqattn.nn import Statistic
from train.config import Experiment
from train.data import saved_tokenizer
from train.data.tokenizer import Characters, SavedTokenizer
from train.hub.origin import Origin
from train.reports.profile import parse_steps
from train.tasks.own_files import OwnFiles
from train.tasks.translation import ParallelFiles
from train.update.optimizer import Momentum, Muon
from train.update.parameters import check_patterns, matching, matrices, paths
from train.update.step import TrainState

log = logging.getLogger(__name__)


def check_settings(experiment: Experiment) -> None:
    """Checks the settings that can be judged without a model.

    Raises:
        ValueError: a setting would have no effect; the message names it and what it needs.
    """
    # Before examples are loaded, so that a mistake shows at once.
    _check_adapters(experiment)
    _check_evaluations(experiment)
    _check_rates(experiment)
    if isinstance(experiment.task, OwnFiles | ParallelFiles):
        experiment.task.check_effect()
    optimizer, algorithm = experiment.optimizer, experiment.optimizer.algorithm
    if optimizer.clip_norm is not None and math.isinf(optimizer.clip_norm):
        raise ValueError(f"clip_norm ({optimizer.clip_norm}) would clip nothing; None is for no limit")
    if isinstance(algorithm, Momentum) and algorithm.nesterov and not algorithm.momentum:
        raise ValueError(f"nesterov (True) looks ahead along the momentum, and momentum is {algorithm.momentum}")
    if experiment.profile is not None and parse_steps(experiment.profile)[1] == 1:
        raise ValueError(
            f"profile ({experiment.profile}) would trace nothing: the first update compiles and is left out"
        )


def check_parameters(experiment: Experiment, state: TrainState) -> None:
    """Checks the settings that depend on the parameters of the model.

    `train.update.freezing` refuses patterns that freeze every parameter.

    Args:
        experiment: the resolved experiment.
        state: the state before the first update, or its shapes.

    Raises:
        ValueError: `frozen` matches running statistics, which follow the batches anyway; a pattern of Muon matches no
            parameter; or no matrix is left to Muon.
    """
    _check_statistics(experiment, state.params)
    algorithm = experiment.optimizer.algorithm
    if not isinstance(algorithm, Muon):
        return
    # The default patterns cover the layers of all models, so no single model has all of them.
    # Muon updates the adapters alone, and no pattern has to be of them.
    params = state.trained
    check_patterns(state.params, [pattern for pattern in algorithm.adam if pattern not in Muon().adam])
    others = matching(params, (*algorithm.adam, *experiment.frozen))
    if not any(jax.tree.leaves(jax.tree.map(lambda matrix, other: matrix and not other, matrices(params), others))):
        raise ValueError(
            f"Muon would orthogonalize no matrix: its adam ({', '.join(algorithm.adam)}) and frozen "
            f"({', '.join(experiment.frozen)}) match all of them; AdamW does the same"
        )


def _check_statistics(experiment: Experiment, params: Any) -> None:
    variables = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    names, chosen = jax.tree.leaves(paths(params)), jax.tree.leaves(matching(params, experiment.frozen))
    rows = zip(names, chosen, variables, strict=True)
    if found := [name for name, is_frozen, variable in rows if is_frozen and isinstance(variable, Statistic)]:
        raise ValueError(
            f"frozen ({', '.join(experiment.frozen)}) matches running statistics, which follow the batches "
            f"anyway: {', '.join(found)}; freeze the rest by name, such as */kernel and */scale"
        )


def check_tokenizer(experiment: Experiment, begun: Origin) -> None:
    """Checks the tokenizer of an experiment beside that of the model to start from, which replaces it.

    Warns unless it is the default or the same one.

    Raises:
        ValueError: it is a saved tokenizer with another vocabulary.
    """
    given = experiment.tokenizer
    if isinstance(given, SavedTokenizer) and given != begun.tokenizer_config:
        if saved_tokenizer.make(given, ()).to_json() != begun.tokenizer.to_json():
            raise ValueError(
                f"--tokenizer.path: {given.path} has another vocabulary than {begun.name}: leave it out, since "
                "--start-from takes its tokenizer"
            )
    elif given not in (Characters(), begun.tokenizer_config):
        # A warning, not an error: the tokenizer may come from the experiment, not from the command line.
        log.warning("the tokenizer is that of %s, not %s", begun.name, given)


def _check_adapters(experiment: Experiment) -> None:
    if experiment.adapters is None:
        return
    if experiment.start_from is None:
        raise ValueError("adapters need the parameters of a trained model: give --start-from")
    if experiment.frozen:
        raise ValueError(
            f"frozen ({', '.join(experiment.frozen)}) would change nothing beside adapters: all parameters are frozen "
            f"but those of adapters.train ({', '.join(experiment.adapters.train)})"
        )


def _check_evaluations(experiment: Experiment) -> None:
    count = experiment.steps // experiment.evaluate_every
    there = f"evaluations of the run ({count}), from steps ({experiment.steps}) and evaluate_every "
    there += f"({experiment.evaluate_every})"
    if experiment.patience is not None and experiment.patience >= count:
        raise ValueError(f"patience ({experiment.patience}) would never end: it must be below the {there}")
    if experiment.keep_best and not count:
        raise ValueError(f"keep_best ({experiment.keep_best}) would keep nothing: it must be at most the {there}")


def _check_rates(experiment: Experiment) -> None:
    schedule = experiment.optimizer.schedule
    given = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    for name in ("rate", "peak", "factor"):
        if given.get(name) == 0:
            raise ValueError(f"{name} ({given[name]}) would train nothing: it must be positive")
