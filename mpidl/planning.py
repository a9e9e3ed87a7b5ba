"""Who makes the plans of a training: its triggers, and the coordinator with what it decides by."""

from __future__ import annotations

import copy

from mpidl.errors import ConfigError
from mpidl.parameters import ParameterManager
from mpidl.runtime import World
from mpidl.scheduling import (
    Balancer,
    Coordinator,
    DropBudget,
    GroupSize,
    Header,
    LearningRates,
    Recording,
    Triggers,
    as_trigger,
    check_schedule,
    num_iterations,
)
from mpidl.settings import Settings


def make_triggers(
    settings: Settings, num_samples: int, epochs: int, *, validates: bool, replay: Recording | None
) -> Triggers:
    """What is due when, with a memory of its own; on every rank.

    Args:
        settings: of the training.
        num_samples: of the training set.
        epochs: of the training.
        validates: whether there is a validation set.
        replay: what is repeated; None: nothing is.
    """
    per_epoch = num_iterations(num_samples, settings.batch_size)
    if replay is not None:
        return replay.triggers(per_epoch, epochs, keeps=settings.run_dir is not None)
    made = Triggers(
        iterations_per_epoch=per_epoch,
        epochs=epochs,
        validate=as_trigger("validate_every", settings.validate_every) if validates else None,
        checkpoint=None if settings.run_dir is None else as_trigger("checkpoint_every", settings.checkpoint_every),
        summarize=as_trigger("summarize_every", settings.summarize_every),
        end=as_trigger("end_when", settings.end_when),
    )
    return copy.deepcopy(made)  # the user's own remember nothing of this training, and may serve the next


def make_header(settings: Settings, world: World, num_samples: int, epochs: int) -> Header:
    """What a training's plans are made for."""
    return Header(
        num_samples=num_samples,
        batch_size=settings.batch_size,
        epochs=epochs,
        partitions=settings.partitions,
        world_size=world.size,
        num_nodes=world.num_nodes,
        seed=settings.seed,
        threads_per_rank=world.threads_per_rank,
        reduction=settings.reduction,
        wire=settings.wire,
        error_feedback=settings.error_feedback,
        clip_norm=settings.clip_norm,
        clip_value=settings.clip_value,
        drop_share=settings.drop_share,
    )


def measured(settings: Settings, triggers: Triggers) -> tuple[str, ...]:
    """The names of the numbers that a validation gives."""
    return ("loss", *settings.metrics) if triggers.validate is not None else ()


def make_coordinator(
    settings: Settings,
    manager: ParameterManager,
    triggers: Triggers,
    group_size: GroupSize,
    num_samples: int,
    first_iteration: int,
) -> Coordinator:
    """The coordinator of a training; on rank 0.

    Raises:
        ConfigError: the schedule does not serve, or depends on validations that nobody can foresee.
    """
    groups = [{k: v for k, v in g.items() if k != "params"} for g in settings.param_groups or [{}]]
    total = triggers.total_iterations
    check_schedule(settings.optimizer, groups, settings.schedule, total, measured(settings, triggers))
    learning_rates = LearningRates(settings.optimizer, groups, settings.schedule)
    validate = triggers.validate
    if learning_rates.metric is not None and validate is not None and not validate.is_foreseen:
        raise ConfigError(
            f"the schedule depends on validations, and when they are due cannot be foreseen: validate_every is "
            f"{validate!r}; use iterations(...) or epochs(...)"
        )
    return Coordinator(
        num_samples=num_samples,
        batch_size=settings.batch_size,
        assignment=manager.assignment,
        triggers=triggers,
        group_size=group_size,
        learning_rates=learning_rates,
        balancer=_make_balancer(settings, manager),
        drop_budget=_make_drop_budget(settings),
        first_iteration=first_iteration,
    )


def _make_balancer(settings: Settings, manager: ParameterManager) -> Balancer | None:
    wanted = manager.moves_keep_bits if settings.balance == "auto" else settings.balance
    return Balancer(manager.assignment, manager.world.node_of) if wanted else None


def _make_drop_budget(settings: Settings) -> DropBudget | None:
    if not settings.drop_share:
        return None
    return DropBudget(settings.drop_share, settings.drop_budget_s, settings.drop_warmup)
